"""What a config will do before it does it: what cannot train, what is likely to disappoint, what is not there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from align.errors import ConfigError
from align.published import PUBLISHED, is_builtin, is_hub_name
from align.registry import suggest

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing worth saying of a config.

    Args:
        level: "error" cannot run, "warning" is likely to disappoint, "note" explains.
        code: stable short name, for filters and tests.
        message: one sentence on what and why.
        do: one sentence on what to change, empty for notes.
        key: the dotted key to change.
    """

    level: Level
    code: str
    message: str
    do: str = ""
    key: str = ""


def check_config(config: Any, *, reward_names: Collection[str] | None = None, files: bool = False) -> list[Finding]:
    """Return every finding on `config`, errors first.

    Args:
        config: what to check.
        reward_names: the registered rewards; an unknown name is then an error.
        files: also read the prompt files and look for the model folder.
    """
    if config.language:
        from align.language_checks import check_language_config

        return check_language_config(config, reward_names=reward_names, files=files)
    if config.trainer == "offline":
        from align.offline_checks import check_offline_config

        return check_offline_config(config, reward_names=reward_names, files=files)
    if config.trainer in ("fit", "peering"):
        return _fitting(config, files=files)
    from align.visual_checks import check_visual_config

    return check_visual_config(config, reward_names=reward_names, files=files)


