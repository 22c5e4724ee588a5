"""The transition kernel: sampling and replay are one function, for rectified flows and for diffusion.

Notation: a latent `x = alpha x0 + sigma noise` at one level of the schedule, `(alpha_next, sigma_next)` at the
next, `delta = sigma - sigma_next > 0`. A rectified flow has `alpha = 1 - sigma`, variance-preserving (VP)
diffusion `alpha^2 + sigma^2 = 1`. The model's output `v` estimates both ends:

| prediction      | x0_hat                  | noise_hat             |
|-----------------|-------------------------|-----------------------|
| `velocity`      | x - sigma v             | x + (1 - sigma) v     |
| `epsilon`       | (x - sigma v) / alpha   | v                     |
| `v_prediction`  | alpha x - sigma v       | sigma x + alpha v     |

Every kernel moves along the same two estimates and differs in two numbers per step only, how much of
the estimated noise it keeps and how much fresh noise it adds:

    mean   = alpha_next x0_hat + noise_coef noise_hat  =  mean_x x + mean_v v
    x_next = mean + std n,   n ~ N(0, I)
    logp   = reduce over latent entries of  -(x_next - mean)^2 / (2 std^2) - log std - log(2 pi) / 2

`mean_x` and `mean_v` are worked out once per step in double precision. For `ode` on a flow they are 1 and
-delta, so that it equals `FlowMatchEulerDiscreteScheduler` bit for bit; `mean_v` is also d mean / d v.

| kind            | path | noise_coef                            | std                        | eta    |
|-----------------|------|---------------------------------------|----------------------------|--------|
| `ode`           | both | sigma_next                            | 0                          | unused |
| `dance_sde`     | flow | sigma_next - eta^2 delta / (2 sigma)  | eta sqrt(delta)            | .3     |
| `flow_sde`      | flow | sigma_next - g^2 delta / (2 sigma)    | g sqrt(delta)              | .7     |
| `cps`           | flow | sigma_next cos(eta pi / 2)            | sigma_next sin(eta pi / 2) | .8     |
| `precise`       | flow | sigma_next c                          | sigma_next sqrt(1 - c^2)   | 1.5    |
| `dance_precise` | flow | sigma_next c                          | sigma_next sqrt(1 - c^2)   | .3     |
| `ddim`          | VP   | sqrt(sigma_next^2 - std^2)            | see below                  | 1      |

`flow_sde`: `g = eta sqrt(sigma / (1 - sigma))`, with `1 - sigma_next` under the root at sigma = 1.
`precise`: `c = [sigma_next (1 - sigma) / (sigma (1 - sigma_next))]^(eta^2 / 2)`, 0 at sigma = 1.
`dance_precise`: `c = exp(-(eta^2 / 2)(1 / sigma_next - 1 / sigma))`, 0 at sigma_next = 0.
`ddim`: `std = eta (sigma_next / sigma) sqrt(1 - alpha^2 / alpha_next^2)`; with eta 1, the DDPM posterior.
`precise` and `dance_precise` solve Flow-SDE and Dance-SDE exactly for a frozen x0_hat.

Sources: DanceGRPO (arXiv 2505.07818, eq. 7-8), Flow-GRPO (2505.05470), CPS (2509.05952), Precise
(2605.23522), DDIM (2010.02502, eq. 12, 16).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from align.diffusion.schedules import Schedule
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


def _ddim(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    shrink = max(0.0, 1 - (1 - sigma * sigma) / (1 - sigma_next * sigma_next))
    std = eta * sigma_next / sigma * math.sqrt(shrink)
    return math.sqrt(max(0.0, sigma_next * sigma_next - std * std)), std


KERNELS: dict[str, Callable[[float, float, float], tuple[float, float]]] = {
    "ode": _ode,
    "dance_sde": _dance_sde,
    "flow_sde": _flow_sde,
    "cps": _cps,
    "precise": _precise,
    "dance_precise": _dance_precise,
    "ddim": _ddim,
}


def coefficients(kind: str, sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Return `(noise_coef, std)` of one step of kernel `kind`, in double precision.

    Raises:
        KernelError: an unknown kind, levels that do not descend within (0, 1], or an eta out of range.
    """
    if kind not in KERNELS:
        raise KernelError(f"Unknown kernel {kind!r}", do=suggest(kind, KERNELS))
    if not 0 <= sigma_next < sigma <= 1:
        raise KernelError(
            "Noise levels must descend",
            where=f"sigma {sigma:g} to {sigma_next:g}",
            why="a step needs 1 >= sigma > sigma_next >= 0",
        )
    if eta < 0 or (kind == "ddim" and eta > 1):
        limit = "from 0 to 1" if kind == "ddim" else "0 or more"
        raise KernelError("A kernel's eta is out of range", where=f"{kind}, eta {eta:g}", do=f"Set it to {limit}")
    return KERNELS[kind](sigma, sigma_next, eta)


