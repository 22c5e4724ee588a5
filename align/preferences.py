"""Rows of prompts and completions with what people thought of them, in the forms TRL documents.

    {"prompt": ..., "completion": ..., "label": true}       a thumb                        kto, bco, sft
    {"prompt": ..., "chosen": ..., "rejected": ...}         a pair; two thumbs for kto and bco        dpo
    {"chosen": ..., "rejected": ...}                        a pair whose prompt is what both begin with
    {"prompt": ..., "completion": ...}, {"messages": ...}, {"text": ...}                   sft

A prompt or completion is text, or a list of `{"role": ..., "content": ...}` messages. `tools` (a list or its JSON),
`chat_template_kwargs`, `score`, `weight` and `udm_weight` may stand beside them. Other fields are left alone.

    {"image": "cat.png", "completion": ..., "label": true,
     "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]}

`image`, or `images` with a list, names files relative to the data file, or holds `{"bytes": ..., "path": ...}` as the
Image feature of `datasets` does. Each goes with a part of type image of the prompt, in order. In a prompt without such
parts, the images stand at the beginning of the first message of the user.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from align.errors import DataError
from align.image_rows import checked_parts, count_images, row_images, with_image_parts
from align.images import ImageFile
from align.prompts import FORMATS, read_rows
from align.registry import suggest
from align.seeding import seed as derive_seed

Text = str | tuple[Mapping[str, Any], ...]
_LABELS = {1: True, 0: False, -1: False}  # True and False among them
_WORDS = {"up": True, "down": False, "true": True, "false": False, "1": True, "0": False, "-1": False, "+1": True}
THUMBS = "true or false, 1 or 0, 1 or -1, up or down"
_FIELDS = (
    "prompt", "completion", "chosen", "rejected", "messages", "text", "label", "score", "score_chosen",
    "score_rejected", "tools", "chat_template_kwargs", "weight", "udm_weight", "image", "images",
)  # fmt: skip

_ANSWERED = {"completion", "chosen", "rejected", "messages", "text"}


@dataclass(frozen=True)
class Completion:
    """One completion of one prompt.

    Args:
        prompt: text or messages; empty text where there is none.
        completion: text or messages.
        label: thumbs up or down; None where nobody said.
        score: a number for it, such as a rating; None where there is none.
        pair: number of the pair it comes from, -1 for none; the two of a pair follow one another, chosen first.
        weight: of an undesirable row's loss (`udm_weight`) times that of any row (`weight`).
        tools: tool definitions for the chat template.
        template: further arguments of the chat template.
        images: of the prompt's parts of type image, in order.
        place: where the row stands, for messages.
    """

    prompt: Text
    completion: Text
    label: bool | None = None
    score: float | None = None
    pair: int = -1
    weight: float = 1.0
    tools: tuple[Mapping[str, Any], ...] = ()
    template: Mapping[str, Any] | None = None
    images: tuple[ImageFile, ...] = ()
    place: str = ""


@dataclass(frozen=True)
class PreferenceSet:
    """Completions in file order, and where they came from."""

    rows: tuple[Completion, ...]
    source: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def counts(self) -> dict[str, int]:
        """Return how many rows are up, down, unlabelled, scored and how many pairs there are."""
        labels = [row.label for row in self.rows]
        return {
            "up": labels.count(True),
            "down": labels.count(False),
            "unlabelled": labels.count(None),
            "scored": sum(row.score is not None for row in self.rows),
            "pairs": sum(row.pair >= 0 for row in self.rows) // 2,
        }

    def require_labels(self, *, threshold: float | None = None, soft: bool = False) -> PreferenceSet:
        """Return the rows with a label each: their own, or `score >= threshold`, or with `soft` `score > .5`.

        Raises:
            DataError: a row without a label, or with `soft` a score outside 0 to 1.
        """
        return replace(self, rows=tuple(self._labelled(row, threshold, soft) for row in self.rows))

    def _labelled(self, row: Completion, threshold: float | None, soft: bool) -> Completion:
        if soft and row.score is not None:
            if not 0 <= row.score <= 1:
                raise DataError(
                    "A soft label is a score from 0 to 1",
                    where=f"{row.place}, field 'score'",
                    why=f"found {row.score:g}",
                )
            return replace(row, label=row.score > 0.5)
        if row.label is not None:
            return row
        if threshold is not None and row.score is not None:
            return replace(row, label=row.score >= threshold)
        has_score = row.score is not None
        raise DataError(
            "A row has a score and no label" if has_score else "A row has no label",
            where=f"{row.place}, field 'label'",
            why=f"found the score {row.score:g}, expected true or false" if has_score else "expected true or false",
            do="Set data.score_threshold, or objective.soft_labels with bco" if has_score
            else "Give each row a label (thumbs), or chosen and rejected (pairs)",
        )  # fmt: skip

    def require_both_classes(self) -> PreferenceSet:
        """Return the rows, unless all carry one label.

        Raises:
            DataError: naming the side that is missing and how to come by it.
        """
        found = self.counts()
        missing = "down" if found["up"] and not found["down"] else "up" if found["down"] and not found["up"] else ""
        if missing:
            raise DataError(
                f"There is no thumb {missing} in the data", where=f"{self.source}, field 'label'",
                why=f"found {found['up']} up and {found['down']} down; these objectives learn from the difference",
                do="Add rows people disliked: regenerated, edited or reported answers, low ratings"
                if missing == "down" else "Add rows people liked: accepted or copied answers, high ratings",
            )  # fmt: skip
        return self

    def pairs(self) -> PreferenceSet:
        """Return the rows that come in pairs.

        Raises:
            DataError: there is none.
        """
        rows = tuple(row for row in self.rows if row.pair >= 0)
        if not rows:
            raise DataError(
                "There is no pair in the data", where=self.source, why="dpo needs the fields chosen and rejected",
                do="Train with trainer: kto or bco on thumbs, or convert with `align feedback convert`",
            )  # fmt: skip
        return replace(self, rows=rows)

    def one_a_prompt(self) -> PreferenceSet:
        """Return one row of each prompt: its first that is not a thumb down, or its first."""
        found: dict[str, Completion] = {}
        for row in sorted(self.rows, key=lambda row: row.label is False):
            found.setdefault(prompt_key(row), row)
        kept = set(map(id, found.values()))
        return replace(self, rows=tuple(row for row in self.rows if id(row) in kept))

    def split(self, fraction: float) -> tuple[PreferenceSet, PreferenceSet]:
        """Return (training, held-out) rows: whole prompts, lowest in a hash of what they are, are held out.

        Raises:
            DataError: too few distinct prompts to leave one on each side.
        """
        keys = [prompt_key(row) for row in self.rows]
        ranked = sorted(set(keys), key=lambda key: (derive_seed("heldout", 0, key), key))
        count = max(1, round(fraction * len(ranked))) if fraction else 0
        if count >= len(ranked):
            raise DataError(
                "Too few prompts to hold any out", where=self.source, why=f"{len(ranked)} distinct prompts",
                do="Add rows, set data.heldout_fraction: 0, or give data.heldout_path",
            )  # fmt: skip
        held = set(ranked[:count])
        sides = [
            tuple(r for r, key in zip(self.rows, keys, strict=True) if (key in held) is side) for side in (False, True)
        ]
        return replace(self, rows=sides[0]), replace(self, rows=sides[1])


def load_preferences(source: str | Path | Iterable[Mapping[str, Any]], *, prompts: bool = False) -> PreferenceSet:
    """Return the completions of a JSONL, CSV or Parquet file, of a folder written by `datasets`, or of mappings.

    Args:
        source: the rows.
        prompts: rows may be prompts alone; their completion is empty. A file of lines will do too.

    Raises:
        DataError: a file that cannot be read, or a row that is none of the forms above; each names the file, the
            row and the field, what was found and what was expected.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.exists():
            raise DataError("There is no such data file", where=str(path), do="Check the path, or make the file first")
        rows, name = (_dataset_rows(path) if path.is_dir() else read_rows(path)), str(path)
        folder = path if path.is_dir() else path.parent
    else:
        rows, name, folder = ((f"item {i}", row) for i, row in enumerate(source)), "given rows", Path()
    found: list[Completion] = []
    pairs = 0
    for place, row in rows:
        made = parse_row(row, f"{name}, {place}", pairs, folder, prompts=prompts)
        pairs += made[0].pair >= 0
        found += made
    if not found:
        raise DataError("There is no row", where=name, why="it is empty")
    return PreferenceSet(tuple(found), name)


