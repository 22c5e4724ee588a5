"""Preference objectives as pure functions: log-ratios and labels in, one loss per row and its statistics out.

Notation. `log_ratio_B = sum_T log pi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t)`, in nats, over the tokens of the
completion. A label is 1 for a desirable completion (thumbs up) and 0 for an undesirable one. KTO keeps `beta` out of
its reference point z0, which is in nats; BCO's delta is in units of its reward `beta * log_ratio`. The two are never
exchanged. Neither carries a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from align.errors import ConfigError
from trainers.objectives import Terms

WEIGHT_RATIOS = {"paper": (1.0, 1.5), "trl": (1.0, 4 / 3)}
"""Bounds on `weight_D n_D / (weight_U n_U)`: of the paper's current version, and of TRL and earlier versions."""


def kto(
    log_ratio: Tensor, label: Tensor, z0: Tensor | float, *, beta: float, weight_D: float = 1.0, weight_U: float = 1.0
) -> Terms:
    """Kahneman-Tversky optimisation: how far a completion is from being told apart from the reference point.

        u    = s beta (h - z0),  s = +1 desirable, -1 undesirable
        loss = w (1 - sigmoid(u)),  w = weight_D or weight_U
        d loss / d h = -w s beta sigmoid(u) sigmoid(-u)

    Args:
        log_ratio: `[B]`, h in nats.
        label: `[B]`, 1 desirable, 0 undesirable.
        z0: the reference point in nats, see `kto_reference_point`; no gradient flows into it.
        beta: inverse temperature.
        weight_D, weight_U: weights of the two classes; 0 is 0.

    Raises:
        ConfigError: shapes that differ.

    Source: KTO (arXiv 2402.01306), eq. 8.
    """
    sign, desirable = _signs(log_ratio, label)
    point = torch.as_tensor(z0, dtype=log_ratio.dtype, device=log_ratio.device).detach()
    weight = torch.where(desirable, weight_D, weight_U).to(log_ratio)
    margin = sign * beta * (log_ratio - point)
    return Terms(weight * torch.sigmoid(-margin), _reward_stats(beta * log_ratio, beta * point, desirable))


def apo_zero_unpaired(
    log_ratio: Tensor, label: Tensor, *, beta: float, weight_D: float = 1.0, weight_U: float = 1.0
) -> Terms:
    """KTO with the reference point at 0, which needs no mismatched completions: `kto(..., z0=0)`.

    Source: APO (arXiv 2408.06266), APO-zero on single completions; KTO-zero in HALOs.
    """
    return kto(log_ratio, label, 0.0, beta=beta, weight_D=weight_D, weight_U=weight_U)


def mismatch_sums(log_ratio: Tensor) -> Tensor:
    """Return `[sum, count]` of the log-ratios of mismatched rows, float64, to be added over processes.

    A log-ratio of exactly 0 is that of an empty completion, which says nothing and is not counted.
    """
    value = log_ratio.detach().double()
    return torch.stack([value.sum(), (value != 0).double().sum()])


def kto_reference_point(sums: Tensor) -> Tensor:
    """Return KTO's reference point of a microbatch: `z0 = max(0, sum / count)`, 0 where nothing was counted.

    Args:
        sums: `[2]`, what `mismatch_sums` says of all processes together: the mean is clamped after averaging.

    Source: KTO (arXiv 2402.01306), section 3.3; sum and count as in HALOs.
    """
    return mismatch_mean(sums).clamp(min=0.0)


def mismatch_mean(sums: Tensor) -> Tensor:
    """Return the mean behind `kto_reference_point`, before it is clamped."""
    return sums[0] / sums[1].clamp(min=1.0)


def humanline(token_log_ratio: Tensor, low: float = -1.0, high: float = 1.5) -> Tensor:
    """Clamp the log-ratio of every token to `[low, high]` nats before tokens are summed.

    Source: HALOs, `humanline` with log_epsilon_P and log_epsilon_R.
    """
    return token_log_ratio.clamp(low, high)


def bco(
    log_ratio: Tensor, target: Tensor, delta: Tensor | float, *, beta: float, weight: Tensor | None = None
) -> Terms:
    """Binary classifier optimisation: logistic regression on the implicit reward, shifted by delta.

        r    = beta h
        loss = w ( -q log sigmoid(r - delta) - (1 - q) log sigmoid(-(r - delta)) )
        d loss / d h = w beta (sigmoid(r - delta) - q)

    Args:
        log_ratio: `[B]`, h in nats.
        target: `[B]`, q in [0, 1]: labels, or scores taken as soft labels.
        delta: reward shift, see `BalancedDelta`; no gradient flows into it.
        beta: inverse temperature.
        weight: `[B]`, such as `udm_weights`; 1 when None.

    Raises:
        ConfigError: shapes that differ.

    Source: BCO (arXiv 2404.04656), eq. 8; `row_shares` makes the two class means of it.
    """
    _, desirable = _signs(log_ratio, target)
    reward = beta * log_ratio
    shift = torch.as_tensor(delta, dtype=reward.dtype, device=reward.device).detach()
    loss = functional.binary_cross_entropy_with_logits(reward - shift, target.to(reward), reduction="none")
    if weight is not None:
        loss = loss * weight.to(loss)
    return Terms(loss, _reward_stats(reward, shift, desirable))


