"""From the arguments of a TRL script to a config of ours, field by field; TRL itself is not imported.

What has no counterpart is listed, never dropped: `Ported.findings`. Arguments that are not given have the defaults of
TRL 1.16, of BCO those of 1.13, so that the run is the one that TRL would have made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.checks import Finding
from align.config import load_config
from align.errors import ConfigError
from align.language_config import LanguageConfig
from align.registry import suggest
from align.textfiles import dump_value

TRAINERS = ("kto", "bco", "dpo", "sft")

# Ours by TRL's name, where the value stays as it is. What follows rules of its own is in `_rules`.
NAMES = {
    "model_name_or_path": "model.path", "chat_template_path": "model.chat_template", "lora_r": "model.lora.rank",
    "lora_alpha": "model.lora.alpha", "gradient_checkpointing": "model.gradient_checkpointing",
    "dataset_name": "data.path", "max_length": "data.max_length", "max_prompt_length": "data.max_prompt_length",
    "dataset_num_proc": "data.workers", "learning_rate": "optimizer.lr", "adam_epsilon": "optimizer.eps",
    "weight_decay": "optimizer.weight_decay", "beta": "objective.beta", "label_smoothing": "objective.label_smoothing",
    "desirable_weight": "objective.weight_desirable", "undesirable_weight": "objective.weight_undesirable",
    "seed": "seed", "save_total_limit": "checkpoint.keep",
}  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_train_epochs": 3, "max_length": 1024,
    "lr_scheduler_type": "linear", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 42,
    "bf16": True, "gradient_checkpointing": True, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8,
    "save_steps": 500, "use_peft": False,
}  # fmt: skip
OF_TRAINER: dict[str, dict[str, Any]] = {
    "kto": {"learning_rate": 1e-6, "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "bco": {"learning_rate": 5e-7, "beta": 0.1},
    "dpo": {"learning_rate": 1e-6, "beta": 0.1, "label_smoothing": 0.0},
    "sft": {"learning_rate": 2e-5},
}
# Where these values are given nothing has to be done: it is so here, whatever is set.
_SO_ANYWAY = {
    "disable_dropout": True, "remove_unused_columns": False, "do_train": True, "completion_only_loss": True,
    "truncation_mode": "keep_start", "average_tokens_across_devices": True, "push_to_hub": False,
}  # fmt: skip
_ELSEWHERE = {
    "output_dir": "the run folder is --out", "deepspeed": "settings are --deepspeed FILE, beside --launch",
    "logging_steps": "every step is in metrics.jsonl", "report_to": "nothing leaves the machine; tracking.tensorboard",
    "logging_strategy": "every step is in metrics.jsonl", "run_name": "the run is named by `name`",
}  # fmt: skip
"""What is said in another place than the config."""
_UDM = {"prompt_sample_size": "--sample", "min_density_ratio": "--low", "max_density_ratio": "--high"}


@dataclass(frozen=True)
class Ported:
    """A config made of TRL's arguments.

    Args:
        values: what differs from our defaults or was given, nested as in YAML.
        config: the same, checked.
        findings: what has no counterpart, and what is done differently.
    """

    values: dict[str, Any]
    config: LanguageConfig
    findings: list[Finding]


def from_trl(*given: Any, trainer: str | None = None, processes: int = 1) -> Ported:
    """Return our config of TRL's arguments.

    Batches count the rows of all processes here: `microbatch = per_device_train_batch_size x processes`, and
    `batch_size = microbatch x gradient_accumulation_steps`.

    Args:
        given: mappings such as a TRL YAML file, or objects such as `trl.KTOConfig`, `ScriptArguments`, `ModelConfig`.
        trainer: kto, bco, dpo or sft; when None what the names of the objects or of their fields say.
        processes: of the launch.

    Raises:
        ConfigError: no trainer can be told, or the values make no config.
    """
    fields = [_fields(part) for part in given]
    asked = {name: value for part in fields for name, value in part.items() if value is not None}
    trainer = trainer or _trainer(given, asked)
    if trainer not in TRAINERS:
        raise ConfigError(f"Unknown trainer {trainer!r}", where="--trainer", do=suggest(trainer, TRAINERS))
    arguments = {**DEFAULTS, **OF_TRAINER[trainer], **asked}
    if "activation_checkpointing" in asked:  # the name of transformers 6
        arguments["gradient_checkpointing"] = asked["activation_checkpointing"]
    ours, used, findings = _rules(arguments, trainer, processes)
    for name, key in NAMES.items():
        if name in arguments and _applies(name, key, trainer, bool(arguments["use_peft"])):
            ours[key] = arguments[name]
            used.add(name)
    ours.setdefault("model.path", "MODEL")
    ours.setdefault("data.path", "DATA")
    left = {
        name: value for name, value in asked.items()
        if name not in used and not (name in _SO_ANYWAY and _SO_ANYWAY[name] == value)
    }  # fmt: skip
    if left:
        listed = ", ".join(f"{name}={_word(value)}" for name, value in sorted(left.items()))
        findings.append(Finding("warning", "no_counterpart", f"Nothing here corresponds to {listed}"))
    values = _nested({"trainer": trainer, **ours})
    return Ported(values, load_config(values), findings)


def _applies(name: str, key: str, trainer: str, lora: bool) -> bool:
    """Whether a trainer has the key, and the run a use for it."""
    return (not key.startswith("objective.") or name in OF_TRAINER[trainer]) and (lora or "lora" not in key)


def _fields(part: Any) -> dict[str, Any]:
    """Return the arguments of a mapping; of an object those that are mapped or differ from its defaults."""
    if isinstance(part, Mapping):
        return {str(name): value for name, value in part.items()}
    values = {name: value for name, value in vars(part).items() if not name.startswith("_")}
    if not dataclasses.is_dataclass(part):
        return values
    plain = {
        f.name: f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        for f in dataclasses.fields(part)
    }
    known = {*NAMES, *DEFAULTS}
    return {
        name: value for name, value in values.items()
        if name in plain and (name in known or _word(value) != _word(plain[name])) and name not in _SET_BY_ITSELF
    }  # fmt: skip


# Fields of transformers.TrainingArguments that it fills in while it is made.
_SET_BY_ITSELF = {
    "accelerator_config", "logging_dir", "lr_scheduler_kwargs", "fsdp", "fsdp_config", "report_to", "debug",
    "include_for_metrics", "parallelism_config", "deepspeed_plugin", "distributed_state", "mixed_precision",
    "use_cpu", "output_dir", "disable_tqdm", "dataloader_pin_memory", "per_device_eval_batch_size", "data_seed",
    "optim_args", "hub_token", "run_name",
}  # fmt: skip


def _trainer(given: tuple[Any, ...], asked: Mapping[str, Any]) -> str:
    for name in TRAINERS:
        if any(type(part).__name__ == f"{name.upper()}Config" for part in given):
            return name
    signs = {
        "kto": {"desirable_weight", "undesirable_weight"}, "bco": set(_UDM),
        "dpo": {"f_divergence_type", "loss_weights", "ld_alpha"},
        "sft": {"completion_only_loss", "assistant_only_loss"},
    }  # fmt: skip
    found = [name for name, fields in signs.items() if fields & set(asked)]
    found += [name for name in ("kto",) if asked.get("loss_type") in ("kto", "apo_zero_unpaired") and not found]
    if len(found) != 1:
        raise ConfigError(
            "The arguments do not say which trainer they are for", do="Add --trainer kto, bco, dpo or sft"
        )
    return found[0]


def _rules(
    arguments: Mapping[str, Any], trainer: str, processes: int
) -> tuple[dict[str, Any], set[str], list[Finding]]:
    """Return our values by dotted key where a rule makes them, the names they use up, and what is to be said."""
    used = {
        "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "adam_beta1", "adam_beta2",
        "bf16", "use_peft", "max_grad_norm", "save_steps", "warmup_steps", "lr_scheduler_type",
    }  # fmt: skip
    findings: list[Finding] = []

    def unlike(what: str, key: str = "") -> None:
        findings.append(Finding("warning", "differs", what, "", key))

    microbatch = int(arguments["per_device_train_batch_size"]) * processes
    ours: dict[str, Any] = {
        "microbatch": microbatch, "batch_size": microbatch * int(arguments["gradient_accumulation_steps"]),
        "model.dtype": "bf16" if arguments["bf16"] else "fp32",
        "model.train": "lora" if arguments["use_peft"] else "full",
        "optimizer.betas": [arguments["adam_beta1"], arguments["adam_beta2"]],
        "optimizer.max_grad_norm": arguments["max_grad_norm"] or None,
    }  # fmt: skip
    epochs, steps = float(arguments["num_train_epochs"]), int(arguments.get("max_steps", -1))
    used.add("max_steps")
    ours["epochs"] = max(1, round(epochs))
    if steps > 0:
        ours["steps"] = steps
    elif epochs != ours["epochs"]:
        unlike(f"num_train_epochs {epochs:g} is no whole number, and became {ours['epochs']}", "epochs")
    schedule = str(getattr(arguments["lr_scheduler_type"], "value", arguments["lr_scheduler_type"]))
    ours["optimizer.schedule"] = {"constant_with_warmup": "constant"}.get(schedule, schedule)
    if ours["optimizer.schedule"] not in ("constant", "linear", "cosine"):
        unlike(f"lr_scheduler_type {schedule} became linear", "optimizer.schedule")
        ours["optimizer.schedule"] = "linear"
    used.add("warmup_ratio")
    warmup = float(arguments.get("warmup_ratio") or 0) or float(arguments["warmup_steps"])
    if warmup >= 1:
        if steps <= 0:
            unlike(f"warmup_steps {warmup:g} of a number of steps that is not given became a tenth", "optimizer.warmup")
        warmup = min(0.99, warmup / steps) if steps > 0 else 0.1
    ours["optimizer.warmup"] = 0.0 if schedule == "constant" else warmup
    save = float(arguments["save_steps"])
    ours["checkpoint.every"] = int(save) if save >= 1 else 100
    if arguments.get("precompute_ref_log_probs") and trainer != "sft":
        ours["reference.mode"] = "precomputed"
        used.add("precompute_ref_log_probs")
    if str(arguments.get("eval_strategy", "no")).endswith("steps") and arguments.get("eval_steps"):
        ours["evaluation.every"] = int(arguments["eval_steps"])
        used |= {"eval_strategy", "eval_steps"}
    targets = arguments.get("lora_target_modules")
    if targets and arguments["use_peft"]:
        targets = [targets] if isinstance(targets, str) else list(targets)
        ours["model.lora.targets"] = None if targets == ["all-linear"] else targets
        used.add("lora_target_modules")
    used |= {"lora_r", "lora_alpha", "activation_checkpointing"}
    loss = arguments.get("loss_type")
    loss = loss[0] if isinstance(loss, list) and len(loss) == 1 else loss
    if trainer == "kto" and loss in ("kto", "apo_zero_unpaired"):
        ours["objective.loss"] = loss
    if loss in {"kto": ("kto", "apo_zero_unpaired"), "bco": ("bco",), "dpo": ("sigmoid",), "sft": ("nll",)}[trainer]:
        used.add("loss_type")
    used.add("trainer")
    matching = {name: flag for name, flag in _UDM.items() if name in arguments}
    if matching:
        used |= set(matching)
        flags = " ".join(f"{flag} {arguments[name]:g}" for name, flag in matching.items())
        unlike(
            f"Prompts are matched before training: align feedback match-prompts DATA --out FILE {flags}", "data.path"
        )
    if trainer == "bco":
        ours |= {"objective.delta": "cumulative_pooled", "objective.balance": "pooled"}
        unlike("The shift and the loss are TRL's; leave out delta and balance for the paper's", "objective")
    if "dataset_name" in arguments and not Path(str(arguments["dataset_name"])).exists():
        unlike(f"data.path is read from this machine: save the data set {arguments['dataset_name']} to a file first",
               "data.path")  # fmt: skip
    for name in _ELSEWHERE.keys() & set(arguments):
        findings.append(Finding("note", "elsewhere", f"{name}: {_ELSEWHERE[name]}"))
        used.add(name)
    mixes = "; every update mixes both classes" if trainer in ("kto", "bco") else ""
    unlike(f"A tenth of the prompts is held out, and epochs are shuffled{mixes}", "data")
    return ours, used, findings


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        section = found
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return found


def as_yaml(ported: Ported) -> str:
    """Return a ported config as YAML, what has to be said of it as comments above."""
    notes = [f"# {finding.message}." for finding in ported.findings]
    return "\n".join([*notes, *(f"{key}: {dump_value(value)}" for key, value in ported.values.items())])


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))