def parse_row(row: Any, where: str, pair: int = 0, folder: Path = Path(), *, prompts: bool = False) -> list[Completion]:
    """Return the one or two completions of a row.

    Args:
        row: a mapping with the fields of one of the forms above; a null field counts as absent.
        where: file and row, for messages.
        pair: number to give the pair, if it is one.
        folder: where the paths of images begin.
        prompts: a row may be a prompt alone.

    Raises:
        DataError: see `load_preferences`.
    """
    if not isinstance(row, Mapping):
        raise DataError("A row is not an object with named fields", where=where, why=f"found {_short(row)}")
    given = {str(k): v for k, v in row.items() if v is not None and not (v == "" and k not in ("completion", "prompt"))}
    if prompts and given.get("prompt") and not _ANSWERED & given.keys():
        chat = not isinstance(given["prompt"], str)
        given["completion"] = [{"role": "assistant", "content": ""}] if chat else ""
    read = _Reader(given, where, tuple(name for name in _FIELDS if name in row and name not in given))
    images = row_images(given, where, folder)
    found = _completions(read, where, pair)
    for made, field in zip(found, ("chosen", "rejected") if len(found) > 1 else ("completion",), strict=True):
        if count_images(made.completion):
            raise DataError(
                "A completion holds an image", where=f"{where}, field {field!r}",
                why="found a part of type image, expected text", do="Put images into the prompt",
            )  # fmt: skip
    return [replace(made, prompt=with_image_parts(made.prompt, len(images), where), images=images) for made in found]


