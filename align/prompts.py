"""Prompt files: txt, JSONL, CSV and Parquet, with images and metadata, and a held-out split."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import DataError
from align.images import require_readable
from align.parquetfiles import parquet_rows
from align.registry import suggest
from align.seeding import permutation
from align.seeding import seed as derive_seed
from align.textfiles import read_csv, read_lines
from align.types import ImagePrompt, Prompt

if TYPE_CHECKING:
    from align.config import PromptsConfig

FORMATS = {".txt": "one prompt a line", ".jsonl": "one object a line", ".csv": "a table", ".parquet": "a table"}


@dataclass(frozen=True)
class PromptSet:
    """Prompts in file order.

    Args:
        prompts: the N texts.
        images: N image files or None, empty when no image column was asked for.
        metadata: N mappings of the other columns.
        source: where they came from, for messages.
    """

    prompts: tuple[str, ...]
    images: tuple[Path | None, ...] = ()
    metadata: tuple[Mapping[str, Any], ...] = field(default=())
    source: str = ""

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.prompts)

    @property
    def asked(self) -> tuple[Prompt, ...]:
        """What a model is asked for: the texts, with their image where there is one."""
        images = self.images or (None,) * len(self)
        return tuple(t if i is None else ImagePrompt(t, i) for t, i in zip(self.prompts, images, strict=True))

    @property
    def duplicates(self) -> int:
        """How many rows repeat the prompt of an earlier one, up to case and spaces."""
        return len(self.prompts) - len({_same(text) for text in self.prompts})

    def select(self, indices: Sequence[int]) -> PromptSet:
        """Return the rows at `indices`, in that order."""
        return PromptSet(
            tuple(self.prompts[i] for i in indices),
            tuple(self.images[i] for i in indices) if self.images else (),
            tuple(self.metadata[i] for i in indices) if self.metadata else (),
            self.source,
        )

    def indices_at(self, step: int, count: int, seed: int) -> list[int]:
        """Return the rows of training step `step`: a pure function of its arguments, so it resumes by itself.

        An epoch is a new shuffle cut into whole steps; the up to `count - 1` rows that fill no step are
        left to later epochs. A step never holds a row twice unless `count` exceeds the number of rows,
        which are then all repeated equally often, give or take one.
        """
        size = len(self.prompts)
        if step < 0 or count < 1:
            raise DataError(
                "A step needs a number from 0 and at least one prompt", why=f"got step {step}, {count} prompts"
            )
        if count > size:
            rounds = [permutation(size, "prompts", seed, step, i) for i in range(-(-count // size))]
            return [row for order in rounds for row in order][:count]
        epoch, place = divmod(step, size // count)
        return permutation(size, "prompts", seed, epoch)[place * count : (place + 1) * count]

    def at(self, step: int, count: int, seed: int) -> PromptSet:
        """Return the `count` prompts of training step `step` (see `indices_at`)."""
        return self.select(self.indices_at(step, count, seed))


def load_prompts(
    source: str | Path | Iterable[str | Mapping[str, Any]],
    *,
    prompt_column: str = "prompt",
    image_column: str | None = None,
) -> PromptSet:
    """Return the prompts of a file, or of an iterable of texts or of mappings.

    Txt holds one prompt a line; JSONL, CSV and Parquet hold `prompt_column`, optionally `image_column`
    (a path relative to the file), and any other columns, which become metadata.

    Raises:
        DataError: no such file, an unknown format, bad encoding, an empty file or line, a missing
            column, a prompt that is not text, an image that cannot be read; each names file and row.
    """
    if isinstance(source, (str, Path)):
        rows, name, base = read_rows(source, prompt_column), str(source), Path(source).parent
    else:
        rows = ((f"item {i}", {prompt_column: v} if isinstance(v, str) else v) for i, v in enumerate(source))
        name, base = "given prompts", Path()
    return _collect(rows, name, base, prompt_column, image_column)


def read_rows(source: str | Path, text_column: str = "prompt") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Return (place, row) of every row of a txt, JSONL, CSV or Parquet file; a line of txt is its `text_column`.

    Raises:
        DataError: no such file or an unknown format; and, while rows are read, a row that cannot be.
    """
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    if reader is None and path.is_file():
        raise DataError(
            "A prompt file of an unknown format", where=str(path),
            why=f"it ends in {path.suffix!r}" if path.suffix else "its name has no ending",
            do=f"Use {', '.join(f'{ending} ({what})' for ending, what in FORMATS.items())}",
        )  # fmt: skip
    if reader is None:
        raise DataError(
            "A prompt file is needed, and this is a folder" if path.is_dir() else "There is no such prompt file",
            where=str(path), do="Give a txt, JSONL, CSV or Parquet file",
        )  # fmt: skip
    return reader(path, text_column)


