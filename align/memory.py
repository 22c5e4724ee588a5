"""How much fits at once: the memory at hand, and what one row of work keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SHARE = 0.5  # of the memory at hand; the rest is for temporaries, fragmentation and what one row cannot show
MOST = {"cpu": 96, "cuda": 320}  # more rows win nothing: they fall out of the cache, or the device is busy


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Return the bytes that `forward` keeps for its backward pass, weights and buffers aside, each storage once."""
    import torch

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
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return 4 << 30


def rows_within(row_bytes: int, device: torch.device) -> int:
    """Return how many rows of `row_bytes` fit into a share of the memory at hand: 1 to `MOST`."""
    return max(1, min(MOST.get(device.type, 320), int(SHARE * available_bytes(device)) // max(1, row_bytes)))
