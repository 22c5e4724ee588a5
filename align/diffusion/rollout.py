"""Prompts to trajectories to media, through any family; and the replay of stored trajectories."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.diffusion.kernels import StepTable, second_order, transition
from align.diffusion.policy import Policy
from align.errors import KernelError
from align.launch import World
from align.seeding import normal
from align.types import Prompt, Samples, Video, join_samples, text_of


@dataclass(frozen=True)
class Rollout:
    """P prompts x G members, flattened to P G samples, member fastest; of these, the B in `rows`.

    Args:
        prompts: the prompt of each sample, B of them.
        rows: the places of the B samples among all; other processes hold the others.
        key: names the rollout; all its noise is a function of it.
        group_size: G.
        table: the S solver steps.
        x: float32 latents before each step and after the last, `[B, S + 1, ...]`; of a rollout that is not
            replayed the last ones alone, `[B, 1, ...]`.
        logp: log-density of each stochastic step as it was taken, `[B, S]`, NaN elsewhere; `[B, 0]` then.
        mean: mean of each step as it was taken, `[B, S, ...]`, where it was to be kept.
        samples: the decoded media.
        decode_seconds: how long decoding took.
    """

    prompts: tuple[Prompt, ...]
    rows: range
    key: tuple[int | str, ...]
    group_size: int
    table: StepTable
    x: Tensor
    logp: Tensor
    mean: Tensor | None
    samples: Samples
    decode_seconds: float

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Tile:
    """N (sample, step) rows of a rollout, replayed in one forward, and their share of the update's loss."""

    prompts: list[Prompt]
    step: Tensor
    x: Tensor
    x_next: Tensor
    logp: Tensor
    mean: Tensor | None
    advantage: Tensor
    share: float


