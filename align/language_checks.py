"""What a language-model config will do before it does it: combinations that cannot train, and advice."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from align.checks import Finding
from align.errors import AlignError, ConfigError
from align.language_config import BCOConfig, DPOConfig, KTOConfig, LanguageConfig, SFTConfig


def check_language_config(config: LanguageConfig, *, files: bool = False) -> list[Finding]:
    """Return every finding on `config`, errors first.

    Args:
        config: what to check.
        files: also read the data files and look for the model folder.
    """
    found = [*_batches(config), *_data(config)]
    if isinstance(config, KTOConfig):
        found += _kto(config)
    if isinstance(config, BCOConfig):
        found += _bco(config)
    if not isinstance(config, SFTConfig):
        found += _reference(config)
    if files:
        found += _files(config)
    order = ("error", "warning", "note")
    return sorted(found, key=lambda finding: order.index(finding.level))


def require_divisible(config: LanguageConfig, processes: int) -> None:
    """Refuse a number of processes that a microbatch does not divide over.

    Raises:
        ConfigError: with what to set.
    """
    if config.microbatch % processes:
        raise ConfigError(
            f"A microbatch of {config.microbatch} does not divide over {processes} processes", where="microbatch",
            do=f"Set it to a multiple of {processes}; it counts the rows of all processes",
        )  # fmt: skip


def _batches(config: LanguageConfig) -> list[Finding]:
    if config.batch_size % config.microbatch:
        return [Finding(
            "error", "uneven_batches",
            f"batch_size {config.batch_size} is no multiple of microbatch {config.microbatch}",
            "Set batch_size to a multiple of microbatch", "batch_size",
        )]  # fmt: skip
    return []


def _data(config: LanguageConfig) -> list[Finding]:
    found, data = [], config.data
    if data.max_prompt_length is not None and data.max_prompt_length >= data.max_length:
        found.append(Finding(
            "error", "no_room", f"max_prompt_length {data.max_prompt_length} leaves no room for a completion in "
            f"max_length {data.max_length}", "Lower data.max_prompt_length, or raise data.max_length",
            "data.max_prompt_length",
        ))  # fmt: skip
    if data.heldout_fraction == 0 and data.heldout_path is None:
        found.append(Finding(
            "warning", "no_heldout_rows", "No row is held out, so nothing tells learning from memorising",
            "Set data.heldout_fraction: 0.1, or data.heldout_path", "data.heldout_fraction",
        ))  # fmt: skip
    if data.allow_one_class and isinstance(config, (KTOConfig, BCOConfig)):
        found.append(Finding(
            "note", "one_class",
            "data.allow_one_class trains on thumbs of one kind, which pushes all completions one way",
            "", "data.allow_one_class",
        ))  # fmt: skip
    return found


def _kto(config: KTOConfig) -> list[Finding]:
    found, objective = [], config.objective
    if objective.loss == "kto" and objective.z0 == "batch" and config.microbatch < 2:
        found.append(Finding(
            "error", "microbatch_of_one", "A microbatch of 1 row has no mismatched pair to take KTO's z0 from",
            "Set microbatch to 4 or more, objective.z0: ema, objective.loss: apo_zero_unpaired, or trainer: bco",
            "microbatch",
        ))  # fmt: skip
    elif objective.loss == "kto" and objective.z0 == "batch" and config.microbatch < 4:
        found.append(Finding(
            "warning", "small_microbatch", f"z0 from {config.microbatch} rows is noisy; 4 or more are advised",
            "Raise microbatch, or set objective.z0: ema", "microbatch",
        ))  # fmt: skip
    if not 16 <= config.batch_size <= 128:
        found.append(Finding(
            "note", "batch_size", f"batch_size {config.batch_size} is outside the advised 16 to 128", "", "batch_size"
        ))  # fmt: skip
    if config.model.train == "full" and config.optimizer.lr > 5e-6 and config.model.path != "tiny":
        found.append(Finding(
            "warning", "lr_high", f"lr {config.optimizer.lr:g} is above the 5e-7 to 5e-6 advised for full fine-tuning",
            "Lower optimizer.lr", "optimizer.lr",
        ))  # fmt: skip
    if objective.humanline is not None and config.reference.mode == "precomputed":
        found.append(Finding(
            "error", "humanline_tokens", "humanline clamps token by token, and what is precomputed are sums",
            "Set reference.mode: auto, or objective.humanline: null", "objective.humanline",
        ))  # fmt: skip
    if objective.humanline is not None and objective.humanline[0] >= objective.humanline[1]:
        found.append(Finding(
            "error", "humanline_order", "humanline needs a lower bound below its upper one", "Write e.g. [-1, 1.5]",
            "objective.humanline",
        ))  # fmt: skip
    if objective.loss == "apo_zero_unpaired" and objective.z0 == "ema":
        found.append(Finding(
            "note", "z0_unused", "objective.z0 changes nothing with loss: apo_zero_unpaired", "", "objective.z0"
        ))  # fmt: skip
    return found


def _bco(config: BCOConfig) -> list[Finding]:
    if config.objective.soft_labels and config.data.score_threshold is not None:
        return [Finding(
            "error", "two_labels", "soft_labels takes scores as they are, and score_threshold cuts them",
            "Keep one of them", "data.score_threshold",
        )]  # fmt: skip
    return []


def _reference(config: Any) -> list[Finding]:
    if config.reference.mode == "lora_off" and config.model.train != "lora":
        return [Finding(
            "error", "no_adapters", "There are no adapters to switch off when every weight is trained",
            "Set reference.mode: copy or precomputed", "reference.mode",
        )]  # fmt: skip
    return []


def _files(config: LanguageConfig) -> list[Finding]:
    from align.preferences import load_preferences

    found = []
    for key, path in (("data.path", config.data.path), ("data.heldout_path", config.data.heldout_path)):
        if path is None or path == "toy":
            continue
        try:
            rows = load_preferences(path)
            if isinstance(config, DPOConfig):
                rows.pairs()
            elif not isinstance(config, SFTConfig):
                soft = isinstance(config, BCOConfig) and config.objective.soft_labels
                rows = rows.require_labels(threshold=config.data.score_threshold, soft=soft)
                if key == "data.path" and not config.data.allow_one_class:
                    rows.require_both_classes()
        except AlignError as error:
            found.append(Finding("error", "data", str(error).removesuffix("."), "", key))
    model = Path(config.model.path)
    if config.model.path != "tiny" and model.is_dir() and not (model / "config.json").is_file():
        found.append(Finding(
            "error", "model", f"{config.model.path!r} is no model folder: it has no config.json",
            "Give a folder written by save_pretrained, a hub name, or 'tiny'", "model.path",
        ))  # fmt: skip
    return found


def describe_language_config(config: LanguageConfig, findings: list[Finding]) -> dict[str, Any]:
    """Return what `align check` says of a config: its name, batches, forwards a step and findings.

    `forwards` counts passes over the rows of a step, a backward pass being two: KTO 7, or 5 with precomputed reference
    log-probs; BCO and DPO 5 or 4 (recomputation with gradient checkpointing included); SFT 4; one less without it.
    """
    again = int(config.model.gradient_checkpointing)
    forwards = 3 + again
    if not isinstance(config, SFTConfig):
        live = getattr(config, "reference").mode != "precomputed"  # noqa: B009 (not a field of all)
        mismatched = isinstance(config, KTOConfig) and config.objective.loss == "kto" and config.objective.z0 != "zero"
        forwards += int(live) + int(mismatched) * (1 + int(live))
    return {
        "kind": "config", "name": config.name, "trainer": config.trainer, "steps": config.steps,
        "epochs": config.epochs, "batch_size": config.batch_size, "microbatch": config.microbatch,
        "accumulation": config.batch_size // config.microbatch, "forwards": forwards,
        "findings": [asdict(finding) for finding in findings],
        "valid": all(finding.level != "error" for finding in findings),
    }  # fmt: skip
