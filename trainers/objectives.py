"""Objectives as pure functions: log-probabilities and advantages in, one loss per term and its statistics out.

How the clip range is meant. With a mean log-prob, `rho = (p_new / p_old)^(1 / dim)`, so a range of 1e-4
allows `1e-4 dim` nats of the whole latent: 1.6 for a 512-pixel Stable Diffusion image, 90 for a video.
`clip_bounds` gives the same bound in nats to every size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from align.errors import ConfigError


@dataclass(frozen=True)
class Terms:
    """The loss of N terms `[N]`, and quantities to average over them, `[N]` each, detached.

    `first_ratio` is what `guards.first_ratio_errors` found, where it was asked.
    """

    loss: Tensor
    stats: Mapping[str, Tensor]
    first_ratio: tuple[float, float] | None = None


def grpo_clip(logp: Tensor, logp_old: Tensor, advantage: Tensor, *, clip_low: float, clip_high: float) -> Terms:
    """The clipped policy-gradient objective of GRPO, one term per trained (sample, step).

        rho  = exp(logp - logp_old)
        loss = max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high))

    A term is clipped where the bound is active: rho > 1 + clip_high with A > 0, or rho < 1 - clip_low
    with A < 0; its gradient is zero.

    Args:
        logp, logp_old: `[N]`, current and stored log-density; mean or sum reduction alike.
        advantage: `[N]`.
        clip_low, clip_high: how far the ratio may fall and rise.

    Raises:
        ConfigError: shapes that differ.

    Source: DanceGRPO (arXiv 2505.07818), eq. 6 without its KL term.
    """
    if not logp.shape == logp_old.shape == advantage.shape:
        raise ConfigError(
            "An objective needs one log-prob, old log-prob and advantage a term",
            why=f"{tuple(logp.shape)}, {tuple(logp_old.shape)}, {tuple(advantage.shape)}",
        )
    log_ratio = logp - logp_old
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high))
    with torch.no_grad():
        stats = {
            "ratio": ratio.detach(),
            "clip_share_low": ((ratio < 1 - clip_low) & (advantage < 0)).float(),
            "clip_share_high": ((ratio > 1 + clip_high) & (advantage > 0)).float(),
            "approx_kl": (ratio - 1) - log_ratio,
        }
    return Terms(loss, stats)


@dataclass(frozen=True)
class Steps:
    """N stored solver steps under the current policy: what a loss may look at.

    Args:
        logp, logp_old, advantage: `[N]`.
        mean, mean_old, x_next: means of the step, now and when it was taken, and where it went, `[N, ...]`.
        std: true standard deviation of each step `[N]`.
        delta: `sigma - sigma_next` of each step `[N]`.
        clip_low, clip_high: how far a ratio may fall and rise.
        threshold: largest KL of a step that Flow-DPPO leaves alone.
    """

    logp: Tensor
    logp_old: Tensor
    advantage: Tensor
    mean: Tensor
    mean_old: Tensor | None
    x_next: Tensor
    std: Tensor
    delta: Tensor
    clip_low: float
    clip_high: float
    threshold: float

    @property
    def shift(self) -> Tensor:
        """How far the mean has moved since the step was taken, float64 `[N, D]`."""
        return (self.mean - self.mean_old).double().flatten(1)

    @property
    def noise(self) -> Tensor:
        """The noise the step was taken with, `(x_next - mean_old) / std`, float64 `[N, D]`."""
        return (self.x_next - self.mean_old).double().flatten(1) / self.std.double()[:, None]

    @property
    def kl(self) -> Tensor:
        """The KL of the step then from the step now, per latent entry: `mean(shift^2) / (2 std^2)`, `[N]`."""
        return self.shift.square().mean(1) / (2 * self.std.double().square())


def grpo_guard(steps: Steps) -> Terms:
    """The clipped objective on a ratio whose mean does not drift below 1.

        log rho        = mean(e shift / std - shift^2 / (2 std^2))      of the Gaussian step, e ~ N(0, I)
        log rho_guard  = (log rho + mean(shift^2) / (2 std^2)) std  =  mean(e shift)

    With the true std the guarded log-ratio has mean 0 at every step, and a spread that no longer grows as std falls.
    Its clip ranges are therefore smaller than those of `grpo_clip`; 2e-6 is usual.

    Source: GRPO-Guard (arXiv 2510.22319), with the step's true standard deviation.
    """
    guarded = (steps.noise * steps.shift).mean(1)
    return grpo_clip(
        guarded, torch.zeros_like(guarded), steps.advantage, clip_low=steps.clip_low, clip_high=steps.clip_high
    )


def grpo_guard_delta(steps: Steps) -> Terms:
    """`grpo_guard` with each term divided by its `delta = sigma - sigma_next`, as Flow-GRPO's release has it."""
    terms = grpo_guard(steps)
    return Terms(terms.loss / steps.delta.to(terms.loss), terms.stats)


