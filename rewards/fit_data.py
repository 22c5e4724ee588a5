"""What people said as observations of one latent, and what of it a fit is trained on.

Events stay what they are: a thumb, a rating, a comparison and a ranking are four kinds of observation of the same
outputs.
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
from align.feedback.exchange import UNRANKED, Reading, Row, read_feedback, read_table
from align.feedback.signals import SignalReport, gates_not_held, select_signal
from align.feedback.store import Store
from align.feedback.views import Shown, of_key, shown_of
from align.fit_config import FitConfig, FitDataConfig
from align.seeding import uniform
from rewards.plove import keep_negatives

KINDS = ("thumb", "silence", "rating", "comparison", "ranking")
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
        signals: thumbs or reactions that are fitted, where what was shown is known, measured against the gates.
    """

    items: dict[str, Item] = field(default_factory=dict)
    rows: list[Observation] = field(default_factory=list)
    folders: dict[str, Path] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    signals: list[SignalReport] = field(default_factory=list)

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
    del left_out[UNRANKED]  # they are no answers
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
    thumb = thumb_kind(events, config)
    for event in events:
        if event.kind == "exposure":
            continue
        made = _observation(event, data.items, config, thumb)
        if isinstance(made, Observation):
            rows.append(made)
            data.notes["both bad, read as ties"] += event.value == "both_bad"
        else:
            data.left_out[made] += 1
    shown = _shown_by_key(events, data, config, thumb)
    data.signals += _measured(shown, config, thumb)
    if config.silence != "ignore":
        rows += _silent(events, shown, data, config, rows)
    return rows


def thumb_kind(events: Iterable[FeedbackEvent], config: FitDataConfig) -> str:
    """Return what is read as thumbs: "reaction" where one is fitted, else "binary".

    A thumb up is no love, and a thumb down says nothing of it. Where a reaction is fitted, thumbs are so only if
    `data.key` is theirs and not the reaction's.
    """
    if not config.reaction:
        return "binary"
    own = {
        event.kind for event in events
        if event.key == config.key and (event.kind == "binary" or _is_reaction(event, config))
    }  # fmt: skip
    return "binary" if own == {"binary"} else "reaction"


def _is_reaction(event: FeedbackEvent, config: FitDataConfig) -> bool:
    return event.kind == "reaction" and bool(config.reaction) and event.value == config.reaction


def _observation(
    event: FeedbackEvent, items: Mapping[str, Item], config: FitDataConfig, thumb: str
) -> Observation | str:
    """Return what an answer says of the latent, or why it is left out; `thumb` is of `thumb_kind`."""
    if event.tombstone:
        return "superseded or taken back"
    if not of_key(event, config.key, config.ratings_key):
        return "of other signals"
    if any(item not in items for item in event.items):
        return "about outputs that are not there"
    if len({items[item].prompt_id for item in event.items}) > 1:
        return "across prompts"
    value: Any = event.value
    if event.kind == "binary" and thumb != "binary":
        return f"thumbs, which say nothing of {config.reaction}"
    if event.kind == "binary":
        kind, value = "thumb", float(value)
    elif _is_reaction(event, config):
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


def _shown_by_key(
    events: Sequence[FeedbackEvent], data: FitData, config: FitDataConfig, thumb: str
) -> dict[str, Shown]:
    """Return what was shown, with the thumbs or reactions that came back, for each key of them."""
    if not any(e.kind == "exposure" or e.exposure == "shown" for e in events):
        return {}
    keys = {
        e.key for e in events
        if e.kind == thumb and config.key in (None, e.key) and (thumb == "binary" or _is_reaction(e, config))
    }  # fmt: skip
    if thumb == "reaction":
        events = [*events, *_shown_by_thumbs(events)]
    name = config.reaction if thumb == "reaction" else ""
    asked = sorted(keys) or [config.key or ""] * (config.silence != "ignore")
    return {key: shown_of(events, data.items, key, thumb, positive=name) for key in asked}


def _shown_by_thumbs(events: Iterable[FeedbackEvent]) -> list[FeedbackEvent]:
    """The exposures that only a thumb tells of: it says that its output was shown, and was not logged when it was."""
    logged, told = set(), {}
    for event in events:
        if event.kind == "exposure":
            logged |= {(event.annotator, item) for item in event.items}
        elif event.kind == "binary" and event.exposure == "shown" and not event.tombstone:
            told[event.annotator, event.items[0], event.session] = event
    return [
        replace(event, kind="exposure", value=None, key="shown", identifier="", id="")
        for (user, item, _), event in told.items() if (user, item) not in logged
    ]  # fmt: skip


def _measured(shown: Mapping[str, Shown], config: FitDataConfig, thumb: str) -> list[SignalReport]:
    if config.protocols is not None and "thumb" not in config.protocols:
        return []
    ending = f":{config.reaction}" if thumb == "reaction" else "/binary"
    return [select_signal(f"{key}{ending}", one) for key, one in shown.items() if one.reacted_N.any()]


def _silent(
    events: Sequence[FeedbackEvent], shown_by_key: Mapping[str, Shown], data: FitData, config: FitDataConfig,
    rows: Sequence[Observation],
) -> list[Observation]:  # fmt: skip
    """What was shown and not answered: silence, or a negative."""
    if not shown_by_key:
        raise DataError(
            "Silence is known only where what was shown was logged", where=f"data.silence {config.silence}",
            why=f"none of {len(events)} events is an exposure",
            do="Log exposures, or use silence: ignore with thumbs up and down",
        )  # fmt: skip
    answered = {(row.user, row.items[0]) for row in rows if row.kind == "thumb"}
    found: dict[tuple[str, str, int], Observation] = {}  # by person, output, and how many times it was shown before
    for shown in shown_by_key.values():
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
            do="Choose one signal with data.key, or data.ratings_key where the others have another",
        )  # fmt: skip


# --- what is trained on ------------------------------------------------------------------------------


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


def gate_notes(signals: Iterable[SignalReport]) -> list[str]:
    """Return a warning of each signal that does not pass the gates; one that is unproven has none."""
    return [
        f"The signal {report.key} does not pass the gates of what may be trained on: "
        f"{'; '.join(gates_not_held(report, measured=True))}"
        for report in signals
        if report.verdict == "fail"
    ]


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
    givers = {row.user for row in rows if row.kind == "thumb" and row.user}
    if config.users.effects and len(givers) < 2:
        raise DataError(
            "Effects of people need people", where="users.effects", why=f"{len(givers)} named in {len(thumbs)} thumbs",
            do="Set users.effects: false",
        )  # fmt: skip
    if config.users.effects and levels:
        found.append(
            f"users.effects is of thumbs: {sum(levels.values())} ratings are read as if all raters were as strict"
        )
    return found