def estimates(prediction: str, alpha: float, sigma: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return `x0_hat` and `noise_hat` as weights of `(x, v)`, for a model that predicts `prediction`.

    Raises:
        KernelError: an unknown prediction, or an epsilon prediction where no signal is left.
    """
    if prediction == "velocity":
        return (1.0, -sigma), (1.0, 1 - sigma)
    if prediction == "v_prediction":
        return (alpha, -sigma), (sigma, alpha)
    if prediction != "epsilon":
        known = ("velocity", "epsilon", "v_prediction")
        raise KernelError(f"Unknown prediction type {prediction!r}", do=suggest(prediction, known))
    if alpha == 0:
        raise KernelError("An epsilon prediction says nothing of x0 where alpha is 0", do="Use a v_prediction model")
    return (1 / alpha, -sigma / alpha), (0.0, 1.0)


@dataclass(frozen=True)
class StepTable:
    """The numbers of S solver steps, one row a step, all float64 `[S]`.

    Args:
        kind, eta: the kernel of the stochastic steps.
        alpha, alpha_next: signal levels before and after the step.
        sigma, sigma_next: noise levels before and after the step.
        mean_x, mean_v: the mean is `mean_x x + mean_v v`.
        x0_x, x0_v: x0_hat is `x0_x x + x0_v v`.
        std: the true standard deviation of the step; 0 marks a deterministic step.
        timestep: what the model is told, exactly as the pipeline tells it.
    """

    kind: str
    eta: float
    alpha: Tensor
    alpha_next: Tensor
    sigma: Tensor
    sigma_next: Tensor
    mean_x: Tensor
    mean_v: Tensor
    x0_x: Tensor
    x0_v: Tensor
    std: Tensor
    timestep: Tensor

    def __len__(self) -> int:
        return len(self.sigma)

    @property
    def stochastic_steps(self) -> list[int]:
        """Indices of the steps that have a density, hence can be trained."""
        return [i for i, std in enumerate(self.std.tolist()) if std > 0]


def step_table(kind: str, eta: float, schedule: Schedule, stochastic: Collection[int] | None = None) -> StepTable:
    """Tabulate kernel `kind` on the levels of `schedule`.

    Only the steps in `stochastic`, all of them when None, are random; the others are those of `ode`.

    The last step is always deterministic: on a flow its mean is x0_hat, that is what gets decoded, and
    no noise drawn there could touch the reward. It is never trained.

    Raises:
        KernelError: a kernel made for the other path, or levels that do not descend.
    """
    flow = schedule.prediction == "velocity"
    if kind in KERNELS and kind != "ode" and flow == (kind == "ddim"):
        made_for, use = ("diffusion", "a flow kernel such as dance_sde") if flow else ("rectified flows", "ddim")
        raise KernelError(
            f"The kernel {kind!r} does not run on this model",
            why=f"it is made for {made_for}, and the model predicts {schedule.prediction}",
            do=f"Set sampler.kernel to {use}",
        )

    def random(s: int) -> bool:
        return s < len(schedule) - 1 and (stochastic is None or s in stochastic)

    levels = list(zip(schedule.alpha.tolist(), schedule.sigma.tolist(), strict=True))
    rows = []
    for s, ((alpha, sigma), (alpha_next, sigma_next)) in enumerate(zip(levels, levels[1:], strict=False)):
        noise_coef, std = coefficients(kind if random(s) else "ode", sigma, sigma_next, eta)
        (x0_x, x0_v), (noise_x, noise_v) = estimates(schedule.prediction, alpha, sigma)
        if flow:  # alpha_next x0_hat + sigma_next noise_hat is x - delta v exactly; add what is kept beyond it
            extra = noise_coef - sigma_next
            mean = (1 + extra, -(sigma - sigma_next) + extra * (1 - sigma))
        else:
            mean = (alpha_next * x0_x + noise_coef * noise_x, alpha_next * x0_v + noise_coef * noise_v)
        rows.append((alpha, alpha_next, sigma, sigma_next, *mean, x0_x, x0_v, std))
    return StepTable(kind, eta, *torch.tensor(rows, dtype=torch.float64).T, timestep=schedule.timestep.double())


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
        velocity: the model's output at `x`, whatever the schedule says it predicts.
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
    if not torch.is_tensor(step) or step.ndim == 0:
        step = torch.as_tensor(step).expand(x.shape[0])
    index, velocity = step.cpu(), velocity.to(x.dtype)

    def row(name: str) -> Tensor:
        return _column(getattr(table, name)[index].to(x.device, x.dtype), x)

    std = table.std[index].to(x.device, x.dtype)
    mean = row("mean_x") * x + row("mean_v") * velocity
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
        x0_hat=row("x0_x") * x + row("x0_v") * velocity,
        logp=None if reduction is None else gaussian_logp(x_next, mean, std, reduction),
    )


def second_order(x: Tensor, x0_hat: Tensor, before: tuple[Tensor, int] | None, table: StepTable, step: int) -> Tensor:
    """Take a deterministic step of DPM-Solver++(2M), which looks at the estimate of the step before.

        lambda = log(alpha / sigma),  h = lambda_next - lambda,  r = h_before / h
        D      = x0_hat + (x0_hat - x0_hat_before) / (2 r)
        x_next = sigma_next / sigma x + (alpha_next - sigma_next alpha / sigma) D

    First order, which is the ODE's own step, without a step before, from pure noise, and to the last level.

    Args:
        x, x0_hat: latents and the estimate at them, `[B, ...]`.
        before: `x0_hat` of the step before, and its index.

    Source: DPM-Solver++ (arXiv 2211.01095), the midpoint form.
    """
    alpha, alpha_next, sigma, sigma_next = (
        float(getattr(table, name)[step]) for name in ("alpha", "alpha_next", "sigma", "sigma_next")
    )
    guess = x0_hat
    if before is not None and alpha > 0 and sigma_next > 0 and float(table.alpha[before[1]]) > 0:
        last = before[1]
        h = math.log(alpha_next / sigma_next) - math.log(alpha / sigma)
        h_before = math.log(alpha / sigma) - math.log(float(table.alpha[last]) / float(table.sigma[last]))
        guess = x0_hat + (h / (2 * h_before)) * (x0_hat - before[0])
    return (sigma_next / sigma) * x + (alpha_next - sigma_next * alpha / sigma) * guess
