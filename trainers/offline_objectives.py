"""Learning from given images as pure functions: matching errors of model and reference in, a loss a row out.

Notation. `l_B` is the mean over latent entries of the squared error of what the model says (velocity, noise or v), and
`l_ref` that of the model before training, at the same noise and level. `l_ref - l` stands for a log-ratio: it is up
where the model has learnt to make this image. beta is the papers' constant with T and all factors in it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from align.errors import ConfigError
from trainers.objectives import Terms

UTILITIES = {
    "sigmoid": torch.sigmoid,
    "loss_averse": functional.logsigmoid,
    "risk_seeking": functional.softplus,
}
"""KTO's utility functions U: risk-averse in gains and seeking in losses, averse in both, seeking in both."""


def diffusion_dpo(error_w: Tensor, reference_w: Tensor, error_l: Tensor, reference_l: Tensor, *, beta: float) -> Terms:
    """Diffusion-DPO: the chosen image's error should fall against the reference by more than the rejected one's.

        loss = -log sigmoid( -(beta / 2) [ (l_w - l_ref_w) - (l_l - l_ref_l) ] )

    log 2 where nothing has moved.

    Args:
        error_w, reference_w: `[B]`, of the chosen image, of model and reference.
        error_l, reference_l: `[B]`, of the rejected one, at the same noise and level.
        beta: how strongly a change of the errors counts.

    Raises:
        ConfigError: shapes that differ.

    Source: Diffusion-DPO (arXiv 2311.12908); the half as in its released code.
    """
    _require_rows(error_w, reference_w, error_l, reference_l)
    margin = (beta / 2) * ((reference_w - error_w) - (reference_l - error_l))
    return Terms(-functional.logsigmoid(margin), {"correct": _sides(margin.detach()), "margin": margin.detach()})


def diffusion_kto(
    error: Tensor,
    reference: Tensor,
    label: Tensor,
    z: Tensor | float,
    *,
    beta: float,
    weight_D: float = 1.0,
    weight_U: float = 1.0,
    utility: str = "sigmoid",
) -> Terms:
    """Diffusion-KTO: the utility of each image against a reference point, from thumbs alone.

        g    = (l_ref - l) - z
        loss = w (1 - U(y beta g)),  y = +1 thumb up, -1 thumb down,  w = weight_D or weight_U

        sigmoid        U(x) = sigmoid(x)
        loss_averse    U(x) = log sigmoid(x)
        risk_seeking   U(x) = -log sigmoid(-x)

    `w (1 - U(0))` where nothing has moved.

    Args:
        error, reference: `[B]`, of model and reference at the same noise and level.
        label: `[B]`, 1 up, 0 down.
        z: of `reference_point`; no gradient flows into it.
        beta: how strongly a change of the error counts.
        weight_D, weight_U: weights of thumbs up and down.
        utility: a name in `UTILITIES`.

    Raises:
        ConfigError: shapes that differ, or an unknown utility.

    Source: Diffusion-KTO (arXiv 2404.04465).
    """
    _require_rows(error, reference, label)
    if utility not in UTILITIES:
        raise ConfigError(f"Unknown utility {utility!r}", do=f"Choose {', '.join(UTILITIES)}")
    desirable = label > 0.5
    sign = torch.where(desirable, 1.0, -1.0).to(error)
    weight = torch.where(desirable, weight_D, weight_U).to(error)
    point = torch.as_tensor(z, dtype=error.dtype, device=error.device).detach()
    margin = sign * beta * (reference - error - point)
    loss = weight * (1 - UTILITIES[utility](margin))
    return Terms(loss, {"correct": _sides(margin.detach()), "margin": margin.detach()})


def gain_sums(gain: Tensor) -> Tensor:
    """Return `[sum, count]` of `l_ref - l` `[B]`, float64, to be added over tiles and processes."""
    value = gain.detach().double()
    return torch.stack([value.sum(), torch.full_like(value, 1.0).sum()])


def reference_point(sums: Tensor) -> Tensor:
    """Return `z = max(0, sum / count)` of an update, from the `gain_sums` of all its rows.

    Clamped after averaging over everything: a mean of clamped means depends on how rows are spread.

    Source: Diffusion-KTO (arXiv 2404.04465).
    """
    return (sums[0] / sums[1].clamp(min=1.0)).clamp(min=0.0)


def _sides(margin: Tensor) -> Tensor:
    return (margin > 0).float() + 0.5 * (margin == 0).float()


def _require_rows(*values: Tensor) -> None:
    if len({value.shape for value in values}) != 1 or values[0].ndim != 1:
        raise ConfigError(
            "An objective needs one value a row", why=", ".join(str(tuple(value.shape)) for value in values)
        )
