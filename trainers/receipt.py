"""What a visual run hands over beside the weights: evaluations, sample grids, alarms and the summary."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align import guards
from align.diffusion.policy import Policy
from align.run import Run, peak_memory_mb
from align.tracking import read_jsonl, save_grid
from align.types import Prompt, text_of
from align.videos import STRIP_WIDTH, save_video, still_images
from rewards.panel import Panel
from trainers.evaluation import Measurement, generate, measure, members_for, read_rows, write_rows

GRID_PROMPTS, GRID_MEMBERS = 8, 6  # of a video, one member


class Receipt:
    """Measures a run from outside: before, during and after training.

    Args:
        run: the run, whose log it writes to.
        policy: the model in training.
        prompts: held-out prompts.
        panels: "reward" (trained on) and "heldout" (never trained on).
    """

    def __init__(self, run: Run, policy: Policy, prompts: Sequence[Prompt], panels: Mapping[str, Panel]) -> None:
        self.run, self.config, self.prompts = run, run.config, list(prompts)
        self.policy = policy.with_guidance(self.config.evaluation.guidance_scale)
        self.panels = {name: panel for name, panel in panels.items() if panel}
        self.heldout = "heldout" if "heldout" in self.panels else "reward"
        self._sampler: dict[str, Any] = {
            "seed": self.config.seed,
            "solver_steps": self.config.evaluation.solver_steps,
            "shift": self.config.sampler.shift,
        }
        self._base: Measurement | None = None

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

    def during(self, step: int) -> dict[str, float]:
        """Evaluate and draw when due; raise the drift alarm when the rewards part ways."""
        began, found = time.perf_counter(), {}
        evaluation, last = self.config.evaluation, step == self.config.steps
        if evaluation.every and step % evaluation.every == 0 and not last:
            now = self._evaluate(step, evaluation.samples)
            found = {"diversity": now.diversity, "heldout": now.estimate(self.heldout).mean}
            self._watch(step, now)
        if self.config.tracking.samples_every and (step % self.config.tracking.samples_every == 0 or last):
            self._grid(step)
        return {**found, "time/log": time.perf_counter() - began}

    def after(self) -> dict[str, Any]:
        """Measure the trained model on the base model's prompts and noises and write `summary.json`.

        Every process takes part in measuring; the first one returns the summary.
        """
        base, final = self._base, self._evaluate(self.config.steps, self.config.evaluation.final_samples)
        if not self.run.world.leads:
            return {}
        write_rows(self.run.directory / "evaluations" / f"step_{self.config.steps:06d}.jsonl", final)
        self._watch(self.config.steps, final)
        rows = self.run.log.read_metrics()
        first = [row for row in read_jsonl(self.run.directory / "evaluation.jsonl")[0] if row["step"] == 0][-1]
        summary = {
            "name": self.config.name,
            "steps": self.config.steps,
            "reward_before": base.estimate("reward").as_dict(),
            "reward_after": final.estimate("reward").as_dict(),
            "heldout_before": base.estimate(self.heldout).as_dict(),
            "heldout_after": final.estimate(self.heldout).as_dict(),
            "heldout_gain": final.gain(base, self.heldout).as_dict(),
            **{f"{key}_before": first[key] for key in ("heldout_accuracy", "diversity") if key in first},
            **{f"{key}_after": value for key, value in self._facts(final).items() if key in first},
            "first_ratio_error_max": max((row["first_ratio_error"] for row in rows), default=None),
            "feq_per_sample": rows[-1]["feq_per_sample"] if rows else None,
            "cpu_seconds": self.run.cpu_seconds(),
            "seconds": self.run.seconds(),
            "peak_memory_mb": peak_memory_mb(),
        }
        path = self.run.directory / "summary.json"
        path.write_text(json.dumps(summary, indent=1), encoding="utf-8")
        return summary

    def _facts(self, measured: Measurement) -> dict[str, float]:
        accuracy = measured.extras.get(f"{self.heldout}/accuracy")
        found = {"diversity": measured.diversity}
        return found if accuracy is None else {**found, "heldout_accuracy": float(np.nanmean(accuracy))}

    def _evaluate(self, step: int, samples: int) -> Measurement:
        members = members_for(samples, len(self.prompts))
        with self.run.delivered():
            measured = measure(self.policy, self.prompts, members, self.panels, world=self.run.world, **self._sampler)
        row = {
            "step": step,
            "sampler": f"ode, {self._sampler['solver_steps']} steps",
            "n": len(measured.prompts),
            "heldout": measured.estimate(self.heldout).as_dict(),
            "reward": measured.estimate("reward").as_dict(),
            "components": {name: measured.estimate(name).as_dict() for name in measured.values if "/" in name},
            **self._facts(measured),
            "meters": {
                name.removeprefix("meter/"): float(np.nanmean(value))
                for name, value in measured.extras.items()
                if name.startswith("meter/") and np.isfinite(value).any()
            },
            "seconds": measured.seconds,
        }
        self.run.log.evaluation(row)
        return measured

    def _watch(self, step: int, now: Measurement) -> None:
        gain = now.gain(self._base, "reward")
        verdict = guards.drift(gain.mean, now.gain(self._base, self.heldout))
        if verdict.hacked:
            self.run.log.warn(step, "alarm", "drift", verdict.message)
        trained = [name for name in now.values if name.startswith("reward/")]
        watched = [(name, "saturation", guards.saturated) for name in trained]
        watched += [(name, "meter", guards.displaced) for name in now.extras if name.startswith("meter/")]
        for name, code, check in watched:
            message = check(now.column(name), self._base.column(name))
            if message and not self.run.counters.get(f"warned/{name}"):
                self.run.counters[f"warned/{name}"] = 1.0  # once a run
                self.run.log.warn(step, "warning", code, f"{name.partition('/')[2]}: {message}")

    def _grid(self, step: int) -> None:
        if not self.run.world.leads:
            return
        prompts, columns = self.prompts[:GRID_PROMPTS], GRID_MEMBERS if self.policy.family.fps is None else 1
        with self.run.delivered():
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
