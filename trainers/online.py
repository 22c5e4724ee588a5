"""What the online visual trainers share: rollouts, rewards, advantages, updates, the receipt.

    prompts -> sample -> scores -> advantages -> disjoint minibatches -> tiles -> terms -> update -> log

A trainer says what a tile of its training is and what a tile's loss: see the methods under "What a trainer says".
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from align import guards
from align.averaging import Average
from align.checks import require_valid
from align.config import VisualConfig, anchored, load_config
from align.diffusion.kernels import StepTable
from align.diffusion.memory import rows_that_fit
from align.diffusion.policy import Policy
from align.diffusion.rollout import Rollout, sample
from align.engine import Engine, ReplicaEngine, require_engine
from align.errors import ConfigError
from align.groupstats import bootstrap_mean, masked_mean, masked_std
from align.images import require_first_frame
from align.launch import World, join_world, meeting
from align.ledger import feq_ledger
from align.prompts import PromptSet, short_repr
from align.run import Run, claiming
from align.seeding import permutation
from align.sharding import FSDP2Engine, deepspeed_engine
from align.stops import Stopped
from align.types import (
    Advantages,
    ImagePrompt,
    Prompt,
    Samples,
    Scores,
    StepStats,
    max_or_nan,
    merge_stats,
    stack_scores,
)
from rewards.compose import Composed
from rewards.panel import Panel
from rewards.remote import remote_rewards, wait_until_healthy
from rewards.streaming import ScoreStream
from trainers.advantages import group_advantages
from trainers.evaluation import load_policy, resolve_prompts
from trainers.objectives import Terms
from trainers.receipt import Receipt
from trainers.result import RunResult
from trainers.sparsity import masked_optimizer

EQUAL = 1e-5  # advantages of this size and less say that a group's rewards were the same but for their last digits


class OnlineRun:
    """Align a diffusion model with rewards of what it samples.

    Args:
        config: of the trainer, or a recipe name, a path or a mapping for `load_config`.
        out: the run folder, `runs/<name>` when None. An unfinished run there is resumed.
        overwrite: start again, replacing a run that is there.
        fork: go on with a run that is there under a changed configuration.
        rewards: a panel to train on in place of the configuration's.
        deepspeed: name or file of DeepSpeed settings, to train under ZeRO; see `align.engine`.
        fsdp: split weights, gradients and optimizer over the processes with torch's FSDP2; see `align.sharding`.

    Started by `torchrun` or `deepspeed`, every process builds one of these and does its share.
    """

    config_type: ClassVar[type[VisualConfig]]

    def __init__(
        self,
        config: VisualConfig | str | Path | Mapping[str, Any],
        *,
        out: str | Path | None = None,
        overwrite: bool = False,
        fork: bool = False,
        rewards: Panel | None = None,
        deepspeed: str | None = None,
        fsdp: bool = False,
    ) -> None:
        kind = self.config_type
        self.config = anchored(config if isinstance(config, kind) else load_config(config, kind=kind))
        require_valid(self.config)
        if (split := require_engine(self.config.trainer, deepspeed, fsdp=fsdp)) is not None:
            require_splittable(self.config, split)
        self.fsdp = fsdp
        self.world, self.deepspeed = join_world(self.config.checkpoint.hung_after_seconds), deepspeed
        self._require_enough_samples()
        self.directory = Path(out or Path("runs") / self.config.name)
        with claiming(self.directory, self.config, self.world, overwrite=overwrite, fork=fork) as self._changed:
            self.prompts, self.heldout_prompts = resolve_prompts(self.config)
            self.rewards = rewards or Panel.build(self.config.rewards, self.config.combine)
            self.heldout = Panel.build(self.config.heldout_rewards)
            self.policy = load_policy(self.config)
            self._require_first_frames()
            made = "image" if self.policy.family.fps is None else "video"
            for panel in (self.rewards, self.heldout):
                panel.require_media(made, self.policy.family.name)
            sampler = self.config.sampler
            self.schedule = self.policy.family.schedule(sampler.solver_steps, sampler.shift, self.policy.latent_shape)
            self.table_at(1)
            self.require_data()

    @classmethod
    def resume(cls, directory: str | Path, *, deepspeed: str | None = None, fsdp: bool = False) -> OnlineRun:
        """Open an earlier run to go on where it stopped.

        Raises:
            ConfigError: no run in that folder.
        """
        return cls(config_to_resume(directory), out=directory, deepspeed=deepspeed, fsdp=fsdp)

    # What a trainer says

    def table_at(self, step: int) -> StepTable:
        """Return the solver steps of training step `step`."""
        raise NotImplementedError

    @property
    def rollout_options(self) -> dict[str, Any]:
        """Return what `sample` is to keep and how it solves."""
        raise NotImplementedError

    def tiles(self, rollout: Rollout, rows: Sequence[int], advantages: Tensor, size: int, of: int) -> Iterator[Any]:
        """Yield the tiles, of `size` rows at most, of an update on this process's samples `rows`.

        The update has `of` samples over all processes. Its loss is the sum over tiles of `tile.share` x mean loss.
        """
        raise NotImplementedError

    def terms(self, tile: Any, rollout: Rollout, run: Run, *, first: bool) -> Terms:
        """Return the loss of every row of a tile `[N]`, and its statistics; `first`: no update was taken yet."""
        raise NotImplementedError

    def before_update(self, run: Run, stats: StepStats, step: int) -> None:
        """Refuse what the replay for the first update of a rollout found."""

    def advantages_of(self, composed: Composed) -> Advantages:
        """Return what the samples of a step are worth."""
        config = self.config
        return group_advantages(
            composed.scores, config.group_size, composed.weights, mode=config.combine.mode,
            **config.advantage.model_dump(),
        )  # fmt: skip

    def begin(self, rollout: Rollout, advantages: Tensor, size: int) -> None:
        """Work out what all updates of a rollout need."""

    def moves(self, advantages: np.ndarray) -> np.ndarray:
        """Return which samples are worth a replay: those with an advantage."""
        return advantages != 0

    def after_step(self, run: Run, stats: StepStats, step: int) -> dict[str, float]:
        """Return what the trainer logs of a step, and go on to the next."""
        return {}

    def prepare(self) -> None:
        """Keep what has to be remembered of the model before training."""

    def kept(self) -> dict[str, Average]:
        """Return averages of the weights that a checkpoint must hold, by name."""
        return {}

    def sampling_weights(self) -> contextlib.AbstractContextManager[None]:
        """Have the weights that rollouts are sampled with in the model."""
        return contextlib.nullcontext()

    def ledger(self, table: StepTable | None = None) -> dict[str, float]:
        """Return what one sample costs in denoiser forwards: of a rollout by `table`, or of the first training step."""
        steps = None if table is None else len(table)
        return {**feq_ledger(self.config, solver_steps=steps), "latent_dim": math.prod(self.policy.latent_shape)}

    @property
    def optimises_rewards(self) -> bool:
        """Whether rewards are trained on, and not measured alone."""
        return True

    def require_data(self) -> None:
        """Refuse data of the trainer's own before anything is written."""

    def rollout(
        self, prompts: PromptSet, step: int, batch: int, deliver: Callable[[Samples], object] | None
    ) -> Rollout:
        """Return what a step is trained on: samples of the model."""
        config = self.config
        return sample(
            self.policy,
            prompts.asked,
            metadata=prompts.metadata,
            group_size=config.group_size,
            table=self.table_at(step),
            key=(config.seed, step),
            noise_scope=config.sampler.initial_noise,
            batch=batch,
            world=self.world,
            deliver=deliver,
            **self.rollout_options,
        )

    # What they share

    @meeting()
    def train(self) -> RunResult:
        """Train to the configured number of steps, or until asked to stop."""
        config, policy, rewards = self.config, self.policy, self.rewards
        with self.world.together():
            for prompts in (self.prompts, self.heldout_prompts):  # in the same batches wherever a run is resumed
                policy.encodings.add(prompts.asked)
            self.prepare()
        with self.open_run() as run:
            receipt = Receipt(
                run, policy, self.heldout_prompts.asked, {"reward": rewards, "heldout": self.heldout},
                optimised=self.optimises_rewards,
            )  # fmt: skip
            receipt.before()
            for step in run.steps():
                clock = _Clock()
                run.sitting.at("rollout")
                prompts = self.prompts.at(step, config.prompts_per_step, config.seed)
                with ScoreStream(rewards) as stream:
                    with self.sampling_weights(), run.whole(), run.cut():
                        deliver = clock.timed("time/reward", stream.submit)
                        rollout = self.rollout(prompts, step, self._batches(run)[0], deliver)
                    run.sitting.see(samples=lambda seen=rollout: samples_seen(seen))
                    self._require_finite(rollout, step)
                    clock.lap("time/rollout", less={"time/decode": rollout.decode_seconds})
                    run.sitting.at("waiting for scores")
                    with run.cut():
                        scores = self._collect(stream, rollout, run, step)
                run.sitting.see(samples=lambda seen=rollout, said=scores: samples_seen(seen, said))
                rewards.require_scored(scores, f"step {step}")
                composed = rewards.compose(scores, config.group_size)
                advantages = self.advantages_of(composed)
                clock.lap("time/reward")
                run.sitting.see(samples=lambda seen=(rollout, scores, advantages): samples_seen(*seen))
                run.sitting.at("training")
                stats = self.learn(run, rollout, advantages, step)
                run.update_average()
                clock.lap("time/train")
                self._watch_base_rate(scores, run, step)
                metrics = self._metrics(scores, composed, advantages, rollout.table, run)
                metrics |= self.after_step(run, stats, step)
                run.commit(step, {**metrics, **receipt.during(step), **clock.laps}, stats)
            return finish(run, receipt)
        return RunResult(self.directory, "stopped", {})

    def open_run(self) -> Run:
        """Return the run in this trainer's folder, resumed where there is a checkpoint."""
        return open_run(
            self.config, self.directory, self.policy, self._record(), float(self.schedule.timestep[0]),
            self.prompts.asked[0], world=self.world, deepspeed=self.deepspeed, fsdp=self.fsdp, changed=self._changed,
            kept=self.kept(),
        )  # fmt: skip

    def _batches(self, run: Run) -> tuple[int, int]:
        """Return how many samples are rolled out at once, and how many (sample, step) pairs replayed.

        Without gradients a row needs a fraction of what it needs with them.
        """
        fit = int(run.counters["batch_tile"])
        return self.config.batch.rollout or 4 * fit, self.config.batch.tile or fit

    def learn(self, run: Run, rollout: Rollout, advantages: Advantages, step: int) -> StepStats:
        """Take the updates of one rollout: disjoint minibatches of samples, each replayed in tiles.

        Every process knows all minibatches and replays those of their samples that it holds.
        """
        stats, values = StepStats(), torch.as_tensor(advantages.values.reshape(-1))
        kept = np.flatnonzero(advantages.kept.reshape(-1))
        order = kept[permutation(len(kept), self.config.seed, step, "minibatches")]
        size = self._batches(run)[1]
        with run.cut():
            self.begin(rollout, values, size)
        first = True
        for rows in np.array_split(order, self.config.updates_per_step):
            moving = rows[self.moves(values.numpy()[rows])]
            if not len(moving):
                continue  # nothing was learnt from these samples
            mine = [int(r) for r in moving if r in rollout.rows]
            with run.cut():
                found = self.tiles(rollout, mine, values, size, len(rows))
                spare = self.tiles(rollout, rollout.rows[:1], values, size, len(rows))
                for tile, last in in_step(found, spare, run):
                    terms = self.terms(tile, rollout, run, first=first)
                    run.sitting.see_tile(prompts=tile.prompts, loss=terms.loss.detach(), **terms.stats)
                    run.backward(terms.loss.mean(), weight=tile.share, last=last)
                    if tile.share:
                        count(stats, terms)
            if first:
                self.before_update(run, stats, step)
            run.update(expect_gradient=first and float(values[moving].abs().max()) > EQUAL)
            first = False
        return merge_stats(self.world.gather(stats))

    def _collect(self, stream: ScoreStream, rollout: Rollout, run: Run, step: int) -> Scores:
        """Return the scores of all processes.

        A server that is down leaves scores missing. While that is more than `combine.max_fail_frac` allows, the run
        waits until the server is back and has the rollout scored again: nothing is lost, and nothing counts as 0.

        Raises:
            Stopped: asked to stop while waiting for a server; the grace time has nothing to wait for then.
        """
        scores = stack_scores(self.world.gather(stream.result()))
        remote = remote_rewards(self.rewards.rewards)
        while self.rewards.too_many_missing(scores):
            down = self.world.first([reward.unreachable for reward in remote])
            if not down:
                return scores  # the servers answer, so this is for the guard to judge
            run.say(step, "reward_server", f"the run waits for a reward server: {down}")
            back = wait_until_healthy(remote, lambda: run.sitting.asked, lambda message: None)
            if not all(self.world.gather(back)):
                raise Stopped(agreed=True)
            run.say(step, "reward_server", "the reward server is back; the rollout is scored again")
            scores = stack_scores(self.world.gather(self.rewards.score(rollout.samples)))
        return scores

    def _require_enough_samples(self) -> None:
        samples = self.config.prompts_per_step * self.config.group_size
        if samples < self.world.size:
            raise ConfigError(
                f"{self.world.size} processes have only {samples} samples a step to share",
                where="prompts_per_step, group_size", do="Start fewer processes, or raise one of the two",
            )  # fmt: skip

    def _require_first_frames(self) -> None:
        """Refuse prompts without a first frame where the model starts from one, and with one where it does not."""
        takes = self.policy.family.takes_image
        wrong = [p for p in (*self.prompts.asked, *self.heldout_prompts.asked) if takes == isinstance(p, str)]
        if wrong:
            raise ConfigError(
                "A prompt has no first frame" if takes else "This model takes no first frame",
                where=f"prompts.image_column, prompt {short_repr(str(wrong[0]))}",
                why=f"{self.policy.family.name} {'starts every video from one' if takes else 'starts from text alone'}",
                do="Name the column that holds image paths" if takes else "Set prompts.image_column to null",
            )  # fmt: skip
        height, width = self.policy.latent_shape[-2:]
        images = {p.image for p in (*self.prompts.asked, *self.heldout_prompts.asked) if isinstance(p, ImagePrompt)}
        for image in sorted(images):
            require_first_frame(image, height, width)

    def _require_finite(self, rollout: Rollout, step: int) -> None:
        """Stop all processes before a rollout that is not finite on one of them is scored or trained on."""
        trajectory = rollout.x.isfinite().all() & rollout.logp[:, rollout.table.stochastic_steps].isfinite().all()
        found = torch.tensor(0.0 if bool(trajectory) else float("nan"), device=rollout.x.device)
        guards.require_finite(self.world.add(found), "The rollout", f"step {step}")

    def _metrics(
        self, scores: Scores, composed: Composed, advantages: Advantages, table: StepTable, run: Run
    ) -> dict[str, float]:
        config = self.config
        total = self.rewards.total(scores, config.group_size)
        reward = bootstrap_mean(total, np.arange(len(total)) // config.group_size, draws=500)
        ledger = self.ledger(table)
        run.count(samples=len(total), feq=len(total) * ledger["feq_per_sample"])
        return {
            "samples": len(total),
            "reward": reward.mean,
            "reward_ci_low": reward.ci_low,
            "reward_ci_high": reward.ci_high,
            **{f"reward/{name}/mean": float(np.nanmean(scores.column(name))) for name in scores.names},
            **{f"reward/{name}/std": std for name, std in zip(scores.names, self._within_std(scores), strict=True)},
            **{
                f"reward/{name}/fail_frac": float(failed)
                for name, failed in zip(scores.names, (~scores.valid).mean(0), strict=True)
            },
            "gated": composed.gated,
            "valid_share": float(scores.valid.any(1).mean()),
            "zero_std_groups": advantages.zero_std_groups,
            "invalid_members": advantages.invalid_members,
            "dropped_groups": advantages.dropped_groups,
            "unselected": advantages.unselected,
            "feq": len(total) * ledger["feq_per_sample"],
            "feq_total": run.counters["feq"],
            "feq_per_sample": ledger["feq_per_sample"],
        }

    def _within_std(self, scores: Scores) -> list[float]:
        """Standard deviation of each component within groups, averaged over groups; NaN where no group has two."""
        shape = (-1, self.config.group_size, len(scores.names))
        within = masked_std(
            scores.values.reshape(shape), scores.valid.reshape(shape), axis=1, ddof=self.config.advantage.ddof
        )
        return masked_mean(within, np.isfinite(within), axis=0).tolist()

    def _watch_base_rate(self, scores: Scores, run: Run, step: int) -> None:
        """Warn when a binary reward says nearly always the same: most groups then teach nothing."""
        for name in scores.names:
            values = scores.column(name)[scores.valid[:, scores.names.index(name)]]
            rate = float(values.mean()) if len(values) else 0.5
            if run.counters.get(f"base_rate/{name}") or not np.isin(values, (0.0, 1.0)).all() or 0.1 <= rate <= 0.9:
                continue
            run.counters[f"base_rate/{name}"] = 1.0  # once a run
            raw = scores.extras.get(f"raw/{name.rpartition('_above_')[0]}")
            middle = "" if raw is None else f"; half of them are above {float(np.nanmedian(raw)):.3g}"
            run.log.warn(
                step, "warning", "base_rate", f"the binary reward {name} is 1 for {rate:.0%} of the samples{middle}"
            )

    def _record(self) -> dict[str, Any]:
        return {
            "model": describe_model(self.policy, self.config),
            "rewards": self.rewards.describe(),
            "heldout_rewards": self.heldout.describe(),
            "ledger": self.ledger(),
        }


def open_run(
    config: Any,
    directory: Path,
    policy: Policy,
    record: Mapping[str, Any],
    timestep: float,
    prompt: Prompt,
    *,
    world: World,
    deepspeed: str | None,
    fsdp: bool = False,
    **options: Any,
) -> Run:
    """Return the run in a folder, resumed where there is a checkpoint, with its engine.

    `counters["batch_tile"]` says how many rows fit at once; a resumed run keeps its own, so that it goes on bit for
    bit.

    Args:
        timestep, prompt: of a row that is tried.
        options: of `Run`.
    """
    engine: Engine | None = None
    if fsdp:
        engine = FSDP2Engine(policy.family.denoiser, policy.trainable, config.optimizer, world)
    parameters = policy.trainable()
    if config.sparsity.mask is not None:
        optimizer = masked_optimizer(parameters, config.optimizer, config.sparsity.mask, deepspeed)
        engine = ReplicaEngine(parameters, config.optimizer, world, optimizer)
    elif deepspeed is not None:
        engine = deepspeed_engine(policy.family.denoiser, parameters, config.optimizer, world, deepspeed)
    run = Run(config, directory, parameters, record, world=world, engine=engine, **options)
    if "batch_tile" not in run.counters:
        run.counters["batch_tile"] = float(min(world.gather(rows_that_fit(policy, timestep, prompt))))
    return run


def in_step(tiles: Iterator[Any], spare: Iterator[Any], run: Run) -> Iterator[tuple[Any, bool]]:
    """Yield the tiles of an update, and of each whether it is the last.

    Where processes meet in every pass through the model, each takes as many: those with fewer go on with tiles that
    weigh nothing. There the last one is known; elsewhere it makes no difference.

    Args:
        spare: gives a tile to a process that has none.
    """
    if not run.engine.lockstep:
        yield from ((tile, False) for tile in tiles)
        return
    found = list(tiles)
    most = max(run.world.gather(len(found)))
    found += [replace(found[-1] if found else next(spare), share=0.0)] * (most - len(found))
    yield from ((tile, i == most - 1) for i, tile in enumerate(found))


def require_splittable(config: Any, engine: str) -> None:
    """Refuse what needs whole weights where `engine` leaves none.

    Raises:
        ConfigError: naming the key.
    """
    whole = {
        "sparsity.mask": config.sparsity.mask is not None, "sparsity.every": bool(config.sparsity.every),
        "objective.kl_weight with model.train full": config.model.train == "full" and bool(config.objective.kl_weight),
    }  # fmt: skip
    for where, asked in whole.items():
        if asked:
            raise ConfigError(
                f"This needs whole weights, which {engine} leaves to no process", where=where,
                do="Leave it out, or train under --deepspeed zero2",
            )  # fmt: skip


def describe_model(policy: Policy, config: Any) -> dict[str, Any]:
    """Return what `run.json` says of the model."""
    return {
        "path": config.model.path,
        "family": policy.family.name,
        "train": config.model.train,
        "parameters": sum(p.numel() for p in policy.family.denoiser.parameters()),
        "trained_parameters": sum(p.numel() for p in policy.trainable().values()),
    }


def finish(run: Run, receipt: Receipt) -> RunResult:
    """End a run that was stopped, or measure and end one that is complete or that the hack monitor stopped."""
    if run.sitting.stopping not in ("", "monitor") and run.step < run.config.steps:
        run.sitting.finish("stopped")
        return RunResult(run.directory, "stopped", {})
    summary = receipt.after()
    run.sitting.finish(run.outcome)
    return RunResult(run.directory, run.outcome, summary)


def samples_seen(
    rollout: Rollout, scores: Scores | None = None, advantages: Advantages | None = None
) -> list[dict[str, Any]]:
    """Return what is known of a process's samples, for people to read.

    Args:
        scores, advantages: of all samples, as far as the step came.
    """
    found = []
    for i, (place, prompt) in enumerate(zip(rollout.rows, rollout.prompts, strict=True)):
        p, g = divmod(place, rollout.group_size)
        row = {"sample": place, "prompt": prompt, "seed": [*rollout.key, p, g]}
        row["latents_finite"] = bool(rollout.x[i].isfinite().all())
        if scores is not None:
            row["scores"] = dict(zip(scores.names, scores.values[place].tolist(), strict=True))
            row |= {"error": scores.errors[place]} if scores.errors and scores.errors[place] else {}
        if advantages is not None:
            row["advantage"] = float(advantages.values[p, g])
        found.append(row)
    return found


def config_to_resume(directory: str | Path) -> Any:
    """Return the config of the run in a folder.

    Raises:
        ConfigError: no run in that folder.
    """
    config = Path(directory) / "config.yaml"
    if not config.is_file():
        raise ConfigError("There is no run to resume", where=str(directory), why="it has no config.yaml")
    return load_config(config)


def count(stats: StepStats, terms: Terms) -> None:
    """Add the terms of a tile to the statistics of a step."""
    sums = {name: float(value.sum()) for name, value in terms.stats.items()}
    extremes = {}
    if "ratio" in sums:
        ratio = terms.stats["ratio"]
        sums["ratio_mean"], extremes["ratio"] = sums.pop("ratio"), (float(ratio.min()), float(ratio.max()))
    stats.add(len(terms.loss), sums={**sums, "loss": float(terms.loss.detach().sum())}, extremes=extremes)
    if terms.first_ratio is not None:
        scaled, worst = terms.first_ratio
        stats.first_ratio_scaled = max_or_nan(stats.first_ratio_scaled, scaled)
        stats.first_ratio_error = max_or_nan(stats.first_ratio_error, worst)


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()
        self._inside = 0.0

    def lap(self, name: str, less: Mapping[str, float] = {}) -> None:
        """End the lap `name`; parts of it that have a name of their own are counted there."""
        now = time.perf_counter()
        for part, seconds in less.items():
            self.laps[part] = self.laps.get(part, 0.0) + seconds
        whole = now - self._last - sum(less.values()) - self._inside
        self.laps[name], self._last, self._inside = self.laps.get(name, 0.0) + whole, now, 0.0

    def timed(self, name: str, work: Callable[[Samples], None]) -> Callable[[Samples], None]:
        """Return `work`, its seconds counted under `name` and not in the lap it runs in."""

        def run(samples: Samples) -> None:
            began = time.perf_counter()
            work(samples)
            seconds = time.perf_counter() - began
            self.laps[name], self._inside = self.laps.get(name, 0.0) + seconds, self._inside + seconds

        return run
