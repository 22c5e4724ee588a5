"""Transforms of scores, and combinations of several rewards into one.

Both work on the scores of whole groups: B = P G samples, member fastest, gathered over processes. A missing score
stays missing through every transform. With `z` the transformed component, `w` its weight:

    weighted_sum   R = sum_k w_k z_k             missing where a component is
    min            R = min_k w_k z_k             missing where a component is: it might have been the least
    gate           R of the utilities by weighted_sum; where a gate component is not above 0, R = floor

`sum_of_advantages` and `gdpo` combine advantages and not rewards, and live in `trainers/advantages.py`; here they leave
the components side by side.

| transform       | z                                            | parameters                                       |
|-----------------|----------------------------------------------|--------------------------------------------------|
| `affine`        | scale r + shift                              | scale 1, shift 0                                 |
| `clip`          | min(max(r, low), high)                       | low, high; also written as a list                |
| `sigmoid`       | 1 / (1 + exp(-r))                            |                                                  |
| `platt`         | 1 / (1 + exp(-(a r + b)))                    | a, b                                             |
| `isotonic`      | linear between the points (x, y), flat outside | x, y                                           |
| `zscore`        | (r - mean) / std, both frozen; or            | mean, std                                        |
|                 | (r - mean) / (std + eps) of what is at hand  | over: batch or group; ddof 1, eps 1e-4           |
| `rank_in_group` | share of the group's other members below, ties half |                                           |
| `threshold`     | 1 where r > tau, else 0                      | at, or over: group, tau the group's median       |
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.errors import ConfigError, RewardError
from align.groupstats import masked_mean, masked_std
from align.registry import suggest
from align.types import Scores

Transform = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Values `[P, G]`, NaN where missing, and their validity to values `[P, G]`."""


def _affine(scale: float = 1.0, shift: float = 0.0) -> Transform:
    return lambda r, valid: scale * r + shift


def _clip(low: float, high: float) -> Transform:
    if not low < high:
        raise ConfigError("A clip needs low below high", where=f"clip: [{low:g}, {high:g}]")
    return lambda r, valid: np.clip(r, low, high)


def _sigmoid() -> Transform:
    return _platt(1.0, 0.0)


def _platt(a: float, b: float) -> Transform:
    return lambda r, valid: 0.5 * (1 + np.tanh(0.5 * (a * r + b)))  # does not overflow


def _isotonic(x: Sequence[float], y: Sequence[float]) -> Transform:
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if xs.ndim != 1 or xs.shape != ys.shape or len(xs) < 2 or (np.diff(xs) <= 0).any() or (np.diff(ys) < 0).any():
        raise ConfigError("An isotonic table needs as many y as x, x rising and y not falling", where="isotonic")
    return lambda r, valid: np.where(valid, np.interp(np.nan_to_num(r), xs, ys), np.nan)


def _zscore(
    mean: float | None = None, std: float | None = None, over: str | None = None, ddof: int = 1, eps: float = 1e-4
) -> Transform:
    frozen = mean is not None and std is not None
    if frozen == (over is not None) or over not in (None, "batch", "group"):
        raise ConfigError(
            "A zscore is either frozen or taken over what is at hand", where="zscore",
            do="Give mean and std, or over: batch, or over: group",
        )  # fmt: skip
    if frozen:
        if not std > 0:
            raise ConfigError("A frozen zscore needs a std above 0", where=f"zscore: std {std:g}")
        return lambda r, valid: (r - mean) / std
    axis = 1 if over == "group" else None

    def scaled(r: np.ndarray, valid: np.ndarray) -> np.ndarray:
        centre, spread = masked_mean(r, valid, axis), masked_std(r, valid, axis, ddof)
        if axis == 1:
            centre, spread = centre[:, None], spread[:, None]
        return (r - centre) / (np.nan_to_num(spread) + eps)

    return scaled