def errors_first(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings by level: errors, warnings, notes."""
    order = ("error", "warning", "note")
    return sorted(findings, key=lambda finding: order.index(finding.level))


def _fitting(config: Any, *, files: bool) -> list[Finding]:
    """Findings on a reward to be fitted, or two of them."""
    from align.fit_config import require_fit
    from align.peering_config import SIMULATED, require_peering

    found = []
    try:
        require_fit(config) if config.trainer == "fit" else require_peering(config)
    except ConfigError as error:
        message = f"{error.what}: {error.why}" if error.why else error.what
        found.append(Finding("error", "fit", message, error.do, error.where))
    found += [
        Finding("error", "data", f"There is no such feedback: {path}", "Check data.paths", "data.paths")
        for path in (config.data.paths if files else ())
        if not Path(path).is_file() and not (config.trainer == "peering" and path == SIMULATED)
    ]
    return found


def require_valid(config: Any, findings: list[Finding] | None = None) -> list[Finding]:
    """Return the warnings and notes on `config`.

    Args:
        findings: on it, where files were read too; those that need no file when None.

    Raises:
        ConfigError: the first error found, where its value came from, and what to change.
    """
    from align.config import config_origins

    findings = check_config(config) if findings is None else findings
    for finding in findings:
        if finding.level == "error":
            origin = config_origins(config).get(finding.key)
            where = f"{finding.key}, {origin}" if origin else finding.key
            raise ConfigError(finding.message, where=where, do=finding.do)
    return findings


def looks_around(spec: Mapping[str, Any]) -> bool:
    """Whether a transform, as configured, measures a score by those of other samples."""
    (name, given), *_ = spec.items() if spec else (("", None),)
    return name == "rank_in_group" or (isinstance(given, Mapping) and given.get("over") is not None)


def reward_identity(reward: Any) -> str:
    """Return what makes two rewards of a configuration the same: name and arguments."""
    return f"{reward.name} {sorted(reward.args.items(), key=lambda item: item[0])!r}"


def named_rewards(rewards: Any) -> list[tuple[Any, Any]]:
    """Return rewards with their keys: names of a mapping, or numbers of a list."""
    return list(rewards.items() if isinstance(rewards, dict) else enumerate(rewards))


def unknown_rewards(config: Any, parts: Collection[str], known: Collection[str]) -> list[Finding]:
    """Return an error for every reward in the lists or mappings `parts` of `config` whose name is not `known`."""
    listed = [
        (f"{part}.{i}.name", r.name)
        for part in parts
        for i, r in named_rewards(getattr(config, part))
        if ":" not in r.name and r.args.get("placement") != "remote"  # a class by its place; a server's own names
    ]
    return [
        Finding("error", "unknown_reward", f"Unknown reward {name!r}", suggest(name, known).removesuffix("."), key)
        for key, name in listed
        if name not in known
    ]


def heldout_gates(config: Any) -> list[Finding]:
    """Findings on held-out rewards that are told to be gates."""
    return [
        Finding(
            "error", "heldout_gate", f"The held-out reward {reward.name!r} has role: gate, and nothing to close",
            "Remove it; held-out rewards are only measured", f"heldout_rewards.{i}.role",
        )
        for i, reward in enumerate(config.heldout_rewards) if reward.role == "gate"
    ]  # fmt: skip


def mask_findings(config: Any, *, files: bool) -> list[Finding]:
    """Say why a mask cannot be kept to: adapters move every weight of their layers; or that it is not there."""
    mask = config.sparsity.mask
    if mask is None:
        return []
    if config.model.train == "lora":
        return [Finding(
            "error", "mask_lora", "sparsity.mask needs full training: an adapter moves every weight of its layer",
            "Set model.train: full", "model.train",
        )]  # fmt: skip
    if files and not Path(mask).is_file():
        return [Finding(
            "error", "mask_absent", f"There is no mask file {mask!r}",
            "Write one with `align sparsity compare BASE TUNED --mask FILE`", "sparsity.mask",
        )]  # fmt: skip
    return []


def model_folder(model: str) -> list[Finding]:
    """Say of `model.path` what it is not: a pipeline folder, a built-in name, or a model on the hub that is here."""
    if is_hub_name(model):
        return _hub_model(model)
    if is_builtin(model) or (Path(model) / "model_index.json").is_file():
        return []
    return [Finding(
        "error", "model", f"{model!r} is no diffusers pipeline folder: it has no model_index.json",
        "Give a folder written by save_pretrained, or 'digits' for the embedded model", "model.path",
    )]  # fmt: skip


def _hub_model(name: str) -> list[Finding]:
    """Say of a model on the hub that it is not here yet."""
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "model_index.json"), str):
        return []
    doubt = "" if name in PUBLISHED else "; it is none of the published models known here"
    return [Finding(
        "warning", "model_absent", f"There is no folder {name!r}, so a run fetches it from the hub{doubt}",
        "Fetch it where there is a network, or give a folder written by save_pretrained", "model.path",
    )]  # fmt: skip


def describe_config(config: Any, findings: list[Finding]) -> dict[str, Any]:
    """Return what `align check` says of a config: its name, sizes, ledger, clip range and findings."""
    if config.language:
        from align.language_checks import describe_language_config

        return describe_language_config(config, findings)
    if config.trainer == "offline":
        from align.offline_checks import describe_offline_config

        return describe_offline_config(config, findings)
    if config.trainer in ("fit", "peering"):
        return {
            "kind": "config", "name": config.name, "trainer": config.trainer, "steps": config.steps,
            **judged(findings),
        }  # fmt: skip
    from align.visual_checks import describe_visual_config

    return describe_visual_config(config, findings)


def judged(findings: list[Finding]) -> dict[str, Any]:
    """Return the end of what `align check` says of any config: its findings, and whether it can run."""
    return {
        "findings": [asdict(finding) for finding in findings],
        "valid": all(finding.level != "error" for finding in findings),
    }


def describe_prompts(path: str | Path, *, image_column: str | None = None) -> dict[str, Any]:
    """Return what `align check` says of a prompt file: rows, duplicates, metadata fields, length.

    Raises:
        DataError: the file is not what it claims to be.
    """
    from align.prompts import load_prompts

    prompts = load_prompts(path, image_column=image_column)
    return {
        "kind": "prompts",
        "source": prompts.source,
        "prompts": len(prompts),
        "duplicates": prompts.duplicates,
        "metadata": sorted({key for row in prompts.metadata for key in row}),
        "longest": max(len(text) for text in prompts),
        "first": prompts.prompts[0],
        "valid": True,
    }
