"""The loops that change weights. `from trainers import DanceGRPO`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.loops import LANGUAGE, VISUAL

if TYPE_CHECKING:
    from trainers.bco import BCO
    from trainers.dance_grpo import DanceGRPO
    from trainers.dpo import DPO
    from trainers.evaluation import Sampling, evaluate, sample_images
    from trainers.forward import Forward
    from trainers.kto import KTO
    from trainers.language_verbs import evaluate_language, sample_completions
    from trainers.offline import Offline
    from trainers.result import RunResult
    from trainers.rluf import RLUF
    from trainers.sft import SFT
    from trainers.sources import find_source

__all__ = [
    "BCO", "DPO", "KTO", "RLUF", "SFT", "DanceGRPO", "Forward", "Offline", "RunResult", "Sampling", "evaluate",
    "evaluate_language",
    "find_source", "sample_completions", "sample_images", "trainer_for",
]  # fmt: skip

_TRAINERS = {name: loop.title for name, loop in {**VISUAL, **LANGUAGE}.items()}
_HOMES = {
    **{title: f"trainers.{name}" for name, title in _TRAINERS.items()},
    "RunResult": "trainers.result",
    "Sampling": "trainers.evaluation",
    "evaluate": "trainers.evaluation",
    "evaluate_language": "trainers.language_verbs",
    "find_source": "trainers.sources",
    "sample_completions": "trainers.language_verbs",
    "sample_images": "trainers.evaluation",
}


def trainer_for(config: Any, **options: Any) -> Any:
    """Return the trainer that a config names, with a `train()` that returns a `RunResult`.

    Args:
        config: of `align.load_config`.
        options: `out`, `overwrite`, `fork`, `deepspeed`; of language models and dance_grpo `fsdp`.
    """
    return __getattr__(_TRAINERS[config.trainer])(config, **options)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trainers' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
