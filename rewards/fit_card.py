"""What a fit leaves: the reward, calibrated, the card of what it is worth, and the receipt of which weights moved.

A probability is calibrated on rows held out for it, and reported on rows held out from both.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.errors import DataError, ModelError
from align.feedback.overview import plain
from align.fit_config import FitConfig
from align.launch import World
from align.sparsity.callback import Travelled
from align.sparsity.receipt import write_receipt
from align.tracking import replace_text
from rewards import plove
from rewards.fit_answers import Answers, Packed
from rewards.fit_data import FitData, Observation
from rewards.fit_latent import Latent, with_one_output
from rewards.fitted import ARTEFACT, FORMAT, calibrated
from rewards.on_feedback import by_protocol

EVALUATED_AT_ONCE = 64


@torch.no_grad()
def latent_values(latent: Latent, count: int, world: World) -> np.ndarray:
    """The latent reward of all outputs, each process working out its share."""
    mine = world.share(count)
    parts = [latent.of(mine[s : s + EVALUATED_AT_ONCE]) for s in range(0, len(mine), EVALUATED_AT_ONCE)]
    return np.concatenate(world.gather(torch.cat(parts).double().cpu().numpy() if parts else np.zeros(0)))


def fit_card(
    config: FitConfig, data: FitData, value: np.ndarray, answers: Answers, parts: Mapping[str, list[Observation]],
    places: Mapping[str, int], train: Packed,
) -> dict[str, Any]:  # fmt: skip
    """Return what the reward is worth on held-out rows, and what it was made of."""
    if bad := int((~np.isfinite(value)).sum()):
        raise DataError("The fitted reward is no number somewhere", why=f"of {bad} of {len(value)} outputs")
    calibration = _calibration(config, answers, value, parts["calibration"], places)
    return {
        "data": {
            "hashes": data.hashes, "observations": data.counts(), "notes": {k: n for k, n in data.notes.items() if n},
        },
        "signals": [report.as_dict() for report in data.signals],
        "split": {name: _part_counts(rows) for name, rows in parts.items()},
        "read": data.read,
        "trained_on": len(train),
        "calibration": calibration,
        "observation_models": _observation_models(answers),
        **_user_variance(answers, train, value),
        "heldout": by_protocol(
            [row for row in parts["heldout"] if row.kind != "thumb" or calibration is not None],
            {name: value[i] for name, i in places.items()},
            None if calibration is None else lambda latent: calibrated(latent, calibration),
        ),
        "shared_with_heldout": _shared(parts),
        "known_failure_modes": _failure_modes(config, calibration),
    }  # fmt: skip


def _part_counts(rows: Sequence[Observation]) -> dict[str, int]:
    return {
        "rows": len(rows), "prompts": len({row.prompt for row in rows}),
        "users": len({row.user for row in rows} - {""}),
        "outputs": len({name for row in rows for name in row.items}),
    }  # fmt: skip


def _shared(parts: Mapping[str, list[Observation]]) -> dict[str, int]:
    """How many held-out rows have their prompt, or their person, in training: 0 for what was split by."""
    found = {}
    for axis in ("prompt", "user"):
        known = {getattr(row, axis) for row in parts["train"]} - {""}
        found[axis] = sum(getattr(row, axis) in known for row in parts["heldout"])
    return found


def _thumbs(rows: Sequence[Observation], value: np.ndarray, places: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    thumbs = [row for row in rows if row.kind == "thumb"]
    seen = np.array([float(row.value) for row in thumbs])
    return value[[places[row.items[0]] for row in thumbs]] if thumbs else np.zeros(0), seen


def _calibration(
    config: FitConfig, answers: Answers, value: np.ndarray, rows: Sequence[Observation], places: Mapping[str, int]
) -> dict[str, Any] | None:
    """Return what makes a probability of the latent; None where nobody gave thumbs."""
    if not hasattr(answers, "thumb_bias"):
        return None
    plain = {"kind": "none", "a": answers.thumb_scale().item(), "b": answers.thumb_bias.item(), "n": 0}
    latent, seen = _thumbs(rows, value, places)
    if config.calibration == "none" or config.data.silence == "unlabelled" or not 0 < seen.sum() < len(seen):
        return plain
    if config.calibration == "isotonic":
        if len(seen) < 1000:
            raise DataError(
                "An isotonic calibration needs 1,000 rows", where="calibration", why=f"{len(seen)} are held out for it",
                do="Use calibration: temperature",
            )  # fmt: skip
        return {"kind": "isotonic", **plove.fit_isotonic(latent, seen), "n": len(seen)}
    a, b = plove.fit_temperature(latent, seen)
    return {"kind": "temperature", "a": a, "b": b, "n": len(seen)}


def _observation_models(answers: Answers) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: value.item()
        for name, value in answers.named_parameters()
        if name not in ("effect", "rating_first", "rating_gaps", "mistakes")
    }
    if hasattr(answers, "thumb_bias"):
        found["mistakes"] = dict(
            zip(
                ("rho_up", "rho_down"),
                (float(rate.detach() if isinstance(rate, Tensor) else rate) for rate in answers.mistake_rates()),
                strict=True,
            )
        )
    if hasattr(answers, "rating_gaps"):
        found["rating_thresholds"] = answers.thresholds().tolist()
    return found


def _user_variance(answers: Answers, train: Packed, value: np.ndarray) -> dict[str, Any]:
    """Return the variance of people's effects: that of the prior, and that of the training rows given the reward."""
    if answers.variance is None:
        return {}
    rows, user, seen = train.thumbs_of_people()
    with torch.no_grad():
        logit = answers.thumb_logit(torch.from_numpy(value[train.item_NM[:, 0].numpy()[rows]])).numpy()
    _, variance = plove.fit_effects(logit, seen, user, np.where(seen > 0.5, 1.0, math.exp(answers.shift)))
    return {"user_variance": {"prior": answers.variance, "given_the_reward": variance}}


