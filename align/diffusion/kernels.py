"""The transition kernel of a rectified flow: sampling and replay are one function.

Notation: latent `x` at noise level `sigma`, next level `sigma_next`, `delta = sigma - sigma_next > 0`.
The model predicts the velocity `v` of `x = (1 - sigma) x0 + sigma noise`, hence

    x0_hat = x - sigma v        noise_hat = x + (1 - sigma) v

Every kernel moves along the same two estimates and differs in two numbers per step only, how much of
the estimated noise it keeps and how much fresh noise it adds:

    mean   = (1 - sigma_next) x0_hat + noise_coef noise_hat
           = x - delta v + (noise_coef - sigma_next) noise_hat          (the form computed here)
    x_next = mean + std n,   n ~ N(0, I)
    logp   = reduce over latent entries of  -(x_next - mean)^2 / (2 std^2) - log std - log(2 pi) / 2

The second form is Euler's step plus a correction that vanishes for `ode`, which therefore equals
`FlowMatchEulerDiscreteScheduler` bit for bit.

| kind            | noise_coef                            | std                        | eta            |
|-----------------|---------------------------------------|----------------------------|----------------|
| `ode`           | sigma_next                            | 0                          | unused         |
| `dance_sde`     | sigma_next - eta^2 delta / (2 sigma)  | eta sqrt(delta)            | .3             |
| `flow_sde`      | sigma_next - g^2 delta / (2 sigma)    | g sqrt(delta)              | .7             |
| `cps`           | sigma_next cos(eta pi / 2)            | sigma_next sin(eta pi / 2) | .8             |
| `precise`       | sigma_next c                          | sigma_next sqrt(1 - c^2)   | 1.5            |
| `dance_precise` | sigma_next c                          | sigma_next sqrt(1 - c^2)   | .3             |

`flow_sde`: `g = eta sqrt(sigma / (1 - sigma))`, with `1 - sigma_next` under the root at sigma = 1.
`precise`: `c = [sigma_next (1 - sigma) / (sigma (1 - sigma_next))]^(eta^2 / 2)`, 0 at sigma = 1.
`dance_precise`: `c = exp(-(eta^2 / 2)(1 / sigma_next - 1 / sigma))`, 0 at sigma_next = 0.
`precise` and `dance_precise` solve Flow-SDE and Dance-SDE exactly for a frozen x0_hat.

Sources: DanceGRPO (arXiv 2505.07818, eq. 8), Flow-GRPO (2505.05470), CPS (2509.05952), Precise (2605.23522).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from align.errors import KernelError
from align.registry import suggest

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def _ode(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    return sigma_next, 0.0


def _euler_maruyama(g: float, sigma: float, sigma_next: float) -> tuple[float, float]:
    delta = sigma - sigma_next
    return sigma_next - g * g * delta / (2 * sigma), g * math.sqrt(delta)


def _dance_sde(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    return _euler_maruyama(eta, sigma, sigma_next)


def _flow_sde(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    signal = 1 - sigma if sigma < 1 else 1 - sigma_next
    return _euler_maruyama(eta * math.sqrt(sigma / signal), sigma, sigma_next)


def _cps(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    angle = eta * math.pi / 2
    return sigma_next * math.cos(angle), sigma_next * math.sin(angle)


def _retain(c: float, sigma_next: float) -> tuple[float, float]:
    return sigma_next * c, sigma_next * math.sqrt(1 - c * c)


def _precise(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    ratio = sigma_next * (1 - sigma) / (sigma * (1 - sigma_next))
    return _retain(ratio ** (eta * eta / 2) if eta else 1.0, sigma_next)


def _dance_precise(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    if sigma_next == 0:
        return _retain(0.0, sigma_next)
    return _retain(math.exp(-(eta * eta / 2) * (1 / sigma_next - 1 / sigma)), sigma_next)


KERNELS: dict[str, Callable[[float, float, float], tuple[float, float]]] = {
    "ode": _ode,
    "dance_sde": _dance_sde,
    "flow_sde": _flow_sde,
    "cps": _cps,
    "precise": _precise,
    "dance_precise": _dance_precise,
}


def coefficients(kind: str, sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Return `(noise_coef, std)` of one step of kernel `kind`, in double precision.

    Raises:
        KernelError: an unknown kind, levels that do not descend within (0, 1], or a negative eta.
    """
    if kind not in KERNELS:
        raise KernelError(f"Unknown kernel {kind!r}", do=suggest(kind, KERNELS))
    if not 0 <= sigma_next < sigma <= 1:
        raise KernelError(
            "Noise levels must descend",
            where=f"sigma {sigma:g} to {sigma_next:g}",
            why="a step needs 1 >= sigma > sigma_next >= 0",
        )
    if eta < 0:
        raise KernelError("A kernel's eta cannot be negative", where=f"eta {eta:g}")
    return KERNELS[kind](sigma, sigma_next, eta)


