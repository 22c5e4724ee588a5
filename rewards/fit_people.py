"""Whose answers a fit leaves out, and why: accounts that act together, or people whose thumbs are the least likely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from align.errors import DataError
from align.fit_config import FitConfig
from align.seeding import permutation
from rewards import plove
from rewards.campaigns import find_campaigns
from rewards.fit_data import Observation, thin
from rewards.fit_latent import Latent
from rewards.fit_split import PARTS

FOLDS = 5


def leave_out_people(
    parts: dict[str, list[Observation]], latent: Latent, places: Mapping[str, int], config: FitConfig
) -> tuple[list[dict[str, Any]], dict[str, int], list[str]]:
    """Take people out of `parts`; return who and why, how many rows of each part went, and the warning of it.

    Args:
        latent: of frozen embeddings; its weights are not looked at.
        places: of outputs by name, in the latent.

    Raises:
        DataError: no frozen embeddings, or too few people.
    """
    screened = _screened(config)
    rows, _, _ = thin([row for name in screened for row in parts[name]], config)
    trimmed = _trimmed(rows, latent, places, config)
    gone = {row["account"] for row in trimmed}
    left = {}
    for name in screened:
        kept = [row for row in parts[name] if row.user not in gone]
        left[f"of trimmed people, in {name}"] = len(parts[name]) - len(kept)
        parts[name] = kept
    return trimmed, left, _trim_notes(trimmed, config)


def _screened(config: FitConfig) -> tuple[str, ...]:
    """Return the parts in which people are looked for, and from which those found are left out.

    A campaign is nobody's opinion in any part. People who only cost much stay where the reward is calibrated and
    reported: without them it would look better than it is.
    """
    return PARTS if config.users.trim == "auto" else ("train",)


def _trimmed(
    rows: Sequence[Observation], latent: Latent, places: Mapping[str, int], config: FitConfig
) -> list[dict[str, Any]]:
    """Return who is left out and why: accounts that act together, or the share whose thumbs are the least likely."""
    if latent.features is None:
        raise DataError("People are trimmed on frozen embeddings", where="users.trim", do="Choose another backbone")
    thumbs = [row for row in rows if row.kind == "thumb" and row.user]
    names = sorted({row.user for row in thumbs})
    if len(names) < 2 * FOLDS:
        raise DataError(
            "There are too few people to trim any", where="users.trim", why=f"{len(names)} gave thumbs",
            do=f"Set users.trim: 0, or collect from {2 * FOLDS} or more",
        )  # fmt: skip
    index = {name: i for i, name in enumerate(names)}
    user = np.array([index[row.user] for row in thumbs])
    output, item = np.unique([places[row.items[0]] for row in thumbs], return_inverse=True)
    features = latent.features[output].double()
    features = (features - features.mean(0)) / features.std(0).clamp(min=1e-6)
    seen = torch.tensor([float(row.value) for row in thumbs]).double()
    order = np.array(permutation(len(names), config.seed, "folds"))
    logit, loss = plove.out_of_fold(features, seen, order[user] % FOLDS, item_N=item, ridge=float(features.shape[1]))
    if config.users.trim == "auto":
        given = seen.numpy() > 0.5 if config.data.silence == "negative" else None
        found = find_campaigns(
            logit.numpy(), seen.numpy(), user, item, names, rate=config.users.false_discovery, answered_N=given,
            seed=config.seed,
        )  # fmt: skip
        return [row.as_dict() for row in found]
    cut = plove.trim_users(loss.numpy(), user, config.users.trim)
    reason = "their thumbs cost {:.3f} a row under a model of the others, among the {} that cost most"
    return [{"account": names[u], "reason": reason.format(cut.loss_U[u], len(cut.users))} for u in cut.users]


def _trim_notes(trimmed: Sequence[Mapping[str, Any]], config: FitConfig) -> list[str]:
    """Return who was left out as a warning, by name: nobody is left out silently."""
    if not trimmed:
        return []
    by = (
        f"false discovery rate {config.users.false_discovery:g}"
        if config.users.trim == "auto"
        else "the share asked for"
    )
    names = ", ".join(row["account"] for row in trimmed[:10]) + (" and others" if len(trimmed) > 10 else "")
    return [f"{len(trimmed)} accounts are left out ({by}), listed in the card with the reason of each: {names}"]