def _completions(read: _Reader, where: str, pair: int) -> list[Completion]:
    given = read.row
    common: dict[str, Any] = {
        "tools": read.tools(), "template": read.mapping("chat_template_kwargs"), "place": where,
    }  # fmt: skip
    weight = read.number("weight", 1.0, least=0.0)
    if "chosen" in given or "rejected" in given:
        prompt, chosen, rejected = read.pair()
        up = Completion(prompt, chosen, True, read.number("score_chosen"), pair, weight, **common)
        down = Completion(prompt, rejected, False, read.number("score_rejected"), pair, weight, **common)
        return [up, replace(down, weight=weight * read.number("udm_weight", 1.0, least=0.0))]
    label, score = read.label(), read.number("score")
    if label is False:
        weight *= read.number("udm_weight", 1.0, least=0.0)
    if "completion" in given:
        prompt = read.text("prompt", empty=True)
        return [
            Completion(
                prompt,
                read.answered("completion", read.text("completion", empty=True)),
                label,
                score,
                -1,
                weight,
                **common,
            )
        ]
    if "messages" in given:
        messages = read.text("messages")
        if isinstance(messages, str) or messages[-1]["role"] != "assistant":
            raise read.wrong("messages", "messages of which the last is the assistant's")
        return [Completion(messages[:-1], messages[-1:], label, score, -1, weight, **common)]
    if "text" in given:
        return [Completion("", read.text("text"), label, score, -1, weight, **common)]
    if null := next((name for name in read.null if name in _ANSWERED), ""):
        raise DataError(
            "A row has no completion", where=f"{where}, field {null!r}", why="it is null or empty",
            do="Write the answer there, or leave the row out",
        )  # fmt: skip
    near = next((hint for field in given if (hint := suggest(field, _FIELDS)) and field not in _FIELDS), "")
    raise DataError(
        "A row has no completion", where=f"{where}, field 'completion'",
        why=f"found {', '.join(map(repr, given)) or 'no field'}, expected completion, chosen and rejected, or messages",
        do=near or "Rename the columns; `align feedback convert` knows many forms",
    )  # fmt: skip


