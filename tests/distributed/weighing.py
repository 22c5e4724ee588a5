"""What one process holds of the optimizer, of gradients and of parameters, as shares of whole ones."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from align import checkpoint

SPLITS = {
    None: (), "zero1": ("optimizer",), "zero2": ("optimizer", "gradients"),
    "zero3": ("optimizer", "gradients", "parameters"), "fsdp2": ("optimizer", "gradients", "parameters"),
}  # fmt: skip
"""What each engine is for: of these a process holds its share."""


def held(tensors: Iterable[Tensor]) -> int:
    """The bytes of tensors on this process, each memory counted once."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum({(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in local if t.numel()}.values())


def shares_held(model: nn.Module, optimizer: Any, engine: Any = None) -> dict[str, float]:
    """Held bytes over whole ones: of the optimizer's moments, of gradients, and of parameters, also frozen ones.

    Args:
        optimizer: torch's; that of `engine` where there is one.
        engine: DeepSpeed's, which keeps gradients and optimizer itself.
    """
    parameters = list(model.parameters())
    sizes = [(getattr(p, "ds_numel", p.numel()) * p.element_size(), p.requires_grad) for p in parameters]
    trained = sum(size for size, trains in sizes if trains)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if engine is not None:
        optimizer = engine.optimizer.optimizer
        gradients += [g for group in engine.optimizer.averaged_gradients.values() for g in group or ()]
    moments = [v for state in optimizer.state.values() for v in state.values() if v.dim()]
    here = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]
    return {
        "optimizer": held(moments) / (2 * trained), "gradients": held(gradients) / trained,
        "parameters": held([*parameters, *here]) / sum(size for size, _ in sizes),
    }  # fmt: skip


def weigh_second_step(engine: Any, model: nn.Module, into: dict[str, float]) -> None:
    """Have what is held when DeepSpeed is about to take its second update written into `into`."""
    step = engine.step

    def weighed(*arguments: Any, **options: Any) -> Any:
        if engine.global_steps == 1 and engine.is_gradient_accumulation_boundary():
            into.update(shares_held(model, None, engine))
        return step(*arguments, **options)

    engine.step = weighed


def require_shares(shares: dict[str, float], engine: str | None, size: int = 2) -> None:
    """Each of `size` processes holds less than 1.2 of its part of what the engine splits: under 60 % of two."""
    for what in ("optimizer", "gradients", "parameters"):
        assert (shares[what] < 1.2 / size) if what in SPLITS[engine] else (shares[what] >= 0.99 / size), shares
    assert engine is not None or min(shares.values()) == 1


def largest_difference(one: Path, other: Path) -> float:
    """The largest difference of a weight, of the average or of the optimizer's state in the last checkpoints."""
    first, second = (checkpoint.load_latest(out / "checkpoints").tensors for out in (one, other))
    assert first.keys() == second.keys() == {"model", "optimizer", "average", "rng"}
    found = 0.0
    for group in ("model", "average", "optimizer"):
        assert set(first[group]) == set(second[group])
        for name, value in first[group].items():
            found = max(found, float((value.double() - second[group][name].double()).abs().max()))
    return found


def cell(name: str, engine: str, train: str, difference: float, told: list[dict[str, Any]]) -> str:
    """A line of the table of all engines, of what each process told."""
    shares = [max(one["shares"][what] for one in told) for what in ("optimizer", "gradients", "parameters")]
    return json.dumps([name, engine, train, len(told), told[0]["engine"], told[0]["stage"], difference, *shares])


def train_weighed(trainer: Any) -> dict[str, Any]:
    """Train an image model under ZeRO; return the status and what this process can tell of its engine."""
    opened, kept, shares = trainer.open_run, [], {}

    def open_run() -> Any:
        run = opened()
        kept.append(run.engine.engine)
        weigh_second_step(kept[0], trainer.policy.family.denoiser, shares)
        return run

    trainer.open_run = open_run
    result = trainer.train()
    return {
        "status": result.status, "summary": result.summary, "engine": type(kept[0]).__name__,
        "stage": kept[0].zero_optimization_stage(), "shares": shares,
    }  # fmt: skip
