"""How many rows fit at once, from what one row keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from align.diffusion.policy import Policy

SHARE = 0.5  # of the memory at hand; the rest is for temporaries, fragmentation and what one row cannot show
MOST = 320  # more rows win nothing: the device is busy


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Return the bytes that `forward` keeps for its backward pass, weights and buffers aside, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    total = sum(kept.values())
    del output
    return total


def available_bytes(device: torch.device) -> int:
    """Return the memory that can still be had on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return 4 << 30


def rows_that_fit(policy: Policy, latent_shape: Sequence[int], timestep: float, prompt: str) -> int:
    """Return how many (sample, step) rows can be replayed at once with gradients: 1 to `MOST`.

    One row goes forward once; its backward pass is not needed. Several processes on one CPU share its memory.
    """
    x = torch.zeros(1, *latent_shape, device=policy.device)
    times = torch.full((1,), timestep, device=policy.device)
    row = max(1, saved_bytes(lambda: policy.velocity(x, times, [prompt])))
    return max(1, min(MOST, int(SHARE * available_bytes(policy.device)) // row))