def split_heldout(prompts: PromptSet, fraction: float, seed: int = 0) -> tuple[PromptSet, PromptSet]:
    """Return (training, held-out): the distinct prompts lowest in a hash of their text are held out.

    Prompts that differ in case or spaces alone count as one, so none is ever on both sides, and the
    split does not depend on the order of the file. The held-out share is `round(fraction * distinct)`,
    at least 1 unless `fraction` is 0.

    Raises:
        DataError: too few distinct prompts to leave one on each side.
    """
    if not 0 <= fraction < 1:
        raise DataError("The held-out fraction is a share from 0 up to, not including, 1", why=f"got {fraction:g}")
    keys = [_same(text) for text in prompts.prompts]
    ranked = sorted(set(keys), key=lambda key: (derive_seed("heldout", seed, key), key))
    count = max(1, round(fraction * len(ranked))) if fraction else 0
    if count >= len(ranked):
        raise DataError(
            "Too few prompts to hold any out", where=prompts.source, why=f"{len(ranked)} distinct prompts",
            do="Add prompts, set heldout_fraction: 0, or give a heldout_path",
        )  # fmt: skip
    heldout = set(ranked[:count])
    return (
        prompts.select([i for i, key in enumerate(keys) if key not in heldout]),
        prompts.select([i for i, key in enumerate(keys) if key in heldout]),
    )


def training_and_heldout(
    config: PromptsConfig, *, seed: int = 0, builtin: Mapping[str, Callable[[], Iterable[str]]] | None = None
) -> tuple[PromptSet, PromptSet]:
    """Return (training, held-out) prompts as `config` says.

    With `heldout_path` the two are separate files; with `heldout_fraction` 0 and no path, evaluation
    repeats the training prompts.

    Args:
        config: the `prompts` section.
        seed: of the split. Keep it fixed over runs that are compared.
        builtin: prompts that go by a name instead of a path, e.g. {"digits": digit_prompts}.

    Raises:
        DataError: see `load_prompts`; or a prompt that is in both files.
    """

    def load(path: str) -> PromptSet:
        known = (builtin or {}).get(path)
        return load_prompts(
            path if known is None else known(), prompt_column=config.prompt_column, image_column=config.image_column
        )

    prompts = load(config.path)
    if config.heldout_path is None:
        return split_heldout(prompts, config.heldout_fraction, seed) if config.heldout_fraction else (prompts, prompts)
    heldout = load(config.heldout_path)
    require_apart(prompts, heldout, config.heldout_path)
    return prompts, heldout


def require_apart(prompts: Iterable[str], heldout: Sequence[str] | PromptSet, where: str) -> None:
    """Refuse held-out prompts that are trained on.

    Raises:
        DataError: with one of them.
    """
    shared = {_same(text) for text in prompts} & {_same(text) for text in heldout}
    if shared:
        example = next(text for text in heldout if _same(text) in shared)
        raise DataError(
            f"{len(shared)} held-out prompt{'s are' if len(shared) > 1 else ' is'} also trained on",
            where=where, why=f"for one, {short_repr(example)}", do="Remove it from one of the two files",
        )  # fmt: skip


