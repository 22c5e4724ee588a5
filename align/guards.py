"""Invariants that stop a run before it harms the weights: finite numbers, a first ratio of 1, enough rewards, drift."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from align.errors import GuardError

if TYPE_CHECKING:
    import torch

    from align.groupstats import Estimate

FIRST_RATIO_TOLERANCE = {"fp32": 1e-6, "bf16": 1e-3}
"""Largest |log ratio| (nats per latent entry) before the first update, by compute precision."""


def require_finite(value: torch.Tensor, what: str, where: str) -> None:
    """Raise unless every entry of `value` is finite.

    Raises:
        GuardError: a NaN or an infinity.
    """
    if not bool(value.detach().isfinite().all()):
        raise GuardError(
            f"{what} is not finite",
            where=where,
            why="a NaN or an infinity appeared before the optimizer step, which was not taken",
            do="The weights are unchanged. Lower optimizer.lr, use fp32, or look at the rewards of this step",
        )


def gradient_norm(parameters: Iterable[torch.nn.Parameter], where: str) -> torch.Tensor:
    """Return the global gradient L2 norm.

    Raises:
        GuardError: a gradient that is not finite, or no gradient at all.
    """
    import torch

    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        raise GuardError("No trained weight received a gradient", where=where, why="the loss does not depend on them")
    norm = torch.nn.utils.get_total_norm(gradients)
    require_finite(norm, "The gradient norm", where)
    return norm


def require_first_ratio(
    logp: torch.Tensor, logp_old: torch.Tensor, std: torch.Tensor, tolerance: float, where: str
) -> float:
    """Check that replay reproduces the rollout before any update; return max |ratio - 1|.

    Replaying in other batch shapes moves float32 latents by a rounding step, which a step of tiny std
    magnifies: below a std of .05 the tolerance grows as .05 / std.

    Raises:
        GuardError: |log ratio| beyond the tolerance anywhere, or not a number.
    """
    error = (logp - logp_old).detach().double()
    scaled = error.abs() * (std.to(error) / 0.05).clamp(max=1.0)
    worst = float(error.abs().max())
    if not float(scaled.max()) <= tolerance:
        raise GuardError(
            "The first ratio is not 1",
            where=where,
            why=f"before any update |log ratio| reaches {worst:.2e}, and at most {tolerance:.0e} is rounding",
            do="Rollout and replay differ: look for dropout, another autocast, a guidance order, a noise level off by "
            "one, or latents stored below float32",
        )
    return float(error.expm1().abs().max())


def require_valid_share(valid: int, total: int, least: float, where: str, example: str) -> None:
    """Raise when fewer than the share `least` of the samples have a reward.

    Raises:
        GuardError: too many failed rewards, with one of their messages.
    """
    if total and valid < least * total:
        raise GuardError(
            "Too many rewards failed",
            where=where,
            why=f"{valid} of {total} samples have one, {least:.0%} are required; one says: {example or 'nothing'}",
            do="Nothing was trained on this step. Mend the reward and resume",
        )


@dataclass(frozen=True)
class Drift:
    """A drift verdict: `hacked` when the trained reward rose while the held-out one fell."""

    hacked: bool
    message: str


def drift(reward_gain: float, heldout_gain: Estimate) -> Drift:
    """Compare the change of the trained reward with the paired change of a reward never trained on.

    Alarm when the trained reward rose and the upper end of the held-out change's interval is below 0.
    """
    hacked = reward_gain > 0 and heldout_gain.n > 0 and heldout_gain.ci_high < 0
    message = (
        f"the trained reward changed by {reward_gain:+.3f} and the held-out reward by {heldout_gain.mean:+.3f} "
        f"(95 % CI {heldout_gain.ci_low:+.3f} to {heldout_gain.ci_high:+.3f})"
    )
    return Drift(hacked, ("Reward hacking: " + message) if hacked else message)
