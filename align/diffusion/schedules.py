"""Which noise levels a sampler visits, and which of its steps are trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from align.errors import KernelError
from align.seeding import permutation

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler


@dataclass(frozen=True)
class Schedule:
    """S + 1 levels a sampler visits, noisiest first, and what the model is told at the first S.

    Args:
        alpha, sigma: float64 `[S + 1]`, in `x = alpha x0 + sigma noise`.
        timestep: float32 `[S]`, exactly as the pipeline passes it.
        prediction: what the model's output is: "velocity" (rectified flow), "epsilon" or "v_prediction".
    """

    alpha: Tensor
    sigma: Tensor
    timestep: Tensor
    prediction: str

    def __post_init__(self) -> None:
        if len(self.sigma) < 2 or len(self.alpha) != len(self.sigma) or len(self.timestep) != len(self.sigma) - 1:
            raise KernelError(
                "A schedule needs one timestep a step and one level more",
                why=f"got {len(self.timestep)} timesteps, {len(self.alpha)} alphas and {len(self.sigma)} sigmas",
            )
        if self.prediction == "velocity" and float(self.sigma[-1]) != 0.0:
            raise KernelError("A flow's schedule must end at sigma = 0", why=f"it ends at {float(self.sigma[-1]):g}")

    def __len__(self) -> int:
        return len(self.timestep)


def flow_schedule(sigmas: Tensor, timesteps: Tensor) -> Schedule:
    """Return the schedule of a rectified flow: `alpha = 1 - sigma`, the model predicts `noise - x0`."""
    levels = sigmas.detach().to("cpu", torch.float64)
    return Schedule(1 - levels, levels, timesteps.detach().to("cpu", torch.float32), "velocity")


def shifted_sigmas(solver_steps: int, shift: float) -> Tensor:
    """Return `sigma = shift u / (1 + (shift - 1) u)` on `u = linspace(1, 0, S + 1)`, float64 `[S + 1]`.

    Source: DanceGRPO's released code; SD3 (arXiv 2403.03206, eq. 23).
    """
    if solver_steps < 1 or shift <= 0:
        raise KernelError(
            "A schedule needs at least one step and a positive shift", where=f"{solver_steps} steps, shift {shift:g}"
        )
    u = torch.linspace(1, 0, solver_steps + 1, dtype=torch.float64)
    return shift * u / (1 + (shift - 1) * u)


def trained_subset(candidates: list[int], count: int, *key: int | str) -> list[int]:
    """Draw `count` of the stochastic steps `candidates` without replacement, as a function of `key` alone.

    DanceGRPO draws a subset of its own for each sample: give a key that names the sample. Sorted.

    Raises:
        KernelError: an empty subset, or more steps than there are.
    """
    if not 1 <= count <= len(candidates):
        raise KernelError(
            "The trained subset is empty or too large",
            why=f"{count} of {len(candidates)} stochastic steps",
            do="Raise trained_steps.fraction or sampler.solver_steps; the last step is never trained",
        )
    return sorted(candidates[i] for i in permutation(len(candidates), *key)[:count])


def window_at(
    step: int, solver_steps: int, size: int, *, move: str, every: int, stride: int = 1, first: int = 0, seed: int = 0
) -> range:
    """Return the `size` neighbouring solver steps that training step `step`, counted from 1, trains on.

    The window starts between 0 and `solver_steps - 1 - size`: the last solver step is never trained, and a window
    never shrinks at the end.

        fixed         starts at `first`
        progressive   starts at `first` and moves on by `stride` every `every` training steps, until it is at the end
        exp_decay     progressive, with less and less time beyond 13/25 of the schedule:
                      round(every exp(-.1 max(0, start - 13/25 solver_steps))), at least 1
        random        starts anywhere, as a function of (seed, step)

    Raises:
        KernelError: a window that does not fit, or an unknown way to move.

    Source: MixGRPO (arXiv 2507.21802); Flow-GRPO-Fast draws at random.
    """
    last = solver_steps - 1 - size
    if not size >= 1 or not 0 <= first <= last:
        raise KernelError(
            "The window does not fit the schedule",
            why=f"{size} steps from {first} of {solver_steps}, the last of which is never trained",
            do="Lower trained_steps.window or trained_steps.first, or raise sampler.solver_steps",
        )
    if move not in ("fixed", "progressive", "random", "exp_decay"):
        raise KernelError(f"Unknown way to move a window {move!r}", do="Use fixed, progressive, random or exp_decay")
    start = first
    if move == "random":
        start = permutation(last + 1, seed, step, "window")[0]
    elif move == "progressive":
        start = min(last, first + stride * ((step - 1) // every))
    elif move == "exp_decay":
        left = step - 1
        while start < last:
            stay = max(1, round(every * math.exp(-0.1 * max(0.0, start - solver_steps * 13 / 25))))
            if left < stay:
                break
            left, start = left - stay, min(last, start + stride)
    return range(start, start + size)


def compressed(schedule: Schedule, start: int, share: float) -> Schedule:
    """Return a flow's schedule with fewer steps from step `start` on: `ceil(share (S - start))` in their place.

    The levels kept are evenly spaced in the numbers of the steps, between two of them by interpolation.

    Raises:
        KernelError: a diffusion model, which is asked at whole timesteps only.

    Source: MixGRPO-Flash (arXiv 2507.21802), share .4.
    """
    if schedule.prediction != "velocity":
        raise KernelError("Only a flow's schedule can be compressed", do="Set sampler.steps_after_window to null")
    size = len(schedule)
    count = max(1, math.ceil(round(share * (size - start), 9)))
    places = torch.linspace(start, size, count + 1, dtype=torch.float64)
    times = torch.cat([schedule.timestep.double(), torch.zeros(1, dtype=torch.float64)])

    def between(values: Tensor) -> Tensor:
        low = places.floor().long().clamp(max=size - 1)
        return values[low] + (places - low) * (values[low + 1] - values[low])

    sigma = torch.cat([schedule.sigma[:start], between(schedule.sigma)])
    timestep = torch.cat([times[:start], between(times)[:-1]])
    return flow_schedule(sigma, timestep)


def flow_match_schedule(
    scheduler: FlowMatchEulerDiscreteScheduler,
    solver_steps: int,
    *,
    shift: float | None = None,
    mu: float | None = None,
    sigmas: Sequence[float] | None = None,
) -> Schedule:
    """Return the schedule of S solver steps as a diffusers flow-matching pipeline would use it.

    With `shift` None the pipeline's own scheduler decides (`mu` for resolution-dependent shifting, `sigmas` where
    the pipeline starts from levels of its own), so that the `ode` kernel visits exactly the levels of a plain
    pipeline call. With a number, the levels
    are `shifted_sigmas`, which is what DanceGRPO trains on. The timestep stays the float the pipeline
    passes: `sigma * num_train_timesteps`, never truncated.
    """
    if shift is not None:
        levels = shifted_sigmas(solver_steps, shift).to(torch.float32)
        return flow_schedule(levels, levels[:-1] * scheduler.config.num_train_timesteps)
    extra = {name: value for name, value in (("mu", mu), ("sigmas", sigmas)) if value is not None}
    scheduler.set_timesteps(solver_steps, device="cpu", **extra)
    return flow_schedule(scheduler.sigmas, scheduler.timesteps)


def ddim_schedule(scheduler: DDIMScheduler, solver_steps: int) -> Schedule:
    """Return the schedule of S solver steps as diffusers' DDIM would visit it, whatever the model predicts.

    `alpha = sqrt(alpha_bar)`, `sigma = sqrt(1 - alpha_bar)` at the scheduler's timesteps; the last level is
    its `final_alpha_cumprod`.

    Raises:
        KernelError: a scheduler that clips or rescales what the model predicts, which has no Gaussian density.
    """
    config = scheduler.config
    for name in ("clip_sample", "thresholding", "rescale_betas_zero_snr"):
        if config.get(name):
            raise KernelError(
                f"A sampler with {name} has no exact log-probability",
                where="scheduler/scheduler_config.json",
                do=f"Set {name} to false",
            )
    scheduler.set_timesteps(solver_steps)
    timesteps = scheduler.timesteps.to("cpu")
    previous = timesteps - config.num_train_timesteps // solver_steps  # where DDIM's step says it lands
    if not torch.equal(previous[:-1], timesteps[1:]):
        raise KernelError(
            "The sampler's steps do not follow one another",
            where=f"{solver_steps} steps, timestep_spacing {config.timestep_spacing}",
            why="each lands between two of the timesteps the model is asked at",
            do=f"Use a number of steps that divides {config.num_train_timesteps}, or timestep_spacing: leading",
        )
    end = scheduler.alphas_cumprod[previous[-1]] if previous[-1] >= 0 else scheduler.final_alpha_cumprod
    alpha_bar = torch.cat([scheduler.alphas_cumprod[timesteps], torch.as_tensor(end).reshape(1)]).double()
    return Schedule(alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), timesteps.float(), config.prediction_type)