def _same(text: str) -> str:
    return " ".join(text.split()).casefold()


def short_repr(value: Any) -> str:
    """Return the `repr` of a value as messages show it: 60 characters at most."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _collect(
    rows: Iterable[tuple[str, Mapping[str, Any]]], name: str, base: Path, prompt_column: str, image_column: str | None
) -> PromptSet:
    texts, images, metadata = [], [], []
    for place, row in rows:
        where = f"{name}, {place}"
        if not isinstance(row, Mapping):
            raise DataError("A row is not an object with named fields", where=where, why=f"found {short_repr(row)}")
        for column in filter(None, (prompt_column, image_column)):
            if column not in row:
                raise DataError(f"A row has no field {column!r}", where=where, do=suggest(column, map(str, row)))
        text = row[prompt_column]
        if not isinstance(text, str) or not text.strip():
            empty = text is None or isinstance(text, str)
            raise DataError(
                "A prompt is empty" if empty else "A prompt is not text", where=f"{where}, field {prompt_column!r}",
                why="" if empty else f"found {short_repr(text)}", do="Write the prompt there, or remove the row",
            )  # fmt: skip
        texts.append(text)
        if image_column:
            images.append(_image(row[image_column], base, f"{where}, field {image_column!r}"))
        metadata.append({str(key): v for key, v in row.items() if key not in (prompt_column, image_column)})
    if not texts:
        raise DataError("There is no prompt", where=name, why="it is empty", do="Write at least one prompt into it")
    return PromptSet(tuple(texts), tuple(images), tuple(metadata) if any(metadata) else (), name)


def _image(value: Any, base: Path, where: str) -> Path | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise DataError("An image is not given as a path", where=where, why=f"found {short_repr(value)}")
    path = base / value
    if not path.is_file():
        raise DataError(
            "There is no such image", where=where, why=str(path), do="Paths are relative to the prompt file"
        )
    require_readable(path, where)
    return path


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(read_lines(path, DataError), start=1):
        line = line.removesuffix("\n").removesuffix("\r")
        if not line.strip():
            raise DataError("A line is empty", where=f"{path}, line {number}", do="Fill it in, or remove the line")
        yield f"line {number}", line


def _read_txt(path: Path, column: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for place, line in _lines(path):
        yield place, {column: line}


def _read_jsonl(path: Path, column: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for place, line in _lines(path):
        try:
            yield place, json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(
                "A line is not JSON", where=f"{path}, {place}", why=reason, do='Write e.g. {"prompt": "a cat"}'
            ) from error


def _read_csv(path: Path, column: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    header: list[str] | None = None
    done = 0
    try:
        for _, last, cells in read_csv(path, DataError):
            done = last
            place = f"line {done}"
            if header is None:
                header = [cell.strip() for cell in cells]
                if len(header) == 1 and (mark := next((m for m in ";\t|" if m in header[0]), "")):
                    raise DataError(
                        "A table's columns are not separated by commas", where=f"{path}, {place}",
                        why=f"found {short_repr(mark)} in {short_repr(header[0])}", do="Save it with commas between",
                    )  # fmt: skip
                if len(set(header)) < len(header):
                    raise DataError("A table names two columns alike", where=f"{path}, {place}", why=", ".join(header))
            elif not cells:
                raise DataError("A line is empty", where=f"{path}, {place}", do="Remove the line")
            elif len(cells) != len(header):
                raise DataError(
                    "A row does not fit the header", where=f"{path}, {place}",
                    why=f"{len(cells)} cells for {len(header)} columns", do="Quote a cell that holds a comma",
                )  # fmt: skip
            else:
                yield place, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError("A file is not CSV", where=f"{path}, line {done + 1}", why=str(error)) from error


def _read_parquet(path: Path, column: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for i, row in enumerate(parquet_rows(path)):
        yield f"row {i}", row


_READERS = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
