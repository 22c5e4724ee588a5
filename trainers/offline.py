"""Learning from people's thumbs and pairs of images: Diffusion-KTO (arXiv 2404.04465), Diffusion-DPO (2311.12908).

    rows -> latents, once -> an update's rows -> noised at a level -> errors of model and reference -> loss -> update

No sample is drawn while training, and no reward is trained on.

Where this differs from the papers
1. Flows are trained too: the error is that of the velocity, with a smaller beta.
2. Both losses weigh every noise level alike.
3. Levels are drawn from 250 of the schedule, or the solver's, one in each of `draws` strata; noise and level are a
   function of (seed, step, row, draw), the same for model and reference, and for both images of a pair.
4. KTO's reference point is that of the whole update, over all its tiles and processes, clamped once.
5. Every update has its share of thumbs up and down. Class weights balance the two unless they are given.
6. Latents are the mean of the autoencoder's posterior, not a draw from it.
7. Prompts are never dropped, and there is no guidance in training.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align import guards
from align.checks import require_valid
from align.config import anchored, load_config
from align.diffusion.digits_data import cache_directory
from align.diffusion.families import require_encoding
from align.diffusion.latents import Latents
from align.diffusion.noising import NoisedLatents, draw_level, noised, training_levels
from align.engine import require_engine
from align.errors import ConfigError, DataError
from align.groupstats import Estimate, bootstrap_mean
from align.image_feedback import ImageFeedback, ImageRow, distinct_prompts, fitted
from align.launch import join_world, meeting
from align.offline_checks import offline_ledger
from align.offline_config import OfflineConfig
from align.run import Run, claiming
from align.seeding import normal, permutation
from align.types import StepStats, max_or_nan, merge_stats
from rewards.panel import Panel
from trainers.evaluation import load_policy
from trainers.forward_objectives import matching_error
from trainers.language_measures import auc, auc_interval
from trainers.objectives import Terms
from trainers.offline_objectives import diffusion_dpo, diffusion_kto, gain_sums, reference_point
from trainers.offline_rows import resolve_rows
from trainers.online import config_to_resume, count, describe_model, finish, open_run
from trainers.preference import auto_class_weights
from trainers.preference_data import stratify
from trainers.receipt import Receipt
from trainers.result import RunResult

FIRST_ERROR_TOLERANCE = {"fp32": 1e-6, "bf16": 1e-3}
BETA = {"velocity": 2000.0, "epsilon": 5000.0, "v_prediction": 5000.0}
PROMPTS_AT_ONCE = 256
ERROR_GROWTH = 1.3
"""Warned of beyond it: the digits flow made better samples with 1.15 times the reference's errors, worse with 1.35."""


@dataclass(frozen=True)
class Part:
    """N (row, draw) pairs of an update that go forward together, `[N]`; of pairs both images, the chosen ones first.

    Args:
        rows: numbers of the rows.
        draws: which of its draws each is.
    """

    rows: tuple[int, ...]
    draws: tuple[int, ...]


@dataclass(frozen=True)
class Errors:
    """Matching errors of model and reference, `[N]`, or of pairs `[2 N]`, the chosen ones first."""

    now: Tensor
    reference: Tensor

    @property
    def gain(self) -> Tensor:
        """`l_ref - l`, without gradient."""
        return self.reference - self.now.detach()