def _rank_in_group() -> Transform:
    def ranked(r: np.ndarray, valid: np.ndarray) -> np.ndarray:
        both = valid[:, :, None] & valid[:, None, :]
        below = (r[:, :, None] > r[:, None, :]) & both
        equal = (r[:, :, None] == r[:, None, :]) & both
        others = both.sum(2) - 1
        won = below.sum(2) + 0.5 * (equal.sum(2) - 1)
        return np.where(valid, np.divide(won, others, out=np.full(r.shape, 0.5), where=others > 0), np.nan)

    return ranked


def _threshold(at: float | None = None, over: str | None = None) -> Transform:
    if (at is None) == (over is None) or over not in (None, "group"):
        raise ConfigError("A threshold is at a number, or over: group for its median", where="threshold")

    def cut(r: np.ndarray, valid: np.ndarray) -> np.ndarray:
        tau = at if over is None else np.nanmedian(np.where(valid.any(1, keepdims=True), r, 0.0), axis=1)[:, None]
        return np.where(valid, np.where(r > tau, 1.0, 0.0), np.nan)

    return cut


TRANSFORMS: dict[str, Callable[..., Transform]] = {
    "affine": _affine, "clip": _clip, "sigmoid": _sigmoid, "platt": _platt, "isotonic": _isotonic, "zscore": _zscore,
    "rank_in_group": _rank_in_group, "threshold": _threshold,
}  # fmt: skip
"""Name of a transform to its maker, which takes the parameters of the table above."""


def build_transforms(specs: Sequence[Mapping[str, Any]], where: str = "transform") -> list[Transform]:
    """Return the transforms that a configuration lists, such as `[{"zscore": {"over": "batch"}}, {"clip": [-3, 3]}]`.

    Raises:
        ConfigError: an unknown transform or parameter, each with the closest known one.
    """
    made = []
    for spec in specs:
        if len(spec) != 1:
            raise ConfigError("A transform is one name with its parameters", where=where, why=f"found {dict(spec)}")
        (name, given), *_ = spec.items()
        if name not in TRANSFORMS:
            raise ConfigError(f"Unknown transform {name!r}", where=where, do=suggest(name, TRANSFORMS))
        accepted = list(inspect.signature(TRANSFORMS[name]).parameters)
        if isinstance(given, (list, tuple)):
            given = dict(zip(accepted, given, strict=False)) if len(given) <= len(accepted) else {"": given}
        if given is not None and not isinstance(given, Mapping):
            given = {accepted[0] if accepted else "": given}
        for parameter in given or {}:
            if parameter not in accepted:
                raise ConfigError(
                    f"The transform {name!r} has no parameter {parameter!r}",
                    where=where,
                    do=suggest(parameter, accepted),
                )  # fmt: skip
        try:
            made.append(TRANSFORMS[name](**(given or {})))
        except TypeError as error:  # a parameter without default was not given
            raise ConfigError(f"The transform {name!r} lacks a parameter", where=where, why=str(error)) from error
    return made


@dataclass(frozen=True)
class Composed:
    """Scores ready to become advantages, the weight of each component, and how many samples a gate closed."""

    scores: Scores
    weights: tuple[float, ...]
    gated: int = 0


def transform(scores: Scores, group_size: int, transforms: Sequence[Sequence[Transform]]) -> Scores:
    """Apply to each component its transforms in order, over groups of `group_size`."""
    columns = []
    for k, chain in enumerate(transforms):
        values, valid = (part[:, k].reshape(-1, group_size) for part in (scores.values, scores.valid))
        for step in chain:
            values = np.where(valid, step(values, valid), np.nan)
        columns.append(values.reshape(-1))
    values = np.stack(columns, 1)
    return Scores(values, scores.valid, scores.names, scores.errors, scores.extras)


