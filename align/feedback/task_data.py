"""The data of a task: rows to outputs, media files checked, outputs cut into units, gold rows with their answers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.errors import DataError
from align.feedback.events import PAIRWISE, Item, content_id
from align.feedback.tasks import CONTENT, TaskConfig, Unit, shuffled
from align.prompts import read_rows, short_repr
from align.registry import suggest

SIGNATURES = {
    ".png": ("image/png", 0, (b"\x89PNG",)),
    ".jpg": ("image/jpeg", 0, (b"\xff\xd8\xff",)),
    ".jpeg": ("image/jpeg", 0, (b"\xff\xd8\xff",)),
    ".gif": ("image/gif", 0, (b"GIF8",)),
    ".webp": ("image/webp", 8, (b"WEBP",)),
    ".mp4": ("video/mp4", 4, (b"ftyp",)),
    ".webm": ("video/webm", 0, (b"\x1aE\xdf\xa3",)),
}
"""Endings of files that are served: their type, and the bytes that must stand at an offset of the file."""


def read_units(config: TaskConfig, path: Path, media: dict[str, Path]) -> tuple[tuple[Unit, ...], int]:
    """Return the units of a task file's data in file order, and how many outputs were repeated; fills `media`."""
    groups, repeated = _groups(config, path, config.data, media)
    return tuple(_units(config, groups, str(path.parent / config.data))), repeated


def _groups(
    config: TaskConfig,
    path: Path,
    data: str,
    media: dict[str, Path],
    answers: list[tuple[list[Item], Any, str]] | None = None,
) -> tuple[dict[str, list[Item]], int]:
    """Return the items of each prompt in file order; with `answers`, also collect each row's items and answer."""
    source = path.parent / data
    groups: dict[str, dict[str, Item]] = {}
    repeated = 0
    for place, row in read_rows(source):
        where = f"{source}, {place}"
        if not isinstance(row, Mapping):
            raise DataError("A row is not an object with named fields", where=where, why=f"found {short_repr(row)}")
        named = dict(row)
        for ours, theirs in config.columns.items():
            if theirs not in named:
                raise DataError(f"A row has no field {theirs!r}", where=where, do=suggest(theirs, map(str, row)))
            named[ours] = named.pop(theirs)
        answer = named.pop("answer", None) if answers is not None else None
        if answers is not None and answer is None:
            raise DataError("A gold row has no field 'answer'", where=where, do="Write the right answer there")
        items = list(_items(named, path.parent, where, media))
        for item in items:
            group = groups.setdefault(item.prompt_id, {})
            repeated += item.id in group
            group.setdefault(item.id, item)
        if answers is not None:
            answers.append((items, answer, where))
    if not groups:
        raise DataError("There is nothing to annotate", where=str(source), why="it is empty")
    return {key: list(group.values()) for key, group in groups.items()}, repeated


def _items(row: dict[str, Any], base: Path, where: str, media: dict[str, Path]) -> Iterator[Item]:
    given = [name for name in CONTENT if row.get(name) not in (None, "")]
    if len(given) != 1:
        raise DataError(
            "A row has no output" if not given else "A row has outputs of two kinds", where=where,
            why=f"its fields are {', '.join(map(str, row))}" if not given else " and ".join(given),
            do=f"Give one of {', '.join(CONTENT)}",
        )  # fmt: skip
    name = given[0]
    prompt = _said(row.get("prompt"), f"{where}, field 'prompt'")
    input_ = row.get("input") or ""
    if not isinstance(input_, str):
        raise DataError("An input is not text", where=f"{where}, field 'input'", why=f"found {short_repr(input_)}")
    metadata = {k: v for k, v in row.items() if k not in ("prompt", "input", *CONTENT)}
    value = row[name]
    if name.endswith("s") and isinstance(value, str) and value[:1] == "[":
        value = _parsed(value, f"{where}, field {name!r}")
    if name.endswith("s") and (not isinstance(value, (list, tuple)) or not value):
        raise DataError(
            "Several outputs are a list", where=f"{where}, field {name!r}", why=f"found {short_repr(value)}"
        )
    for part in value if name.endswith("s") else [value]:
        place = f"{where}, field {name!r}"
        kind = name.removesuffix("s")
        if kind == "response":
            response = _said(part, place)
            yield Item(prompt, response, input_, "text" if isinstance(response, str) else "chat", metadata)
            continue
        file = _media_file(part, base, place, kind)
        item = Item(prompt, str(part), input_, kind, metadata)
        media[item.id] = file
        yield item


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError("A list in a table is not JSON", where=where, why=str(error)) from error