class Offline:
    """Learn an image model from thumbs or pairs.

    Args:
        config: an `OfflineConfig`, or a recipe name, a path or a mapping for `load_config`.
        out: the run folder, `runs/<name>` when None. An unfinished run there is resumed.
        overwrite: start again, replacing a run that is there.
        fork: go on with a run that is there under a changed configuration.
        deepspeed: name or file of DeepSpeed settings, to train under ZeRO; see `align.engine`.

    Started by `torchrun` or `deepspeed`, every process builds one of these and does its share.

    Raises:
        DataError: rows or images that cannot be learnt from, each named.
    """

    config: OfflineConfig

    def __init__(
        self,
        config: OfflineConfig | str | Path | Mapping[str, Any],
        *,
        out: str | Path | None = None,
        overwrite: bool = False,
        fork: bool = False,
        deepspeed: str | None = None,
    ) -> None:
        self.config = anchored(config if isinstance(config, OfflineConfig) else load_config(config, kind=OfflineConfig))
        require_valid(self.config)
        require_engine(self.config.trainer, deepspeed)
        self.world, self.deepspeed = join_world(self.config.checkpoint.hung_after_seconds), deepspeed
        self.directory = Path(out or Path("runs") / self.config.name)
        with claiming(self.directory, self.config, self.world, overwrite=overwrite, fork=fork) as self._changed:
            sampler, objective = self.config.sampler, self.config.objective
            self.rows, self.heldout_rows = resolve_rows(self.config)
            shuffled = permutation(len(self.heldout_rows), "measured rows")  # a file may be sorted
            self._measured = [self.heldout_rows.rows[i] for i in sorted(shuffled[: self.config.evaluation.rows])]
            self._require_enough_rows()
            self.heldout = Panel.build(self.config.heldout_rewards)
            self.policy = load_policy(self.config)
            family = self.policy.family
            if family.takes_image or (family.fps is not None and sampler.frames != 1):
                raise ConfigError(
                    "This model makes videos, and only images can be learnt from here", where="model.path",
                    do="Train it with rewards: trainer dance_grpo or forward" if family.takes_image
                    else "Set sampler.frames: 1, or train it with rewards: trainer dance_grpo or forward",
                )  # fmt: skip
            require_encoding(family)
            self.heldout.require_media("image", family.name)
            self.levels = training_levels(
                self.policy, objective.levels, sampler.solver_steps, sampler.shift, objective.draws
            )
            self.beta = objective.beta or BETA[self.levels.prediction]
            self.weights = self._class_weights()
            self._plans: dict[int, np.ndarray] = {}

    @classmethod
    def resume(cls, directory: str | Path, *, deepspeed: str | None = None) -> Offline:
        """Open an earlier run to go on where it stopped.

        Raises:
            ConfigError: no run in that folder.
        """
        return cls(config_to_resume(directory), out=directory, deepspeed=deepspeed)

    @meeting()
    def train(self) -> RunResult:
        """Train to the configured number of steps, or until asked to stop."""
        policy = self.policy
        with self.world.together():
            self._encode()
            policy.keep_reference()
        with self.open_run() as run:
            prompts = distinct_prompts(self.heldout_rows.rows)
            receipt = Receipt(run, policy, prompts, {"heldout": self.heldout}, implicit=self.implicit_accuracy)
            receipt.before()
            for step in run.steps():
                began = time.perf_counter()
                rows = self.rows_at(step)
                run.sitting.see(rows=lambda seen=rows: self._seen(seen, step))  # noqa: B023 (asked within this step)
                run.sitting.at("training")
                stats = self.learn(run, rows, step)
                run.update_average()
                self._watch_errors(stats, run, step)
                metrics = {**self._metrics(rows, run, step), "time/train": time.perf_counter() - began}
                run.commit(step, {**metrics, **receipt.during(step)}, stats)
            return finish(run, receipt)
        return RunResult(self.directory, "stopped", {})

    def open_run(self) -> Run:
        """Return the run in this trainer's folder, resumed where there is a checkpoint."""
        return open_run(
            self.config, self.directory, self.policy, self._record(), float(self.levels.timestep[0]),
            self.rows.rows[0].prompt, world=self.world, deepspeed=self.deepspeed, changed=self._changed,
        )  # fmt: skip

    # Rows

    def rows_at(self, step: int) -> list[int]:
        """Return the rows of training step `step`, counted from 1: a function of (seed, step) and the data.

        An epoch is a new shuffle dealt to whole updates, each with its share of both classes; the few rows that fill
        none are left to later epochs.
        """
        size = self.config.batch_size
        updates = len(self.rows) // size
        epoch, place = divmod(step - 1, updates)
        if epoch not in self._plans:
            labels = np.array([row.label is not False for row in self.rows.rows])
            classes = [found for found in (np.flatnonzero(labels), np.flatnonzero(~labels)) if len(found)]
            plan = stratify(classes, np.zeros(len(labels)), updates, size, self.config.seed, epoch)
            self._plans = {epoch: plan}
        return [int(row) for row in self._plans[epoch][place]]

    def _encode(self) -> None:
        """Encode every image and prompt once, before the first step."""
        self.latents = Latents(self.policy, cache_directory())
        given = [image for row in (*self.rows.rows, *self._measured) for image in row.images]
        self.latents.add([(image.digest, partial(fitted, image)) for image in given], self.world)
        prompts = distinct_prompts([*self.rows.rows, *self.heldout_rows.rows])
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            self.policy.encodings.add(prompts[start : start + PROMPTS_AT_ONCE])

    # Losses

    def learn(self, run: Run, rows: Sequence[int], step: int) -> StepStats:
        """Take the update of a step: its (row, draw) pairs, shared out over processes, in tiles that fit.

        KTO needs its reference point before the first backward pass. Where a process's rows fit at once they go
        forward once; else they go forward twice, the first time without gradient.
        """
        stats, objective = StepStats(), self.config.objective
        pairs = [(j, r) for j in range(objective.draws) for r in rows]
        own = self.world.share(len(pairs))
        fit = self.config.batch.tile or int(run.counters["batch_tile"])
        size = max(1, fit // self._images_a_row)
        tiles = [pairs[start : min(start + size, own.stop)] for start in range(own.start, own.stop, size)]
        parts = [Part(tuple(r for _, r in tile), tuple(j for j, _ in tile)) for tile in tiles]
        first: list[Errors] = []
        point = torch.zeros((), dtype=torch.float64)
        if objective.loss == "kto":
            with torch.set_grad_enabled(len(parts) == 1), run.cut():
                first = [self.errors(part, step) for part in parts]
            point = reference_point(self.world.add(sum(gain_sums(errors.gain) for errors in first)))
        worst = 0.0
        with run.cut():
            for i, part in enumerate(parts):
                errors = first[i] if len(first) == 1 else self.errors(part, step, first[i].reference if first else None)
                worst = max_or_nan(worst, float(errors.gain.abs().max()))
                terms = self.terms(part, errors, point)
                run.sitting.see_tile(rows=part.rows, draws=part.draws, loss=terms.loss.detach(), **terms.stats)
                run.backward(terms.loss.mean(), weight=len(part.rows) / len(pairs))
                count(stats, terms)
        if run.step == 0:
            worst = max(self.world.gather(worst))
            guards.require_reference(worst, FIRST_ERROR_TOLERANCE[self.config.model.dtype], f"step {step}")
            stats.first_ratio_error = worst * self.beta
        run.update(expect_gradient=True)
        forwards = self._images_a_row * len(pairs)
        again = sum(self.world.gather(sum(len(part.rows) for part in parts) if len(first) > 1 else 0))
        run.count(feq=forwards * self._ledger["feq_per_sample"] / objective.draws + again)
        self._point = float(point)
        return merge_stats(self.world.gather(stats))

    def errors(self, part: Part, step: int, reference: Tensor | None = None) -> Errors:
        """Return the errors of model and reference on the images of a part, at the same noises and levels.

        Args:
            reference: what the reference's errors were found to be before.
        """
        rows = [self.rows.rows[r] for r in part.rows]
        keys = [(self.config.seed, step, r, j) for r, j in zip(part.rows, part.draws, strict=True)]
        return self._errors(rows, part.draws, keys, self.config.objective.draws, reference)

    def _errors(
        self, rows: Sequence[ImageRow], draws: Sequence[int], keys: Sequence[tuple[Any, ...]], of: int,
        reference: Tensor | None = None,
    ) -> Errors:  # fmt: skip
        sides = len(rows[0].images)
        level = [draw_level(self.levels, j, of, *key) for j, key in zip(draws, keys, strict=True)]
        noise = torch.stack([normal(self.policy.latent_shape, *key, "noised") for key in keys]).to(self.policy.device)
        x0 = self.latents.stack([row.images[side].digest for side in range(sides) for row in rows])
        tile = noised(x0, torch.cat([noise] * sides), level * sides, self.levels)
        prompts = [row.prompt for row in rows] * sides

        def error(tile: NoisedLatents) -> Tensor:
            return matching_error(self.policy.velocity(tile.x, tile.timestep, prompts), tile.target)

        if reference is None:
            with self.policy.reference():
                reference = error(tile)
        return Errors(error(tile), reference)

    def terms(self, part: Part, errors: Errors, point: Tensor) -> Terms:
        """Return the losses of a part's rows, given KTO's reference point."""
        objective, size = self.config.objective, len(part.rows)
        if objective.loss == "dpo":
            (now_w, now_l), (before_w, before_l) = (v.split(size) for v in (errors.now, errors.reference))
            terms = diffusion_dpo(now_w, before_w, now_l, before_l, beta=self.beta)
        else:
            label = torch.tensor([float(bool(self.rows.rows[r].label)) for r in part.rows], device=errors.now.device)
            terms = diffusion_kto(
                errors.now, errors.reference, label, point, beta=self.beta, weight_D=self.weights[0],
                weight_U=self.weights[1], utility=objective.utility,
            )  # fmt: skip
        found = errors.now.detach().reshape(-1, size).mean(0), errors.gain.reshape(-1, size).mean(0)
        return Terms(terms.loss, {**terms.stats, "matching_error": found[0], "error_gain": found[1]})

    def _seen(self, rows: Sequence[int], step: int) -> list[dict[str, Any]]:
        """Return what an update learns from, for people to read."""
        found = []
        for r in rows:
            row = self.rows.rows[r]
            images = [image.digest for image in row.images]
            found.append({"row": r, "prompt": row.prompt, "label": row.label, "images": images,
                          "seed": [self.config.seed, step, r]})  # fmt: skip
        return found

    # Measures

    @torch.no_grad()
    def implicit_accuracy(self) -> Estimate:
        """Return how often held-out rows are told apart by `l_ref - l`, with an interval by prompts.

        Of pairs the share whose chosen image gained more, of thumbs the chance that one up gained more than one down
        (AUROC). Ties count half. Missing with held-out thumbs of one kind. Every process must call it.
        """
        rows, of = self._measured, min(self.config.evaluation.draws, len(self.levels))
        own, size = self.world.share(len(rows) * of), 16
        mine: list[list[float]] = []
        for start in range(own.start, own.stop, size):
            places = [divmod(i, of) for i in range(start, min(start + size, own.stop))]
            keys = [("heldout", self.config.seed, r, j) for r, j in places]
            found = self._errors([rows[r] for r, _ in places], [j for _, j in places], keys, of)
            mine += found.gain.double().reshape(-1, len(places)).T.tolist()
        gain = np.array([row for part in self.world.gather(mine) for row in part]).reshape(len(rows), of, -1).mean(1)
        prompts = np.array([row.prompt for row in rows])
        if gain.shape[1] == 2:
            difference = gain[:, 0] - gain[:, 1]
            return bootstrap_mean((difference > 0) + 0.5 * (difference == 0), prompts)
        up = np.array([bool(row.label) for row in rows])
        value = auc(gain[:, 0], up)
        return Estimate(value, *auc_interval(gain[:, 0], up, prompts), len(rows) if np.isfinite(value) else 0)

    def _watch_errors(self, stats: StepStats, run: Run, step: int) -> None:
        """Warn once when images of both kinds have become much less likely: samples then fall apart."""
        now = stats.mean("matching_error")
        before = now + stats.mean("error_gain")
        if now > ERROR_GROWTH * before and not run.counters.get("warned/errors"):
            run.counters["warned/errors"] = 1.0
            run.log.warn(
                step, "warning", "errors_grow",
                f"the error on the rows' images is {now / before:.2f} times the reference's: the loss falls because "
                "disliked images become unlikely, and all others with them; raise objective.beta or lower optimizer.lr",
            )  # fmt: skip

    def _metrics(self, rows: Sequence[int], run: Run, step: int) -> dict[str, float]:
        images = len(rows) * self._images_a_row
        before = run.counters.get("feq_logged", 0.0)
        run.counters["feq_logged"] = run.counters["feq"]
        found = {
            "samples": images,
            "epoch": step / (len(self.rows) // self.config.batch_size),
            "feq": run.counters["feq"] - before,
            "feq_total": run.counters["feq"],
            "feq_per_sample": self._ledger["feq_per_sample"],
        }
        if self.config.objective.loss == "kto":
            up = [bool(self.rows.rows[r].label) for r in rows]
            found |= {"z": self._point, "share_up": sum(up) / len(up)}
        return found

    # What it starts from

    @property
    def _images_a_row(self) -> int:
        return 2 if self.config.objective.loss == "dpo" else 1

    @property
    def _ledger(self) -> dict[str, float | int]:
        return offline_ledger(self.config)

    def _require_enough_rows(self) -> None:
        count, size = len(self.rows), self.config.batch_size
        if count < size:
            raise DataError(
                "There are fewer rows than one update takes", where=self.rows.source, why=f"{count}, batch_size {size}",
                do="Lower batch_size, or add rows",
            )  # fmt: skip
        if size * self.config.objective.draws < self.world.size:
            raise ConfigError(
                f"{self.world.size} processes have only {size} rows an update to share", where="batch_size",
                do="Start fewer processes, or raise it",
            )  # fmt: skip

    def _class_weights(self) -> tuple[float, float]:
        objective, counts = self.config.objective, self.rows.counts()
        if objective.loss == "dpo":
            return 1.0, 1.0
        return auto_class_weights(
            counts["up"], counts["down"], weight_D=objective.weight_desirable, weight_U=objective.weight_undesirable,
            ratio=objective.weight_ratio,
        )  # fmt: skip

    def _record(self) -> dict[str, Any]:
        def described(rows: ImageFeedback) -> dict[str, Any]:
            return {"rows": len(rows), **rows.counts(), "prompts": len(distinct_prompts(rows.rows))}

        found = {
            "model": describe_model(self.policy, self.config),
            "data": {"training": described(self.rows), "heldout": described(self.heldout_rows)},
            "beta": self.beta,
            "class_weights": list(self.weights),
            "ledger": {**self._ledger, "latent_dim": int(np.prod(self.policy.latent_shape))},
        }
        return {**found, "heldout_rewards": self.heldout.describe()} if self.heldout else found
