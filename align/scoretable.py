"""The table of scores: what `align score` writes, and what thresholds and pages read.

One row a sample: `image` or `completion`, `prompt`, one column of numbers a reward component, `truncated`, `valid`
(no component is missing), `error`, and `identity` (those of the rewards, joined by "+"). A score that is missing is
null, or an empty cell, and never a number.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.errors import ConfigError, DataError
from align.parquetfiles import parquet_rows, require_pyarrow
from align.textfiles import read_csv, read_lines

FORMATS = (".parquet", ".csv", ".jsonl")
WORDS = ("image", "completion", "prompt", "error", "identity")
FLAGS = ("truncated", "valid")
Row = dict[str, Any]


def components_of(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the names of the columns that hold scores."""
    names = dict.fromkeys(name for row in rows for name in row)
    return tuple(name for name in names if name not in WORDS and name not in FLAGS)


def require_format(path: str | Path) -> Path:
    """Return the path of a table to be written.

    Raises:
        ConfigError: an unknown suffix, or Parquet without pyarrow.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(
            "A table of scores is Parquet, CSV or JSONL", where=str(path),
            why=f"its name ends in {path.suffix or 'nothing'}", do=f"End it in {', '.join(FORMATS)}",
        )  # fmt: skip
    if path.suffix.lower() == ".parquet":
        require_pyarrow(path, ConfigError)
    return path


def write_scores(path: str | Path, rows: Sequence[Row]) -> None:
    """Write a table of scores, replacing the file as a whole.

    Raises:
        ConfigError: an unknown suffix, or a file that cannot be written.
    """
    path = require_format(path)
    names = list(dict.fromkeys(name for row in rows for name in row))
    temporary = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".parquet":
            _write_parquet(temporary, rows, names)
        else:
            with temporary.open("w", encoding="utf-8", newline="") as file:
                if path.suffix.lower() == ".csv":
                    writer = csv.writer(file, lineterminator="\n")
                    writer.writerow(names)
                    writer.writerows([_cell(row.get(name)) for name in names] for row in rows)
                else:
                    file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError("A table cannot be written", where=str(path), why=error.strerror or str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _write_parquet(path: Path, rows: Sequence[Row], names: Sequence[str]) -> None:
    pa, parquet = require_pyarrow(path, ConfigError)
    kinds = {name: pa.string() if name in WORDS else pa.bool_() if name in FLAGS else pa.float64() for name in names}
    columns = {name: pa.array([row.get(name) for row in rows], kinds[name]) for name in names}
    parquet.write_table(pa.table(columns), path)


def _cell(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def read_scores(path: str | Path) -> list[Row]:
    """Return the rows of a table of scores; what is missing is None.

    Raises:
        DataError: no such file, another format, or a row that is not one of such a table, with its place.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if not path.is_file() or kind not in FORMATS:
        raise DataError(
            "There is no such table of scores" if not path.is_file() else "This is no table of scores",
            where=str(path), do=f"Give a {', '.join(FORMATS)} file that `align score` wrote",
        )  # fmt: skip
    if kind == ".parquet":
        rows = list(parquet_rows(path))
    elif kind == ".csv":
        rows = _csv(path)
    else:
        rows = [_object(line.removesuffix("\n"), path, n) for n, line in enumerate(read_lines(path, DataError), 1)]
    return [_row(row, path, n) for n, row in enumerate(rows, 1)]


def _csv(path: Path) -> list[Row]:
    found, done = [], 0
    names: list[str] = []
    try:
        for _, last, cells in read_csv(path, DataError):
            done = last
            if names and cells:
                found.append(dict(zip(names, cells, strict=True)))
            names = names or cells
    except (csv.Error, ValueError) as error:  # the latter where a row has more cells than the header, or fewer
        raise DataError("A table of scores cannot be read", where=f"{path}, line {done}", why=str(error)) from error
    return found


def _object(line: str, path: Path, n: int) -> Row:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError("A line is not JSON", where=f"{path}, line {n}", why=str(error)) from error
    if not isinstance(found, dict):
        raise DataError("A line is no row of a table", where=f"{path}, line {n}", why=f"found {found!r}"[:80])
    return found


def _row(row: Mapping[str, Any], path: Path, n: int) -> Row:
    found: Row = {}
    for name, value in row.items():
        if value is None or value == "":
            found[name] = None
        elif name in WORDS:
            found[name] = str(value)
        elif name in FLAGS:
            found[name] = value if isinstance(value, bool) else str(value).lower() == "true"
        else:
            try:
                number = float(value)
            except (TypeError, ValueError) as error:
                raise DataError(
                    "A score is not a number", where=f"{path}, row {n}, column {name}", why=f"found {value!r}"
                ) from error
            found[name] = number if math.isfinite(number) else None
    return found


def read_scores_of(path: str, identity: str, what: str) -> list[Row]:
    """Read a table of scores that the reward of this identity made.

    Args:
        what: what the table is, "baseline".

    Raises:
        DataError: a table that cannot be read, or of another reward or version.
    """
    rows = read_scores(path)
    versions = {part for row in rows for part in str(row.get("identity") or "").split("+")} - {""}
    if versions and identity not in versions:
        raise DataError(
            f"The {what} was scored by another reward, or by another version of this one", where=path,
            why=f"its identity is {'+'.join(sorted(versions))}, this reward's {identity}",
            do=f"Score the {what} again with `align score`",
        )  # fmt: skip
    return rows
