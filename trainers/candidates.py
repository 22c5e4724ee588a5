"""What is selected from: several outputs of each prompt, from `align sample`, from a table of scores, or any file.

{"prompt": ..., "completion": ...}      an answer, text or chat           align sample, of a language model
{"prompt": ..., "image": "a.png"}       an image, relative to the file    align sample, of images
a table that `align score` wrote        either, with its scores
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.errors import DataError
from align.feedback.events import Item
from align.preferences import parse_row, prompt_key, text_key
from align.prompts import read_rows, short_repr
from align.scoretable import FLAGS, WORDS, components_of, read_scores
from rewards.chats import completion_text
from rewards.outputs import sample_of
from rewards.sources import Source

FORMATS = (".jsonl", ".csv", ".parquet")
SAMPLES = "samples.jsonl"
_CARRIED = ("tools", "chat_template_kwargs")


@dataclass(frozen=True)
class Candidate:
    """One output of one prompt.

    Args:
        prompt: text, or a chat as a list of messages.
        output: an image file; or a completion, text or messages.
        key: what the candidates of one prompt have in common.
        fields: what else its row says.
        place: where the row stands, for messages.
    """

    prompt: Any
    output: Any
    key: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""

    @property
    def content(self) -> str:
        """What it is, to know two that are the same: the text, or the name of the image file; "" if it is empty."""
        if not isinstance(self.output, Path) and not completion_text(self.output).strip():
            return ""
        return json.dumps(self.output, sort_keys=True, default=str)

    def source(self) -> Source:
        """Return it as `rewards.scoring` scores it; a chat is scored as the whole conversation."""
        if isinstance(self.output, Path):
            return Source(str(self.prompt), self.output, None, self.fields)
        prompt, conversation = sample_of(Item(self.prompt, self.output))
        return Source(prompt, None, conversation, self.fields)

    def given(self, root: Path) -> Any:
        """Return its output as a row in a file of the folder `root` names it."""
        if not isinstance(self.output, Path):
            return self.output
        return os.path.relpath(self.output, root)

    def carried(self) -> dict[str, Any]:
        """Return what the chat template needs besides, as trainers read it."""
        return {name: self.fields[name] for name in _CARRIED if self.fields.get(name)}


@dataclass(frozen=True)
class Candidates:
    """Candidates in file order.

    Args:
        rows: the candidates.
        source: where they came from.
        scores: by component, None where missing; of a table of scores only.
        errors: why a score of the table is missing.
    """

    rows: tuple[Candidate, ...]
    source: str = ""
    scores: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    errors: Sequence[str] = ()

    @property
    def images(self) -> bool:
        """Whether they are images."""
        return isinstance(self.rows[0].output, Path)

    @property
    def policies(self) -> list[str]:
        """What made them, as far as the rows say."""
        return sorted({str(row.fields["policy"]) for row in self.rows if row.fields.get("policy")})

    def groups(self) -> list[int]:
        """Return the number of each candidate's prompt, prompts numbered as they appear."""
        known: dict[str, int] = {}
        return [known.setdefault(row.key, len(known)) for row in self.rows]


def is_candidates(path: str | Path) -> bool:
    """Whether a path is a file of candidates, or the folder that `align sample` wrote, rather than a model."""
    path = Path(path)
    return path.suffix.lower() in FORMATS or (path / SAMPLES).is_file()


def read_candidates(path: str | Path) -> Candidates:
    """Read candidates; see the module for what they may be.

    Raises:
        DataError: a file that cannot be read, or a row that is no candidate; each names file and row.
    """
    path = Path(path)
    path = path / SAMPLES if path.is_dir() else path
    rows = list(read_rows(path))
    if not rows:
        raise DataError("There is no candidate", where=str(path), why="it is empty")
    if all(isinstance(row, Mapping) and {"identity", "valid"} <= set(row) for _, row in rows):
        return _scored(path)
    found = tuple(_candidate(row, f"{path}, {place}", path.parent) for place, row in rows)
    return Candidates(_of_one_kind(found), str(path))


def _scored(path: Path) -> Candidates:
    rows = read_scores(path)
    names = components_of(rows)
    found, errors = [], []
    scores: dict[str, list[float | None]] = {name: [] for name in names}
    for n, row in enumerate(rows, 1):
        about = {k: v for k, v in row.items() if k not in (*names, *WORDS, *FLAGS)}
        about |= {k: row[k] for k in ("prompt", "image", "completion") if row.get(k) is not None}
        if row.get("image") and Path(str(row["image"])).is_file():
            about["image"] = str(Path(str(row["image"])).absolute())
        candidate = _candidate(about, f"{path}, row {n}", path.parent)
        if isinstance(candidate.output, list) and candidate.output[0].get("role") != "assistant":
            raise DataError(
                "A table of scores holds conversations, not answers", where=candidate.place,
                do="Give the file of candidates with the reward; what was scored is kept",
            )  # fmt: skip
        gone = isinstance(candidate.output, Path) and not candidate.output.is_file()
        found.append(candidate)
        errors.append("the image is not there" if gone else str(row.get("error") or ""))
        for name in names:
            scores[name].append(None if gone else row.get(name))
    return Candidates(_of_one_kind(tuple(found)), str(path), scores, errors)


def _candidate(row: Any, where: str, base: Path) -> Candidate:
    if not isinstance(row, Mapping):
        raise DataError("A row is not an object with named fields", where=where, why=f"found {short_repr(row)}")
    given = {str(k): v for k, v in row.items() if v is not None}
    if "video" in given or ("image" in given and "completion" in given):
        what = "a video" if "video" in given else "an image and a completion"
        raise DataError("This is no candidate", where=where, why=f"it has {what}", do="Give answers of text, or images")
    prompt = given.get("prompt")
    if "image" in given:
        for name in ("prompt", "image"):
            if not isinstance(given.get(name), str) or not given[name].strip():
                raise DataError(
                    f"A candidate has no {name}", where=f"{where}, field {name!r}",
                    why=f"found {short_repr(given.get(name))}",
                )  # fmt: skip
        rest = {k: v for k, v in given.items() if k not in ("prompt", "image")}
        return Candidate(prompt, base / given["image"], text_key(prompt), rest, where)
    if not prompt:
        raise DataError(
            "A candidate has no prompt", where=f"{where}, field 'prompt'", do="Candidates are grouped by it"
        )
    if "completion" not in row:
        raise DataError(
            "A candidate has no completion", where=f"{where}, field 'completion'",
            why=f"the fields are {', '.join(given)}",
            do="Call the column of answers 'completion', or that of image files 'image'",
        )  # fmt: skip
    wanted = {k: row[k] for k in ("prompt", "completion", *_CARRIED) if k in row}
    read = parse_row(wanted, where)[0]
    rest = {k: v for k, v in given.items() if k not in ("prompt", "completion")}
    said, asked = (v if isinstance(v, str) else [dict(turn) for turn in v] for v in (read.completion, read.prompt))
    return Candidate(asked, said, prompt_key(read), rest, where)


def _of_one_kind(rows: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    odd = next((r for r in rows if isinstance(r.output, Path) != isinstance(rows[0].output, Path)), None)
    if odd is not None:
        raise DataError("A file holds images and texts", where=odd.place, do="Select from each by itself")
    return rows
