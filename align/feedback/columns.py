"""Rows of a table, one at a time: CSV, TSV, JSON, JSONL and Parquet, with a header or under a column map.

Every row comes with its place, so that a bad cell is refused as file:row:field. Cells are typed by whoever asks
for them: a response may read `true` or `6` and is a text all the same, a rating may read `6.0` and is the number 6.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.errors import DataError
from align.parquetfiles import parquet_rows
from align.registry import suggest
from align.textfiles import read_csv, read_json, read_lines

ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
MISSING_WORDS = frozenset({"", "nan", "none", "null", "na", "n/a", "<na>"})
IGNORED = "-"

_HEADERLESS = (
    "Where the file has no header, name all its columns in order: --columns, --ratings-columns or --rankings-columns"
)
Row = tuple[str, Mapping[str, Any]]


def read_rows(path: str | Path, columns: Sequence[str] = ()) -> Iterator[Row]:
    """Yield (place, row) of each row of a table file, reading it as a stream where its format allows.

    Args:
        columns: names of the columns of a headerless CSV or TSV, in order; "-" leaves a column out. Without them the
            first line holds the names. In JSON and Parquet every cell has its name already.

    Raises:
        DataError: no such file, a format it does not know, a row that does not fit, or bytes that are no text.
    """
    path = Path(path)
    if path.suffix.lower() not in ENDINGS:
        raise DataError("A table has an unknown format", where=str(path), do=f"Its name ends in {', '.join(ENDINGS)}")
    if not path.is_file():
        why = "it is a folder" if path.is_dir() else ""
        raise DataError("There is no such file", where=str(path), why=why, do="Check the path")
    named = [column for column in columns if column != IGNORED]
    if len(set(named)) < len(named) or any(not column for column in columns):
        raise DataError("A column map names each column once", why=f"got {','.join(columns)}")
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        return _delimited(path, columns, "," if kind == ".csv" else "\t")
    if columns:
        raise DataError(
            "A column map is for headerless CSV", where=str(path), why="this format names its columns",
            do="Leave the map out",
        )  # fmt: skip
    return {".json": _json, ".parquet": _parquet}.get(kind, _jsonl)(path)


def _delimited(path: Path, columns: Sequence[str], delimiter: str) -> Iterator[Row]:
    names = list(columns)
    line = 0
    try:
        for began, last, cells in read_csv(path, DataError, delimiter):
            line = last
            if not cells:
                continue
            if not names:
                names = [cell.strip() for cell in cells]
                if len(set(names)) < len(names):
                    raise DataError("A table names two columns alike", where=f"{path}:{began}", do=_HEADERLESS)
            elif len(cells) != len(names):
                raise DataError(
                    "A row does not fit the columns", where=f"{path}:{began}",
                    why=f"{len(cells)} cells for {len(names)} columns ({', '.join(names)})",
                    do="Quote a cell that holds the separator, or mend the column map",
                )  # fmt: skip
            else:
                yield f"{path}:{began}", dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise DataError("A file is not CSV", where=f"{path}:{line + 1}", why=str(error)) from error


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(read_lines(path, DataError), start=1):
        if line.strip():
            yield _object(_parsed(line.removesuffix("\n"), f"{path}:{number}"), f"{path}:{number}")


def _json(path: Path) -> Iterator[Row]:
    found = read_json(path, DataError)
    if not isinstance(found, list):
        raise DataError("A JSON table is a list of objects", where=str(path), why=f"found a {type(found).__name__}")
    for i, row in enumerate(found):
        yield _object(row, f"{path}:{i + 1}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError("This is not JSON", where=where, why=reason) from error


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError("A row is not an object with named fields", where=where, why=f"found {str(row)[:60]!r}")
    return where, row


def _parquet(path: Path) -> Iterator[Row]:
    for number, row in enumerate(parquet_rows(path), start=1):
        yield f"{path}:{number}", row


# --- cells ------------------------------------------------------------------------------------------


def cell(row: Mapping[str, Any], field: str, place: str) -> Any:
    """Return the cell of a field that every row must have.

    Raises:
        DataError: the row has no such field.
    """
    if field not in row:
        close = suggest(field, filter(None, map(str, row)))
        delimited = Path(place.rpartition(":")[0]).suffix.lower() in (".csv", ".tsv")
        do = close if close.startswith("Did you mean") or not delimited else f"{close}. {_HEADERLESS}"
        raise DataError(f"A row has no field {field!r}", where=place, do=do)
    return row[field]


def text_cell(value: Any) -> str | list[Any]:
    """Return what a prompt or response says: a text as it stands, a chat as its turns, a missing one as "".

    A number or a truth value is written as JSON writes it, so that a response `true` is the text "true" in every
    format.
    """
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list):
        return value
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def is_empty(value: Any) -> bool:
    """Whether a cell holds no answer: null, NaN, nothing, or a word that stands for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str) and value.strip().casefold() in MISSING_WORDS


def number_cell(value: Any, field: str, place: str) -> float:
    """Return a number, NaN where the cell holds no answer; `6`, `"6"` and `6.0` are the same.

    Raises:
        DataError: a cell that is neither.
    """
    if is_empty(value):
        return float("nan")
    try:
        found = float("x") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.inf
    if not math.isfinite(found) or (isinstance(value, str) and "_" in value):
        raise DataError("A cell is not a number", where=f"{place}:{field}", why=f"found {str(value)[:60]!r}")
    return found


def label_cell(value: Any) -> Any:
    """Return a label in one spelling: whole numbers as int however they are written, None where there is none."""
    if is_empty(value):
        return None
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str):
        value = value.strip()
        try:
            number = float(value)
        except ValueError:
            return value
    else:
        number = float(value) if isinstance(value, (int, float)) else math.inf
    return int(number) if math.isfinite(number) and number == int(number) else value
