"""Out of a store into files: every row names the events it stands on, and what a shape cannot hold is counted.

| shape        | columns                                        | holds                                        |
|--------------|------------------------------------------------|----------------------------------------------|
| `events`     | all of `FeedbackEvent`, with the items         | every current event; reads back as it was    |
| `plain`      | prompt, input, response(s), what was said      | every current event, under the import's names |
| `preference` | prompt, chosen, rejected (TRL)                 | pairwise events with a winner                |
| `unpaired`   | prompt, completion, label (TRL)                | binary events                                |
| `ranking`    | prompt, completions, ranks                     | ranking events                               |

Trainers know no `input`: the last three join it to the prompt with an empty line between. Where either is a chat, both
are, a text becoming one turn. Ratings turned into pairs, and the like, are `align feedback convert`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import DataError, first_line
from align.feedback.events import FeedbackEvent, Item
from align.feedback.exchange.tables import write_table
from align.feedback.store import Store
from align.registry import suggest

EXPORTS = ("events", "plain", "preference", "unpaired", "ranking")
_BATCH = 10_000
# What `convert` makes of events that a shape cannot hold: its form, and the kinds it is made of.
_CONVERTS = {
    "preference": ("pairs", ("ordinal", "ranking")),
    "unpaired": ("unpaired", ("ordinal", "reaction", "pairwise", "ranking")),
    "ranking": ("rankings", ("ordinal", "pairwise")),
}
_VALUES = {"binary": "label", "reaction": "reaction", "ordinal": "rating", "text": "text", "pairwise": "preference"}
_VALUES |= {"ranking": "ranks"}


@dataclass(frozen=True)
class Exported:
    """What was written where: rows, and how many events were left out and why."""

    path: str
    rows: int
    left_out: Mapping[str, int]


def export_events(
    store: Store,
    path: str | Path,
    shape: str = "events",
    *,
    chat: bool = False,
    overwrite: bool = False,
    **filters: Any,
) -> Exported:
    """Write the current events of a store to a CSV, JSONL or Parquet file, or to a Hugging Face data set folder.

    Args:
        shape: one of `EXPORTS`.
        chat: write prompts and responses as chats, texts becoming one turn of user and assistant.
        filters: those of `Store.current`.

    Raises:
        DataError: an unknown shape or file format, nothing to write, a file that is there already, or a value that
            the format cannot hold.
    """
    if shape not in EXPORTS:
        raise DataError(f"Unknown shape {shape!r}", do=suggest(shape, EXPORTS))
    left_out: Counter[str] = Counter()
    packed = Path(path).suffix.lower() != ".jsonl"

    def rows() -> Iterator[dict[str, Any]]:
        for event, items in with_items(store, filters):
            made = _record(event, items, packed) if shape == "events" else _shape(event, items, shape, chat)
            if isinstance(made, str):
                left_out[made] += 1
            else:
                yield made

    form, kinds = _CONVERTS.get(shape, ("", ()))
    instead = {f"of kind {kind}": f"Turn them into it with `align feedback convert --to {form}`" for kind in kinds}
    count = save(path, rows(), overwrite=overwrite, lost=left_out, instead=instead)
    return Exported(str(path), count, dict(left_out))


def save(
    path: str | Path,
    rows: Iterable[Mapping[str, Any]],
    *,
    overwrite: bool = False,
    lost: Mapping[str, int] | None = None,
    instead: Mapping[str, str] | None = None,
) -> int:
    """Write rows to a file by its ending, or to a data set folder where `path` has none; refuse to write nothing.

    Args:
        lost: how many were left out before, by reason.
        instead: for a reason, what to do where it leaves nothing to write.
    """
    stream = iter(rows)
    first = next(stream, None)
    if first is None:
        why = ", ".join(f"{n} {reason}" for reason, n in (lost or {}).items())
        advice = next((advice for reason, advice in (instead or {}).items() if reason in (lost or {})), "")
        raise DataError(
            "There is nothing to write", where=str(path), why=why or "no event is left",
            do=advice or "Look at `align feedback stats`, and at the filters",
        )  # fmt: skip

    def all_rows() -> Iterator[Mapping[str, Any]]:
        yield first
        yield from stream

    if not Path(path).suffix:
        return save_dataset(path, all_rows(), overwrite=overwrite)
    return write_table(path, all_rows(), overwrite=overwrite)


def save_dataset(path: str | Path, rows: Iterable[Mapping[str, Any]], *, overwrite: bool = False) -> int:
    """Write rows as a Hugging Face data set folder, for `datasets.load_from_disk`; needs `datasets`."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise DataError("There is a folder already", where=str(path), do="Name another, or add --overwrite")
    try:
        import datasets
        import pyarrow
    except ImportError as error:
        raise DataError(
            "A data set folder needs the package datasets", where=str(path),
            do="Run `pip install datasets`, or write a .parquet file, which it reads",
        ) from error  # fmt: skip
    try:
        made = datasets.Dataset.from_list([dict(row) for row in rows])
        with _quiet(datasets):
            made.save_to_disk(str(path))
    except (pyarrow.ArrowException, OSError, ValueError, TypeError) as error:
        raise DataError("A data set cannot be written", where=str(path), why=first_line(error)) from error
    return len(made)


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    already = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not already:
            datasets.enable_progress_bars()


