"""DeepSpeed for language models: our settings completed with what `transformers.Trainer` fills in."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from align.errors import ConfigError
from align.recipes import list_engines, read_engine
from align.registry import suggest

_AUTO = (
    "train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping",
)  # fmt: skip


def deepspeed_arguments(settings: str) -> dict[str, Any]:
    """Return DeepSpeed settings, by name or file, as `TrainingArguments` takes them.

    Batch sizes, clipping and precision come from `align`'s configuration, the optimizer is torch's AdamW, and the
    whole weights are gathered when a checkpoint is written under ZeRO 3.

    Raises:
        ConfigError: no such settings, not a JSON object, or DeepSpeed is not installed.
    """
    if settings in list_engines():
        text, where = read_engine(settings), f"configs/deepspeed/{settings}.json"
    elif Path(settings).is_file():
        text, where = Path(settings).read_text(encoding="utf-8"), settings
    else:
        raise ConfigError(
            f"There are no DeepSpeed settings {settings!r}", where="--deepspeed", do=suggest(settings, list_engines())
        )
    try:
        options = json.loads(text)
        stage = int(options.get("zero_optimization", {}).get("stage", 0))
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError("DeepSpeed settings are one JSON object", where=where, why=str(error)) from error
    _without_compiler()
    zero = {**options.get("zero_optimization", {}), "stage": stage}
    if stage == 3:
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)
    return {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 62,
        **options,
        **dict.fromkeys(_AUTO, "auto"),
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
    }


def _without_compiler() -> None:
    """On CPU, have DeepSpeed's collectives go through gloo, as its accelerated one would need a compiler."""
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError("DeepSpeed is not installed", where="--deepspeed", do="pip install deepspeed") from error
    if not torch.cuda.is_available():
        with contextlib.suppress(AttributeError, KeyError):
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
