"""Objectives as pure functions: log-probabilities and advantages in, one loss per term and its statistics out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from align.errors import ConfigError


@dataclass(frozen=True)
class Terms:
    """The loss of N terms `[N]`, and quantities to average over them, `[N]` each, detached."""

    loss: Tensor
    stats: Mapping[str, Tensor]


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
