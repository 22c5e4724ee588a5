"""Which noise levels a sampler visits, and which of its steps are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from align.errors import KernelError
from align.seeding import permutation

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler


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


def flow_match_schedule(
    scheduler: FlowMatchEulerDiscreteScheduler,
    solver_steps: int,
    *,
    shift: float | None = None,
    mu: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `(sigmas [S + 1], timesteps [S])` as a diffusers flow-matching pipeline would use them.

    With `shift` None the pipeline's own scheduler decides (`mu` for resolution-dependent shifting), so
    that the `ode` kernel visits exactly the levels of a plain pipeline call. With a number, the levels
    are `shifted_sigmas`, which is what DanceGRPO trains on. The timestep stays the float the pipeline
    passes: `sigma * num_train_timesteps`, never truncated.
    """
    if shift is not None:
        sigmas = shifted_sigmas(solver_steps, shift).to(torch.float32)
        return sigmas, sigmas[:-1] * scheduler.config.num_train_timesteps
    extra = {} if mu is None else {"mu": mu}
    scheduler.set_timesteps(solver_steps, device="cpu", **extra)
    return scheduler.sigmas.to("cpu", torch.float32), scheduler.timesteps.to("cpu", torch.float32)