@dataclass(frozen=True)
class StepTable:
    """The numbers of S solver steps, one row a step, all float64 `[S]`.

    Args:
        kind, eta: the kernel of the stochastic steps.
        sigma, sigma_next: noise levels before and after the step.
        correction: `noise_coef - sigma_next`.
        std: the true standard deviation of the step; 0 marks a deterministic step.
        timestep: what the model is told, exactly as the pipeline tells it.
    """

    kind: str
    eta: float
    sigma: Tensor
    sigma_next: Tensor
    correction: Tensor
    std: Tensor
    timestep: Tensor

    def __len__(self) -> int:
        return len(self.sigma)

    @property
    def stochastic_steps(self) -> list[int]:
        """Indices of the steps that have a density, hence can be trained."""
        return [i for i, std in enumerate(self.std.tolist()) if std > 0]

    def jacobian(self) -> Tensor:
        """Return `d mean / d v` of every step, `[S]`: `-delta + (noise_coef - sigma_next)(1 - sigma)`."""
        return -(self.sigma - self.sigma_next) + self.correction * (1 - self.sigma)


def step_table(kind: str, eta: float, sigmas: Tensor, timesteps: Tensor) -> StepTable:
    """Tabulate kernel `kind` on the levels `sigmas` `[S + 1]`, descending to 0.

    The last step, which ends at sigma = 0, is always deterministic: its mean is x0_hat, that is what
    gets decoded, and no noise drawn there could touch the reward. It is never trained.

    Raises:
        KernelError: levels that do not descend to 0, or timesteps that are not one a step.
    """
    levels = [float(s) for s in sigmas]
    if len(levels) < 2 or levels[-1] != 0.0:
        raise KernelError("A schedule must end at sigma = 0", why=f"it ends at {levels[-1] if levels else 'nothing'}")
    if len(timesteps) != len(levels) - 1:
        raise KernelError(
            "A schedule needs one timestep a step", why=f"got {len(timesteps)} for {len(levels) - 1} steps"
        )
    rows = [coefficients(kind, a, b, eta) if b > 0 else (0.0, 0.0) for a, b in zip(levels, levels[1:], strict=False)]
    levels_64 = torch.tensor(levels, dtype=torch.float64)
    return StepTable(
        kind=kind,
        eta=eta,
        sigma=levels_64[:-1],
        sigma_next=levels_64[1:],
        correction=torch.tensor([coef for coef, _ in rows], dtype=torch.float64) - levels_64[1:],
        std=torch.tensor([std for _, std in rows], dtype=torch.float64),
        timestep=timesteps.detach().to("cpu", torch.float64),
    )


@dataclass(frozen=True)
class Transition:
    """One step of B samples: `x_next`, `mean` and `x0_hat` like x; `std` and `logp` `[B]`.

    `logp` is None where it was not asked for.
    """

    x_next: Tensor
    mean: Tensor
    std: Tensor
    x0_hat: Tensor
    logp: Tensor | None


