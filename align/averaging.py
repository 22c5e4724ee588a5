"""The running average of trained weights that is delivered in place of the last ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Average:
    """Exponential moving average of the trained weights, once a training step.

        average_n = decay average_(n-1) + (1 - decay) weights_n,   average_0 = weights_0

    so that `decay^n` of the weights before training is left after n steps.

    Args:
        parameters: the trained weights by name.
        decay: between 0 and 1.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.values = {name: p.detach().clone() for name, p in parameters.items()}

    def update(self, decay: float | None = None) -> None:
        """Take in the weights as they are now; `decay` is that of this once."""
        for name, parameter in self.parameters.items():
            self.values[name].lerp_(parameter.detach(), 1 - (self.decay if decay is None else decay))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the model within the block, and the trained weights back after it."""
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._put(self.values)
        try:
            yield
        finally:
            self._put(trained)

    def _put(self, values: Mapping[str, torch.Tensor]) -> None:
        import torch

        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])
