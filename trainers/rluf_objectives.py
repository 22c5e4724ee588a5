"""Constrained objectives over several completions of a prompt, as pure functions: CRPG, CRRAFT and CODPO.

Notation. P prompts, G completions of each, drawn from the policy; y_base is a baseline completion of the same prompt.
`log_ratio = log pi(y | x) - log pi_ref(y | x)`, in nats, summed over the tokens of y. `J` is 1 where every judge passes
and 0 elsewhere. A completion is *valid* where `J = 1` and `log_ratio <= kl_max`. A completion whose reward is missing
is *unknown*: it is left out, and never counts as 0.

Which completions are trained on is decided from numbers without gradient, so that only those need a forward with one.

Source: CGPO (arXiv 2409.20370).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from align.errors import ConfigError
from trainers.objectives import Terms

NONE = -1
"""In place of a member: the prompt is skipped."""

BASELINE_WEIGHT = 0.5
"""Weight of a baseline completion that CRRAFT learns from: the reward that the baseline has by construction."""


def calibrated_reward(reward: Tensor, baseline: Tensor) -> Tensor:
    """Return `R_hat = sigmoid(r - r_base)`: 1/2 is as good as the baseline, whatever the units of the reward.

    Args:
        reward: `[P, G]` or any shape; NaN where missing.
        baseline: of y_base, broadcast against `reward`; NaN where missing.

    Source: CGPO (arXiv 2409.20370), eq. 5.
    """
    return torch.sigmoid(reward - baseline)


def is_valid(judged: Tensor, log_ratio: Tensor, kl_max: float) -> Tensor:
    """Return where a completion satisfies its constraints: every judge passes and `log_ratio <= kl_max`.

    Args:
        judged: bool, J; a judge that failed to answer did not pass.
        log_ratio: nats, of the same shape. A log-ratio that is not a number satisfies nothing.
        kl_max: nats a completion.
    """
    return judged & (log_ratio <= kl_max)


def constrained_reward(calibrated: Tensor, valid: Tensor) -> Tensor:
    """Return `R = 1[log_ratio <= kl_max] J R_hat`: the calibrated reward, 0 where a constraint is violated.

    A violation is 0 whether its reward is known or not; of the others a missing reward stays NaN.

    Source: CGPO (arXiv 2409.20370), section 4.
    """
    return torch.where(valid, calibrated, torch.zeros_like(calibrated))


def crpg_advantages(constrained: Tensor) -> Tensor:
    """Return `A = R - mean_G R` over the known completions of each prompt, 0 for the others.

    Args:
        constrained: `[P, G]`, R; NaN where unknown.

    Source: CGPO (arXiv 2409.20370), CRPG.
    """
    known = constrained.isfinite()
    value = torch.where(known, constrained, 0.0)
    mean = value.sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
    centred = value - mean
    flat = centred.abs() <= 1e-12  # equal rewards can leave a rounding residue in their mean
    return torch.where(known & ~flat, centred, torch.zeros_like(centred))


def crpg(logp: Tensor, advantage: Tensor) -> Terms:
    """Calibrated, regularised policy gradient: `loss = -A log pi(y)`, one term a completion.

    Args:
        logp: `[N]`, log pi(y), with gradient.
        advantage: `[N]`, of `crpg_advantages`, or of another aggregation; no gradient flows into it.

    Source: CGPO (arXiv 2409.20370), CRPG.
    """
    _require_shapes(logp, advantage)
    return Terms(-advantage.detach() * logp, {"logp": logp.detach()})


@dataclass(frozen=True)
class Choice:
    """Which completion of each prompt is learnt from, and how much it weighs.

    Args:
        member: int `[P]`; G is the baseline, `NONE` skips the prompt.
        weight: `[P]`, 0 where the prompt is skipped.
    """

    member: Tensor
    weight: Tensor


def crraft_choice(constrained: Tensor, valid: Tensor, baseline_valid: Tensor) -> Choice:
    """Choose `y* = argmax R` among the valid completions with weight R(y*); without any, a valid baseline with 1/2.

    Args:
        constrained: `[P, G]`, R; NaN where unknown.
        valid: bool `[P, G]`.
        baseline_valid: bool `[P]`, whether y_base passes the judges and the KL bound.

    Source: CGPO (arXiv 2409.20370), eq. 18 and its fallback.
    """
    open_ = valid & constrained.isfinite()
    best, member = torch.where(open_, constrained, -torch.inf).max(1)
    some, base = open_.any(1), constrained.shape[1]
    member = torch.where(some, member, torch.where(baseline_valid, base, NONE))
    weight = torch.where(some, best, torch.where(baseline_valid, BASELINE_WEIGHT, 0.0).to(best))
    return Choice(member, weight)


def crraft(logp: Tensor, weight: Tensor) -> Terms:
    """Calibrated, regularised reward-ranked fine-tuning: `loss = -R(y*) log pi(y*)`, one term a prompt.

    Args:
        logp: `[N]`, log pi(y*), with gradient.
        weight: `[N]`, of `crraft_choice`; no gradient flows into it.

    Source: CGPO (arXiv 2409.20370), eq. 18.
    """
    _require_shapes(logp, weight)
    return Terms(-weight.detach() * logp, {"logp": logp.detach()})


def codpo_choice(calibrated: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the chosen and the rejected completion of each prompt, int `[P]` each, both `NONE` where it is skipped.

    Chosen is the valid completion with the largest R_hat; rejected the violating one with the least, or the least of
    all where none violates. A prompt without a valid completion, or whose two would be one, is skipped.

    Args:
        calibrated: `[P, G]`, R_hat, before constraints; NaN where unknown.
        valid: bool `[P, G]`.

    Source: CGPO (arXiv 2409.20370), eq. 14.
    """
    known = calibrated.isfinite()
    open_, violating = valid & known, ~valid & known
    chosen = torch.where(open_, calibrated, -torch.inf).argmax(1)
    pool = torch.where(violating.any(1, keepdim=True), violating, known)
    rejected = torch.where(pool, calibrated, torch.inf).argmin(1)
    skipped = ~open_.any(1) | (chosen == rejected)
    return chosen.masked_fill(skipped, NONE), rejected.masked_fill(skipped, NONE)


def codpo(
    chosen: Tensor, rejected: Tensor, chosen_reference: Tensor, rejected_reference: Tensor, length: Tensor, *,
    beta: float, sft_weight: float,
) -> Terms:  # fmt: skip
    """Constrained online DPO, one term a prompt.

        Delta = [log pi - log pi_ref](y_c) - [log pi - log pi_ref](y_r)
        loss  = -log sigmoid(beta Delta) - (lambda / |y_c|) log pi(y_c)

    Args:
        chosen, rejected: `[N]`, log-probs under the policy, with gradient.
        chosen_reference, rejected_reference: `[N]`, under the reference.
        length: `[N]`, |y_c| in tokens.
        beta: inverse temperature.
        sft_weight: lambda.

    Source: CGPO (arXiv 2409.20370), eq. 14.
    """
    _require_shapes(chosen, rejected, chosen_reference, rejected_reference, length)
    delta = (chosen - chosen_reference.detach()) - (rejected - rejected_reference.detach())
    loss = -functional.logsigmoid(beta * delta) - sft_weight / length.to(chosen) * chosen
    return Terms(loss, {"delta": delta.detach(), "accuracy": (delta > 0).float()})


def _require_shapes(*parts: Tensor) -> None:
    if len({part.shape for part in parts}) != 1 or parts[0].ndim != 1:
        raise ConfigError(
            "An objective needs one number of each kind a term", why=", ".join(str(tuple(p.shape)) for p in parts)
        )