def read_thumb(value: Any) -> bool | None:
    """Return whether a label is a thumb up; None where it is none of `THUMBS`."""
    if isinstance(value, str):
        return _WORDS.get(value.strip().lower())
    return _LABELS.get(value) if isinstance(value, (bool, int, float)) else None


class _Reader:
    """The fields of one row, and the names of those that are null or empty."""

    def __init__(self, row: Mapping[str, Any], where: str, null: tuple[str, ...] = ()) -> None:
        self.row, self.where, self.null = row, where, null

    def wrong(self, field: str, expected: str, do: str = "") -> DataError:
        found = _short(self.row[field]) if field in self.row else "null" if field in self.null else "nothing"
        why = f"found {found}, expected {expected}"
        return DataError("A field is wrong", where=f"{self.where}, field {field!r}", why=why, do=do)

    def text(self, field: str, *, empty: bool = False) -> Text:
        value = self.row.get(field)
        if isinstance(value, str) and value.lstrip().startswith("[{"):
            turns = _json(value, None)  # a chat in a column of text; other JSON is an answer, such as a tool call
            if isinstance(turns, list) and all(isinstance(turn, dict) and "role" in turn for turn in turns):
                value = turns
        if value is None and empty and field == "prompt":
            return ""
        if isinstance(value, str):
            if value or empty:
                return value
            raise self.wrong(field, "text or a list of messages")
        if not isinstance(value, Sequence) or not value:
            raise self.wrong(field, "text or a list of messages")
        for i, message in enumerate(value):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                shown = _short(message)
                raise DataError(
                    "A message is wrong", where=f"{self.where}, field {field!r}, message {i}",
                    why=f"found {shown}, expected an object with role and content",
                )  # fmt: skip
        found = [{k: v for k, v in message.items() if v is not None} for message in value]
        for i, message in enumerate(found):
            if isinstance(message.get("content"), list):
                message["content"] = checked_parts(message["content"], f"{self.where}, field {field!r}, message {i}")
        return tuple(found)

    def answered(self, field: str, completion: Text) -> Text:
        """Return a completion, unless it is a chat that begins with somebody else's turn, which is the prompt's."""
        if completion and not isinstance(completion, str) and completion[0]["role"] in ("user", "system"):
            raise self.wrong(field, "messages that begin with the assistant's; those before belong in prompt")
        return completion

    def pair(self) -> tuple[Text, Text, Text]:
        chosen, rejected = self.text("chosen"), self.text("rejected")
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise self.wrong(
                "rejected", f"the same form as chosen, {'text' if isinstance(chosen, str) else 'messages'}"
            )
        if "prompt" in self.row:
            prompt = self.text("prompt", empty=True)
            shared = len(prompt)
            if isinstance(prompt, str) and not isinstance(chosen, str):  # UltraFeedback: it is a turn of both, too
                shared = min(_shared(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
                if any(turn.get("content") == prompt for turn in chosen[:shared]):
                    prompt = chosen[:shared]
            if not isinstance(prompt, str) and prompt and chosen[:shared] == prompt == rejected[:shared]:
                chosen, rejected = chosen[shared:], rejected[shared:]  # the whole chat stands in both
            return prompt, self.answered("chosen", chosen), self.answered("rejected", rejected)
        shared = _shared(chosen, rejected)
        if shared in (len(chosen), len(rejected)):
            raise self.wrong("prompt", "a prompt, as chosen and rejected do not differ after a common beginning")
        return chosen[:shared], chosen[shared:], rejected[shared:]

    def label(self) -> bool | None:
        value = self.row.get("label")
        found = None if value is None else read_thumb(value)
        if value is not None and found is None:
            raise self.wrong(
                "label", THUMBS,
                "Write one of these; `align feedback convert FILE thumbs.jsonl --to unpaired` reads yes and 1.0, too",
            )  # fmt: skip
        return found

    def number(self, field: str, default: Any = None, *, least: float | None = None) -> Any:
        value = self.row.get(field)
        if value is None:
            return default
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if isinstance(value, bool) or not abs(number) < float("inf") or (least is not None and number < least):
            raise self.wrong(field, "a finite number" + ("" if least is None else f" from {least:g}"))
        return number

    def mapping(self, field: str) -> Mapping[str, Any] | None:
        value = _json(self.row.get(field), self.row.get(field))
        if value is not None and not isinstance(value, Mapping):
            raise self.wrong(field, "an object")
        return value

    def tools(self) -> tuple[Mapping[str, Any], ...]:
        value = _json(self.row.get("tools"), self.row.get("tools"))
        if value is None:
            return ()
        if not isinstance(value, Sequence) or not all(isinstance(tool, Mapping) for tool in value):
            raise self.wrong("tools", "a list of tool definitions, or its JSON")
        return tuple(value)


def _json(value: Any, otherwise: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return otherwise


def _shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return how much two texts (to the end of a word) or chats have in common at their beginning."""
    shared = next((i for i, (left, right) in enumerate(zip(a, b, strict=False)) if left != right), min(len(a), len(b)))
    if isinstance(a, str):
        while 0 < shared < min(len(a), len(b)) and not a[shared - 1].isspace():
            shared -= 1
    return shared


def text_key(text: Text) -> str:
    """Return a prompt as text that two prompts share when they differ in case or spaces alone."""
    whole = text if isinstance(text, str) else json.dumps(text, sort_keys=True, default=str)
    return " ".join(whole.split()).casefold()


def prompt_key(row: Completion) -> str:
    """Return what rows of one prompt have in common: its text, and the content of its images."""
    return " ".join([text_key(row.prompt), *(image.digest for image in row.images)])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _dataset_rows(path: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Rows of a folder of `datasets`, or of the one table a folder holds."""
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        try:
            from datasets import DatasetDict, load_from_disk
        except ImportError as error:
            raise DataError("Reading this folder needs datasets", where=str(path), do="pip install datasets") from error
        dataset = load_from_disk(str(path))
        if isinstance(dataset, DatasetDict):
            if "train" not in dataset:
                raise DataError("A folder of splits has none called train", where=str(path), why=", ".join(dataset))
            dataset = dataset["train"]
        if "Image(" in str(dataset.features):  # as it is stored, not decoded
            dataset = dataset.with_format("arrow")
            return ((f"row {i}", table.to_pylist()[0]) for i, table in enumerate(dataset))
        return ((f"row {i}", row) for i, row in enumerate(dataset))
    tables = sorted(p for p in path.iterdir() if p.suffix.lower() in (".jsonl", ".parquet", ".csv"))
    if not tables:
        raise DataError(
            "A folder holds no data", where=str(path), why="neither a dataset nor a JSONL, CSV or Parquet file",
            do="Give a file, or a folder written by Dataset.save_to_disk",
        )  # fmt: skip
    return ((f"{table.name}, {place}", row) for table in tables for place, row in read_rows(table))


def describe_preferences(source: str | Path) -> dict[str, Any]:
    """Return what `align check` says of a file of rows: forms, labels, prompts, repeats, and what they can train.

    Raises:
        DataError: see `load_preferences`.
    """
    found = load_preferences(source)
    counts, rows = found.counts(), found.rows
    both = bool(counts["up"] and counts["down"])
    trainers = [
        name
        for name, can in (("kto", both and not counts["unlabelled"]), ("bco", both and not counts["unlabelled"]),
                          ("dpo", counts["pairs"] == len(found) / 2), ("sft", True))
        if can
    ]  # fmt: skip
    answers: dict[tuple[str, str], list[bool | None]] = {}
    for row in rows:
        answers.setdefault((prompt_key(row), text_key(row.completion)), []).append(row.label)
    labels = [row.label for row in rows]
    for image in {image.digest: image for row in rows for image in row.images}.values():
        image.pixels()
    about = {
        "kind": "preferences", "source": found.source, "rows": len(found), **counts,
        "prompts": len({prompt_key(row) for row in rows}), "no_prompt": sum(not row.prompt for row in rows),
        "chats": sum(not isinstance(row.completion, str) for row in rows),
        "empty_completions": sum(not row.completion for row in rows),
        "rows_with_images": sum(bool(row.images) for row in rows),
        "repeats": sum(len(said) - len(set(said)) for said in answers.values()),
        "contradictions": sum({True, False} <= set(said) for said in answers.values()),
        "sorted_by_label": both and sum(a != b for a, b in pairwise(labels)) == 1 < len(labels) - 1,
        "unread_columns": _unread(source), "one_class": not both and not counts["unlabelled"], "trainers": trainers,
        "valid": True,
    }  # fmt: skip
    return {**about, "warnings": _warnings(about)}


def _warnings(about: Mapping[str, Any]) -> list[str]:
    """Return what is likely to be a mistake in a file that can be read."""
    counted = {
        "empty_completions": "rows have an empty completion; where no token is left of one it is dropped",
        "no_prompt": "rows have no prompt",
        "repeats": "rows repeat another one, label and all",
        "contradictions": "answers have a thumb up and a thumb down",
    }
    found = [f"{about[key]} {text}" for key, text in counted.items() if about[key]]
    found += [f"nothing reads the column {name!r}. {hint}" for name, hint in about["unread_columns"].items() if hint]
    if about["unlabelled"] and (about["unlabelled"] < about["rows"] or about["scored"] or about["unread_columns"]):
        found.append(
            f"{about['unlabelled']} rows have no label, which kto and bco refuse: add it, set data.score_threshold for "
            "rows with a score, or convert ratings with `align feedback convert --to unpaired`"
        )
    if about["one_class"]:
        other = "regenerated, edited or reported answers as down" if about["up"] else "accepted or copied answers as up"
        found.append(
            f"all thumbs are {'up' if about['up'] else 'down'}; kto and bco learn from the difference, and refuse one "
            f"side alone without data.allow_one_class: add {other}"
        )
    return found


def _unread(source: str | Path) -> dict[str, str]:
    """Return the columns of the first row that nothing reads, each with a hint where it is near to one that is."""
    path = Path(source)
    first = next(iter(_dataset_rows(path) if path.is_dir() else read_rows(path)), ("", {}))[1]
    unread = [str(name) for name in first if name not in _FIELDS]
    missing = [name for name in _FIELDS if name not in first]
    return {name: hint if (hint := suggest(name, missing)).startswith("Did you mean") else "" for name in unread}


def is_preference_file(path: str | Path, peek: Callable[[Path], Iterable[tuple[str, Any]]] = read_rows) -> bool:
    """Return whether a table's first row has completions, rather than prompts alone."""
    path = Path(path)
    if path.is_dir():
        return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
    if path.suffix.lower() not in FORMATS or path.suffix.lower() == ".txt" or not path.is_file():
        return False
    _, first = next(iter(peek(path)), ("", {}))
    if not isinstance(first, Mapping):
        return False
    return any(name in first for name in ("completion", "chosen", "rejected", "messages")) or (
        "text" in first and "prompt" not in first
    )
