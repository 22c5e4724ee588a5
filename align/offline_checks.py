"""What a config that learns from given images will do before it does it: what cannot train, advice, and the cost."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from align.checks import Finding, errors_first, heldout_gates, judged, mask_findings, model_folder, unknown_rewards
from align.errors import AlignError
from align.offline_config import OfflineConfig
from align.published import is_builtin

BUILTIN_ROWS = ("digits/thumbs", "digits/pairs")


def offline_ledger(config: OfflineConfig) -> dict[str, float | int]:
    """Return the cost of one trained image in denoiser forwards (F_eq): `draws (k + 1)`, the 1 of the reference.

    k is 2 for LoRA, 3 for full fine-tuning, and 1 more with gradient checkpointing. An update of kto that does not fit
    at once takes another forward a draw, for its reference point; what was done is logged as `feq`.
    """
    draws = config.objective.draws
    k = (3 if config.model.train == "full" else 2) + int(config.model.gradient_checkpointing)
    return {
        "feq_per_sample": draws * (k + 1), "rollout_forwards": 0, "train_forwards": draws, "free_forwards": draws,
        "trained_steps": draws, "solver_steps": config.sampler.solver_steps, "updates_per_step": 1,
        "samples_per_step": config.batch_size * (2 if config.objective.loss == "dpo" else 1), "k": k, "c": 1,
    }  # fmt: skip


def check_offline_config(
    config: OfflineConfig, *, reward_names: Collection[str] | None = None, files: bool = False
) -> list[Finding]:
    """Return every finding on `config`, errors first.

    Args:
        config: what to check.
        reward_names: the registered rewards; an unknown name is then an error.
        files: also read the rows and the headers of their images, and look for the model folder.
    """
    found = [*_objective(config), *_evaluation(config), *mask_findings(config, files=files)]
    if reward_names is not None:
        found += unknown_rewards(config, ("heldout_rewards",), reward_names)
    if files:
        found += [*_rows(config), *model_folder(config.model.path)]
    return errors_first(found)


def _objective(config: OfflineConfig) -> list[Finding]:
    found, objective = [], config.objective
    weights = (objective.weight_desirable, objective.weight_undesirable)
    if objective.loss == "dpo":
        unread = [
            name for name in ("utility", "weight_desirable", "weight_undesirable", "weight_ratio")
            if getattr(objective, name) != type(objective).model_fields[name].default
        ]  # fmt: skip
        found += [
            Finding("error", "kto_only", f"objective.{name} is of loss kto, and loss is dpo",
                    "Leave it out, or set objective.loss: kto", f"objective.{name}")
            for name in unread
        ]  # fmt: skip
    elif 0.0 in weights:
        found.append(Finding(
            "error", "zero_weight", "A class weight of 0 trains on thumbs of one kind, which pushes all images one way",
            "Give both classes a weight, or leave them out", "objective.weight_desirable",
        ))  # fmt: skip
    if objective.levels == "solver" and objective.draws > config.sampler.solver_steps:
        found.append(Finding(
            "error", "draws", f"{objective.draws} draws of {config.sampler.solver_steps} levels would repeat some",
            "Lower objective.draws, or set objective.levels: fine", "objective.draws",
        ))  # fmt: skip
    if config.batch_size < 16 and not is_builtin(config.model.path):
        found.append(Finding(
            "warning", "small_batch", f"{config.batch_size} rows an update make noisy updates",
            "Raise batch_size to 64 or more; batch.tile bounds what is held at once", "batch_size",
        ))  # fmt: skip
    if config.model.train == "full":
        found.append(Finding(
            "note", "reference_copy", "Full fine-tuning keeps a frozen copy of the denoiser in memory as reference", "",
            "model.train",
        ))  # fmt: skip
        if config.optimizer.lr > 1e-5 and not is_builtin(config.model.path):
            found.append(Finding(
                "warning", "lr_high", f"lr {config.optimizer.lr:g} is high for full fine-tuning with these betas",
                "Set optimizer.lr between 1e-8 and 1e-5", "optimizer.lr",
            ))  # fmt: skip
    return found


def _evaluation(config: OfflineConfig) -> list[Finding]:
    found = []
    if config.data.heldout_path is None and config.data.heldout_fraction == 0:
        found.append(Finding(
            "warning", "no_heldout_rows", "No row is held out, so nothing tells learning from memorising",
            "Set data.heldout_fraction: 0.1, or data.heldout_path", "data.heldout_fraction",
        ))  # fmt: skip
    if not config.heldout_rewards:
        found.append(Finding(
            "note", "no_rewards",
            "Without heldout_rewards the run is judged by how it tells held-out rows apart, not by what it makes", "",
            "heldout_rewards",
        ))  # fmt: skip
    found += heldout_gates(config)
    return found


def _rows(config: OfflineConfig) -> list[Finding]:
    from align.image_feedback import load_image_feedback

    found, data = [], config.data
    for key, path in (("data.path", data.path), ("data.heldout_path", data.heldout_path)):
        if path is None or path in BUILTIN_ROWS:
            continue
        try:
            rows = load_image_feedback(path, root=data.root).for_loss(config.objective.loss)
        except AlignError as error:
            found.append(Finding("error", "data", str(error).removesuffix("."), "", key))
            continue
        if key == "data.path" and len(rows) < config.batch_size:
            found.append(Finding(
                "error", "few_rows", f"{len(rows)} rows do not fill an update of {config.batch_size}",
                "Lower batch_size, or add rows", "batch_size",
            ))  # fmt: skip
    return found


def describe_offline_config(config: OfflineConfig, findings: list[Finding]) -> dict[str, Any]:
    """Return what `align check` says of a config: its name, loss, updates, ledger and findings."""
    return {
        "kind": "config", "name": config.name, "trainer": config.trainer, "loss": config.objective.loss,
        "steps": config.steps, "batch_size": config.batch_size, "ledger": offline_ledger(config),
        **judged(findings),
    }  # fmt: skip


def describe_image_feedback(path: str | Path) -> dict[str, Any]:
    """Return what `align check` says of a file of thumbs or pairs on images.

    Raises:
        DataError: see `load_image_feedback`.
    """
    from align.image_feedback import distinct_prompts, load_image_feedback

    found = load_image_feedback(path)
    counts = found.counts()
    losses = [name for name, can in (
        ("kto", (counts["up"] and counts["down"]) or counts["pairs"]), ("dpo", counts["pairs"] == len(found)),
    ) if can]  # fmt: skip
    return {
        "kind": "image_feedback", "source": found.source, "rows": len(found), **counts,
        "prompts": len(distinct_prompts(found.rows)), "losses": losses, "valid": True,
    }  # fmt: skip


def is_image_feedback_file(path: str | Path) -> bool:
    """Return whether a table's first row has an image and a label, or a pair of image files, and no text about them."""
    from align.prompts import FORMATS, read_rows

    path = Path(path)
    if path.suffix.lower() not in FORMATS or path.suffix.lower() == ".txt" or not path.is_file():
        return False
    _, first = next(iter(read_rows(path)), ("", {}))
    if not isinstance(first, dict) or first.get("completion") is not None:
        return False
    pair = [first.get(name) for name in ("chosen", "rejected")]
    if all(isinstance(value, str) and Path(value).suffix.lower() in _IMAGES for value in pair):
        return all((path.parent / str(value)).is_file() for value in pair)
    return first.get("image") is not None and "label" in first


_IMAGES = (".png", ".jpg", ".jpeg", ".webp")