def _said(value: Any, where: str) -> Any:
    """Return a text, or a chat with its turns checked."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, (list, tuple)) and value:
        turns = [turn for turn in value if isinstance(turn, Mapping)]
        if len(turns) == len(value) and all(isinstance(t.get(k), str) for t in turns for k in ("role", "content")):
            return [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    raise DataError(
        "A text or a chat is needed", where=where, why=f"found {short_repr(value)}",
        do='Give a text that is not empty, or turns such as [{"role": "user", "content": "Hi"}]',
    )  # fmt: skip


def _media_file(value: Any, base: Path, where: str, kind: str) -> Path:
    if not isinstance(value, str) or "\0" in value:
        raise DataError(
            f"An {kind} is not given as a path" if kind == "image" else "A video is not given as a path", where=where
        )
    path = (base / value).resolve()
    if not path.is_relative_to(base.resolve()):
        raise DataError(
            "A media file lies outside the folder of its task",
            where=where,
            why=value,
            do="Move it beside the task file",
        )
    content, offset, marks = SIGNATURES.get(path.suffix.lower(), ("", 0, ()))
    if not content.startswith(f"{kind}/"):
        ends = [end for end, (known, *_) in SIGNATURES.items() if known.startswith(kind)]
        raise DataError(f"Not a file of a known {kind} format", where=where, why=value, do=f"Use {', '.join(ends)}")
    try:
        with path.open("rb") as opened:
            head = opened.read(16)
    except OSError as error:
        raise DataError(
            "A media file cannot be read",
            where=where,
            why=f"{path}: {error.strerror}",
            do="Paths are relative to the task file",
        ) from error
    if not any(head[offset:].startswith(mark) for mark in marks):
        raise DataError(
            f"A media file is no {content}", where=where, why=f"{path} begins otherwise", do="Replace the file"
        )
    return path


def _units(config: TaskConfig, groups: Mapping[str, list[Item]], where: str) -> Iterator[Unit]:
    for items in groups.values():
        if config.kind in ("rating", "thumbs"):
            yield from (make_unit(config.name, [item]) for item in items)
            continue
        if len(items) < 2:
            raise DataError(
                f"A {config.kind} task needs two outputs of every prompt", where=where,
                why=f"there is one for {short_repr(items[0].prompt)}", do="Add outputs, or rate them one at a time",
            )  # fmt: skip
        if config.kind == "pairwise":
            for pair in itertools.combinations(items, 2):
                yield make_unit(config.name, pair, fixed=config.both_orders)
                if config.both_orders:
                    yield make_unit(config.name, pair[::-1], fixed=True)
        else:
            yield from (make_unit(config.name, chosen) for chosen in _sets(items, config.k, config.seed))


def _sets(items: Sequence[Item], k: int, seed: int) -> Iterator[list[Item]]:
    """Cut into sets of `k` that cover all items; the last set is filled up with items of earlier ones."""
    order = shuffled(len(items), "ranking sets", seed, items[0].prompt_id) if len(items) > k else range(len(items))
    chosen = [items[i] for i in order]
    for start in range(0, len(chosen), k):
        yield (chosen + chosen[:k])[start : start + k] if len(chosen) > k else chosen


def make_unit(name: str, items: Sequence[Item], *, fixed: bool = False, gold: Any = None) -> Unit:
    """Return the unit of these items in the task called `name`."""
    ids = [item.id for item in items]
    made = content_id(name, "gold" if gold is not None else "", *(ids if fixed else sorted(ids)))
    return Unit(made, tuple(items), fixed, gold)


def read_gold(config: TaskConfig, path: Path, media: dict[str, Path]) -> tuple[Unit, ...]:
    """Return the units of the gold file, their answers checked; fills `media`."""
    if config.gold is None:
        return ()
    units: list[Unit] = []
    answers: list[tuple[list[Item], Any, str]] = []
    _groups(config, path, config.gold.data, media, answers)
    for items, answer, where in answers:
        if isinstance(answer, str) and answer not in PAIRWISE:
            try:
                answer = json.loads(answer)
            except ValueError as error:
                raise DataError("A gold answer cannot be read", where=where, why=f"found {answer!r}") from error
        if problem := _gold_problem(config, len(items), answer):
            raise DataError("A gold answer does not fit its task", where=f"{where}, field 'answer'", why=problem)
        marked = [Item(i.prompt, i.response, i.input, i.media, {**i.metadata, "gold": answer}) for i in items]
        units.append(make_unit(config.name, marked, fixed=True, gold=answer))
    return tuple(units)


def _gold_problem(config: TaskConfig, count: int, answer: Any) -> str:
    wanted = {"rating": 1, "thumbs": 1, "pairwise": 2}.get(config.kind)
    if wanted and count != wanted:
        return f"a {config.kind} is about {wanted} output{'s' if wanted > 1 else ''}, the row has {count}"
    if config.kind == "thumbs":
        return "" if isinstance(answer, bool) else f"true or false, got {answer!r}"
    if config.kind == "pairwise":
        return "" if answer in PAIRWISE else f"a, b, tie or both_bad, got {answer!r}"
    if config.kind == "ranking":
        return "" if isinstance(answer, list) and len(answer) == count >= 2 else "one rank an output, 1 the best"
    names = {dimension.name for dimension in config.dimensions}
    given = answer if isinstance(answer, dict) else {next(iter(names)): answer}
    if not set(given) <= names:
        return f"the dimensions are {', '.join(sorted(names))}"
    low, high = config.scale
    right = all(isinstance(v, int) and low <= v <= high for v in given.values())
    return "" if right else f"whole numbers within {low}..{high}, got {answer!r}"
