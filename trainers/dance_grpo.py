"""DanceGRPO (arXiv 2505.07818): group-relative policy gradients through an SDE sampler.

Where this differs from the paper
1. The log-probability is that of the true Gaussian step, with its own std. The paper's formula is the
   same; several released implementations are not.
2. The objective has no KL term, as in the paper's experiments (its eq. 6 allows one).
3. The last solver step is deterministic, is never trained, and its x0 estimate is what gets decoded.
4. `log p_old` is the number the rollout stored. It is never recomputed, and the first update of every
   rollout is refused unless the ratio is 1.
5. Samples of one rollout are shuffled across prompts before they are split into updates.
6. A reward that fails is missing: its sample leaves the group's statistics and the loss.
7. Evaluation samples with the ODE, on held-out prompts, with a reward that is never trained on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align import guards
from align.checks import feq_ledger, require_valid, trained_step_count
from align.config import DanceGRPOConfig, load_config
from align.diffusion.kernels import StepTable, step_table
from align.diffusion.rollout import Rollout, replay, sample, tiles
from align.diffusion.schedules import trained_subset
from align.errors import ConfigError
from align.groupstats import bootstrap_mean
from align.run import Run, claim_directory, require_directory
from align.seeding import permutation
from align.types import Advantages, Scores, StepStats
from rewards.panel import Panel
from trainers.advantages import group_advantages
from trainers.evaluation import load_policy, resolve_prompts
from trainers.objectives import grpo_clip
from trainers.receipt import Receipt


@dataclass(frozen=True)
class RunResult:
    """How a run ended: its folder, its status ("complete" or "stopped") and its summary, if complete."""

    directory: Path
    status: str
    summary: dict[str, Any]


class DanceGRPO:
    """Align a diffusion model with rewards.

    Args:
        config: a `DanceGRPOConfig`, or a recipe name, a path or a mapping for `load_config`.
        out: the run folder, `runs/<name>` when None. An unfinished run there is resumed.
        overwrite: start again, replacing a run that is there.
        rewards: a panel to train on in place of the configuration's.
    """

    def __init__(
        self,
        config: DanceGRPOConfig | str | Path | Mapping[str, Any],
        *,
        out: str | Path | None = None,
        overwrite: bool = False,
        rewards: Panel | None = None,
    ) -> None:
        self.config = config if isinstance(config, DanceGRPOConfig) else load_config(config)
        require_valid(self.config)
        self.directory = Path(out or Path("runs") / self.config.name)
        require_directory(self.directory, self.config, overwrite=overwrite)
        self.prompts, self.heldout_prompts = resolve_prompts(self.config)
        self.rewards = rewards or Panel.build(self.config.rewards)
        self.heldout = Panel.build(self.config.heldout_rewards)
        self.policy = load_policy(self.config)
        sampler = self.config.sampler
        self.latent_shape = self.policy.family.latent_shape(sampler.height, sampler.width)
        self.table: StepTable = step_table(
            sampler.kernel,
            sampler.eta,
            self.policy.family.schedule(sampler.solver_steps, sampler.shift, self.latent_shape),
        )
        claim_directory(self.directory, self.config, overwrite=overwrite)

    @classmethod
    def resume(cls, directory: str | Path) -> DanceGRPO:
        """Open an earlier run to go on where it stopped.

        Raises:
            ConfigError: no run in that folder.
        """
        config = Path(directory) / "config.yaml"
        if not config.is_file():
            raise ConfigError("There is no run to resume", where=str(directory), why="it has no config.yaml")
        return cls(load_config(config), out=directory)

    def train(self) -> RunResult:
        """Train to the configured number of steps, or until asked to stop."""
        config, policy, rewards = self.config, self.policy, self.rewards
        policy.encodings.add(self.prompts)
        with Run(config, self.directory, policy.trainable(), self._record()) as run:
            receipt = Receipt(run, policy, list(self.heldout_prompts), {"reward": rewards, "heldout": self.heldout})
            receipt.before()
            for step in run.steps():
                clock = _Clock()
                prompts = self.prompts.at(step, config.prompts_per_step, config.seed)
                rollout = sample(
                    policy,
                    prompts.prompts,
                    metadata=prompts.metadata,
                    group_size=config.group_size,
                    table=self.table,
                    latent_shape=self.latent_shape,
                    key=(config.seed, step),
                    noise_scope=config.sampler.initial_noise,
                    batch=config.batch.rollout,
                    reduction=config.objective.logprob_reduction,
                )
                clock.lap("time/rollout", less=("time/decode", rollout.decode_seconds))
                scores = rewards.score(rollout.samples)
                valid = scores.valid.any(1)
                guards.require_valid_share(
                    int(valid.sum()),
                    len(valid),
                    config.objective.min_valid_share,
                    f"step {step}",
                    next(filter(None, scores.errors), ""),
                )
                advantages = group_advantages(
                    scores, config.group_size, rewards.weights, **config.advantage.model_dump()
                )
                clock.lap("time/reward")
                stats = self.learn(run, rollout, advantages, step)
                clock.lap("time/train")
                run.commit(
                    step, {**self._metrics(scores, advantages, run), **receipt.during(step), **clock.laps}, stats
                )
            return self._finish(run, receipt)

    def learn(self, run: Run, rollout: Rollout, advantages: Advantages, step: int) -> StepStats:
        """Take the updates of one rollout: disjoint minibatches of samples, each replayed in tiles."""
        config, stats = self.config, StepStats()
        reduction = config.objective.logprob_reduction
        count = trained_step_count(
            config.sampler.solver_steps, config.trained_steps.fraction, config.trained_steps.rule
        )
        steps = self.table.stochastic_steps
        values = torch.as_tensor(advantages.values.reshape(-1))
        kept = np.flatnonzero(advantages.kept.reshape(-1))
        order = kept[permutation(len(kept), config.seed, step, "minibatches")]
        nats = math.prod(self.latent_shape) if reduction == "sum" else 1
        tolerance = guards.FIRST_RATIO_TOLERANCE[config.model.dtype] * nats
        for update, rows in enumerate(np.array_split(order, config.updates_per_step)):
            if not len(rows):
                continue
            chosen = [trained_subset(steps, count, config.seed, step, int(r), "trained") for r in rows]
            for tile in tiles(rollout, rows.tolist(), chosen, values, config.batch.tile or len(rollout)):
                logp = replay(self.policy, tile, self.table, reduction)
                if update == 0:
                    error = guards.require_first_ratio(
                        logp, tile.logp, self.table.std[tile.step], tolerance, f"step {step}"
                    )
                    stats.first_ratio_error = max(stats.first_ratio_error, error)
                terms = grpo_clip(
                    logp,
                    tile.logp,
                    tile.advantage,
                    clip_low=config.objective.clip_range,
                    clip_high=config.objective.clip_range,
                )
                run.backward(terms.loss.mean(), weight=tile.share)
                ratio = terms.stats["ratio"]
                stats.add(
                    len(ratio),
                    sums={
                        "loss": float(terms.loss.detach().sum()),
                        "ratio_mean": float(ratio.sum()),
                        **{n: float(v.sum()) for n, v in terms.stats.items() if n != "ratio"},
                    },
                    extremes={"ratio": (float(ratio.min()), float(ratio.max()))},
                )
            run.update()
        return stats

    def _metrics(self, scores: Scores, advantages: Advantages, run: Run) -> dict[str, float]:
        config = self.config
        total = self.rewards.total(scores)
        reward = bootstrap_mean(total, np.arange(len(total)) // config.group_size, draws=500)
        ledger = self.ledger()
        run.count(samples=len(total), feq=len(total) * ledger["feq_per_sample"])
        return {
            "samples": len(total),
            "reward": reward.mean,
            "reward_ci_low": reward.ci_low,
            "reward_ci_high": reward.ci_high,
            **{f"reward/{name}/mean": float(np.nanmean(scores.column(name))) for name in scores.names},
            **{f"reward/{name}/std": std for name, std in advantages.raw_std.items()},
            "valid_share": float(scores.valid.any(1).mean()),
            "zero_std_groups": advantages.zero_std_groups,
            "invalid_members": advantages.invalid_members,
            "dropped_groups": advantages.dropped_groups,
            "feq": len(total) * ledger["feq_per_sample"],
            "feq_total": run.counters["feq"],
            "feq_per_sample": ledger["feq_per_sample"],
        }

    def ledger(self) -> dict[str, float]:
        """Return what one sample costs in denoiser forwards, and the clip range in nats."""
        dim = math.prod(self.latent_shape)
        clip = self.config.objective.clip_range
        nats = clip * dim if self.config.objective.logprob_reduction == "mean" else clip
        return {**feq_ledger(self.config), "latent_dim": dim, "clip_range": clip, "clip_nats": nats}

    def _record(self) -> dict[str, Any]:
        trainable = sum(p.numel() for p in self.policy.trainable().values())
        everything = sum(p.numel() for p in self.policy.family.denoiser.parameters())
        return {
            "model": {
                "path": self.config.model.path,
                "family": self.policy.family.name,
                "train": self.config.model.train,
                "parameters": everything,
                "trained_parameters": trainable,
            },
            "rewards": self.rewards.describe(),
            "heldout_rewards": self.heldout.describe(),
            "ledger": self.ledger(),
        }

    def _finish(self, run: Run, receipt: Receipt) -> RunResult:
        if run.stopping:
            run.finish("stopped")
            return RunResult(self.directory, "stopped", {})
        summary = receipt.after()
        run.finish("complete")
        return RunResult(self.directory, "complete", summary)


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str, less: tuple[str, float] | None = None) -> None:
        """End the lap `name`; a part of it that has a name of its own is counted there."""
        now = time.perf_counter()
        part, seconds = less or ("", 0.0)
        self.laps[name], self._last = now - self._last - seconds, now
        if part:
            self.laps[part] = seconds
