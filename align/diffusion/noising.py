"""Clean latents noised to levels of a schedule, and what the model would say if it knew them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.diffusion.kernels import estimates
from align.diffusion.policy import Policy
from align.diffusion.schedules import Schedule
from align.errors import ConfigError
from align.seeding import uniform

FINE_LEVELS = 250


@dataclass(frozen=True)
class NoisedLatents:
    """N rows of `x = alpha x0 + sigma noise`.

    Args:
        x0, x: `[N, ...]`.
        timestep, sigma: `[N]`, what the model is told, and the noise level.
        x0_x, x0_v: x0_hat is `x0_x x + x0_v output`, `[N, 1, ...]`.
        target: what the model would say if it knew `x0`, `[N, ...]`: noise - x0, noise, or alpha noise - sigma x0.
    """

    x0: Tensor
    x: Tensor
    timestep: Tensor
    sigma: Tensor
    x0_x: Tensor
    x0_v: Tensor
    target: Tensor


def training_levels(policy: Policy, levels: str, solver_steps: int, shift: float | None, draws: int) -> Schedule:
    """Return the levels that latents are noised to: the solver's, or `FINE_LEVELS` of the same schedule.

    Raises:
        ConfigError: more draws than levels.
    """
    steps = FINE_LEVELS if levels == "fine" else solver_steps
    schedule = policy.family.schedule(steps, shift, policy.latent_shape)
    if draws > len(schedule):
        raise ConfigError(
            "More draws than levels", where="objective.draws", why=f"{draws} of {len(schedule)}",
            do="Lower it, raise sampler.solver_steps, or set objective.levels: fine",
        )  # fmt: skip
    return schedule


def draw_level(schedule: Schedule, draw: int, draws: int, *key: int | str) -> int:
    """Return a level in stratum `draw` of `draws`, as a function of `key`."""
    return min(len(schedule) - 1, int((draw + uniform(*key, "level")) * len(schedule) / draws))


def noised(x0: Tensor, noise: Tensor, level: Sequence[int], schedule: Schedule) -> NoisedLatents:
    """Noise latents `x0` `[N, ...]` to their `level` `[N]` of `schedule`."""
    rows, device = torch.as_tensor(level), x0.device
    alpha, sigma = (values[rows].to(device, x0.dtype) for values in (schedule.alpha, schedule.sigma))
    weights = [estimates(schedule.prediction, float(schedule.alpha[s]), float(schedule.sigma[s]))[0] for s in rows]
    x0_x, x0_v = (torch.tensor(values, device=device, dtype=x0.dtype) for values in zip(*weights, strict=True))

    def column(values: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * (x0.ndim - 1))

    target = {
        "velocity": lambda: noise - x0,
        "epsilon": lambda: noise,
        "v_prediction": lambda: column(alpha) * noise - column(sigma) * x0,
    }[schedule.prediction]()
    return NoisedLatents(
        x0=x0, x=column(alpha) * x0 + column(sigma) * noise, timestep=schedule.timestep[rows].to(device), sigma=sigma,
        x0_x=column(x0_x), x0_v=column(x0_v), target=target,
    )  # fmt: skip