def fill_missing(scores: Scores, group_size: int) -> Scores:
    """Put the mean of the group's valid members where a component is missing: neutral, whatever its scale.

    A component that a whole group lacks stays missing there.
    """
    shape = (-1, group_size, len(scores.names))
    values, valid = scores.values.reshape(shape), scores.valid.reshape(shape)
    mean = masked_mean(values, valid, axis=1)[:, None, :]
    filled = np.where(valid, values, mean).reshape(scores.values.shape)
    return Scores(filled, np.isfinite(filled), scores.names, scores.errors, scores.extras)


def worst_missing(scores: Scores) -> tuple[int, float]:
    """Return the component of which the largest share is missing, and that share."""
    if not scores.valid.size:
        return 0, 0.0
    failed = (~scores.valid).mean(0)
    return int(failed.argmax()), float(failed.max())


def allowed_missing(missing: str, max_fail_frac: float) -> float:
    """Return the share of a component that may be missing: none at all where `missing` is "raise"."""
    return 0.0 if missing == "raise" else max_fail_frac


def require_scored(
    scores: Scores, *, missing: str, max_fail_frac: float, where: str, key: str = "combine.max_fail_frac"
) -> None:
    """Refuse scores of which too many are missing, in any one component.

    Args:
        key: the key of the configuration that says how many may be.

    Raises:
        RewardError: with the first messages; one missing score is too many where `missing` is "raise".
    """
    worst, share = worst_missing(scores)
    allowed = allowed_missing(missing, max_fail_frac)
    if share > allowed:
        messages = list(dict.fromkeys(filter(None, scores.errors)))[:3]
        count = int((~scores.valid[:, worst]).sum())
        raise RewardError(
            "Too many rewards failed", where=where,
            why=f"{scores.names[worst]} is missing for {count} of {len(scores)} samples, "
            + (f"{allowed:.0%} are allowed" if allowed else "none may be")
            + f"; {' | '.join(messages) or 'no message was given'}",
            do="Nothing was trained on this step. Mend the reward and resume, or raise " + key,
        )  # fmt: skip


def combine(
    scores: Scores,
    group_size: int,
    weights: Sequence[float],
    *,
    mode: str,
    gates: Sequence[bool] = (),
    floor: float | None = None,
) -> Composed:
    """Combine transformed components as the module's table says.

    Args:
        weights: one a component.
        mode: "weighted_sum", "min" or "gate"; "sum_of_advantages" and "gdpo" leave the components as they are.
        gates: which components are gates, in mode "gate".
        floor: what a closed gate makes of a reward; None is the least reward of the group's open members, and
            where none is open the whole group is missing: nothing can be said of it.

    Raises:
        ConfigError: an unknown mode, or mode "gate" without a gate or a utility.
    """
    known = ("sum_of_advantages", "gdpo", "weighted_sum", "gate", "min")
    if mode not in known:
        raise ConfigError(f"Unknown combination {mode!r}", where="combine.mode", do=suggest(mode, known))
    if mode in ("sum_of_advantages", "gdpo"):
        return Composed(scores, tuple(weights))
    weighted, gated = scores.values * np.asarray(weights), 0
    if mode == "gate":
        closing = np.asarray(gates, bool)
        if not closing.any() or closing.all():
            raise ConfigError("A gate needs a reward with role: gate and one without", where="combine.mode")
        total = weighted[:, ~closing].sum(1)
        known_gate = scores.valid[:, closing].all(1)
        closed = known_gate & (scores.values[:, closing] <= 0).any(1)
        total = np.where(known_gate, total, np.nan)
        rows = np.where(closed, np.nan, total).reshape(-1, group_size)
        least = np.array([np.nanmin(row) if np.isfinite(row).any() else np.nan for row in rows])
        lowest = np.repeat(least, group_size) if floor is None else floor
        total, gated = np.where(closed, lowest, total), int(closed.sum())
    else:
        total = weighted.sum(1) if mode == "weighted_sum" else weighted.min(1)
    joined = Scores(total[:, None], np.isfinite(total)[:, None], ("reward",), scores.errors, scores.extras)
    return Composed(joined, (1.0,), gated)
