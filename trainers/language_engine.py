"""DeepSpeed for language models: which settings a run has, whoever gave them, and a reference that is sharded.

Settings come from `--deepspeed`, by name or file, or from the configuration file of `accelerate launch`. Batch sizes,
clipping, precision, optimizer and schedule are `align`'s: settings may leave them out, say auto, or say the same.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from align.engine import read_settings, require_stage
from align.errors import ConfigError
from align.language_config import LanguageConfig
from align.launch import World

_AUTO = (
    "train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping",
)  # fmt: skip
_ACCELERATE_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}  # fmt: skip
_ACCELERATE_FIELDS = "ACCELERATE_CONFIG_DS_FIELDS"


def engine_settings(deepspeed: str | None, config: LanguageConfig, world: World) -> dict[str, Any] | None:
    """Return the DeepSpeed settings of a run as `TrainingArguments` takes them; None without DeepSpeed.

    The optimizer is torch's AdamW, and the whole weights are gathered when a checkpoint is written under ZeRO 3.

    Args:
        deepspeed: a name in configs/deepspeed or a JSON file; what `accelerate launch` asks for when None.
        config: what the settings must agree with.
        world: the processes of the run.

    Raises:
        ConfigError: see `require_settings`.
    """
    options = require_settings(deepspeed, config, world.size)
    if options is None:
        return None
    _start_deepspeed()
    zero = dict(options["zero_optimization"])
    if zero["stage"] == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 62,
        **{name: value for name, value in options.items() if name not in ("optimizer", "scheduler", "fp16")},
        **dict.fromkeys(_AUTO, "auto"),
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
    }


def require_settings(
    deepspeed: str | None, config: LanguageConfig, processes: int, *, launching: bool = False
) -> dict[str, Any] | None:
    """Return the DeepSpeed settings that `engine_settings` takes, refusing what can be seen before anything starts.

    Args:
        deepspeed, config: see there.
        processes: of the run.
        launching: they are about to be started; this process is none of them.

    Raises:
        ConfigError: no such settings, settings that contradict `config`, no launcher, or something that is not
            installed.
    """
    _require_accelerate(config)
    found = _accelerate_settings()
    if deepspeed is not None and found is not None:
        raise ConfigError(
            "Two DeepSpeed settings are given", where=f"--deepspeed {deepspeed}",
            why="the configuration of `accelerate launch` turns DeepSpeed on too", do="Give one of them",
        )  # fmt: skip
    if deepspeed is not None:
        found = read_settings(deepspeed)
    if found is None:
        return None
    options, where = found
    if find_spec("deepspeed") is None:
        raise ConfigError("DeepSpeed is not installed", where=where, do="pip install deepspeed")
    if "RANK" not in os.environ and not launching:
        raise ConfigError(
            "ZeRO needs a launcher", where=where,
            do="Add --launch deepspeed --nproc N, or leave --deepspeed out to train in one process",
        )  # fmt: skip
    _require_same(options, config, processes, where)
    return options


def zero_stage(options: Mapping[str, Any] | None) -> int:
    """Return the ZeRO stage of settings that `engine_settings` made; 0 without DeepSpeed."""
    return 0 if options is None else int(options["zero_optimization"]["stage"])


def _require_same(options: Mapping[str, Any], config: LanguageConfig, processes: int, where: str) -> None:
    """Refuse settings that say another thing than the configuration."""
    accumulation = config.batch_size // config.microbatch
    expected = {
        "train_micro_batch_size_per_gpu": config.microbatch // processes, "train_batch_size": config.batch_size,
        "gradient_accumulation_steps": accumulation, "gradient_clipping": config.optimizer.max_grad_norm or 0.0,
        "fp16.enabled": False, "bf16.enabled": config.model.dtype == "bf16",
    }  # fmt: skip
    for key, value in expected.items():
        group, _, name = key.rpartition(".")
        found = (options.get(group) or {} if group else options).get(name, "auto")
        if found not in ("auto", value):
            raise ConfigError(
                f"DeepSpeed's {key} is {found!r}, and the configuration makes it {value!r}", where=where,
                do=f"Remove {key}, or set it to auto",
            )  # fmt: skip
    for block in ("optimizer", "scheduler"):
        said = options.get(block) or {}
        fixed = [name for name, value in (said.get("params") or {}).items() if value not in ("auto", True)]
        if block == "optimizer" and said.get("type", "AdamW") != "AdamW":
            fixed.insert(0, "type")
        if fixed:
            raise ConfigError(
                f"DeepSpeed's {block} sets {fixed[0]}, which the configuration decides", where=where,
                do=f"Remove the {block} block, and set `optimizer` in the configuration",
            )  # fmt: skip


# What `accelerate launch` asks for, in the environment it makes


def _accelerate_settings() -> tuple[dict[str, Any], str] | None:
    """Return the DeepSpeed settings of `accelerate launch` and where they stand, None where it has none."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None

    def given(name: str) -> str | None:
        value = os.environ.get(f"ACCELERATE_{name}", "none")
        return None if value.lower() in ("none", "auto", "") else value

    file = given("DEEPSPEED_CONFIG_FILE")
    if file is not None:
        return read_settings(file)
    where = "accelerate launch, deepspeed_config"
    stage = int(given("DEEPSPEED_ZERO_STAGE") or 2)
    require_stage(stage, where)
    zero: dict[str, Any] = {"stage": stage}
    for what in ("optimizer", "param"):
        device = given(f"DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE")
        if device is not None:
            path = given(f"DEEPSPEED_OFFLOAD_{what.upper()}_NVME_PATH") if device == "nvme" else None
            zero[f"offload_{what}"] = {"device": device, **({"nvme_path": path} if path else {})}
    options: dict[str, Any] = {"zero_optimization": zero}
    steps, clipping = given("GRADIENT_ACCUMULATION_STEPS"), given("GRADIENT_CLIPPING")
    if steps not in (None, "1"):  # 1 is what it passes on where nothing was said
        options["gradient_accumulation_steps"] = int(steps)
    if clipping is not None:
        options["gradient_clipping"] = float(clipping)
    return options, where


