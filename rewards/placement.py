"""Where a reward's modules live while they are not asked, in what precision they compute, and how many rows at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from align.errors import ConfigError
from align.memory import rows_within, saved_bytes
from align.registry import suggest

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

POLICIES = ("resident", "offload", "cpu", "remote")
DTYPES = ("fp32", "bf16", "fp16")


class Placement:
    """Placement of one reward's modules.

    Args:
        policy: "resident" keeps them on the accelerator, where there is one; "offload" keeps them on the CPU and
            brings them over for each batch of scoring; "cpu" computes on the CPU. ("remote" is another reward:
            see `rewards.remote`.)
        dtype: "fp32", or "bf16" / "fp16" for autocast compute over float32 weights.
        batch_size: rows scored at once; None derives it from the memory at hand.

    Raises:
        ConfigError: an unknown policy or dtype.
    """

    def __init__(self, policy: str = "resident", dtype: str = "fp32", batch_size: int | None = None) -> None:
        for value, known, name in ((policy, POLICIES, "placement"), (dtype, DTYPES, "dtype")):
            if value not in known:
                raise ConfigError(f"Unknown {name} {value!r} of a reward", do=suggest(str(value), known))
        if batch_size is not None and batch_size < 1:
            raise ConfigError("A reward's batch_size is 1 or more", where=f"batch_size {batch_size}")
        self.policy, self.dtype, self.batch_size = policy, dtype, batch_size
        self._derived: dict[str, int] = {}

    @property
    def device(self) -> torch.device:
        """Where modules compute."""
        import torch

        return torch.device("cuda" if self.policy != "cpu" and torch.cuda.is_available() else "cpu")

    def settle(self, module: nn.Module) -> nn.Module:
        """Freeze a module, put it where it rests, and return it."""
        import torch

        rest = torch.device("cpu") if self.policy == "offload" else self.device
        return module.requires_grad_(False).eval().to(rest)

    @contextlib.contextmanager
    def active(self, *modules: nn.Module) -> Iterator[torch.device]:
        """Have modules on their device, in their precision, within the block; yields the device."""
        import torch

        device = self.device
        moved = self.policy == "offload" and device.type != "cpu"
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.dtype)
        try:
            for module in modules if moved else ():
                module.to(device)
            with torch.autocast(device.type, dtype=half or torch.bfloat16, enabled=half is not None):
                yield device
        finally:
            for module in modules if moved else ():
                module.to("cpu")

    def rows(self, key: str, forward_one: Callable[[], Tensor]) -> int:
        """Return how many rows to score at once: `batch_size`, or what fits by the first row of this kind.

        `forward_one` scores one row; what it would keep for a backward pass bounds what it needs without one.
        """
        if self.batch_size is not None:
            return self.batch_size
        if key not in self._derived:
            self._derived[key] = rows_within(saved_bytes(forward_one), self.device, most=256)
        return self._derived[key]