def with_items(store: Store, filters: Mapping[str, Any]) -> Iterator[tuple[FeedbackEvent, list[Item]]]:
    """Yield the current events of a store with the items each is about."""
    batch: list[FeedbackEvent] = []

    def flush() -> Iterator[tuple[FeedbackEvent, list[Item]]]:
        known = store.items({name for event in batch for name in event.items})
        for event in batch:
            yield event, [known[name] for name in event.items]
        batch.clear()

    for event in store.current(**filters):
        batch.append(event)
        if len(batch) == _BATCH:
            yield from flush()
    yield from flush()


def _record(event: FeedbackEvent, items: Sequence[Item], packed: bool) -> dict[str, Any]:
    fields = {f.name: getattr(event, f.name) for f in dataclasses.fields(event)}
    value = list(event.value) if isinstance(event.value, tuple) else event.value
    listed = [{f.name: getattr(item, f.name) for f in dataclasses.fields(item)} for item in items]
    fields |= {"items": listed, "value": value, "scale": event.scale and list(event.scale)}
    if packed:
        for name in ("items", "value"):
            fields[f"{name}_json"] = json.dumps(fields.pop(name), ensure_ascii=False)
        fields["scale"] = event.scale and "{}..{}".format(*event.scale)
    return fields


def _shape(event: FeedbackEvent, items: Sequence[Item], shape: str, chat: bool) -> dict[str, Any] | str:
    """Return the row of an event in a shape, or why it has none."""
    if len({(item.prompt_id, item.media) for item in items}) > 1:
        return "about different prompts"
    if shape == "plain":
        return _plain(event, items)
    wanted = {"preference": "pairwise", "unpaired": "binary", "ranking": "ranking"}[shape]
    if event.kind != wanted:
        return f"of kind {event.kind}"
    about = {"events": [event.id], "annotator": event.annotator, "key": event.key}
    if shape == "preference":
        if event.value not in ("a", "b"):
            return "without a winner"
        won = "ab".index(event.value)
        return pair_row(items[won], items[1 - won], about, chat=chat)
    if shape == "unpaired":
        return unpaired_row(items[0], event.value, about, chat=chat)
    return ranking_row(items, event.value, about, chat=chat)


def pair_row(chosen: Item, rejected: Item, about: Mapping[str, Any], *, chat: bool = False) -> dict[str, Any]:
    """Return TRL's preference columns of two outputs of one prompt, then `about`."""
    prompt, (won, lost) = _contents(chosen, (chosen, rejected), chat)
    return {"prompt": prompt, "chosen": won, "rejected": lost, **about}


def unpaired_row(item: Item, label: bool, about: Mapping[str, Any], *, chat: bool = False) -> dict[str, Any]:
    """Return TRL's unpaired preference columns of an output, then `about`."""
    prompt, (completion,) = _contents(item, (item,), chat)
    return {"prompt": prompt, "completion": completion, "label": label, **about}


def score_row(item: Item, score: float, about: Mapping[str, Any], *, chat: bool = False) -> dict[str, Any]:
    """Return prompt, completion and score of an output, then `about`."""
    prompt, (completion,) = _contents(item, (item,), chat)
    return {"prompt": prompt, "completion": completion, "score": score, **about}


def ranking_row(
    items: Sequence[Item], ranks: Sequence[int], about: Mapping[str, Any], *, chat: bool = False
) -> dict[str, Any]:
    """Return prompt, completions and ranks (1 the best) of outputs of one prompt, then `about`."""
    prompt, completions = _contents(items[0], items, chat)
    return {"prompt": prompt, "completions": completions, "ranks": list(ranks), **about}


def _contents(first: Item, items: Sequence[Item], chat: bool) -> tuple[Any, list[Any]]:
    prompt: Any = first.prompt
    chat = chat or not isinstance(prompt, str) or any(not isinstance(item.response, str) for item in items)
    if first.input and isinstance(prompt, str):
        prompt = f"{prompt}\n\n{first.input}"
    if not chat:
        return prompt, [item.response for item in items]
    return _turns(prompt, "user"), [_turns(item.response, "assistant") for item in items]


def _turns(content: Any, role: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}] if isinstance(content, str) else [dict(turn) for turn in content]


def _plain(event: FeedbackEvent, items: Sequence[Item]) -> dict[str, Any]:
    first = items[0]
    row: dict[str, Any] = {"prompt": first.prompt, "input": first.input, "media": first.media}
    if len(items) == 1:
        row["response"] = first.response
    elif event.kind == "pairwise":
        row |= {"response_a": items[0].response, "response_b": items[1].response}
    else:
        row["responses"] = [item.response for item in items]
    if event.kind in _VALUES:
        row[_VALUES[event.kind]] = list(event.value) if event.kind == "ranking" else event.value
    else:
        row["exposure"] = "shown"
    exposure = row.get("exposure", event.exposure)
    scale = event.scale and "{}..{}".format(*event.scale)
    names = ("annotator", "key", "source", "session", "ts", "policy", "position", "latency_ms", "propensity", "reply")
    row |= {name: getattr(event, name) for name in names} | {"ts": event.ts or None}
    extra = {"scale": scale, "exposure": exposure, "tie_origin": event.tie_origin, "identifier": event.identifier}
    return {**row, **extra, "event_id": event.id}