def _require_accelerate(config: LanguageConfig) -> None:
    """Refuse what `accelerate launch` asks for and this run would not do."""
    if find_spec("accelerate") is None:
        raise ConfigError(
            "Language models need accelerate, which is not installed", why="transformers.Trainer runs on it",
            do="pip install 'align[llm]'",
        )  # fmt: skip
    where = "accelerate launch"
    for name, engine in _ACCELERATE_ENGINES.items():
        if os.environ.get(name, "false").lower() == "true":
            raise ConfigError(
                f"accelerate asks for {engine}, which language runs do not have through it", where=where,
                why="without GPUs its FSDP is data parallelism" if engine == "FSDP" else "",
                do="Leave it out and add --fsdp, or use zero_stage 3 of its deepspeed_config",
            )  # fmt: skip
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", config.model.dtype):
        raise ConfigError(
            f"accelerate asks for {precision}, and model.dtype is {config.model.dtype}", where=where,
            do="Set model.dtype, and leave --mixed_precision at no",
        )  # fmt: skip
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ConfigError(
            "accelerate asks for a compiled model, which language runs do not have", where=where,
            do="Leave --dynamo_backend at no",
        )  # fmt: skip
    alone = "ACCELERATE_MIXED_PRECISION" in os.environ and "RANK" not in os.environ and "MASTER_PORT" in os.environ
    if alone:
        raise ConfigError(
            "accelerate was asked for several processes and started one", where=where,
            why="without GPUs it does so unless a distributed engine is named", do="Add --multi_gpu or --use_deepspeed",
        )  # fmt: skip


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Within the block accelerate is not told which fields of its settings `engine_settings` has taken over: it
    refuses them beside settings in DeepSpeed's own form. What it leaves in the environment goes when the block ends."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    os.environ.pop(_ACCELERATE_FIELDS, None)
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]
        os.environ.update(kept)


# A reference that is sharded


def sharded(model: nn.Module, options: Mapping[str, Any], *, half: bool) -> nn.Module:
    """Return a model that does not train, in an engine that holds its share of the weights: ZeRO 3.

    Args:
        model: loaded after `TrainingArguments` were made with `options`, so that it is partitioned already.
        options: the settings of the run, of which optimizer, schedule and the optimizer's offloading are left out.
        half: bfloat16.
    """
    import deepspeed

    zero = {k: v for k, v in options["zero_optimization"].items() if v != "auto" and k != "offload_optimizer"}
    settings = {
        "train_micro_batch_size_per_gpu": 1, "steps_per_print": 1 << 62, "bf16": {"enabled": half},
        "zero_optimization": zero,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    engine.eval()
    return engine


def _start_deepspeed() -> None:
    """Have DeepSpeed join the processes, before a model is partitioned over them, and keep it quiet.

    On CPU its collectives go through gloo, as its accelerated one would need a compiler.
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)  # it warns of the accumulation it then takes
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    if not torch.cuda.is_available():
        with contextlib.suppress(AttributeError, KeyError):
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
