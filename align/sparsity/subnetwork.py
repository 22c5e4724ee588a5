"""Training a subnetwork: AdamW on the entries that a mask names, and on nothing else.

    gather  w = weight[places],  g = gradient[places]
    AdamW on w, with g, m and v, one-dimensional and as long as `places`
    scatter weight[places] = w

What a mask does not name is never written: weight decay does not move it, and it has no state. On w the arithmetic is
torch's own AdamW, so the result is bit for bit that of dense AdamW on masked gradients without weight decay, where
entries with no gradient stand still.

Of float32 weights dense AdamW takes 16 bytes an entry: weight, gradient, m and v. Here it is 8 + 12 rho at density rho:
m, v and places of 4 bytes. Activations and the gradient of whole matrices stay as they are: a mask saves memory, not
arithmetic.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from align.errors import CheckpointError, ConfigError
from align.sparsity.adapters import plain
from align.sparsity.masks import read_mask


def read_places(path: str | Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries that a mask file names, as places in each flattened weight, int32 where that reaches.

    Names count without wrappers' prefixes. Every weight must be in the mask, and be of its size.

    Args:
        path: of `align sparsity compare --mask` or `align sparsity control`.
        weights: those that would train without a mask.

    Raises:
        ConfigError: a weight that is not in the mask, one of another size, or a mask that names nothing.
        ModelError, DataError: not a readable mask file.
    """
    mask = read_mask(path)
    names = {plain(name): name for name in mask.names} | {name: name for name in mask.names}
    found = {}
    for name, weight in weights.items():
        stored = names.get(name) or names.get(plain(name))
        if stored is None or int(mask.exponents(stored)[0].sum()) != weight.numel():
            raise ConfigError(
                "A mask is of another model", where=f"sparsity.mask, {path}",
                why=f"it has no {name} of {weight.numel():,} entries", do="Give the mask of a run of this model",
            )  # fmt: skip
        if not weight.is_contiguous():
            raise ConfigError("A weight does not lie in order in memory", where=name, why="a mask counts its entries")
        kind = torch.int32 if weight.numel() < 2**31 else torch.int64
        found[name] = torch.from_numpy(mask.chosen(stored)).to(weight.device, kind)
    if not any(len(places) for places in found.values()):
        raise ConfigError("A mask names no weight", where=f"sparsity.mask, {path}", do="Give one that does")
    return found


class SubnetworkAdamW(torch.optim.Optimizer):
    """AdamW on chosen entries; see the module.

    Args:
        parameters: weights, or groups of them with options of their own.
        places: of each weight, in the same order, the chosen entries of it, flattened.
        lr, betas, eps, weight_decay: as of `torch.optim.AdamW`.
    """

    def __init__(
        self, parameters: Iterable[Any], places: Iterable[Tensor], *, lr: float,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        weights = [p for group in self.param_groups for p in group["params"]]
        self.places: dict[Tensor, Tensor] = dict(zip(weights, places, strict=True))
        self._marks = [_mark(self.places[weight]) for weight in weights]

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the gradient of everything else to zero: before norms are taken and gradients are clipped."""
        for weight, places in self.places.items():
            if weight.grad is not None:
                weight.grad = weight.grad.contiguous()
                flat = weight.grad.view(-1)
                kept = flat[places]
                flat.zero_()
                flat[places] = kept

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step on the chosen entries of the weights that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None and len(self.places[weight]):
                    self._step(weight, group)
        return loss

    def _step(self, weight: Tensor, group: dict[str, Any]) -> None:
        places, state, flat = self.places[weight], self.state[weight], weight.view(-1)
        part = flat[places]
        if not state:
            state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(part), exp_avg_sq=torch.zeros_like(part))
        adamw(
            [part], [weight.grad.reshape(-1)[places]], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
            foreach=False, fused=False, amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1],
            lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip
        flat[places] = part

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with a mark of each weight's places, by which another mask is told."""
        found = super().state_dict()
        for index, mark in enumerate(self._marks if found["state"] else ()):  # of weights without a state too
            found["state"][index] = {**found["state"].get(index, {}), "places": torch.tensor(mark)}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set what `state_dict` returned.

        Raises:
            CheckpointError: the state of another mask, or of an optimizer of whole weights.
        """
        slots, state = {}, state_dict["state"]
        for index, own in enumerate(self._marks if state else ()):
            found = state.get(index, {})
            mark = found.get("places")
            if mark is None or int(mark) != own:
                raise CheckpointError(
                    "A checkpoint was trained on another mask", where="sparsity.mask",
                    why="the optimizer's state is not that of its entries", do="Give the mask it was trained on, or "
                    "start another run from its weights",
                )  # fmt: skip
            if len(found) > 1:
                slots[index] = {name: value for name, value in found.items() if name != "places"}
        super().load_state_dict({**state_dict, "state": slots})


def _mark(places: Tensor) -> int:
    return zlib.crc32(places.cpu().numpy().tobytes())
