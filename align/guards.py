"""Invariants that stop a run before it harms the weights: finite numbers, a first ratio of 1, saturation.

Whether the reward is being hacked is `trainers.monitor`'s to say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from align.errors import GuardError

if TYPE_CHECKING:
    import numpy as np
    import torch

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


def require_gradient(norm: torch.Tensor, loss_check: torch.Tensor, where: str, *, expected: bool = True) -> None:
    """Refuse an update whose losses or gradient are not finite, or that has no gradient although one is expected.

    Args:
        norm: global gradient L2 norm.
        loss_check: 0 times every loss, summed over tiles and processes: not a number when one was not finite.
        expected: False where all terms may have been clipped, which leaves a gradient of 0.

    Raises:
        GuardError: on every process alike, before the optimizer.
    """
    require_finite(loss_check, "The loss", where)
    require_finite(norm, "The gradient norm", where)
    if expected and float(norm) == 0:
        raise GuardError("No trained weight received a gradient", where=where, why="the loss does not depend on them")


def weights_check(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return 0 times the norm of the weights that this process holds: not a number when the norm is not finite."""
    import torch

    return 0.0 * torch.nn.utils.get_total_norm([_held(p) for p in parameters]).float()


def _held(parameter: Any) -> torch.Tensor:
    """Return what this process holds of a weight, without what fills ZeRO 3's parts up to one size: it is no number."""
    import torch.distributed as dist

    if hasattr(parameter, "ds_tensor"):
        part = parameter.ds_tensor.detach().view(-1)
        return part[: max(parameter.ds_numel - part.numel() * dist.get_rank(), 0)]
    held = parameter.detach()
    return held.to_local() if hasattr(held, "to_local") else held


def require_weights(check: torch.Tensor, where: str) -> None:
    """Refuse a step whose update left weights that are not finite, before it is logged or saved.

    Args:
        check: `weights_check`, summed over processes.

    Raises:
        GuardError: on every process alike.
    """
    if not bool(check.isfinite()):
        raise GuardError(
            "The trained weights are not finite", where=where, why="its update made them so, from a finite gradient",
            do="The step is not kept: the last checkpoint is as it was. Lower optimizer.lr, or use fp32",
        )  # fmt: skip


def first_ratio_errors(logp: torch.Tensor, logp_old: torch.Tensor, std: torch.Tensor) -> tuple[float, float]:
    """Return how far the first ratios are from 1: `(scaled |log ratio|, |ratio - 1|)`, the largest of each.

    Replaying in other batch shapes moves float32 latents by a rounding step, which a step of tiny std
    magnifies: below a std of .05 the scaled error shrinks as std / .05.
    """
    error = (logp - logp_old).detach().double()
    scaled = error.abs() * (std.to(error) / 0.05).clamp(max=1.0)
    return float(scaled.max()), float(error.expm1().abs().max())


def require_first_ratio(scaled: float, worst: float, tolerance: float, where: str) -> None:
    """Check that replay reproduced the rollout before any update; see `first_ratio_errors`.

    Raises:
        GuardError: beyond the tolerance anywhere, or not a number.
    """
    if not scaled <= tolerance or not math.isfinite(worst):
        raise GuardError(
            "The first ratio is not 1",
            where=where,
            why=f"before any update |ratio - 1| reaches {worst:.2e}, and at most {tolerance:.0e} is rounding",
            do="Rollout and replay differ: look for dropout, another autocast, a guidance order, a noise level off by "
            "one, or latents stored below float32; in bf16 also set batch.rollout and batch.tile to the same number",
        )


def require_reference(worst: float, tolerance: float, where: str) -> None:
    """Check that model and reference agree before any update, as the first loss takes for granted.

    Args:
        worst: largest `|error - reference error|` of a row.

    Raises:
        GuardError: beyond the tolerance.
    """
    if worst > tolerance:
        raise GuardError(
            "The model and its reference differ before any update", where=where,
            why=f"their errors are {worst:.2e} apart, and at most {tolerance:.0e} is rounding",
            do="Look for dropout, adapters that do not start at 0, or a reference that is another model",
        )  # fmt: skip


def saturated(values: np.ndarray, calibration: np.ndarray, share: float = 0.25) -> str:
    """Return a message when more than `share` of the values lie above the 99.9 percentile of the calibration set.

    Without training one in a thousand does. A reward that has left the range it was seen in is extrapolating.
    Missing values count on neither side; an empty text means that all is well.
    """
    import numpy as np

    seen, now = calibration[np.isfinite(calibration)], values[np.isfinite(values)]
    if len(seen) < 20 or not len(now):
        return ""
    edge = float(np.quantile(seen, 0.999))
    beyond = float((now > edge).mean())
    if beyond <= share:
        return ""
    return f"{beyond:.0%} of the samples score above {edge:.3g}, which 1 in 1,000 did before training"


def repeated(distances: np.ndarray, base: np.ndarray, share: float = 0.25) -> str:
    """Return a message when more than `share` of samples are as near to another as 1 in 100 was before training."""
    import numpy as np

    seen, now = base[np.isfinite(base)], distances[np.isfinite(distances)]
    if len(seen) < 20 or not len(now):
        return ""
    edge = float(np.quantile(seen, 0.01))
    beyond = float((now < edge).mean())
    if beyond <= share:
        return ""
    return f"{beyond:.0%} of the samples are within {edge:.3g} of another of their prompt; 1 in 100 was before training"


def displaced(values: np.ndarray, base: np.ndarray) -> str:
    """Return a message when the mean of a meter has left the central 98 % of single samples before training."""
    import numpy as np

    seen, now = base[np.isfinite(base)], values[np.isfinite(values)]
    if len(seen) < 20 or not len(now):
        return ""
    low, high, mean = *np.quantile(seen, [0.01, 0.99]), float(now.mean())
    if low <= mean <= high:
        return ""
    return f"its mean is {mean:.3g}; before training 98 % of single samples lay between {low:.3g} and {high:.3g}"
