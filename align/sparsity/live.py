"""A model in memory as a checkpoint: its tensors as entries, so that whatever compares files compares it too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from align.errors import ModelError
from align.sparsity.formats import ITEM_BYTES, TORCH_NAMES
from align.sparsity.sources import Entry, Source

if TYPE_CHECKING:
    from torch import Tensor


def live_source(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Source:
    """Return tensors in memory as a checkpoint; on a CPU no copy is made, elsewhere one of what is read at a time.

    Args:
        tensors: weights by the names they have on the disk; adapters are told by theirs.
        config: of the model, or of the adapters: their `lora_alpha`.

    Raises:
        ModelError: a tensor whose numbers are no plain codes.
    """
    adapter = any(".lora_A." in name for name in tensors)
    source = Source("the model in memory", "in memory", {}, config=dict(config or {}), adapter=adapter)
    for place, (name, tensor) in enumerate(tensors.items()):
        dtype = TORCH_NAMES.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None or tensor.device.type == "meta":
            raise ModelError("A tensor in memory has no codes to compare", where=name, why=f"it is {tensor.dtype}")
        source.entries[name] = Entry(name, dtype, tuple(tensor.shape), source.path, place, _reader(tensor, dtype))
    return source


def _reader(tensor: Tensor, dtype: str) -> Callable[[int, int], NDArray[Any]]:
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    signed = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[ITEM_BYTES[dtype]]

    def read(start: int, stop: int) -> NDArray[Any]:
        return flat[start:stop].cpu().view(signed).numpy().view(f"u{ITEM_BYTES[dtype]}")

    return read
