"""What a language-model config will do before it does it: combinations that cannot train, and advice."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.checks import Finding, errors_first, judged, mask_findings
from align.errors import AlignError, ConfigError, ModelError
from align.language_config import BCOConfig, DPOConfig, KTOConfig, LanguageConfig, SFTConfig
from align.rluf_checks import check_rluf
from align.rluf_config import RLUFConfig
from align.weights import require_whole

if TYPE_CHECKING:
    from align.preferences import PreferenceSet


def check_language_config(
    config: LanguageConfig, *, reward_names: Collection[str] | None = None, files: bool = False
) -> list[Finding]:
    """Return every finding on `config`, errors first.

    Args:
        config: what to check.
        reward_names: the registered rewards; an unknown name is then an error.
        files: also read the data files and look for the model folder.
    """
    found = [*_batches(config), *_data(config), *mask_findings(config, files=files)]
    if isinstance(config, KTOConfig):
        found += _kto(config)
    if isinstance(config, BCOConfig):
        found += _bco(config)
    if isinstance(config, RLUFConfig):
        found += check_rluf(config, reward_names)
    if hasattr(config, "reference"):
        found += _reference(config)
    if files:
        found += _files(config)
    return errors_first(found)


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
    from align.preferences import PreferenceSet, load_preferences

    found: list[Finding] = []
    for key, path in (("data.path", config.data.path), ("data.heldout_path", config.data.heldout_path)):
        if path is None or path == "toy":
            continue
        try:
            alone = isinstance(config, RLUFConfig) and config.prompts_alone
            rows = load_preferences(path, prompts=alone)
            if any(row.images for row in rows.rows) and _reads_text_alone(config.model.path):
                found.append(Finding(
                    "error", "images", f"{path} has images, and {config.model.path!r} reads text alone",
                    "Set model.path to a vision-language model", "model.path",
                ))  # fmt: skip
            if isinstance(config, DPOConfig):
                rows = rows.pairs()
            elif isinstance(config, RLUFConfig):
                rows = rows.one_a_prompt()
            elif isinstance(config, SFTConfig):
                rows = PreferenceSet(tuple(row for row in rows.rows if row.label is not False), rows.source)
            else:
                soft = isinstance(config, BCOConfig) and config.objective.soft_labels
                rows = rows.require_labels(threshold=config.data.score_threshold, soft=soft)
                if key == "data.path" and not config.data.allow_one_class:
                    rows.require_both_classes()
            if key == "data.path":
                held = config.data.heldout_path is None and config.data.heldout_fraction
                parts = rows.split(config.data.heldout_fraction) if held else (rows, None)
                if not isinstance(config, RLUFConfig):
                    parts = (_answered(parts[0]), parts[1] and _answered(parts[1]))
                found += _counts(config, *parts)
        except AlignError as error:
            found.append(Finding("error", "data", str(error).removesuffix("."), "", key))
    return [*found, *_model_folder(config.model.path)]


def _answered(rows: PreferenceSet) -> PreferenceSet:
    """Return the rows with a completion, which alone are learnt from, without what is left of their pairs."""
    empty = {row.pair for row in rows.rows if not row.completion} - {-1}
    return replace(rows, rows=tuple(row for row in rows.rows if row.completion and row.pair not in empty))


def _counts(config: LanguageConfig, training: PreferenceSet, heldout: PreferenceSet | None) -> list[Finding]:
    """What the numbers of rows say: too few for an update, uneven classes, weights outside of what is advised."""
    counts = training.counts()
    up, down = counts["up"], counts["down"]
    units, kind = len(training), "prompts" if isinstance(config, RLUFConfig) else "rows"
    if isinstance(config, DPOConfig):
        units, kind = counts["pairs"], "pairs"
    elif isinstance(config, BCOConfig) and config.objective.balance == "oversample":
        units, kind = 2 * max(up, down), "rows, the smaller class repeated,"
    if units < config.batch_size:
        return [Finding(
            "error", "few_rows", f"{units} {kind} to train on are fewer than the {config.batch_size} of one update",
            "Lower batch_size and microbatch, or add rows", "batch_size",
        )]  # fmt: skip
    held = "" if heldout is None else f", {len(heldout)} rows are held out"
    classes = "" if kind in ("pairs", "prompts") or isinstance(config, SFTConfig) else f" ({up} up, {down} down)"
    updates = f"{units // config.batch_size} updates an epoch"
    found = [Finding("note", "rows", f"{units} {kind} train{classes}{held}; {updates}", "", "data.path")]
    if not (up and down):
        return found
    if isinstance(config, KTOConfig):
        found += _class_weights(config, up, down)
    elif isinstance(config, BCOConfig) and max(up, down) > 4 * min(up, down) and kind == "rows":
        found.append(Finding(
            "warning", "uneven_classes", f"{up} thumbs up and {down} down; the paper repeats the smaller class",
            "Set objective.balance: oversample", "objective.balance",
        ))  # fmt: skip
    return found


def _class_weights(config: KTOConfig, up: int, down: int) -> list[Finding]:
    given = (config.objective.weight_desirable, config.objective.weight_undesirable)
    if None in given:
        return []  # what is derived is right by construction
    weighted = given[0] * up, given[1] * down
    if min(weighted) == 0 or 1 <= weighted[0] / weighted[1] <= 1.5:
        return []
    return [Finding(
        "warning", "class_weights", f"{weighted[0]:g} weighted thumbs up over {weighted[1]:g} weighted thumbs down is "
        f"{weighted[0] / weighted[1]:.3g}, outside the advised 1 to 3/2",
        f"Leave both weights auto, or set weight_desirable from {weighted[1] / up:.4g} to {1.5 * weighted[1] / up:.4g}",
        "objective.weight_desirable",
    )]  # fmt: skip


def _model_folder(path: str) -> list[Finding]:
    folder = Path(path)
    try:
        require_whole(folder)
    except ModelError as error:
        return [Finding("error", "model", error.what, error.do, "model.path")]
    if path == "tiny" or (folder / "config.json").is_file():
        return []
    if folder.is_dir():
        return [Finding(
            "error", "model", f"{path!r} is no model folder: it has no config.json",
            "Give a folder written by save_pretrained, a hub name, or 'tiny'", "model.path",
        )]  # fmt: skip
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path.startswith("."):
        return [Finding(
            "error", "model", f"There is no folder {path!r}", "Give a folder written by save_pretrained, or a hub name",
            "model.path",
        )]  # fmt: skip
    return [] if _cached(path) else [Finding(
        "warning", "model_not_here", f"{path!r} is no folder here, and nothing of that name was fetched before",
        "Have the network or a folder at hand when training starts", "model.path",
    )]  # fmt: skip


def _cached(name: str) -> bool:
    """Whether the hub's client has fetched a model of this name before."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return False
    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _reads_text_alone(model: str) -> bool:
    """Return whether a model is known to take no images: the embedded one, or a folder whose config has no vision."""
    try:
        config = "{}" if model == "tiny" else (Path(model) / "config.json").read_text(encoding="utf-8")
        return "vision_config" not in json.loads(config)
    except (OSError, ValueError):
        return False  # a hub name; it is found out when it is loaded