def dpo(chosen_log_ratio: Tensor, rejected_log_ratio: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Terms:
    """Direct preference optimisation on pairs.

        m    = beta (h_w - h_l)
        loss = -(1 - eps) log sigmoid(m) - eps log sigmoid(-m)

    Args:
        chosen_log_ratio, rejected_log_ratio: `[B]` in nats.
        beta: inverse temperature.
        label_smoothing: eps, the share of labels believed to be flipped.

    Raises:
        ConfigError: shapes that differ.

    Source: DPO (arXiv 2305.18290), eq. 7; eps: conservative DPO.
    """
    if chosen_log_ratio.shape != rejected_log_ratio.shape:
        raise _shapes(chosen_log_ratio, rejected_log_ratio)
    margin = beta * (chosen_log_ratio - rejected_log_ratio)
    loss = -(1 - label_smoothing) * functional.logsigmoid(margin) - label_smoothing * functional.logsigmoid(-margin)
    with torch.no_grad():
        stats = {"margin": margin.detach(), "accuracy": (margin > 0).float() + 0.5 * (margin == 0).float()}
    return Terms(loss, stats)


def row_shares(desirable: Tensor, count_D: int, count_U: int, balance: str) -> Tensor:
    """Return what to multiply each row's loss by, `[B]`, so that the sum over a global batch is its loss.

        pooled, oversample   1 / (n_D + n_U)
        class_mean           1 / n_D or 1 / n_U: the sum of two class means; a class that is absent adds 0

    Args:
        desirable: bool `[B]`.
        count_D, count_U: rows of each class in the whole optimizer batch, over accumulation and processes.
        balance: the rule.

    Raises:
        ConfigError: an unknown rule.

    Source: BCO (arXiv 2404.04656), eq. 8 (class_mean) and section 5.4 (oversample); TRL 1.13 (pooled).
    """
    if balance in ("pooled", "oversample"):
        return torch.full(desirable.shape, 1.0 / max(1, count_D + count_U), device=desirable.device)
    if balance != "class_mean":
        raise ConfigError(f"Unknown balance {balance!r}", do="Choose class_mean, pooled or oversample")
    return torch.where(desirable, 1.0 / max(1, count_D), 1.0 / max(1, count_U))


def class_sums(reward: Tensor, desirable: Tensor) -> Tensor:
    """Return `[sum_D, count_D, sum_U, count_U]` of detached rewards, float64, to be added over processes."""
    value, mask = reward.detach().double(), desirable.double()
    return torch.stack([(value * mask).sum(), mask.sum(), (value * (1 - mask)).sum(), (1 - mask).sum()])


def warmed(decay: float, updates: int) -> float:
    """Return `min(decay, (1 + n) / (10 + n))`, the decay of a running mean after n updates.

    Before training the policy is the reference, so the first rewards are 0: at the full decay from the start they
    would hold the mean near 0 for 1 / (1 - decay) updates.
    """
    return min(decay, (1 + updates) / (10 + updates))


@dataclass(frozen=True)
class BalancedDelta:
    """BCO's reward shift: one running mean of the reward per class, and their midpoint.

        mean_c <- d mean_c + (1 - d) (sum_c / count_c),  d = warmed(decay, updates);   delta = (mean_D + mean_U) / 2

    A step sees the delta of the step before it. The first rewards of a class start its mean; a class that is
    absent keeps it; until both classes were seen delta is 0.

    Source: BCO (arXiv 2404.04656), eq. 7; the decay is not given there.
    """

    decay: float = 0.99
    mean_D: float | None = None
    mean_U: float | None = None
    updates: int = 0

    @property
    def value(self) -> float:
        """Delta, in units of the reward."""
        return 0.0 if self.mean_D is None or self.mean_U is None else (self.mean_D + self.mean_U) / 2

    def update(self, sums: Tensor) -> BalancedDelta:
        """Return the state after an optimizer step whose `class_sums`, over all processes, are `sums`."""
        sum_D, count_D, sum_U, count_U = sums.tolist()
        decay = warmed(self.decay, self.updates)

        def moved(mean: float | None, total: float, count: float) -> float | None:
            if not count:
                return mean
            return total / count if mean is None else decay * mean + (1 - decay) * total / count

        return BalancedDelta(
            self.decay, moved(self.mean_D, sum_D, count_D), moved(self.mean_U, sum_U, count_U), self.updates + 1
        )


@dataclass(frozen=True)
class PooledDelta:
    """The reward shift of TRL 1.13: the mean of all rewards seen so far, of both classes, the current ones included.

    Under imbalance it leaves the midpoint of the classes: .35 instead of -.5 at nine to one.
    """

    mean: float = 0.0
    count: float = 0.0

    @property
    def value(self) -> float:
        """Delta, in units of the reward."""
        return self.mean

    def update(self, sums: Tensor) -> PooledDelta:
        """Return the state with the microbatch whose `class_sums`, over all processes, are `sums`."""
        sum_D, count_D, sum_U, count_U = sums.tolist()
        count = self.count + count_D + count_U
        return self if not count else PooledDelta((self.mean * self.count + sum_D + sum_U) / count, count)


@dataclass(frozen=True)
class RunningPoint:
    """A running mean of KTO's unclamped reference point, in nats, clamped where it is used.

    It lets a microbatch hold a single row. The first mean starts it, and its decay is `warmed`.
    """

    decay: float = 0.99
    mean: float | None = None
    updates: int = 0

    @property
    def value(self) -> float:
        """z0, in nats."""
        return max(0.0, self.mean or 0.0)

    def update(self, sums: Tensor) -> RunningPoint:
        """Return the state after an optimizer step whose `mismatch_sums`, over all processes, are `sums`."""
        if not float(sums[1]):
            return self
        now, decay = float(mismatch_mean(sums)), warmed(self.decay, self.updates)
        mean = now if self.mean is None else decay * self.mean + (1 - decay) * now
        return RunningPoint(self.decay, mean, self.updates + 1)


def state_to_json(state: BalancedDelta | PooledDelta | RunningPoint) -> dict[str, Any]:
    """Return the numbers of a running state; `type(state)(**numbers)` is the state again, bit for bit."""
    return asdict(state)


def auto_class_weights(
    count_D: int, count_U: int, *, weight_D: float | None = None, weight_U: float | None = None, ratio: float = 1.0
) -> tuple[float, float]:
    """Return `(weight_D, weight_U)` with `weight_D n_D / (weight_U n_U) = ratio`.

    A weight that is given stays; of two that are not, the larger class keeps 1.

    Raises:
        ConfigError: a class without rows, or a weight of 0 to scale the other one by.
    """
    if weight_D is not None and weight_U is not None:
        return weight_D, weight_U
    if not count_D or not count_U:
        raise ConfigError(
            "Class weights need both classes", why=f"{count_D} desirable and {count_U} undesirable rows",
            do="Set objective.weight_desirable and objective.weight_undesirable",
        )  # fmt: skip
    if weight_D is None and weight_U is None:
        weight_D, weight_U = (1.0, None) if count_D >= count_U else (None, 1.0)
    given = weight_U if weight_D is None else weight_D
    if not given:
        raise ConfigError("A class weight of 0 gives the other none", do="Set both class weights")
    if weight_D is None:
        return ratio * given * count_U / count_D, given
    return given, given * count_D / (ratio * count_U)


def weight_ratio_message(count_D: int, count_U: int, weight_D: float, weight_U: float) -> str:
    """Return what is unusual about the class weights of a data set; nothing where they are as recommended."""
    down = weight_U * count_U
    ratio = weight_D * count_D / down if down else math.inf
    (low, high), (_, older) = WEIGHT_RATIOS["paper"], WEIGHT_RATIOS["trl"]
    if low * (1 - 1e-9) <= ratio <= high * (1 + 1e-9):
        return ""
    return (
        f"weight_desirable x {count_D} over weight_undesirable x {count_U} is {ratio:.3g}; the paper advises "
        f"{low:g} to {high:g} (earlier versions and TRL {low:g} to {older:.2f})"
    )


def udm_weights(probability: Tensor, low: float = 0.5, high: float = 10.0) -> Tensor:
    """Return the weight of undesirable rows that makes their prompts look like those of desirable ones.

        w(x) = clamp( p / (1 - p + 1e-8), low, high ),   p = P(desirable | x) under balanced classes

    Source: BCO (arXiv 2404.04656 v1), underlying distribution matching; values of TRL 1.13.
    """
    return (probability / (1 - probability + 1e-8)).clamp(low, high)


def effective_sample_size(weight: Tensor) -> float:
    """Return how many equal weights would vary as little: `(sum w)^2 / sum w^2`."""
    return float(weight.sum() ** 2 / weight.square().sum()) if len(weight) else 0.0


def _signs(log_ratio: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    if log_ratio.shape != label.shape or log_ratio.ndim != 1:
        raise _shapes(log_ratio, label)
    desirable = label > 0.5
    return torch.where(desirable, 1.0, -1.0).to(log_ratio), desirable


def _shapes(*tensors: Tensor) -> ConfigError:
    return ConfigError("An objective needs one value a row", why=", ".join(str(tuple(t.shape)) for t in tensors))


def _reward_stats(reward: Tensor, point: Tensor, desirable: Tensor) -> Mapping[str, Tensor]:
    with torch.no_grad():
        return {"reward": reward.detach(), "correct": ((reward.detach() > point) == desirable).float()}
