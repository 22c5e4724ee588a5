"""Language-model runs of these tests: small ones, and what a process can tell of the engine that carried them."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import torch

import trainers.language as language
from align.config import load_config
from trainers import trainer_for
from trainers.tiny_language import toy_thumbs

ENGINES = {None: "data_parallel", "zero1": "deepspeed_zero1", "zero2": "deepspeed_zero2", "zero3": "deepspeed_zero3"}


def small(model: Path, trainer: str, *overrides: str):
    """A run of three updates of 16 rows, without warm-up; AdamW's eps keeps rounding small."""
    return load_config(
        {
            "trainer": trainer, "name": "toy", "model": {"path": str(model), "train": "full"}, "data": {"path": "toy"},
            "batch_size": 16, "microbatch": 8, "steps": 3, "optimizer": {"lr": 1e-3, "warmup": 0.0, "eps": 1e-6},
            "evaluation": {"every": 2, "rows": 7, "prompts": 3, "max_new_tokens": 6}, "checkpoint": {"every": 2},
        },
        overrides,
    )  # fmt: skip


class Told:
    """A run, and what really carried it: taken from transformers' and DeepSpeed's own objects."""

    def __init__(self, config, out: Path, deepspeed: str | None) -> None:
        rows = toy_thumbs(40).split(0.2) if config.data.heldout_fraction else (toy_thumbs(8), None)
        self.run = trainer_for(config, out=out, rows=rows, deepspeed=deepspeed)
        self.partitioned = None
        self.trainer = None

    def train(self):
        loaded, made = language.load_language_model, language.AlignTrainer

        def load(*arguments, **options):
            model = loaded(*arguments, **options)
            self.partitioned = all(hasattr(p, "ds_id") for n, p in model.named_parameters() if "lora_" not in n)
            return model

        def make(*arguments, **options):
            self.trainer = made(*arguments, **options)
            return self.trainer

        language.load_language_model, language.AlignTrainer = load, make
        try:
            return self.run.train()
        finally:
            language.load_language_model, language.AlignTrainer = loaded, made

    def weights(self) -> str:
        """A hash of the trained weights in memory, whole ones under ZeRO 3. Every process must call it."""
        parameters = [p for _, p in sorted(self.trainer.model.named_parameters()) if p.requires_grad]
        digest = hashlib.sha256()
        if hasattr(parameters[0], "ds_id"):
            self.trainer.model_wrapped.empty_partition_cache()
        with whole(parameters):
            for p in parameters:
                digest.update(p.detach().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def about(self) -> dict:
        """The engine: its class, stage, world, and whether model and reference are partitioned."""
        import deepspeed

        engine, copy = self.trainer.model_wrapped, self.trainer.models.reference
        copy = None if copy is None else copy.copy
        zero = isinstance(engine, deepspeed.DeepSpeedEngine)
        return {
            "engine": type(engine).__name__, "stage": engine.zero_optimization_stage() if zero else 0,
            "world": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
            "partitioned": self.partitioned, "reference_partitioned": copy is not None
            and all(hasattr(p, "ds_id") for p in copy.parameters()),
        }  # fmt: skip


def whole(parameters):
    """Have all of the parameters' values within the block."""
    if not hasattr(parameters[0], "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def checkpoint_hashes(folder: Path) -> dict[str, str]:
    """Of every file of a checkpoint."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
