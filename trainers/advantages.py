"""From scores to advantages: group centring and scaling under a validity mask.

The only place advantages are made. With r a reward of one component and valid members only:

    group       A = (r - group mean) / (group std + eps)
    group_mean  A = r - group mean, in the reward's unit (Dr. GRPO, arXiv 2503.20783)
    global_std  A = (r - group mean) / (std over all groups + eps)
    global      A = (r - mean over all) / (std over all + eps)

Several components, mode `sum_of_advantages`: each is normalised by itself, then `A = sum_k w_k A_k`, then one
clip to `+-clip`, so that a component with large units does not own the sum. Mode `gdpo` adds a z-score of the
sum over the batch before the clip. (Rewards summed before normalising are `rewards/compose.py`'s: they come here
as one component.)

Best-of-N comes last: statistics are those of the whole group, of which only the extremes are trained on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from align.errors import ConfigError
from align.groupstats import masked_mean, masked_std
from align.types import Advantages, Scores


def normalise(
    values: np.ndarray, valid: np.ndarray, *, ddof: int = 1, eps: float = 1e-4, scope: str = "group"
) -> tuple[np.ndarray, np.ndarray]:
    """Normalise one component over groups `[P, G]`.

    A group in which all valid members are equal gets zeros; so does a missing member, and a group with
    fewer than two valid members, since nothing can be said of it.

    Returns:
        `(advantages [P, G], kept [P, G])`; kept members had a value in a group of at least two.

    Raises:
        ConfigError: an unknown scope.
    """
    if scope not in ("group", "group_mean", "global_std", "global"):
        raise ConfigError(f"Unknown advantage scope {scope!r}", do="Choose group, group_mean, global_std or global")
    kept = valid & (valid.sum(1, keepdims=True) >= 2)
    mean = masked_mean(values, kept) if scope == "global" else masked_mean(values, kept, axis=1)[:, None]
    if scope == "group_mean":
        scale = np.ones(1)
    elif scope == "group":
        scale = masked_std(values, kept, axis=1, ddof=ddof)[:, None] + eps
    else:
        scale = masked_std(values, kept, ddof=ddof) + eps
    centred = np.where(kept, values - mean, 0.0)
    # Equal values can leave a rounding residue in their mean; it must not be blown up to full scale.
    flat = np.abs(centred) <= 1e-12 * np.maximum(1.0, np.abs(np.nan_to_num(values)))
    scaled = np.divide(
        centred, scale, out=np.zeros_like(centred), where=np.broadcast_to(scale > 0, centred.shape) & ~flat
    )
    return scaled, kept


def group_advantages(
    scores: Scores,
    group_size: int,
    weights: Sequence[float],
    *,
    mode: str = "sum_of_advantages",
    ddof: int = 1,
    eps: float = 1e-4,
    scope: str = "group",
    clip: float | None = 5.0,
    best_of: int | None = None,
    recentre: bool = False,
) -> Advantages:
    """Turn the scores of B = P G samples (member fastest) into advantages `[P, G]`.

    A missing component contributes nothing for that member and leaves the component's statistics. A
    member is dropped when all its components are missing.

    Args:
        weights: one a component, in the order of `scores.names`.
        mode: "gdpo" z-scores the weighted sum over all members kept, with the same ddof and eps.
        clip: bound on |A| after the weighted sum, None for none. It can bind only below the largest
            possible value, in scope "group" (G - 1) / sqrt(G) for ddof 1 and sqrt(G - 1) for ddof 0, times the weights.
        best_of: keep this many members of each group, see `extremes`; None keeps all.
        recentre: subtract the mean advantage of the members kept, group by group.

    Raises:
        ConfigError: B not a multiple of G, G below 2, or a weight missing.

    Source: DanceGRPO (arXiv 2505.07818), algorithm 1; aggregation of section 3.3. GDPO (arXiv 2601.05242).
    """
    if group_size < 2 or len(scores) % group_size:
        raise ConfigError(
            "Group advantages need whole groups of at least two", why=f"{len(scores)} scores, group_size {group_size}"
        )
    if len(weights) != len(scores.names):
        raise ConfigError(
            "Every reward component needs a weight", why=f"{len(scores.names)} components, {len(weights)} weights"
        )
    shape = (len(scores) // group_size, group_size)
    total, kept, flat = np.zeros(shape), np.zeros(shape, bool), np.ones(shape[0], bool)
    for k in range(len(scores.names)):
        values, valid = scores.values[:, k].reshape(shape), scores.valid[:, k].reshape(shape)
        advantage, component_kept = normalise(values, valid, ddof=ddof, eps=eps, scope=scope)
        total += weights[k] * advantage
        kept |= component_kept
        flat &= ~(advantage != 0).any(1)
    if mode == "gdpo":
        total, _ = normalise(total, kept, ddof=ddof, eps=eps, scope="global")
    if clip is not None:
        total = np.clip(total, -clip, clip)
    some = kept.any(1)
    chosen = kept if best_of is None else extremes(total, kept, best_of)
    if recentre:
        mean = np.nan_to_num(masked_mean(total, chosen, axis=1))[:, None]
        total = np.where((total != 0).any(1, keepdims=True), total - mean, 0.0)
    return Advantages(
        values=np.where(chosen, total, 0.0),
        kept=chosen,
        zero_std_groups=int((flat & some).sum()),
        invalid_members=int((~scores.valid.any(1)).sum()),
        dropped_groups=int((~some).sum()),
        unselected=int((kept & ~chosen).sum()),
    )


def extremes(advantages: np.ndarray, kept: np.ndarray, count: int) -> np.ndarray:
    """Return which members of each group `[P, G]` are its `count` extremes: the best half and the worst half.

    An odd count takes one more of the best. Ties go to the earlier member among the best and to the later
    one among the worst, so that no member is taken twice. A group with no more than `count` members kept
    keeps them all.

    Source: DanceGRPO (arXiv 2505.07818), best-of-N: the top and bottom 8 of a larger pool.
    """
    chosen = np.zeros_like(kept)
    for p, row in enumerate(kept):
        members = np.flatnonzero(row)
        order = members[np.argsort(-advantages[p, members], kind="stable")]
        best, worst = (count + 1) // 2, count // 2
        chosen[p, order if len(order) <= count else np.r_[order[:best], order[len(order) - worst :]]] = True
    return chosen
