"""Forward-process objectives as pure functions: what a model says of noised samples in, a loss a row out.

Rows are (sample, noise level) pairs, `[N]`; latents `[N, ...]`; norms are means over latent entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from align.errors import ConfigError
from trainers.objectives import Terms, grpo_clip


def matching_error(output: Tensor, target: Tensor) -> Tensor:
    """Return `mean (output - target)^2` over latent entries, `[N]`."""
    return (output - target).square().flatten(1).mean(1)


def supervised(error: Tensor) -> Terms:
    """Plain supervised training on given images: `loss = mean (output - target)^2`, the pretraining loss.

    Args:
        error: of `matching_error`, `[N]`; for a flow the target is `noise - x0`, for a model of noise the noise.

    Source: flow matching (arXiv 2210.02747); for noise, DDPM's simple loss (arXiv 2006.11239).
    """
    return Terms(error, {"matching_error": error.detach()})


def x0_estimate(x: Tensor, output: Tensor, x0_x: Tensor, x0_v: Tensor) -> Tensor:
    """Return `x0_hat = x0_x x + x0_v output`; for a flow `x - sigma v`."""
    return x0_x * x + x0_v * output


def old_policy_decay(kind: str, step: int) -> float:
    """Return how much of itself the old policy keeps after training step `step`, counted from 1.

        step   0: the old policy is that of the step
        ramp   min(.001 step, .5)
        late   0 up to step 75, then min(.0075 (step - 75), .999)

    Raises:
        ConfigError: an unknown kind.

    Source: DiffusionNFT (arXiv 2509.16117), its two schedules.
    """
    if kind == "step":
        return 0.0
    if kind == "ramp":
        return min(0.001 * step, 0.5)
    if kind == "late":
        return min(0.0075 * max(0, step - 75), 0.999)
    raise ConfigError(f"Unknown old policy {kind!r}", do="Choose step, ramp or late")


def optimality(advantage: Tensor, largest: float, feedback: str) -> Tensor:
    """Return NFT's optimality `r = clip(A / largest, -1, 1) / 2 + 1/2`, `[N]`, from 0 (bad) to 1 (good).

    Args:
        advantage: `[N]`; with "label", `2 label - 1`.
        largest: A_max, at which r is 0 or 1.
        feedback: "advantage" or "label" take A as it is; "sign" makes it -1, 0 or 1 times `largest`; "positive" and
            "negative" leave advantages of the other sign out, r = 1/2.

    Raises:
        ConfigError: an unknown feedback.

    Source: DiffusionNFT (arXiv 2509.16117).
    """
    if feedback == "sign":
        advantage = advantage.sign() * largest
    elif feedback == "positive":
        advantage = advantage.clamp(min=0)
    elif feedback == "negative":
        advantage = advantage.clamp(max=0)
    elif feedback not in ("advantage", "label"):
        raise ConfigError(f"Unknown feedback {feedback!r}", do="Choose advantage, sign, positive, negative or label")
    return (advantage / largest).clamp(-1, 1) / 2 + 0.5


def nft(x0_hat: Tensor, x0_old: Tensor, x0: Tensor, r: Tensor, *, beta: float, largest: float) -> Terms:
    """DiffusionNFT: pull an implicit positive policy to good samples, and an implicit negative one to bad samples.

        x0_pos = beta x0_hat + (1 - beta) x0_old        of  v_pos = beta v + (1 - beta) v_old
        x0_neg = (1 + beta) x0_old - beta x0_hat        of  v_neg = (1 + beta) v_old - beta v
        w      = mean |x0_pos - x0|, at least 1e-5, no gradient (and alike for neg)
        loss   = largest [r mean (x0_pos - x0)^2 / w_pos + (1 - r) mean (x0_neg - x0)^2 / w_neg] / beta

    Args:
        x0_hat, x0_old: estimates of the current and of the old policy, `[N, ...]`; the latter has no gradient.
        x0: the sample.
        r: optimality `[N]`.
        beta, largest: b and A_max.

    Source: DiffusionNFT (arXiv 2509.16117), with its weighting by the error.
    """
    positive = beta * x0_hat + (1 - beta) * x0_old
    negative = (1 + beta) * x0_old - beta * x0_hat

    def pull(estimate: Tensor) -> Tensor:
        difference = (estimate - x0).flatten(1)
        weight = difference.detach().double().abs().mean(1).clamp(min=1e-5).to(difference.dtype)
        return difference.square().mean(1) / weight

    loss = largest * (r * pull(positive) + (1 - r) * pull(negative)) / beta
    moved = (x0_hat.detach() - x0_old).square().flatten(1).mean(1)
    return Terms(loss, {"optimality": r.detach(), "moved": moved})


def awm(error: Tensor, error_old: Tensor, sigma: Tensor, advantage: Tensor, weight: str, clip: float) -> Terms:
    """Advantage-weighted matching: the clipped objective on `log p = -w(t) error`, at the same noise.

    | weight | w(t) error          |
    |--------|---------------------|
    | one    | e                   |
    | t      | t e                 |
    | t2     | t^2 e               |
    | huber  | t sqrt(e)           |
    | ghuber | t e^(1/4) / (1/4)   |

    Args:
        error, error_old: of `matching_error`, now and of the policy that sampled, `[N]`.
        sigma: t, the noise level `[N]`.

    Raises:
        ConfigError: an unknown weight.

    Source: AWM (arXiv 2509.25050).
    """
    forms = {
        "one": lambda e: e,
        "t": lambda e: sigma * e,
        "t2": lambda e: sigma.square() * e,
        "huber": lambda e: sigma * (e + 1e-12).sqrt(),
        "ghuber": lambda e: sigma * (e + 1e-12).pow(0.25) / 0.25,
    }
    if weight not in forms:
        raise ConfigError(f"Unknown weight {weight!r}", do=f"Choose {', '.join(forms)}")
    now, before = -forms[weight](error), -forms[weight](error_old.detach())
    terms = grpo_clip(now, before, advantage, clip_low=clip, clip_high=clip)
    return Terms(terms.loss, {**terms.stats, "matching_error": error.detach()})


def dgpo_group_weight(gains: Sequence[float], beta: float, group_size: int) -> float:
    """Return `sigmoid(beta sum_i A_i (error_i - error_ref_i) / G)`: a half where nothing has moved.

    Args:
        gains: `A_i (error_i - error_ref_i)` of a group's members at one draw.
    """
    return 1 / (1 + math.exp(-max(-700.0, min(700.0, beta * sum(gains) / group_size))))


def dgpo(error: Tensor, advantage: Tensor, weight: Tensor) -> Terms:
    """Direct group preference optimisation: `loss = weight A error`, with the group's weight `[N]` held fixed.

    Source: DGPO (arXiv 2510.08425).
    """
    return Terms(weight * advantage * error, {"group_weight": weight, "matching_error": error.detach()})