def gaussian_logp(x_next: Tensor, mean: Tensor, std: Tensor, reduction: str = "mean") -> Tensor:
    """Return the full Gaussian log-density of `x_next` `[B, ...]`, reduced over latent entries to `[B]`.

    `-(x_next - mean)^2 / (2 std^2) - log std - log(2 pi) / 2`, its mean (nats per entry) or sum (nats).
    Accumulated and returned in float64: the sum over an image latent is some 1e5 nats, where float32
    would resolve no better than .01.

    Raises:
        KernelError: a std of 0, which has no density, or an unknown reduction.
    """
    if not bool((std > 0).all()):
        raise KernelError(
            "A deterministic step has no log-probability",
            why="its std is 0",
            do="Train stochastic steps only: use a kernel other than 'ode' with eta above 0, and never the last step",
        )
    if reduction not in ("mean", "sum"):
        raise KernelError(f"Unknown log-prob reduction {reduction!r}", do="Choose 'mean' or 'sum'")
    scaled = ((x_next - mean).double() / _column(std.double(), mean)).flatten(1)
    per_entry = -0.5 * (scaled * scaled).mean(1) - std.double().log() - _HALF_LOG_2PI
    return per_entry if reduction == "mean" else per_entry * scaled.shape[1]


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *([1] * (like.ndim - 1)))


def transition(
    x: Tensor,
    velocity: Tensor,
    table: StepTable,
    step: Tensor | int,
    *,
    noise: Tensor | None = None,
    x_next: Tensor | None = None,
    reduction: str | None = None,
) -> Transition:
    """Take, or score, one step of B samples. Rollout gives `noise`; replay gives `x_next`.

    Args:
        x: latents `[B, ...]`, float32 or float64: a half-precision trajectory cannot be replayed exactly.
        velocity: the model's prediction at `x`.
        table: the schedule's numbers.
        step: the step index, or one per sample `[B]`; samples of one call may stand at different steps.
        noise: `n`, standard normal like x; needed at stochastic steps when sampling.
        x_next: the stored outcome to score.
        reduction: "mean" or "sum" for the log-probability, None for none.

    Raises:
        KernelError: latents below float32, both or neither of noise and x_next at a stochastic step, or
            a log-probability asked for at a deterministic step.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise KernelError(
            "Trajectories are kept in float32", why=f"got {x.dtype}", do="Cast the latents, not the kernel"
        )
    index = (
        torch.as_tensor(step, device="cpu").expand(x.shape[0])
        if not torch.is_tensor(step) or step.ndim == 0
        else step.cpu()
    )
    row = {
        name: getattr(table, name)[index].to(x.device, x.dtype) for name in ("sigma", "sigma_next", "correction", "std")
    }
    sigma, std = _column(row["sigma"], x), row["std"]
    velocity = velocity.to(x.dtype)

    delta = sigma - _column(row["sigma_next"], x)
    noise_hat = x + (1 - sigma) * velocity
    mean = x - delta * velocity + _column(row["correction"], x) * noise_hat
    if x_next is None:
        if noise is None and bool((std > 0).any()):
            raise KernelError("A stochastic step needs its noise", do="Pass noise= to sample or x_next= to score")
        x_next = mean if noise is None else mean + _column(std, x) * noise.to(x.dtype)
    elif noise is not None:
        raise KernelError("A step is sampled or scored, not both", do="Pass noise= or x_next=, not the two")
    elif x_next.dtype != x.dtype:
        raise KernelError("A stored latent lost precision", why=f"x is {x.dtype} and x_next {x_next.dtype}")
    return Transition(
        x_next=x_next,
        mean=mean,
        std=std,
        x0_hat=x - sigma * velocity,
        logp=None if reduction is None else gaussian_logp(x_next, mean, std, reduction),
    )
