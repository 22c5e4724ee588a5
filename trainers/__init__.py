"""The loops that change weights. `from trainers import DanceGRPO`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainers.dance_grpo import DanceGRPO, RunResult
    from trainers.evaluation import evaluate, sample_images

__all__ = ["DanceGRPO", "RunResult", "evaluate", "sample_images"]

_HOMES = {
    "DanceGRPO": "trainers.dance_grpo",
    "RunResult": "trainers.dance_grpo",
    "evaluate": "trainers.evaluation",
    "sample_images": "trainers.evaluation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trainers' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