def _failure_modes(config: FitConfig, calibration: Mapping[str, Any] | None) -> list[str]:
    found = [
        "A policy that is trained on it finds outputs that it scores high and people do not: keep a judge that it does "
        "not see, and prefer selection to training.",
        "It says what those people said of those outputs; others, and outputs unlike them, are not covered.",
    ]
    if config.model.backbone == "words":
        found.append("It reads words, not meaning: long or keyword-laden responses may score high.")
    if config.model.backbone == "pixels":
        found.append("It does not read the prompt: an image that answers another prompt scores the same.")
    if config.data.silence == "negative":
        found.append("Silence counted as a negative: what decides whether people react at all is part of the score.")
    if config.data.silence == "unlabelled":
        found.append("The share of positives in silence was assumed, and its probability is not calibrated.")
    elif calibration is not None and calibration["n"] == 0:
        found.append("Its probability was not calibrated on held-out rows.")
    if calibration is not None and config.users.trim != "auto":
        found.append("Accounts that act together were not looked for (users.trim: auto).")
    if config.objective.mistakes == "fitted":
        found.append("Its rates of mistakes were fitted, of which a log says little.")
    if calibration is None:
        found.append("It is known up to a constant of each prompt: compare outputs of one prompt only.")
    return found


def write_artefact(folder: Path, config: FitConfig, latent: Latent, card: dict[str, Any]) -> None:
    """Write the folder that `rewards.fitted.Fitted` reads: weights, and JSON that holds the card."""
    folder.mkdir(parents=True, exist_ok=True)
    latent.save(folder)
    document = {
        "format": FORMAT, "name": config.name, "media": config.data.media, "embedder": latent.embedder,
        "model": config.model.model_dump(mode="json"), "calibration": card["calibration"], "card": card,
    }  # fmt: skip
    if config.model.path is not None:
        document["model"]["path"] = os.path.abspath(Path(config.model.path).expanduser())
    replace_text(folder / ARTEFACT, json.dumps(plain(document), indent=1, allow_nan=False) + "\n")


def fit_receipt(directory: Path, config: FitConfig, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write which weights of a classifier moved; a head on frozen embeddings has none to be compared with."""

    def base() -> Path:
        if config.model.backbone != "classifier":
            raise ModelError(
                "A head has no weights before training to be compared with", where=config.model.backbone,
                why="it starts from nothing, and what it reads was not trained",
            )  # fmt: skip
        return with_one_output(str(config.model.path), directory, config.seed)

    weights = directory / "reward" / "classifier"
    adapted = config.model.backbone == "classifier" and config.model.train == "lora"
    return write_receipt(directory, base, weights, travelled=Travelled(rows), adapted=adapted)


def calibration_notes(rows: Sequence[Observation], config: FitConfig) -> list[str]:
    """Return that a probability cannot be calibrated as asked, with counts."""
    thumbs = [row.value for row in rows if row.kind == "thumb"]
    if config.calibration == "none" or not thumbs or 0 < sum(thumbs) < len(thumbs):
        return []
    return [f"{int(sum(thumbs))} of {len(thumbs)} thumbs held out for the calibration are up: it is left out"]