def initial_noise(
    shape: Sequence[int], rows: Sequence[int], group_size: int, scope: str, *key: int | str, rank: int = 0
) -> Tensor:
    """Draw x_T for the samples `rows`, `[B, ...]`, as a function of `key` and of each sample's place.

    Scopes: "group" gives all members of a prompt the same noise, "none" gives every sample its own,
    "rank" gives all samples of process `rank` the same.
    """
    if scope == "rank":
        return normal(shape, *key, "rank", rank, "init").expand(len(rows), *shape).clone()
    if scope == "none":
        return torch.stack([normal(shape, *key, *divmod(r, group_size), "init") for r in rows])
    drawn = {p: normal(shape, *key, p, "init") for p in sorted({r // group_size for r in rows})}
    return torch.stack([drawn[r // group_size] for r in rows])


def step_noise(shape: Sequence[int], rows: Sequence[int], group_size: int, step: int, *key: int | str) -> Tensor:
    """Draw the fresh noise of solver step `step` for the samples `rows`: independent for every sample."""
    return torch.stack([normal(shape, *key, r // group_size, r % group_size, step, "sde") for r in rows])


@dataclass(frozen=True)
class Path:
    """What the way from noise to the final latents `x0` `[B, ...]` left behind: see `Rollout`."""

    x0: Tensor
    x: Tensor
    logp: Tensor
    mean: Tensor | None


@torch.no_grad()
def solve(
    policy: Policy,
    x: Tensor,
    prompts: Sequence[Prompt],
    table: StepTable,
    *,
    group_size: int = 1,
    first: int = 0,
    key: tuple[int | str, ...] = (),
    reduction: str | None = None,
    solver: str = "euler",
    keep_mean: bool = False,
    fresh: Callable[[int], Tensor] | None = None,
) -> Path:
    """Run all solver steps from noise `x` `[B, ...]`.

    Args:
        group_size, first, key: name the fresh noise: sample i is member `(first + i) % group_size` of its prompt.
        reduction: of the log-density of stochastic steps; None keeps nothing of the way.
        solver: of the deterministic steps, "euler" or "dpm2m" (see `second_order`).
        keep_mean: keep the mean of every step as well.
        fresh: draws the noise of a stochastic step, like x; by `step_noise` when None.
    """
    fresh = fresh or (lambda step: step_noise(x.shape[1:], places, group_size, step, *key))
    stochastic = set(table.stochastic_steps)
    state, places = x.to(policy.device), range(first, first + len(prompts))
    path, logps, means, before = [state], [], [], None
    for s in range(len(table)):
        timestep = table.timestep[s].to(state.device, torch.float32).expand(len(prompts))
        random = s in stochastic
        noise = fresh(s).to(state.device) if random else None
        velocity = policy.velocity(state, timestep, prompts)
        moved = transition(state, velocity, table, s, noise=noise, reduction=reduction if random else None)
        plain = random or solver == "euler"
        state = moved.x_next if plain else second_order(state, moved.x0_hat, before, table, s)
        before = (moved.x0_hat, s)
        if reduction is not None:
            path.append(state)
            means.extend([moved.mean] if keep_mean else [])
            logps.append(moved.logp if moved.logp is not None else state.new_full((len(prompts),), float("nan")))
    if reduction is None:
        return Path(state, state[:, None], torch.empty(len(prompts), 0), None)
    logp = torch.stack([logp.double() for logp in logps], 1)
    return Path(state, torch.stack(path, 1), logp, torch.stack(means, 1) if keep_mean else None)


@torch.no_grad()
def decode(policy: Policy, latents: Tensor, batch: int | None = None) -> Tensor:
    """Decode latents to CPU pixels in [0, 1], a batch at a time: 65,536 latent positions where it is None."""
    batch = batch or max(1, 65_536 // math.prod(latents.shape[2:]))
    return torch.cat([policy.decode(part).cpu() for part in latents.split(batch)])


def as_samples(
    policy: Policy, pixels: Tensor, prompts: Sequence[Prompt], metadata: Sequence[Mapping[str, Any]] = ()
) -> Samples:
    """Return decoded pixels as the samples that rewards score: images, or videos with their frame rate."""
    texts = [text_of(prompt) for prompt in prompts]
    if pixels.ndim == 4:
        return Samples(prompts=texts, images=pixels, metadata=metadata)
    fps = policy.size.fps or policy.family.fps
    return Samples(prompts=texts, videos=[Video(frames, fps) for frames in pixels], metadata=metadata)


def sample(
    policy: Policy,
    prompts: Sequence[Prompt],
    *,
    group_size: int,
    table: StepTable,
    key: tuple[int | str, ...],
    noise_scope: str = "group",
    metadata: Sequence[Mapping[str, Any]] = (),
    batch: int | None = None,
    reduction: str | None = "mean",
    solver: str = "euler",
    keep_mean: bool = False,
    world: World = World(),
    deliver: Callable[[Samples], object] | None = None,
) -> Rollout:
    """Roll out G members for each prompt, keeping what replay needs.

    Args:
        world: this process makes its share of the P G samples; groups may be split across processes.
        key: names this rollout, e.g. (run seed, step); all noise is a function of it and of the
            sample's place, so `batch` changes the speed and nothing else.
        metadata: one mapping a prompt, handed to the rewards.
        deliver: called with the samples of each batch as soon as they are decoded, in order, so that they can be
            scored while the next batch is sampled.

    Raises:
        KernelError: a table without a stochastic step, of which a log-density is asked.
    """
    if reduction is not None and not table.stochastic_steps:
        raise KernelError(
            "A deterministic sampler cannot be trained by policy gradients",
            why=f"kernel {table.kind!r} with eta {table.eta:g} has std 0",
        )
    rows = world.share(len(prompts) * group_size)
    size = batch or max(1, len(rows))
    parts, decode_seconds = [], 0.0
    for start in range(rows.start, rows.stop, size):
        own = range(start, min(start + size, rows.stop))
        flat = [prompts[r // group_size] for r in own]
        noise = initial_noise(policy.latent_shape, own, group_size, noise_scope, *key, rank=world.rank)
        path = solve(
            policy, noise, flat, table, group_size=group_size, first=own.start, key=key, reduction=reduction,
            solver=solver, keep_mean=keep_mean,
        )  # fmt: skip
        began = time.perf_counter()
        made = as_samples(
            policy, decode(policy, path.x0), flat, [metadata[r // group_size] for r in own] if metadata else ()
        )
        decode_seconds += time.perf_counter() - began
        if deliver is not None:
            deliver(made)
        parts.append((path, made))
    paths, samples = zip(*parts, strict=True)
    return Rollout(
        prompts=tuple(prompts[r // group_size] for r in rows), rows=rows, key=key, group_size=group_size, table=table,
        x=torch.cat([p.x for p in paths]), logp=torch.cat([p.logp for p in paths]),
        mean=torch.cat([p.mean for p in paths]) if keep_mean else None,
        samples=join_samples(samples), decode_seconds=decode_seconds,
    )  # fmt: skip


def tiles(
    rollout: Rollout,
    rows: Sequence[int],
    steps: Sequence[Sequence[int]],
    advantages: Tensor,
    size: int,
    total: int | None = None,
) -> Iterator[Tile]:
    """Cut the trained (sample, step) pairs of one update into tiles of at most `size`, step by step.

    Pairs are ordered by step, then sample, so that a tile holds few distinct noise levels.

    Args:
        rows: the update's samples, of those this rollout holds.
        steps: for each of them, its trained steps.
        advantages: `[P G]`, indexed by sample.
        total: pairs of the update over all processes, by which the loss is divided; None where these are all.
    """
    pairs = sorted((s, r) for r, own in zip(rows, steps, strict=True) for s in own)
    device = rollout.x.device
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        s, r = torch.tensor([p[0] for p in part]), torch.tensor([p[1] for p in part])
        here, at = (r - rollout.rows.start).to(device), s.to(device)
        yield Tile(
            prompts=[rollout.prompts[i] for i in here.tolist()],
            step=s,
            x=rollout.x[here, at],
            x_next=rollout.x[here, at + 1],
            logp=rollout.logp[here, at],
            mean=None if rollout.mean is None else rollout.mean[here, at],
            advantage=advantages[r].to(device),
            share=len(part) / (total or len(pairs)),
        )


@dataclass(frozen=True)
class Replayed:
    """What the current policy says of N stored steps: log-density `[N]`, mean and model output `[N, ...]`."""

    logp: Tensor
    mean: Tensor
    output: Tensor


def replay(policy: Policy, tile: Tile, table: StepTable, reduction: str = "mean") -> Replayed:
    """Score the stored steps of `tile` under the current policy: the same call as sampling."""
    timestep = table.timestep[tile.step].to(tile.x.device, torch.float32)
    output = policy.velocity(tile.x, timestep, tile.prompts)
    moved = transition(tile.x, output, table, tile.step, x_next=tile.x_next, reduction=reduction)
    return Replayed(moved.logp, moved.mean, output)


def reference_output(policy: Policy, tile: Tile, table: StepTable) -> Tensor:
    """Return what the model before training says at the stored latents of `tile`, `[N, ...]`, without gradient."""
    timestep = table.timestep[tile.step].to(tile.x.device, torch.float32)
    with policy.reference():
        return policy.velocity(tile.x, timestep, tile.prompts)