def flow_dppo(steps: Steps) -> Terms:
    """Policy gradient that stops where a step has moved too far, by its exact KL in place of a ratio clip.

        keep = not (kl >= threshold and ((rho > 1 and A > 0) or (rho < 1 and A < 0)))
        loss = -A rho keep

    Source: Flow-DPPO (arXiv 2606.11025).
    """
    log_ratio = steps.logp - steps.logp_old
    ratio, advantage = log_ratio.exp(), steps.advantage
    with torch.no_grad():
        far = steps.kl >= steps.threshold
        low, high = far & (ratio < 1) & (advantage < 0), far & (ratio > 1) & (advantage > 0)
        stats = {
            "ratio": ratio.detach(), "clip_share_low": low.float(), "clip_share_high": high.float(),
            "approx_kl": steps.kl.detach(),
        }  # fmt: skip
    return Terms(-advantage * ratio * (~(low | high)), stats)


@dataclass(frozen=True)
class PolicyLoss:
    """A loss over stored solver steps, and whether it needs the means they were taken with."""

    terms: Callable[[Steps], Terms]
    needs_mean: bool = True


LOSSES: dict[str, PolicyLoss] = {
    "clip": PolicyLoss(
        lambda s: grpo_clip(s.logp, s.logp_old, s.advantage, clip_low=s.clip_low, clip_high=s.clip_high), False
    ),
    "guard": PolicyLoss(grpo_guard),
    "guard_delta": PolicyLoss(grpo_guard_delta),
    "dppo": PolicyLoss(flow_dppo),
}
"""The values of `objective.loss`. To add one: a function of `Steps`, and a line here and in `ObjectiveConfig.loss`."""


def clip_bounds(
    low: float, high: float | None, *, unit: str, reduction: str, dim: int, scale: float = 1.0
) -> tuple[float, float]:
    """Return `(clip_low, clip_high)` for ratios of the given log-prob reduction.

    Args:
        low, high: the configured ranges; `high` None means the same as `low`.
        unit: "ratio" leaves them as they are; "nats" takes them as nats of the whole latent.
        reduction: "mean" or "sum", of the log-prob over `dim` latent entries.
        scale: factor of an adaptive clip.

    Raises:
        ConfigError: an unknown unit.
    """
    if unit not in ("ratio", "nats"):
        raise ConfigError(f"Unknown clip unit {unit!r}", do="Choose ratio or nats")
    factor = scale / dim if unit == "nats" and reduction == "mean" else scale
    return min(low * factor, 0.999), (low if high is None else high) * factor


def adapt_clip(scale: float, clipped: float, target: float) -> float:
    """Return the next factor of an adaptive clip: 10 % wider while more than `target` of the terms are clipped.

    Bounded to 1e-3 .. 1e3. A share that is not a number (nothing was trained) leaves the factor alone.
    """
    if clipped > target:
        scale *= 1.1
    elif clipped < target:
        scale /= 1.1
    return min(max(scale, 1e-3), 1e3)


def velocity_distance(output: Tensor, reference: Tensor) -> Tensor:
    """Return `mean (v - v_ref)^2` over latent entries, `[N]`: a regulariser that no sampler enters.

    Value and gradient are 0 where the two agree.
    """
    return (output - reference).square().flatten(1).mean(1)


def gaussian_kl(output: Tensor, reference: Tensor, mean_v: Tensor, std: Tensor) -> Tensor:
    """Return the KL of the two sampling steps per latent entry, `[N]`.

        KL = (mean - mean_ref)^2 / (2 std^2) = mean_v^2 (v - v_ref)^2 / (2 std^2)

    Args:
        output, reference: what the two models say, `[N, ...]`.
        mean_v: d mean / d v of each term's step `[N]`.
        std: true standard deviation of each term's step `[N]`.
    """
    return velocity_distance(output, reference) * (mean_v / std).square().to(output.dtype) / 2
