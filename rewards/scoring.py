"""Files in, a table of scores out: `score_files` is what `align score` calls."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from align.config import RewardConfig
from align.errors import ConfigError, RewardError
from align.scoretable import FLAGS, WORDS, require_format, write_scores
from align.types import Samples, Scores
from rewards.base import Reward, card_of, get_reward, score_safely
from rewards.journal import Journal, Scored
from rewards.sources import Loaded, Source, load, read_sources, shapes

Named = str | RewardConfig


def plan_scores(
    rewards: Sequence[Reward | Named], out: str | Path, *, prompts: str | Path | None = None,
    images: str | Path | None = None, image_column: str | None = None, completion_column: str = "completion",
    overwrite: bool = False,
) -> tuple[dict[str, Any], list[Source]]:  # fmt: skip
    """Return what `score_files` would do, as far as can be told without building a reward, and the samples.

    Raises:
        ConfigError: no reward, an unknown one, rewards of different media, or a file that would be overwritten.
        DataError: see `read_sources`.
    """
    out = require_format(out)
    if not rewards:
        raise ConfigError("There is nothing to score with", do="Give --reward NAME, which `align rewards` lists")
    kind = _kind(rewards, images)
    if prompts is not None and Path(prompts).exists() and out.exists() and out.samefile(prompts):
        raise ConfigError("The table of scores would replace the prompts", where=str(out), do="Give another --out")
    journal = journal_of(out)
    if out.exists() and not journal.exists() and not overwrite:
        raise ConfigError(
            "The table of scores exists, and its journal does not", where=str(out),
            do="Give another --out, or --overwrite to replace it",
        )  # fmt: skip
    sources = read_sources(kind, prompts, images, image_column=image_column, completion_column=completion_column)
    first, last = sources[0], sources[-1]
    plan = {
        "rewards": [_name(reward) for reward in rewards], "scores": f"{len(sources)} {kind}",
        "first": _shown(first), "last": _shown(last), "out": str(out),
        "resumes": journal.exists() and not overwrite,
    }  # fmt: skip
    return plan, sources


def score_files(
    rewards: Sequence[Reward | Named], out: str | Path = "scores.parquet", *, prompts: str | Path | None = None,
    images: str | Path | None = None, image_column: str | None = None, completion_column: str = "completion",
    batch_size: int = 32, overwrite: bool = False, progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Score images or texts with some rewards and write a table of the raw scores.

    What is scored goes at once into a journal beside the table (`<out>.journal.jsonl`). Called again, whatever the
    reason the last call ended, it takes from there what is unchanged, by the hash of the content and the identity of
    the reward, and tries again what is missing.

    Args:
        rewards: built ones, registered names, or the `rewards` items of a configuration, of which name and args count.
        out: the table: Parquet, CSV or JSONL by its suffix.
        prompts, images, image_column, completion_column: see `read_sources`.
        batch_size: samples read, scored and kept at once.
        overwrite: start again.
        progress: show a bar with rate and remaining time on stderr.

    Returns:
        see `score_sources`.

    Raises:
        ConfigError, DataError: see `plan_scores`.
        RewardError: no sample could be scored; the table with the reasons is written all the same.
    """
    _, sources = plan_scores(
        rewards, out, prompts=prompts, images=images, image_column=image_column,
        completion_column=completion_column, overwrite=overwrite,
    )  # fmt: skip
    return score_sources(rewards, sources, out, batch_size=batch_size, overwrite=overwrite, progress=progress)


