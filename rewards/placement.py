"""Where a reward's modules live while they are not asked, in what precision they compute, and how many rows at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
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

    @property
    def rest(self) -> torch.device:
        """Where modules lie between two batches."""
        import torch

        return torch.device("cpu") if self.policy == "offload" else self.device

    def settle(self, module: nn.Module) -> nn.Module:
        """Freeze a module, put it where it rests, and return it."""
        return module.requires_grad_(False).eval().to(self.rest)

    def require_graph(self, name: str) -> None:
        """Refuse to differentiate through modules that leave the device before the backward pass.

        Raises:
            ConfigError: the policy is "offload", and there is an accelerator.
        """
        if self.rest != self.device:
            raise ConfigError(
                f"The reward {name!r} keeps no graph while it is offloaded",
                do="Build it with placement=resident, or cpu, to differentiate through it",
            )

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

    def rows(
        self,
        key: str,
        forward_one: Callable[[], Tensor],
        forward_two: Callable[[], Tensor] | None = None,
        modules: Sequence[nn.Module] = (),
    ) -> int:
        """Return how many rows to score at once: `batch_size`, or what fits by the first rows of this kind.

        What a row would keep for a backward pass bounds what it needs without one.

        Args:
            forward_one: scores one row of this kind.
            forward_two: scores two; what it keeps beyond `forward_one` leaves out what is kept once, such as weights
                in half precision.
            modules: whose weights put what is computed on the graph; without them frozen modules keep nothing.
        """
        if self.batch_size is not None:
            return self.batch_size
        if key not in self._derived:
            with _on_the_graph(modules):
                one = saved_bytes(forward_one)
                row = saved_bytes(forward_two) - one if forward_two else one
            self._derived[key] = rows_within(row, self.device)
        return self._derived[key]


@contextlib.contextmanager
def _on_the_graph(modules: Sequence[nn.Module]) -> Iterator[None]:
    frozen = [p for module in modules for p in module.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
