"""One sitting of a language run: what its steps measured, the log, how it ended."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from align import checkpoint, launch, stops
from align.run import describe_machine, peak_memory_mb
from align.sitting import Sitting
from align.tracking import Progress, RunLog, read_jsonl
from trainers.language_measures import LanguageEvaluation, one_class_share, update_metrics
from trainers.language_model import weights_folder
from trainers.language_objective import Online, RowLosses
from trainers.monitor import last_said
from trainers.result import RunResult
from trainers.sparsity import end_with_receipt

if TYPE_CHECKING:
    from trainers.language import LanguageRun


@dataclass
class Session:
    """One sitting of a run: the log, what the steps measured, how it ended.

    `save` writes the checkpoint of the step that is committed; all processes call it.
    """

    run: LanguageRun
    log: RunLog
    saved: dict[str, Any] | None
    began: float
    step: int = 0
    evaluation: LanguageEvaluation | None = None
    save: Callable[[], None] | None = None
    _heeded: int = -1
    _measures: list[dict[str, np.ndarray]] = field(default_factory=list)
    _loss: float = 0.0
    _real: list[int] = field(default_factory=lambda: [0, 0])

    @property
    def directory(self) -> Path:
        """The run folder."""
        return self.run.directory

    def __enter__(self) -> Session:
        run, saved = self.run, self.saved or {}
        self.step = int(saved.get("step", 0))
        self.counters: dict[str, float] = dict(saved.get("counters", {}))
        if saved:
            run.objective.restore(saved["objective"])
        self._objective = copy.deepcopy(run.objective.state())
        self.log.truncate_after(self.step if saved or (self.directory / "metrics.jsonl").is_file() else -1)
        for key, old, new in run._changed:
            self.log.warn(self.step, "note", "fork", f"from here on {key} is {new!r}; it was {old!r}")
        for finding in run.findings:
            if not saved and finding.level == "warning":
                self.log.warn(0, "warning", finding.code, f"{finding.message}. {finding.do}")
        if not saved:
            for message in run.about.get("warnings", ()):
                self.log.warn(0, "warning", "data", message)
        self.sitting = Sitting(self.directory, run.config, run.world, self.log, self._keep_committed)
        self.sitting.enter()
        self._mark = (time.perf_counter(), time.process_time())
        self._elapsed = (self.counters.get("seconds", 0.0), self.counters.get("cpu_seconds", 0.0))
        self.progress = Progress(run.steps, initial=self.step, silent=not run.world.leads)
        self.progress.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        self.progress.__exit__(kind, error, trace)
        try:
            return self.sitting.leave(error)
        finally:
            shutil.rmtree(self.directory / "checkpoints" / ".staging", ignore_errors=True)

    def _keep_committed(self) -> None:
        """Save the last committed step where the disk does not hold it: until the next one, memory does."""
        here = self.step in checkpoint.checkpoints(self.directory / "checkpoints")
        if self.step and self.save is not None and not any(self.run.world.gather(here)):
            self.save()

    def region(self) -> Any:
        """Let a stop that is due abandon the block: anywhere in one process; several meet in the Trainer's own places,
        so they abandon it where all of them check."""
        alone = self.run.world.size == 1 and self.run.deepspeed is None
        return stops.region("cut" if alone else "meetings")

    def before(self) -> None:
        """Write the run's record, and measure the model before training."""
        run = self.run
        model = run_model(self.evaluation)
        self.sitting.begin(
            run.steps, run.engine, launcher=launch.started_by(), reference=run.reference,
            model={"path": run.config.model.path, "train": run.config.model.train, **model}, **run.about,
            **describe_machine(),
        )  # fmt: skip
        self.sitting.at("evaluation")
        self.evaluation.before(self.step)
        self._heed(self.step)

    def collect(self, found: RowLosses, inputs: Mapping[str, Any]) -> None:
        """Keep what a microbatch measured until its step is logged."""
        self._loss += float(found.loss.detach())
        self._measures.append({name: v.detach().float().cpu().numpy() for name, v in found.measures.items()})
        mask = inputs["sequences"]["attention_mask"] if found.mask is None else found.mask
        self._real[0] += int(mask.sum())
        self._real[1] += mask.numel()

    def commit(self, step: int, numbers: Mapping[str, float]) -> str:
        """Bring state up to date after an optimizer step and log it; return why to stop, if so. All together."""
        run = self.run
        parts = run.world.gather((self._loss, self._measures, self._real))
        rows = [measure for _, measures, _ in parts for measure in measures]
        merged = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]} if rows else {}
        state = run.objective.finish(run.world)
        now, cpu = time.perf_counter(), time.process_time()
        self.step = step
        row = {
            "step": step, "loss": sum(loss for loss, _, _ in parts), **numbers, **update_metrics(merged), **state,
            **one_class_share([measures for _, measures, _ in parts]),
            "epoch": step * run.accumulation / run.per_epoch,
            "real_token_share": sum(r[0] for *_, r in parts) / max(1, sum(r[1] for *_, r in parts)),
            "seconds": now - self._mark[0], "cpu_seconds": cpu - self._mark[1],
            "seconds_total": self._elapsed[0] + now - self.began, "cpu_seconds_total": self._elapsed[1] + cpu,
            "peak_memory_mb": peak_memory_mb(),
        }  # fmt: skip
        self._measures, self._loss, self._real = [], 0.0, [0, 0]
        self._mark = (now, cpu)
        self.counters["seconds"], self.counters["cpu_seconds"] = row["seconds_total"], row["cpu_seconds_total"]
        self._objective = copy.deepcopy(run.objective.state())
        self.log.metrics(row)
        self.progress.update(row)
        self.sitting.at("evaluation")
        with self.region():
            self.evaluation.during(step)
        self._heed(step)
        return self.sitting.agree_to_stop()

    def _heed(self, step: int) -> None:
        """Say what the hack monitor found at the evaluation of this step, and have the run stop where it is to."""
        verdict = cast(Online, self.run.objective).verdict if self.run.objective.online else None
        if verdict is None or verdict.step != step or self._heeded == step:
            return
        if verdict.blind and not self.counters.get("warned/monitor"):
            self.counters["warned/monitor"] = 1.0  # once a run
            self.log.warn(step, "warning", "monitor", f"The hack monitor sees nothing: {verdict.blind}")
        self._heeded = step
        if not verdict.hacked:
            return
        self.log.warn(step, "alarm", "drift", verdict.message)
        self.progress.say(f"step {step}: {verdict.message}")
        if verdict.stops:
            self.sitting.hacked = verdict.message

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps beside the Trainer's files."""
        run = self.run
        return {
            "step": self.step, "objective": self._objective, "counters": self.counters,
            "config": run.config.model_dump(mode="json"), "engine": run.engine, "processes": run.world.size,
            "hacked": self.sitting.hacked,
        }  # fmt: skip

    def after(self) -> RunResult:
        """Measure the trained model and write the summary; or say that the run was stopped."""
        if self.sitting.stopping not in ("", "monitor") and self.step < self.run.steps:
            self.sitting.finish("stopped")
            return RunResult(self.directory, "stopped", {})
        self.sitting.at("evaluation")
        with self.region():
            summary = self.evaluation.after(self.step)
        self._heed(self.step)
        status, run = "hacked" if self.sitting.hacked else "complete", self.run
        if run.objective.online:
            rows = read_jsonl(self.directory / "evaluation.jsonl")[0]
            summary["monitor"] = last_said(rows, run.config.monitor.action)
        summary |= {"status": status, **{key: self.counters.get(key) for key in ("cpu_seconds", "seconds")}}
        if run.world.leads:
            summary["sparsity"] = end_with_receipt(
                self.directory, lambda: weights_folder(run.config.model.path), self.log.read_metrics(),
                config=run.config, log=self.log,
            )  # fmt: skip
            path = self.directory / "summary.json"
            path.write_text(json.dumps(summary, indent=1), encoding="utf-8")
        self.sitting.finish(status)
        return RunResult(self.directory, status, summary)


def run_model(evaluation: LanguageEvaluation | None) -> dict[str, int]:
    """Return the number of weights and of those that train."""
    weights = list(evaluation.models.plain.parameters()) if evaluation is not None else []
    sizes = [(int(getattr(p, "ds_numel", p.numel())), p.requires_grad) for p in weights]  # whole ones, under ZeRO 3
    return {"parameters": sum(n for n, _ in sizes), "trained_parameters": sum(n for n, trains in sizes if trains)}