def score_sources(
    rewards: Sequence[Reward | Named], sources: Sequence[Source], out: str | Path, *, batch_size: int = 32,
    overwrite: bool = False, progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Score samples into a table as `score_files` does, with the samples at hand; a row each, in their order.

    Returns:
        counts, seconds, the identity of each reward, and mean, std, min and max of each component.

    Raises:
        ConfigError: two rewards of one component name.
        RewardError: no sample could be scored; the table with the reasons is written all the same.
    """
    out, began = require_format(out), time.perf_counter()
    built = [_built(reward) for reward in rewards]
    names = _names(built)
    identities = [reward.identity() for reward in built]
    with Journal(journal_of(out), fresh=overwrite) as journal:
        cards = [_described(reward, identity) for reward, identity in zip(built, identities, strict=True)]
        journal.describe(cards)
        rows = _score_all(sources, list(zip(built, identities, strict=True)), names, journal, batch_size, progress)
        write_scores(out, rows)
    seconds = time.perf_counter() - began
    missing = [row for row in rows if not row["valid"]]
    components = {name: _statistics(rows, name) for name in names}
    summary: dict[str, Any] = {
        "out": str(out), "journal": str(journal.path), "rows": len(rows), "missing": len(missing),
        "truncated": sum(bool(row.get("truncated")) for row in rows), "new_scores": journal.added, "seconds": seconds,
        "rewards": cards, "components": components,
    }  # fmt: skip
    if not any(found["n"] for found in components.values()):
        raise RewardError("Not one sample could be scored", where=str(out), why=str(missing[0]["error"]))
    return summary


def journal_of(out: str | Path) -> Path:
    """Return where the journal of a table lies."""
    return Path(f"{out}.journal.jsonl")


def _name(reward: Reward | Named) -> str:
    return reward if isinstance(reward, str) else reward.name if isinstance(reward, RewardConfig) else reward.card.name


def _built(reward: Reward | Named) -> Reward:
    if isinstance(reward, str):
        return get_reward(reward)
    return get_reward(reward.name, **reward.args) if isinstance(reward, RewardConfig) else reward


def _described(reward: Reward, identity: str) -> dict[str, Any]:
    card = reward.card
    return {
        "name": card.name, "components": list(reward.names), "identity": identity, "definition": card.definition,
        "range": card.range, "direction": card.direction, "licence": card.licence,
    }  # fmt: skip


def media_of(reward: Reward | Named) -> str:
    """What a reward scores: "image", "video", "text", or "any"; that of the reward inside a threshold."""
    if isinstance(reward, str):
        return card_of(reward).media
    if isinstance(reward, RewardConfig):
        inner, media = reward.args.get("reward"), media_of(reward.name)
        return media_of(inner) if media == "any" and isinstance(inner, str) else media
    inner = getattr(reward, "inner", None)
    return media_of(inner) if inner is not None and reward.card.media == "any" else reward.card.media


def _kind(rewards: Sequence[Reward | Named], images: str | Path | None) -> str:
    media = {_name(reward): media_of(reward) for reward in rewards}
    asked = set(media.values()) - {"any"}
    if "video" in asked:
        raise ConfigError("Only images and texts are scored from files", why=f"{media} has a reward of videos")
    if len(asked) > 1:
        raise ConfigError(
            "Rewards of images and of texts do not score the same files",
            why=", ".join(f"{name} scores {kind}s" for name, kind in media.items()), do="Score one, then the other",
        )  # fmt: skip
    return f"{asked.pop()}s" if asked else "images" if images is not None else "texts"


def _names(rewards: Sequence[Reward]) -> list[str]:
    names = [name for reward in rewards for name in reward.names]
    for name in names:
        if names.count(name) > 1 or name in (*WORDS, *FLAGS):
            why = "two rewards give it" if names.count(name) > 1 else "it is another column of the table"
            raise ConfigError(
                f"A table has one column {name!r}", why=why, do="Give a reward another component name, or leave it out"
            )
    return names


def _shown(source: Source) -> str:
    what = source.image.name if source.image is not None else repr(source.completion)[:60]
    return f"{what} for {source.prompt[:60]!r}" if source.prompt else what


def _score_all(
    sources: Sequence[Source], rewards: Sequence[tuple[Reward, str]], names: Sequence[str], journal: Journal,
    batch_size: int, progress: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """Score batch by batch, the next one being read meanwhile; a batch counts as done when the journal has it."""
    from tqdm import tqdm

    rows: list[dict[str, Any]] = []
    known = functools.partial(_complete, journal, [identity for _, identity in rewards])
    parts = [sources[i : i + batch_size] for i in range(0, len(sources), batch_size)]
    unit = "image" if sources[0].image is not None else "text"
    with (
        ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool,
        tqdm(total=len(sources), unit=f" {unit}s", desc="scoring", file=sys.stderr, disable=not progress,
             dynamic_ncols=True, mininterval=0.5) as bar,
    ):  # fmt: skip
        reading = [pool.submit(load, source, known) for source in parts[0]]
        for i, part in enumerate(parts):
            loaded = [future.result() for future in reading]
            reading = [pool.submit(load, source, known) for source in parts[i + 1]] if i + 1 < len(parts) else []
            for reward, identity in rewards:
                journal.append(_score_part(part, loaded, reward, identity, journal))
            rows += [_row(s, found, rewards, names, journal) for s, found in zip(part, loaded, strict=True)]
            bar.update(len(part))
    return rows


def _complete(journal: Journal, identities: Sequence[str], key: str) -> bool:
    found = [journal.find(key, identity) for identity in identities]
    return all(entry is not None and entry.complete for entry in found)


def _score_part(
    part: Sequence[Source], loaded: Sequence[Loaded], reward: Reward, identity: str, journal: Journal
) -> list[Scored]:
    """Score what of a batch can be scored and has not been, each content once, in groups of one shape."""
    wanted: dict[str, int] = {}
    for i, sample in enumerate(loaded):
        before = journal.find(sample.key, identity)
        if not sample.problem and (before is None or not before.complete):
            wanted.setdefault(sample.key, i)
    entries = []
    picked = list(wanted.values())
    for group in shapes([loaded[i] for i in picked]).values():
        members = [picked[i] for i in group]
        scores = score_safely(reward, _samples([part[i] for i in members], [loaded[i] for i in members]))
        entries += [
            Scored(loaded[i].key, identity, *_values(scores, row)) for row, i in enumerate(members)
        ]  # fmt: skip
    return entries


def _samples(sources: Sequence[Source], loaded: Sequence[Loaded]) -> Samples:
    import torch

    common: dict[str, Any] = {"prompts": [s.prompt for s in sources], "metadata": [s.metadata for s in sources]}
    if sources[0].image is None:
        return Samples(texts=[s.completion for s in sources if s.completion is not None], **common)
    pixels = np.stack([found.pixels for found in loaded if found.pixels is not None])
    return Samples(images=torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, **common)


def _values(scores: Scores, row: int) -> tuple[tuple[float | None, ...], str, bool]:
    values = tuple(float(v) + 0.0 if ok else None for v, ok in zip(scores.values[row], scores.valid[row], strict=True))
    error = scores.errors[row] or ("" if None not in values else "no score and no reason was given")
    flags = scores.extras.get("truncated")
    return values, error, bool(flags is not None and len(flags) == len(scores) and flags[row])


def _row(
    source: Source, loaded: Loaded, rewards: Sequence[tuple[Reward, str]], names: Sequence[str], journal: Journal
) -> dict[str, Any]:
    found = [journal.find(loaded.key, identity) for _, identity in rewards]
    blank: tuple[float | None, ...] = (None,) * len(names)
    values = blank if loaded.problem else tuple(v for entry in found if entry is not None for v in entry.values)
    errors = [loaded.problem, *(entry.error for entry in found if entry is not None and not loaded.problem)]
    what: dict[str, Any] = {"image": str(source.image)}
    if source.image is None:
        what = {"completion": source.completion if isinstance(source.completion, str) else _json(source.completion)}
    return {
        **what, "prompt": source.prompt, **dict(zip(names, values, strict=True)),
        "truncated": any(entry.truncated for entry in found if entry is not None),
        "valid": None not in values, "error": "; ".join(dict.fromkeys(filter(None, errors))) or None,
        "identity": "+".join(identity for _, identity in rewards),
    }  # fmt: skip


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _statistics(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, float | int | None]:
    values = np.array([row[name] for row in rows if row[name] is not None])
    if not len(values):
        return {"n": 0, "mean": None, "std": None, "min": None, "max": None}
    std = float(values.std(ddof=1)) if len(values) > 1 else None
    return {"n": len(values), "mean": float(values.mean()), "std": std, "min": float(values.min()),
            "max": float(values.max())}  # fmt: skip
