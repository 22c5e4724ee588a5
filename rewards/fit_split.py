"""What is held out: rows are split by prompt, person or time, so that no held-out row has a sibling in training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from align.errors import DataError
from align.fit_config import FitConfig, FitSplitConfig
from align.seeding import uniform
from rewards.fit_data import FitData, Observation, load_data

PARTS = ("train", "calibration", "heldout")


def split_rows(rows: Sequence[Observation], config: FitSplitConfig, seed: int) -> tuple[dict[str, list[int]], int]:
    """Return the places of the rows of each part, and how many fell between parts and were dropped.

    A prompt or a person belongs to one part by a hash of its name, so that more data does not move it; times are cut
    at their quantiles, the newest held out.

    Raises:
        DataError: rows without a person or a time to split by, one person with all of the data, or an empty part.
    """
    cuts = (1 - config.heldout - config.calibration, 1 - config.heldout)
    chosen = []
    for axis in config.by:
        if axis == "time":
            chosen.append(_by_time(rows, cuts))
        else:
            names = [row.prompt if axis == "prompt" else row.user for row in rows]
            _require_names(names, axis)
            part = {name: _part(uniform(seed, "split", axis, name), cuts) for name in set(names)}
            chosen.append([part[name] for name in names])
    parts: dict[str, list[int]] = {name: [] for name in PARTS}
    dropped = 0
    for i, places in enumerate(zip(*chosen, strict=True)):
        if len(set(places)) == 1:
            parts[PARTS[places[0]]].append(i)
        else:
            dropped += 1
    for name in PARTS:
        if not parts[name] and not (name == "calibration" and config.calibration == 0):
            apart = {"prompt": {row.prompt for row in rows}, "user": {row.user for row in rows}}
            has = ", ".join(f"{len(apart[axis])} different {axis}s" for axis in config.by if axis in apart)
            raise DataError(
                f"The split leaves no rows for {name}", where=f"split.by {', '.join(config.by)}",
                why=f"{len(rows)} rows, {dropped} of them between parts" + (f", {has}" if has else ""),
                do="Give data of more of them, or another split.by: prompt, user or time",
            )  # fmt: skip
    return parts, dropped


def _part(at: float, cuts: tuple[float, float]) -> int:
    return int(at >= cuts[0]) + int(at >= cuts[1])


def _by_time(rows: Sequence[Observation], cuts: tuple[float, float]) -> list[int]:
    ts = _times(rows, "split.by")
    if ts.min() == ts.max():
        raise DataError(
            "These rows cannot be split by time", where="split.by", why="all have the same time",
            do="Split by prompt or user",
        )  # fmt: skip
    edges = np.quantile(ts, cuts, method="inverted_cdf")
    return ((ts > edges[0]).astype(int) + (ts > edges[1]).astype(int)).tolist()


def _times(rows: Sequence[Observation], where: str) -> np.ndarray:
    ts = np.array([row.ts for row in rows], dtype=np.int64)
    if unknown := int((ts == 0).sum()):
        raise DataError(
            "These rows cannot be split by time", where=where, why=f"{unknown} of {len(ts)} have no time",
            do="Split by prompt or user, or give the log's own times as ts",
        )  # fmt: skip
    return ts


def _require_names(names: Sequence[str], axis: str) -> None:
    counts = Counter(names)
    if axis == "user" and counts.get(""):
        raise DataError(
            "These rows cannot be split by user", where="split.by", why=f"{counts['']} of {len(names)} name nobody",
            do="Split by prompt, or add the annotators",
        )  # fmt: skip
    if len(counts) < 3:
        name, most = counts.most_common(1)[0]
        raise DataError(
            f"There are too few {axis}s to hold any out", where="split.by",
            why=f"{len(counts)} {axis}{'s' * (len(counts) > 1)}, {name or 'one'} with {most} of {len(names)} rows",
            do="Split by something else, or collect from more",
        )  # fmt: skip


def require_apart(train: Sequence[Observation], heldout: Sequence[Observation], by: Sequence[str]) -> None:
    """Refuse a held-out file that shares with training what it was to be split by.

    Raises:
        DataError: with counts; or there are rows without a time, and time was to split them.
    """
    for axis in by:
        if axis == "time":
            shared = int((_times(heldout, "split.heldout_path") <= _times(train, "data.paths").max()).sum())
            what = "rows that are older than the newest of training"
        else:
            known = {row.prompt if axis == "prompt" else row.user for row in train}
            shared = sum((row.prompt if axis == "prompt" else row.user) in known for row in heldout)
            what = f"rows whose {axis} is in training too"
        if shared:
            raise DataError(
                "The split leaks", where="split.heldout_path", why=f"{shared} of {len(heldout)} are {what}",
                do="Leave them out, or let split.by and split.heldout do it",
            )  # fmt: skip


def parts_of(config: FitConfig, data: FitData) -> tuple[FitData, dict[str, list[Observation]], int]:
    """Return all that was read, a held-out file too, the rows of each part, and how many lie between parts.

    Raises:
        DataError: a split that leaks.
    """
    found, dropped = split_rows(data.rows, config.split, config.seed)
    parts = {name: [data.rows[i] for i in rows] for name, rows in found.items()}
    if config.split.heldout_path is not None:
        other = load_data([config.split.heldout_path], config.data)
        parts["train"] += parts["heldout"]
        for name in ("train", "calibration"):
            require_apart(parts[name], other.rows, config.split.by) if parts[name] else None
        parts["heldout"] = other.rows
        hashes = {n if n not in data.hashes else f"{n}, held out": digest for n, digest in other.hashes.items()}
        data = FitData(
            data.items | other.items, data.rows + other.rows, data.folders | other.folders, data.hashes | hashes,
            data.notes + other.notes, data.left_out + other.left_out, data.signals,
        )  # fmt: skip
    return data, parts, dropped
