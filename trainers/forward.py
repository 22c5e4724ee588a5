"""Learning from clean samples: DiffusionNFT (arXiv 2509.16117), AWM (2509.25050) and DGPO (2510.08425).

With `loss: supervised`, given images stand in the place of samples; rewards are measured on them, not trained on.

A sample is noised again to a few levels, and what the model says there is moved. No trajectory is kept, any solver
will do, and a step costs `draws` model calls a sample rather than one for each trained solver step.

Where this differs from the papers
1. Levels are drawn one in each of `draws` strata of the schedule, as a function of the sample (dgpo: of the group).
2. Diffusion models that predict noise or v are trained too: every formula is one of x0_hat, which is linear in what
   the model says.
3. The old policy's output is not computed where it is the current one: before the first update of a step with
   `old_policy: step`.
4. A group's weight in dgpo counts the members that were scored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.averaging import Average
from align.diffusion.kernels import StepTable, step_table
from align.diffusion.noising import draw_level, noised, training_levels
from align.diffusion.rollout import Rollout
from align.errors import ConfigError
from align.forward_config import ForwardConfig
from align.prompts import PromptSet
from align.run import Run
from align.seeding import normal
from align.types import Advantages, Prompt, StepStats
from rewards.compose import Composed
from trainers.forward_objectives import (
    awm,
    dgpo,
    dgpo_group_weight,
    matching_error,
    nft,
    old_policy_decay,
    optimality,
    supervised,
    x0_estimate,
)
from trainers.given import GivenImages, liked_images
from trainers.objectives import Terms, velocity_distance
from trainers.online import OnlineRun


@dataclass(frozen=True)
class Noised:
    """N (sample, draw) rows: clean latents, noised to a level.

    Args:
        row, draw: `[N]`, the sample's place, and which of its draws.
        x0, x, timestep, sigma, x0_x, x0_v, target: see `NoisedLatents`.
    """

    prompts: list[Prompt]
    row: Tensor
    draw: Tensor
    x0: Tensor
    x: Tensor
    timestep: Tensor
    sigma: Tensor
    x0_x: Tensor
    x0_v: Tensor
    target: Tensor
    advantage: Tensor
    share: float


class Forward(OnlineRun):
    """Train on noised samples; see `OnlineRun` for the arguments."""

    config_type = ForwardConfig
    config: ForwardConfig

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config, **options)
        sampler, objective = self.config.sampler, self.config.objective
        self.levels = training_levels(
            self.policy, objective.levels, sampler.solver_steps, sampler.shift, objective.draws
        )
        self._old: Average | None = None
        self._given: GivenImages | None
        self._weights: dict[tuple[int, int], float] = {}

    @property
    def optimises_rewards(self) -> bool:
        """Whether rewards are trained on: not where images are given."""
        return self.config.objective.loss != "supervised"

    def require_data(self) -> None:
        """Read the given images, where these are learnt from."""
        objective, self._given = self.config.objective, None
        if objective.loss == "supervised":
            images = liked_images(objective.images, self.config.model.path)
            self._given = GivenImages(images, self.prompts.prompts, objective.images)

    def rollout(self, prompts: PromptSet, step: int, batch: int, deliver: Any) -> Rollout:
        """Return samples of the old policy, or given images."""
        if self._given is None:
            return super().rollout(prompts, step, batch, deliver)
        config = self.config
        return self._given.rollout(
            self.policy,
            prompts.prompts,
            config.group_size,
            self.table_at(step),
            (config.seed, step),
            self.world,
            deliver,
        )

    def ledger(self, table: StepTable | None = None) -> dict[str, float]:
        """Return what one sample costs; given images are not sampled."""
        return super().ledger(table if self._given is None else None)

    def table_at(self, step: int) -> StepTable:
        """Return the solver steps of a rollout, which is the same in every training step."""
        return step_table(self.config.sampler.kernel, self.config.sampler.eta, self.schedule)

    @property
    def rollout_options(self) -> dict[str, Any]:
        """Keep final latents alone."""
        return {"reduction": None, "solver": self.config.sampler.plain_solver}

    def prepare(self) -> None:
        """Keep the model before training where the objective looks back at it."""
        if self.config.objective.kl_weight or self.config.objective.loss == "dgpo":
            self.policy.keep_reference()
        if self._given is not None:
            self._given.encode(self.policy, self.world)

    def kept(self) -> dict[str, Average]:
        """Return the old policy's weights, where it samples."""
        if self._given is not None:
            return {}
        self._old = Average(self.policy.trainable(), 0.0)
        return {"old_policy": self._old}

    def sampling_weights(self) -> contextlib.AbstractContextManager[None]:
        """Sample with the old policy."""
        return contextlib.nullcontext() if self._old is None else self._old.applied()

    def after_step(self, run: Run, stats: StepStats, step: int) -> dict[str, float]:
        """Let the old policy follow."""
        if self._old is None:
            return {}
        decay = old_policy_decay(self.config.objective.old_policy, step)
        self._old.update(decay)
        return {"old_policy_decay": decay}

    def moves(self, advantages: np.ndarray) -> np.ndarray:
        """Return which samples are worth a replay: NFT's and a KL term's all move something."""
        objective = self.config.objective
        everything = objective.loss == "nft" or objective.kl_weight
        return np.ones(len(advantages), bool) if everything else advantages != 0

    def advantages_of(self, composed: Composed) -> Advantages:
        """Return group advantages; with labels as feedback, the rewards themselves, from -1 to 1; of given images 1."""
        if self._given is not None:
            shape = (-1, self.config.group_size)
            ones = np.ones(len(composed.scores.values)).reshape(shape)
            return Advantages(ones, np.ones(ones.shape, bool))
        if self.config.objective.loss != "nft" or self.config.objective.nft_feedback != "label":
            return super().advantages_of(composed)
        total = np.asarray(composed.scores.values, dtype=float) @ np.asarray(composed.weights, dtype=float)
        kept = composed.scores.valid.all(1)
        if kept.any() and not (total[kept].min() >= 0 and total[kept].max() <= 1):
            raise ConfigError(
                "A label is not from 0 to 1", where="objective.nft_feedback",
                why=f"rewards add up to {total[kept].min():.3g} .. {total[kept].max():.3g}",
                do="Train on thumbs, a threshold or a sigmoid transform, with weights that add up to 1",
            )  # fmt: skip
        shape = (-1, self.config.group_size)
        return Advantages(np.where(kept, 2 * total - 1, 0.0).reshape(shape), kept.reshape(shape))

    # Tiles

    def tiles(self, rollout: Rollout, rows: Sequence[int], advantages: Tensor, size: int, of: int) -> Iterator[Noised]:
        """Yield the (sample, draw) pairs, draw by draw."""
        draws = self.config.objective.draws
        pairs = [(j, r) for j in range(draws) for r in rows]
        for start in range(0, len(pairs), size):
            part = pairs[start : start + size]
            yield self._noised(rollout, part, advantages, len(part) / (of * draws))

    def _noised(self, rollout: Rollout, pairs: Sequence[tuple[int, int]], advantages: Tensor, share: float) -> Noised:
        device, draws, shared = rollout.x.device, self.config.objective.draws, self.config.objective.loss == "dgpo"
        keys = [(*rollout.key, r // rollout.group_size if shared else r, j) for j, r in pairs]
        level = [draw_level(self.levels, j, draws, *key) for (j, _), key in zip(pairs, keys, strict=True)]
        rows = torch.tensor([r for _, r in pairs])
        x0 = rollout.x[(rows - rollout.rows.start).to(device), -1]
        noise = torch.stack([normal(x0.shape[1:], *key, "noised") for key in keys]).to(device)
        return Noised(
            prompts=[rollout.prompts[int(r) - rollout.rows.start] for r in rows], row=rows,
            draw=torch.tensor([j for j, _ in pairs]), advantage=advantages[rows].to(device, x0.dtype), share=share,
            **vars(noised(x0, noise, level, self.levels)),
        )  # fmt: skip

    # Losses

    def begin(self, rollout: Rollout, advantages: Tensor, size: int) -> None:
        """With dgpo, work out the weight of every (group, draw) from all members, over all processes."""
        if self.config.objective.loss != "dgpo":
            return
        mine = [r for r in rollout.rows if float(advantages[r]) != 0]
        gains: dict[tuple[int, int], list[float]] = {}
        with torch.no_grad():
            for tile in self.tiles(rollout, mine, advantages, size, max(1, len(mine))):
                now = matching_error(self.policy.velocity(tile.x, tile.timestep, tile.prompts), tile.target)
                with self.policy.reference():
                    before = matching_error(self.policy.velocity(tile.x, tile.timestep, tile.prompts), tile.target)
                found = (tile.advantage * (now - before)).tolist()
                for row, draw, gain in zip(tile.row.tolist(), tile.draw.tolist(), found, strict=True):
                    gains.setdefault((row // rollout.group_size, draw), []).append(gain)
        whole: dict[tuple[int, int], list[float]] = {}
        for part in self.world.gather(gains):
            for key, values in part.items():
                whole.setdefault(key, []).extend(values)
        beta = self.config.objective.dgpo_beta
        self._weights = {key: dgpo_group_weight(v, beta, rollout.group_size) for key, v in whole.items()}

    def terms(self, tile: Noised, rollout: Rollout, run: Run, *, first: bool) -> Terms:
        """Return the losses of a tile."""
        objective = self.config.objective
        # before the forward that the backward pass goes through
        old = None if self._given is not None else self._old_output(tile, first)
        output = self.policy.velocity(tile.x, tile.timestep, tile.prompts)
        old = output.detach() if old is None else old
        if objective.loss == "dgpo":
            groups = (tile.row // rollout.group_size).tolist()
            keys = zip(groups, tile.draw.tolist(), strict=True)
            weight = [self._weights.get(key, 0.5) for key in keys]  # a group of equals has none, and no advantage
            terms = dgpo(matching_error(output, tile.target), tile.advantage, output.new_tensor(weight))
        elif objective.loss == "supervised":
            terms = supervised(matching_error(output, tile.target))
        elif objective.loss == "nft":
            largest = 1.0 if objective.nft_feedback == "label" else self.config.advantage.clip or 5.0
            r = optimality(tile.advantage, largest, objective.nft_feedback)
            x0_hat, x0_old = (x0_estimate(tile.x, v, tile.x0_x, tile.x0_v) for v in (output, old))
            terms = nft(x0_hat, x0_old, tile.x0, r, beta=objective.nft_beta, largest=largest)
        else:
            error, error_old = matching_error(output, tile.target), matching_error(old, tile.target)
            terms = awm(error, error_old, tile.sigma, tile.advantage, objective.awm_weight, objective.awm_clip)
        if not objective.kl_weight:
            return terms
        with self.policy.reference():
            reference = self.policy.velocity(tile.x, tile.timestep, tile.prompts)
        distance = velocity_distance(output, reference)
        return Terms(terms.loss + objective.kl_weight * distance, {**terms.stats, "kl_reference": distance.detach()})

    def _old_output(self, tile: Noised, first: bool) -> Tensor | None:
        """What the policy that sampled says at the tile; None where that is the current one, or not asked."""
        objective = self.config.objective
        if objective.loss == "dgpo" or (first and objective.old_policy == "step"):
            return None
        with self._old.applied(), torch.no_grad():
            return self.policy.velocity(tile.x, tile.timestep, tile.prompts)
