"""What people said as observations of one latent, and what of it is held out.

Events stay what they are: a thumb, a rating, a comparison and a ranking are four kinds of observation of the same
outputs. Rows are held out by prompt, person or time, so that no held-out row has a sibling in training.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from align.errors import DataError
from align.feedback.events import FeedbackEvent, Item
from align.feedback.exchange import Reading, Row, read_feedback, read_table
from align.feedback.store import Store
from align.feedback.views import shown_of
from align.fit_config import FitConfig, FitDataConfig, FitSplitConfig
from align.seeding import uniform
from rewards.plove import keep_negatives

KINDS = ("thumb", "silence", "rating", "comparison", "ranking")
PARTS = ("train", "calibration", "heldout")
_STORES = (".db", ".sqlite", ".sqlite3")
_PAIR_COLUMNS = ("margin", "weight", "tie", "share")


@dataclass(frozen=True)
class Observation:
    """One thing that one person said, or did not say, about one output or several of a prompt.

    Args:
        kind: one of `KINDS`.
        items: ids of the outputs.
        value: thumb 1 or 0; rating (level from 0, number of levels); comparison the share who prefer the first (.5 is
            a tie); ranking the ranks, 1 the best; silence None.
        prompt, user, ts: for the split; "" and 0 where unknown.
        weight: of the row.
        margin: of a comparison, by how much the first is better; None where nothing says.
    """

    kind: str
    items: tuple[str, ...]
    value: Any
    prompt: str
    user: str = ""
    ts: int = 0
    weight: float = 1.0
    margin: float | None = None


@dataclass
class FitData:
    """Observations, the outputs they are about, where images are, and what was met on the way.

    Args:
        notes: counts of what is unusual about rows that are there.
        left_out: counts of answers that are not among the rows, by reason.
    """

    items: dict[str, Item] = field(default_factory=dict)
    rows: list[Observation] = field(default_factory=list)
    folders: dict[str, Path] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def read(self) -> int:
        """How many answers, and silences that count as rows, were read."""
        return len(self.rows) + self.left_out.total()

    def counts(self) -> dict[str, int]:
        """Return how many observations of each kind there are."""
        return dict(Counter(row.kind for row in self.rows))


def load_data(paths: Sequence[str], config: FitDataConfig) -> FitData:
    """Read stores and files into observations.

    Raises:
        DataError: a file that cannot be read, nothing to fit to, silence without exposures, or ratings on different
            scales.
    """
    data = FitData()
    events: list[FeedbackEvent] = []
    for name in paths:
        path = Path(name)
        if not path.is_file():
            raise DataError("There is no such feedback", where=name, do="Check data.paths")
        with path.open("rb") as file:
            data.hashes[path.name if path.name not in data.hashes else name] = hashlib.file_digest(
                file, "sha256"
            ).hexdigest()
        folder = Path(config.folder) if config.folder else path.parent
        if rows := _own_pairs(path):
            found, observed = _pairs(rows)
            data.rows += observed
        else:
            found, said, left_out = read_said(path, config.media)
            events += said
            data.left_out += left_out
        data.items |= found
        data.folders |= dict.fromkeys(found, folder)
    return observe(events, data, config)


def read_said(path: Path, media: str) -> tuple[dict[str, Item], list[FeedbackEvent], Counter[str]]:
    """Return the outputs of a store or a file, the events that stand, and how many answers of the file do not, and why.

    Raises:
        DataError: it cannot be read.
    """
    if path.suffix.lower() in _STORES:
        with Store.open(path, create=False) as store:
            return store.items(), list(store.current()), Counter()
    read = read_feedback(path, Reading(media=media, duplicates="last"))
    said, left_out = read.standing(), Counter(read.skipped)
    answers = sum(event.kind != "exposure" for event, _ in read.events)
    left_out["superseded or taken back"] += answers - sum(event.kind != "exposure" for event in said)
    return read.items, said, left_out


def observe(events: Sequence[FeedbackEvent], data: FitData, config: FitDataConfig) -> FitData:
    """Add the observations that events about the items of `data` make, and return it.

    Raises:
        DataError: nothing to fit to, silence without exposures, or ratings on different scales.
    """
    data.rows += _observed(events, data, config)
    if config.protocols is not None:
        silent = ("silence",) if "thumb" in config.protocols else ()
        kept = [row for row in data.rows if row.kind in (*config.protocols, *silent)]
        data.left_out["of other protocols"] += len(data.rows) - len(kept)
        data.rows = kept
    if not data.rows:
        kinds = Counter(event.kind for event in events)
        raise DataError(
            "There is nothing to fit a reward to", where=", ".join(config.paths),
            why=", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "no events",
            do="Check data.key, data.protocols, data.reaction and data.silence",
        )  # fmt: skip
    _require_one_scale(data.rows)
    return data


def _observed(events: Sequence[FeedbackEvent], data: FitData, config: FitDataConfig) -> list[Observation]:
    rows = []
    for event in events:
        if event.kind == "exposure":
            continue
        made = _observation(event, data.items, config)
        if isinstance(made, Observation):
            rows.append(made)
            data.notes["both bad, read as ties"] += event.value == "both_bad"
        else:
            data.left_out[made] += 1
    if config.silence != "ignore":
        rows += _silent(events, data, config, rows)
    return rows


def _observation(event: FeedbackEvent, items: Mapping[str, Item], config: FitDataConfig) -> Observation | str:
    """Return what an answer says of the latent, or why it is left out."""
    if event.tombstone:
        return "superseded or taken back"
    if config.key is not None and event.key != config.key:
        return "of other signals"
    if any(item not in items for item in event.items):
        return "about outputs that are not there"
    if len({items[item].prompt_id for item in event.items}) > 1:
        return "across prompts"
    value: Any = event.value
    if event.kind == "binary":
        kind, value = "thumb", float(value)
    elif event.kind == "reaction" and config.reaction and value == config.reaction:
        kind, value = "thumb", 1.0
    elif event.kind == "ordinal" and event.scale:
        low, high = event.scale
        kind, value = "rating", (value - low, high - low + 1)
    elif event.kind == "pairwise":
        kind, value = "comparison", {"a": 1.0, "b": 0.0}.get(value, 0.5)
    elif event.kind == "ranking":
        kind, value = "ranking", tuple(value)
    else:
        return f"of kind {event.kind}"
    return Observation(kind, event.items, value, items[event.items[0]].prompt_id, event.annotator, event.ts)


def _silent(
    events: Sequence[FeedbackEvent], data: FitData, config: FitDataConfig, rows: Sequence[Observation]
) -> list[Observation]:
    """What was shown and not answered: silence, or a negative."""
    exposures = sum(e.kind == "exposure" or e.exposure == "shown" for e in events)
    if not exposures:
        raise DataError(
            "Silence is known only where what was shown was logged", where=f"data.silence {config.silence}",
            why=f"none of {len(events)} events is an exposure",
            do="Log exposures, or use silence: ignore with thumbs up and down",
        )  # fmt: skip
    kind = "reaction" if config.reaction else "binary"
    keys = sorted({e.key for e in events if e.kind == kind and (config.key is None or e.key == config.key)})
    answered = {(row.user, row.items[0]) for row in rows if row.kind == "thumb"}
    found: dict[tuple[str, str, int], Observation] = {}  # by person, output, and how many times it was shown before
    for key in keys or [config.key or ""]:
        shown = shown_of(events, data.items, key, kind, positive=config.reaction)
        data.notes["answers without an exposure"] += shown.unknown
        silent = ~shown.reacted_N
        who = list(zip(shown.user_N[silent].tolist(), shown.item_N[silent].tolist(), strict=True))
        for (user, item), before, ts in zip(who, occurrences(who), shown.ts_N[silent].tolist(), strict=True):
            if item in data.items:
                prompt = data.items[item].prompt_id
                found[user, item, before] = Observation("silence", (item,), None, prompt, user, ts)
    silences = [row for (user, item, _), row in found.items() if (user, item) not in answered]
    data.left_out["silences on what was answered at another showing"] += len(found) - len(silences)
    if config.silence == "unlabelled":
        return silences
    return [replace(row, kind="thumb", value=0.0) for row in silences]


def _own_pairs(path: Path) -> list[Row]:
    """The rows of a file of pairs with columns that events have no place for, such as a margin; else nothing."""
    if path.suffix.lower() not in (".jsonl", ".csv", ".parquet"):
        return []
    rows: list[Row] = []
    for row in read_table(path):
        if not isinstance(row, Row):
            raise row.error
        if not {"chosen", "rejected"} <= set(row.fields) or not set(_PAIR_COLUMNS) & set(row.fields):
            return []
        rows.append(row)
    return rows


def _pairs(rows: Iterable[Row]) -> tuple[dict[str, Item], list[Observation]]:
    items: dict[str, Item] = {}
    found = []
    for row in rows:
        cells, where = row.fields, f"{row.place}"
        prompt = cells.get("prompt") or ""
        pair = [Item(prompt, cells[name]) for name in ("chosen", "rejected")]
        items |= {item.id: item for item in pair}
        tie = str(cells.get("tie", "")).strip().lower() in ("true", "1")
        share = 0.5 if tie else _number(cells, "share", where, 1.0)
        margin, weight = _number(cells, "margin", where, None), _number(cells, "weight", where, 1.0)
        if not 0 <= share <= 1 or weight < 0:
            raise DataError("A share lies within 0 to 1, a weight from 0", where=where, why=f"{share:g}, {weight:g}")
        user, ids = str(cells.get("annotator") or ""), (pair[0].id, pair[1].id)
        found.append(Observation("comparison", ids, share, pair[0].prompt_id, user, 0, weight, margin))
    return items, found


def _number(cells: Mapping[str, Any], name: str, where: str, default: Any) -> Any:
    value = cells.get(name)
    if value is None or value == "":
        return default
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise DataError("A field is no number", where=f"{where}, column {name}", why=f"found {value!r}") from error
    if not np.isfinite(number):
        raise DataError("A field is no number", where=f"{where}, column {name}", why=f"found {value!r}")
    return number


def _require_one_scale(rows: Sequence[Observation]) -> None:
    scales = Counter(row.value[1] for row in rows if row.kind == "rating")
    if len(scales) > 1:
        raise DataError(
            "Ratings on different scales cannot be fitted together",
            why=", ".join(f"{n} of {levels} levels" for levels, n in sorted(scales.items())),
            do="Choose one signal with data.key",
        )  # fmt: skip


# --- the split --------------------------------------------------------------------------------------


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


def occurrences(values: Iterable[Hashable]) -> list[int]:
    """Return of each value how many equal ones stand before it."""
    seen: Counter[Hashable] = Counter()
    found = []
    for value in values:
        found.append(seen[value])
        seen[value] += 1
    return found


def thin(rows: Sequence[Observation], config: FitConfig) -> tuple[list[Observation], float, dict[str, int]]:
    """Return what is trained on, the share of the negatives among it, and counts of what was left out.

    Negatives are subsampled, and people cut to their most, by hashes of what the rows say: who said what of which
    outputs, and which time it is that they say so. When that was, or was read, does not enter.
    """
    said = [(row.user, row.items, row.kind, row.value) for row in rows]
    keys = [repr((*what, before)) for what, before in zip(said, occurrences(said), strict=True)]
    down = [row.kind == "thumb" and row.value == 0 for row in rows]
    kept = keep_negatives(keys, config.data.negative_share, config.seed) | ~np.array(down, dtype=bool)
    chosen = [i for i in range(len(rows)) if kept[i]]
    left = {"negatives not drawn": len(rows) - len(chosen)}
    if config.data.most_of_user is not None:
        mine: dict[str, list[int]] = {}
        for i in chosen:
            mine.setdefault(rows[i].user, []).append(i)
        drawn: list[int] = []
        for user, places in mine.items():
            if user:
                places = sorted(places, key=lambda i: uniform(config.seed, "cap", keys[i]))[: config.data.most_of_user]
            drawn += places
        left["beyond the most of a user"] = len(chosen) - len(drawn)
        chosen = sorted(drawn)
    share = config.data.negative_share if any(down) else 1.0
    return [rows[i] for i in chosen], share, left


def warnings_on(rows: Sequence[Observation], config: FitConfig) -> list[str]:
    """Return what is unusual about the training rows, and refuse what cannot be fitted.

    Raises:
        DataError: one class of thumbs only, ratings that are all the same, or comparisons that are all ties.
    """
    found = []
    thumbs = [row.value for row in rows if row.kind == "thumb"]
    up, silent = sum(thumbs), sum(row.kind == "silence" for row in rows)
    others = any(row.kind in ("comparison", "ranking", "rating") for row in rows)
    if thumbs and up in (0, len(thumbs)) and not (silent and up) and not others:
        raise DataError(
            "All thumbs are of one class", why=f"{int(up)} of {len(thumbs)} are up",
            do="Log exposures and set data.silence: negative, or add the other side" if up else "Add thumbs up",
        )  # fmt: skip
    if silent and not up:
        raise DataError("Learning from silence needs reactions", why=f"{silent} silent rows, no thumb up")
    levels = Counter(row.value[0] for row in rows if row.kind == "rating")
    if len(levels) == 1:
        raise DataError(
            "All ratings are the same", why=f"{sum(levels.values())} ratings of level {next(iter(levels))} from 0",
            do="They tell nothing apart; leave them out with data.key",
        )  # fmt: skip
    constant: dict[str, set[int]] = {}
    for row in rows:
        if row.kind == "rating" and row.user:
            constant.setdefault(row.user, set()).add(row.value[0])
    same = [user for user, given in constant.items() if len(given) == 1]
    if len(same) > len(constant) / 2 > 1:
        found.append(f"{len(same)} of {len(constant)} raters always give one rating")
    told = [row.value for row in rows if row.kind == "comparison"]
    if told and all(value == 0.5 for value in told) and len(told) == len(rows):
        raise DataError("All comparisons are ties", why=f"{len(told)} of them", do="They tell nothing apart")
    people = Counter(row.user for row in rows if row.user)
    if people and (most := people.most_common(1)[0])[1] > len(rows) / 2:
        found.append(
            f"{most[0]} gave {most[1]} of {len(rows)} answers: the reward is mostly theirs; "
            "data.most_of_user caps what one person counts"
        )
    if config.users.effects and len(people) < 2:
        raise DataError(
            "Effects of people need people", where="users.effects", why=f"{len(people)} named in {len(rows)} rows",
            do="Set users.effects: false",
        )  # fmt: skip
    return found
