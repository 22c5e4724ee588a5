"""DanceGRPO (arXiv 2505.07818): group-relative policy gradients through an SDE sampler.

Where this differs from the paper
1. The log-probability is that of the true Gaussian step, with its own std. The paper's formula is the
   same; several released implementations are not.
2. The objective has no KL term by default, as in the paper's experiments. `objective.kl_weight` adds the
   distance to the model before training, by default that of the model's output, which no sampler enters.
3. The last solver step is deterministic, is never trained, and what it lands on gets decoded: a flow's x0 estimate.
4. `log p_old` is the number the rollout stored. It is never recomputed, and the first update of every
   rollout is refused unless the ratio is 1.
5. Samples of one rollout are shuffled across prompts before they are split into updates.
6. A reward that fails is missing: its sample leaves the group's statistics and the loss.
7. Best-of-N picks within each group, not within whatever stands on one process.
8. Samples whose advantage is 0 (a group of equals) are counted in the loss but not replayed: they move nothing.
9. With `trained_steps.window` the trained steps are neighbours, the only stochastic ones, and the same for every
   sample of a step (MixGRPO, arXiv 2507.21802; Flow-GRPO-Fast); `sampler.plain_solver` and
   `sampler.steps_after_window` make the others cheaper (MixGRPO-Flash).
10. `objective.loss` puts another bound in the place of the clip: see `trainers.objectives.LOSSES`.
11. Evaluation samples with the ODE, on held-out prompts, with a reward that is never trained on, and measures
   the weights that are delivered: the running average, where there is one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from align import guards
from align.config import DanceGRPOConfig
from align.diffusion.kernels import StepTable, step_table
from align.diffusion.rollout import Replayed, Rollout, Tile, reference_output, replay, tiles
from align.diffusion.schedules import compressed, trained_subset, window_at
from align.ledger import clip_nats, trained_step_count
from align.run import Run
from align.types import StepStats, max_or_nan
from trainers.objectives import LOSSES, Steps, Terms, adapt_clip, clip_bounds, gaussian_kl, velocity_distance
from trainers.online import OnlineRun


class DanceGRPO(OnlineRun):
    """Policy gradients through the sampler's own steps; see `OnlineRun` for the arguments."""

    config_type = DanceGRPOConfig
    config: DanceGRPOConfig

    def window(self, step: int) -> range | None:
        """Return the solver steps that training step `step` trains on; None where every sample has its own."""
        trained = self.config.trained_steps
        if trained.window is None:
            return None
        return window_at(
            step, self.config.sampler.solver_steps, trained.window, move=trained.move, every=trained.move_every,
            stride=trained.stride, first=trained.first, seed=self.config.seed,
        )  # fmt: skip

    def table_at(self, step: int) -> StepTable:
        """Return the solver steps of a training step: with a window, only its own are stochastic."""
        sampler, schedule, window = self.config.sampler, self.schedule, self.window(step)
        if window is not None and sampler.steps_after_window is not None:
            schedule = compressed(schedule, window.stop, sampler.steps_after_window)
        return step_table(sampler.kernel, sampler.eta, schedule, stochastic=window)

    @property
    def rollout_options(self) -> dict[str, Any]:
        """Keep trajectories and their log-density, and the means where the loss needs them."""
        objective = self.config.objective
        return {
            "reduction": objective.logprob_reduction, "keep_mean": LOSSES[objective.loss].needs_mean,
            "solver": self.config.sampler.plain_solver,
        }  # fmt: skip

    def prepare(self) -> None:
        """Keep the model before training where the objective looks back at it."""
        if self.config.objective.kl_weight:
            self.policy.keep_reference()

    def moves(self, advantages: np.ndarray) -> np.ndarray:
        """Return which samples are worth a replay: with a KL term, all of them."""
        return np.ones(len(advantages), bool) if self.config.objective.kl_weight else advantages != 0

    def tiles(self, rollout: Rollout, rows: Sequence[int], advantages: Tensor, size: int, of: int) -> Iterator[Tile]:
        """Yield the trained (sample, solver step) pairs, the steps a random subset of each sample's own."""
        config, candidates = self.config, rollout.table.stochastic_steps
        count = len(candidates) if config.trained_steps.window is not None else trained_step_count(
            config.sampler.solver_steps, config.trained_steps.fraction, config.trained_steps.rule
        )  # fmt: skip
        chosen = [trained_subset(candidates, count, *rollout.key, r, "trained") for r in rows]
        yield from tiles(rollout, rows, chosen, advantages, size, total=of * count)

    def terms(self, tile: Tile, rollout: Rollout, run: Run, *, first: bool) -> Terms:
        """Replay a tile and return its losses."""
        objective, table = self.config.objective, rollout.table
        replayed = replay(self.policy, tile, table, objective.logprob_reduction)
        low, high = self.clip_bounds(run)
        std, delta = table.std[tile.step], (table.sigma - table.sigma_next)[tile.step]
        terms = LOSSES[objective.loss].terms(
            Steps(
                replayed.logp, tile.logp, tile.advantage, replayed.mean, tile.mean, tile.x_next,
                std.to(tile.x.device), delta.to(tile.x.device), low, high, objective.dppo_threshold,
            )
        )  # fmt: skip
        # Clipping makes a finite loss of an infinite ratio; times 0 it is not a number, and the update is refused.
        loss, stats = terms.loss + 0 * replayed.logp.detach(), dict(terms.stats)
        if objective.kl_weight:
            distance = self._distance(replayed, tile, table)
            loss, stats["kl_reference"] = loss + objective.kl_weight * distance, distance.detach()
        errors = guards.first_ratio_errors(replayed.logp, tile.logp, std) if first else None
        return Terms(loss, stats, errors)

    def _distance(self, replayed: Replayed, tile: Tile, table: StepTable) -> Tensor:
        """How far each term's model output is from the model before training."""
        reference = reference_output(self.policy, tile, table)
        if self.config.objective.kl_form == "velocity":
            return velocity_distance(replayed.output, reference)
        mean_v, std = (getattr(table, n)[tile.step].to(reference.device) for n in ("mean_v", "std"))
        return gaussian_kl(replayed.output, reference, mean_v, std)

    def before_update(self, run: Run, stats: StepStats, step: int) -> None:
        """Stop all processes when the first ratio is not 1 on one of them; say once where rounding alone is clipped."""
        config = self.config
        nats = math.prod(self.policy.latent_shape) if config.objective.logprob_reduction == "sum" else 1
        clipped = sum(stats.sums.get(f"clip_share_{side}", 0.0) for side in ("low", "high"))
        found = self.world.gather((stats.first_ratio_scaled, stats.first_ratio_error, clipped, stats.count))
        scaled, worst, clips, counts = zip(*found, strict=True)
        guards.require_first_ratio(
            functools.reduce(max_or_nan, scaled), functools.reduce(max_or_nan, worst),
            guards.FIRST_RATIO_TOLERANCE[config.model.dtype] * nats, f"step {step}",
        )  # fmt: skip
        share = sum(clips) / max(1, sum(counts))
        if share > 0.01 and not run.counters.get("rounding_clipped"):
            run.counters["rounding_clipped"] = 1.0
            run.log.warn(
                step, "warning", "rounding",
                f"rounding alone clips {share:.0%} of the terms before any update: set batch.rollout and batch.tile to "
                "the same number, or widen the bound",
            )  # fmt: skip

    def clip_bounds(self, run: Run) -> tuple[float, float]:
        """Return how far ratios may fall and rise in the step at hand."""
        objective = self.config.objective
        return clip_bounds(
            objective.clip_range, objective.clip_range_high, unit=objective.clip_unit,
            reduction=objective.logprob_reduction, dim=math.prod(self.policy.latent_shape),
            scale=run.counters.get("clip_scale", 1.0),
        )  # fmt: skip

    def after_step(self, run: Run, stats: StepStats, step: int) -> dict[str, float]:
        """Return what the clip was in this step; adapt it for the next one where that is asked for."""
        low, high = self.clip_bounds(run)
        loss, target = self.config.objective.loss, self.config.objective.clip_share_target
        if target is not None:
            clipped = stats.mean("clip_share_low") + stats.mean("clip_share_high")
            run.counters["clip_scale"] = adapt_clip(run.counters.get("clip_scale", 1.0), clipped, target)
        window = self.window(step)
        found = {} if window is None else {"window_start": float(window.start)}
        if loss != "dppo":
            found |= {"clip_low": low, "clip_high": high}
        if loss == "clip":
            mean = self.config.objective.logprob_reduction == "mean"
            found["clip_nats"] = high * (math.prod(self.policy.latent_shape) if mean else 1)
        return found

    def ledger(self, table: StepTable | None = None) -> dict[str, float]:
        """Return what one sample costs in denoiser forwards, and the clip range where the loss has it in nats."""
        found = super().ledger(table)
        nats = clip_nats(self.config, int(found["latent_dim"]))
        return found if nats is None else {**found, "clip_range": self.config.objective.clip_range, "clip_nats": nats}
