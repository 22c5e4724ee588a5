"""How many rows of a rollout can be replayed at once, from what one row keeps for its backward pass."""

from __future__ import annotations

import torch

from align.diffusion.policy import Policy
from align.memory import rows_within, saved_bytes
from align.types import Prompt


def rows_that_fit(policy: Policy, timestep: float, prompt: Prompt) -> int:
    """Return how many (sample, step) rows can be replayed at once with gradients.

    One row goes forward once; its backward pass is not needed. Several processes on one CPU share its memory.
    """
    x = torch.zeros(1, *policy.latent_shape, device=policy.device)
    times = torch.full((1,), timestep, device=policy.device)
    return rows_within(saved_bytes(lambda: policy.velocity(x, times, [prompt])), policy.device)