def describe_language_config(config: LanguageConfig, findings: list[Finding]) -> dict[str, Any]:
    """Return what `align check` says of a config: its name, batches, forwards a step and findings.

    `forwards` counts passes over the rows of a step, a backward pass being two: KTO 7, or 5 with precomputed reference
    log-probs; BCO and DPO 5 or 4 (recomputation with gradient checkpointing included); SFT 4; one less without it.
    RLUF's are of a prompt: k + 1 completions under policy and reference, and those that are learnt from; drawing them
    comes on top.
    """
    again = int(config.model.gradient_checkpointing)
    forwards = 3 + again
    if hasattr(config, "reference"):
        live = config.reference.mode != "precomputed"
        mismatched = isinstance(config, KTOConfig) and config.objective.loss == "kto" and config.objective.z0 != "zero"
        forwards += int(live) + int(mismatched) * (1 + int(live))
    if isinstance(config, RLUFConfig):
        k = config.sampling.completions
        forwards = 2 * (k + 1) + (3 + again) * {"crpg": k, "crraft": 1, "codpo": 2}[config.objective.loss]
    return {
        "kind": "config", "name": config.name, "trainer": config.trainer, "steps": config.steps,
        "epochs": config.epochs, "batch_size": config.batch_size, "microbatch": config.microbatch,
        "accumulation": config.batch_size // config.microbatch, "forwards": forwards,
        **judged(findings),
    }  # fmt: skip
