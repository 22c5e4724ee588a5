"""Language-model runs of these tests: small ones, and what a process can tell of the engine that carried them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import trainers.language as language
from align.config import load_config
from tests.distributed.weighing import shares_held, weigh_second_step
from trainers import trainer_for
from trainers.tiny_language import toy_thumbs

ENGINES = {
    None: "data_parallel", "zero1": "deepspeed_zero1", "zero2": "deepspeed_zero2", "zero3": "deepspeed_zero3",
    "fsdp2": "fsdp2", "zero2_offload": "deepspeed_zero2",
}  # fmt: skip
OFFLOADED = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


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
    """A run, and what really carried it: taken from transformers', DeepSpeed's and torch's own objects.

    Args:
        engine: of ENGINES.
    """

    def __init__(self, config, out: Path, engine: str | None) -> None:
        rows = toy_thumbs(40).split(0.2) if config.data.heldout_fraction else (toy_thumbs(8), None)
        if engine == "zero2_offload":
            out.parent.mkdir(parents=True, exist_ok=True)
            engine = str(out.parent / "offload.json")
            Path(engine).write_text(json.dumps(OFFLOADED))
        how = {"fsdp": True} if engine == "fsdp2" else {"deepspeed": engine}
        self.run = trainer_for(config, out=out, rows=rows, **how)
        self.partitioned = None
        self.trainer = None
        self.shares: dict[str, float] = {}

    def train(self):
        loaded, made = language.load_language_model, language.AlignTrainer

        def load(*arguments, **options):
            model = loaded(*arguments, **options)
            self.partitioned = all(hasattr(p, "ds_id") for n, p in model.named_parameters() if "lora_" not in n)
            return model

        def make(*arguments, **options):
            self.trainer = made(*arguments, **options)
            self.trainer.add_callback(_Weigh(self))
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
                p = p.full_tensor() if isinstance(p, DTensor) else p
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
            "split": all(isinstance(p, DTensor) for p in engine.parameters()), "shares": self.shares,
            "copy_split": copy is not None and all(isinstance(p, DTensor) for p in copy.parameters()),
            "adapted": hasattr(self.trainer.model, "peft_config"),
            "world": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
            "partitioned": self.partitioned, "reference_partitioned": copy is not None
            and all(hasattr(p, "ds_id") for p in copy.parameters()),
        }  # fmt: skip


class _Weigh(TrainerCallback):
    """Weighs what this process holds, against whole tensors, when the second update is about to be taken."""

    def __init__(self, told: Told) -> None:
        self.told = told

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.told.trainer
        if trainer.is_deepspeed_enabled:
            weigh_second_step(trainer.model_wrapped, trainer.model, self.told.shares)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        trainer = self.told.trainer
        if state.global_step == 1 and not trainer.is_deepspeed_enabled:
            optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # of accelerate
            self.told.shares.update(shares_held(trainer.model, optimizer))


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


def row(out, i=-1):
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[i])


def same_answers(one, other):
    """The answers of two runs: in the same order, to the letter where nothing was trained, their log-ratios alike."""
    one, other = (
        [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()] for out in (one, other)
    )
    assert [(row["step"], row["index"]) for row in one] == [(s, i) for s in (0, 2, 3) for i in range(3)][: len(one)]
    assert [(row["step"], row["index"]) for row in other] == [(row["step"], row["index"]) for row in one]
    assert [row["completion"] for row in other[:3]] == [row["completion"] for row in one[:3]]
    for mine, theirs in zip(one, other, strict=True):
        assert (mine["log_ratio"] is None) == (theirs["log_ratio"] is None)
        if mine["log_ratio"] is not None and mine["completion"] == theirs["completion"]:
            assert theirs["log_ratio"] == pytest.approx(mine["log_ratio"], abs=1e-4)


def require_equal(one, other):
    """The last step's metrics, the evaluations, the final weights and the running state agree to 1e-5."""
    name = next(f for f in ("model", "adapter_model") if (one / f"checkpoints/step_000003/{f}.safetensors").exists())
    first, second = (load_file(run / f"checkpoints/step_000003/{name}.safetensors") for run in (one, other))
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, atol=1e-5, rtol=1e-4, msg=key)
    for i in range(3):
        mine, theirs = row(one, i), row(other, i)
        assert mine.keys() == theirs.keys()
        for key in set(mine) & {
            "loss", "rewards/up", "rewards/down", "log_ratio/down", "grad_norm", "lr", "z0", "delta/mean_up", "auc",
        }:  # fmt: skip
            assert theirs[key] == pytest.approx(mine[key], abs=1e-5), (i, key)
    if (one / "generations.jsonl").exists():
        same_answers(one, other)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one, other)]
    for key in {"auc_after", "rewards/margin_after"} & summaries[0].keys():
        assert summaries[1][key] == pytest.approx(summaries[0][key], abs=1e-5), key


def killed(config, out, settings, step):
    """Train until both processes are killed, in the midst of `step`."""

    def work():
        told = Told(config, out, settings)
        finish, count = told.run.objective.finish, [0]

        def die(world):
            count[0] += 1
            if count[0] == step:
                world.wait()
                os.kill(os.getpid(), signal.SIGKILL)
            return finish(world)

        told.run.objective.finish = die
        return told.train().status

    return work
