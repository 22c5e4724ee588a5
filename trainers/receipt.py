"""What a visual run hands over beside the weights: evaluations, sample grids, alarms and the summary."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align import guards
from align.diffusion.policy import Policy, resolve_model
from align.groupstats import Estimate
from align.run import Run, peak_memory_mb
from align.sparsity.live import live_source
from align.sparsity.sources import Source
from align.tracking import counting, read_jsonl, save_grid
from align.types import Prompt, text_of
from align.videos import STRIP_WIDTH, save_video, still_images
from rewards.panel import Panel
from trainers.evaluation import Measurement, generate, measure, members_for, read_rows, write_rows
from trainers.monitor import Monitor, Verdict, last_said
from trainers.sparsity import end_with_receipt, open_tracker

GRID_PROMPTS, GRID_MEMBERS = 8, 6  # of a video, one member


class Receipt:
    """Measures a run from outside: before, during and after training.

    Args:
        run: the run, whose log it writes to.
        policy: the model in training.
        prompts: held-out prompts.
        panels: "reward" (trained on) and "heldout" (never trained on).
        implicit: measures how often the model tells held-out rows apart, a chance of .5 before training; it stands in
            for a held-out reward where there is no panel.
    """

    def __init__(
        self,
        run: Run,
        policy: Policy,
        prompts: Sequence[Prompt],
        panels: Mapping[str, Panel],
        implicit: Callable[[], Estimate] | None = None,
        optimised: bool = True,
    ) -> None:
        self.run, self.config, self.prompts = run, run.config, list(prompts)
        self.policy = policy.with_guidance(self.config.evaluation.guidance_scale)
        self.panels = {name: panel for name, panel in panels.items() if panel}
        self.heldout = next((name for name in ("heldout", "reward") if name in self.panels), "")
        self._implicit, self._learnt = implicit, Estimate(0.5, 0.5, 0.5, 0)
        self._sampler: dict[str, Any] = {
            "seed": self.config.seed,
            "solver_steps": self.config.evaluation.solver_steps,
            "shift": self.config.sampler.shift,
        }
        self._base: Measurement | None = None
        self._verdict: Verdict | None = None
        self._watches = optimised and "reward" in self.panels and self.config.monitor.action != "off"

    @property
    def base_path(self) -> Path:
        """Where the scores of every sample of the untrained model are kept."""
        return self.run.directory / "evaluations" / "step_000000.jsonl"

    def before(self) -> None:
        """Measure the untrained model, unless a resumed run has done so."""
        if self.run.step == 0:
            self._base = self._evaluate(0, self.config.evaluation.final_samples)
            if self.run.world.leads:
                write_rows(self.base_path, self._base)
            self._grid(0)
        else:
            self._base = read_rows(self.base_path)
        run = self.run
        if run.world.leads:
            run.watch = open_tracker(self.config.sparsity, self._model_folder, self._weights, run.log, run.step)

    def _model_folder(self) -> Path:
        """Return the folder of the denoiser before training."""
        return resolve_model(self.config.model.path) / self.policy.family.component

    def _weights(self) -> Source:
        """Return the trained weights as they stand, of which adapters are told by their names."""
        return live_source(self.policy.trainable(), {"lora_alpha": self.config.model.lora.alpha})

    def during(self, step: int) -> dict[str, float]:
        """Evaluate and draw when due; have the run stop when the monitor says that the reward is hacked."""
        began, found = time.perf_counter(), {}
        evaluation, last = self.config.evaluation, step == self.config.steps
        if evaluation.every and step % evaluation.every == 0 and not last:
            now = self._evaluate(step, evaluation.samples)
            heldout = now.estimate(self.heldout) if self.heldout else self._learnt
            found = {"diversity": now.diversity, "heldout": heldout.mean}
            self._watch(step, now)
        if self.config.tracking.samples_every and (step % self.config.tracking.samples_every == 0 or last):
            self._grid(step)
        return {**found, "time/log": time.perf_counter() - began}

    def after(self) -> dict[str, Any]:
        """Measure the trained model on the base model's prompts and noises and write `summary.json`.

        Every process takes part in measuring; the first one returns the summary.
        """
        step = self.run.step
        base, final = self._base, self._evaluate(step, self.config.evaluation.final_samples)
        if not self.run.sitting.hacked:
            self._watch(step, final)
        if not self.run.world.leads:
            return {}
        write_rows(self.run.directory / "evaluations" / f"step_{step:06d}.jsonl", final)
        rows = self.run.log.read_metrics()
        first = [row for row in read_jsonl(self.run.directory / "evaluation.jsonl")[0] if row["step"] == 0][-1]
        summary = {
            "name": self.config.name,
            "steps": step,
            "status": self.run.outcome,
            "monitor": self._monitored(),
            **self._changes(base, final),
            **{f"{key}_before": first[key] for key in ("heldout_accuracy", "diversity") if key in first},
            **{f"{key}_after": value for key, value in self._facts(final).items() if key in first},
            "first_ratio_error_max": max((row["first_ratio_error"] for row in rows), default=None),
            "feq_per_sample": rows[-1]["feq_per_sample"] if rows else None,
            "cpu_seconds": self.run.cpu_seconds(),
            "seconds": self.run.seconds(),
            "peak_memory_mb": peak_memory_mb(),
            "sparsity": end_with_receipt(
                self.run.directory, self._model_folder, rows, config=self.config, log=self.run.log
            ),
        }
        path = self.run.directory / "summary.json"
        path.write_text(json.dumps(summary, indent=1), encoding="utf-8")
        return summary

    def _changes(self, base: Measurement, final: Measurement) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in dict.fromkeys((*self.panels, "heldout")):
            source = name if name in self.panels else self.heldout
            if source:
                found[f"{name}_before"] = base.estimate(source).as_dict()
                found[f"{name}_after"] = final.estimate(source).as_dict()
                if name == "heldout":
                    found["heldout_gain"] = final.gain(base, source).as_dict()
        if self._implicit is not None:
            chance = {"mean": 0.5, "ci_low": 0.5, "ci_high": 0.5, "n": self._learnt.n}
            ends = ("mean", "ci_low", "ci_high")
            gain = {**{end: getattr(self._learnt, end) - 0.5 for end in ends}, "n": self._learnt.n}
            for name in ("implicit", *(() if self.heldout else ("heldout",))):
                found |= {f"{name}_before": chance, f"{name}_after": self._learnt.as_dict(), f"{name}_gain": gain}
            if not self.heldout:
                found["heldout_measure"] = "Held-out accuracy of the implicit reward"
        return found

    def _facts(self, measured: Measurement) -> dict[str, float]:
        accuracy = measured.extras.get(f"{self.heldout}/accuracy")
        found = {"diversity": measured.diversity}
        return found if accuracy is None else {**found, "heldout_accuracy": float(np.nanmean(accuracy))}

    def _evaluate(self, step: int, samples: int) -> Measurement:
        members = members_for(samples, len(self.prompts))
        self.run.sitting.at("evaluation")
        with self.run.delivered(), self.run.cut():
            tell = counting(f"evaluated at step {step}", silent=not self.run.world.leads)
            measured = measure(
                self.policy, self.prompts, members, self.panels, world=self.run.world, tell=tell, **self._sampler
            )
            if self._implicit is not None and step:
                self._learnt = self._implicit()
        scored = {"heldout": self.heldout, "reward": "reward"}
        row = {
            "step": step,
            "sampler": f"ode, {self._sampler['solver_steps']} steps",
            "n": len(measured.prompts),
            "prompts": len(self.prompts),
            **{key: measured.estimate(name).as_dict() for key, name in scored.items() if name in self.panels},
            **({} if self._implicit is None else {"implicit": self._learnt.as_dict()}),
            "components": {name: measured.estimate(name).as_dict() for name in measured.values if "/" in name},
            **self._facts(measured),
            **self._observed(step, measured),
            "meters": {
                name.removeprefix("meter/"): float(np.nanmean(value))
                for name, value in measured.extras.items()
                if name.startswith("meter/") and np.isfinite(value).any()
            },
            "seconds": measured.seconds,
        }
        self.run.log.evaluation(row)
        return measured

    def _observed(self, step: int, now: Measurement) -> dict[str, Any]:
        """Return what the hack monitor sees in an evaluation, and keep its verdict."""
        if self._base is None or not self._watches:
            return {}
        if self.run.sitting.hacked and self._verdict is not None:
            return {"monitor": self._verdict.as_dict()}  # the row of the step that stopped the run says why
        judge = "heldout" if "heldout" in self.panels else None
        before = Monitor(
            self.config.monitor, now.prompts, now.before(self._base, "reward"),
            None if judge is None else now.before(self._base, judge),
        )  # fmt: skip
        self._verdict = before.observe(step, now.values["reward"], None if judge is None else now.values[judge])
        return {"monitor": self._verdict.as_dict()}

    def _monitored(self) -> dict[str, Any] | None:
        """Return what the summary says of the hack monitor; None where it does not watch."""
        if not self._watches:
            return None
        return last_said(read_jsonl(self.run.directory / "evaluation.jsonl")[0], self.config.monitor.action)

    def _watch(self, step: int, now: Measurement) -> None:
        """Raise the monitor's alarm, have the run stop where it is to, and warn of what left its range."""
        verdict = self._verdict
        if verdict is not None and verdict.blind and not self.run.counters.get("warned/monitor"):
            self.run.counters["warned/monitor"] = 1.0
            self.run.log.warn(step, "warning", "monitor", f"The hack monitor sees nothing: {verdict.blind}")
        if verdict is not None and verdict.hacked:
            self.run.alarm(step, "drift", verdict.message, stop=verdict.stops)
        trained = [name for name in now.values if name.startswith("reward/")]
        watched = [(name, "saturation", guards.saturated) for name in trained]
        watched += [
            (name, "meter", guards.repeated if name == "meter/distance" else guards.displaced)
            for name in now.extras
            if name.startswith("meter/")
        ]
        for name, code, check in watched:
            message = check(now.column(name), self._base.column(name))
            if message and not self.run.counters.get(f"warned/{name}"):
                self.run.counters[f"warned/{name}"] = 1.0  # once a run
                self.run.log.warn(step, "warning", code, f"{name.partition('/')[2]}: {message}")

    def _grid(self, step: int) -> None:
        prompts, columns = self.prompts[:GRID_PROMPTS], GRID_MEMBERS if self.policy.family.fps is None else 1
        with self.run.delivered(), self.run.cut():
            if not self.run.world.leads:
                return
            made = generate(self.policy, prompts, columns, **self._sampler)
        folder = self.run.directory / "samples"
        folder.mkdir(exist_ok=True)
        labels = [text_of(prompt) for prompt in prompts]
        longest = 256 if made.videos is None else STRIP_WIDTH
        save_grid(folder / f"step_{step:06d}.png", still_images(made), columns=columns, labels=labels, longest=longest)
        for i, video in enumerate(made.videos or ()):
            save_video(folder / f"step_{step:06d}_{i:02d}.mp4", video)
        names = folder / "prompts.json"
        if not names.is_file():
            names.write_text(json.dumps({"prompts": labels, "columns": columns}), encoding="utf-8")
