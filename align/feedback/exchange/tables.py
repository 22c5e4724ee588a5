"""Files as rows, both ways: CSV, TSV, JSON, JSONL and Parquet. What is wrong with a file is said as file:row:column.

A row number is the line on which the row begins in text files (the header is line 1), and counts rows from 1 in Parquet
and in a JSON list. Cells of CSV are texts and stay so; whoever reads a rating or a label out of them decides.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.errors import DataError, first_line
from align.parquetfiles import parquet_rows, require_pyarrow
from align.textfiles import read_csv, read_json_text, read_lines

READS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
WRITES = (".csv", ".jsonl", ".parquet")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
# Columns that list ids, which hold no spaces: one cell of CSV can hold them all.
ID_LISTS = ("events",)


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Args:
        place: where it stands, as "file:row".
        fields: its cells by name.
        names: what the file calls a field that was renamed since.
    """

    place: str
    fields: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)

    def wrong(self, column: str, what: str, *, why: str = "", do: str = "") -> DataError:
        """Return the error that names this row and a column of it, as the file calls it."""
        return DataError(what, where=f"{self.place}:{self.names.get(column, column)}", why=why, do=do)

    def but(self, fields: Mapping[str, Any], **names: str) -> Row:
        """Return this row with other fields, `names` saying what the file calls those that were renamed."""
        return Row(self.place, fields, {**self.names, **{new: self.names.get(old, old) for new, old in names.items()}})


@dataclass(frozen=True)
class Bad:
    """A row that cannot even be read as one, with the reason."""

    place: str
    error: DataError


def short(value: Any) -> str:
    """Return a value as it is shown in a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_table(path: str | Path, *, columns: Sequence[str] = (), delimiter: str = "") -> Iterator[Row | Bad]:
    """Yield every row of a file, and a `Bad` where one cannot be read.

    Args:
        columns: of a CSV file without a header, the names of its columns in order; "-" leaves one out.
        delimiter: of a CSV file; a comma, or a tab for .tsv.

    Raises:
        DataError: no such file, an unknown format, or a file that is not of its format as a whole.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in READS:
        raise DataError(
            "A file of an unknown format", where=str(path), do=f"Its name must end in one of {', '.join(READS)}"
        )
    if columns and ending not in DELIMITERS:
        raise DataError(
            "A list of columns is for CSV files without a header", where=str(path),
            do="Map the columns by name: field=column",
        )  # fmt: skip
    if not path.is_file():
        raise DataError(
            "A file is needed, and this is a folder" if path.is_dir() else "There is no such file",
            where=str(path), do="Check the path",
        )  # fmt: skip
    if ending in DELIMITERS:
        return _named(path, _read_csv(path, columns, delimiter or DELIMITERS[ending]))
    return _named(path, {".json": _read_json, ".parquet": _read_parquet}.get(ending, _read_jsonl)(path))


def _named(path: Path, rows: Iterator[Row | Bad]) -> Iterator[Row | Bad]:
    """Yield rows; where the file is no text, the column is named too."""
    try:
        yield from rows
    except DataError as error:
        bad = error.__cause__
        if not isinstance(bad, UnicodeDecodeError):
            raise
        line = error.where.rpartition(", line ")[2]
        place = f"{path}:{line}:{bad.start - bad.object.rfind(10, 0, bad.start)}"
        raise DataError(error.what, where=place, why=error.why, do=error.do) from bad


def _read_csv(path: Path, columns: Sequence[str], delimiter: str) -> Iterator[Row | Bad]:
    header, done, begun = list(columns), 0, False
    try:
        for line, last, cells in read_csv(path, DataError, delimiter):
            done = last
            place = f"{path}:{line}"
            if not any(map(str.strip, cells)):
                continue  # spreadsheets write an empty row as separators alone
            if not header:
                header = [cell.strip() for cell in cells]
                _require_names(header, place)
            elif columns and not begun and [cell.strip() for cell in cells] == header:
                raise DataError(
                    "The first row names the columns itself", where=f"{place}:{header[0]}", do="Leave --columns out"
                )
            elif len(cells) != len(header):
                first = header[len(cells)] if len(cells) < len(header) else len(header) + 1
                why = f"{len(cells)} cells for {len(header)} columns"
                yield Bad(place, DataError(
                    "A row does not fit the columns", where=f"{place}:{first}", why=why,
                    do="Quote a cell that holds the delimiter, or a line break",
                ))  # fmt: skip
            else:
                yield Row(place, {n: cell for n, cell in zip(header, cells, strict=True) if n != "-"})
            begun = True
    except csv.Error as error:
        raise DataError(
            "A file is not CSV", where=f"{path}:{done + 1}:{header[0] if header else 1}", why=str(error),
            do="Check the quotes from this row on",
        ) from error  # fmt: skip


def _require_names(names: Sequence[str], place: str) -> None:
    mark = next((mark for mark in ";\t|" if mark in names[0]), "") if len(names) == 1 else ""
    if mark:
        raise DataError(
            "The columns of this file are separated otherwise", where=place, why=f"its one column is {short(names[0])}",
            do=f"Add --delimiter {shlex.quote(mark)}, or save it with commas",
        )  # fmt: skip
    for number, name in enumerate(names, start=1):
        if not name or name in names[: number - 1]:
            raise DataError(
                "A table names two columns alike" if name else "A column has no name",
                where=f"{place}:{name or number}",
                do="Name every column once, or list those of a file without a header: --columns prompt,response,rating",
            )  # fmt: skip


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(n for n in names if names.count(n) > 1)!r} is given twice")
    return found


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError("This is not JSON", where=f"{place}:{error.colno}", why=f"{line}{error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise DataError("This is not JSON", where=f"{place}:1", why=str(error)) from error


def _rows(found: Any, place: str) -> Row | Bad:
    if isinstance(found, dict):
        return Row(place, found)
    return Bad(
        place, DataError("A row is not an object with named fields", where=f"{place}:1", why=f"found {short(found)}")
    )


def _read_jsonl(path: Path) -> Iterator[Row | Bad]:
    for number, line in enumerate(read_lines(path, DataError), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            found = _parse(line.removesuffix("\n"), place)
        except DataError as error:
            yield Bad(place, error)
        else:
            yield _rows(found, place)


def _read_json(path: Path) -> Iterator[Row | Bad]:
    text = read_json_text(path, DataError)
    found = _parse(text, f"{path}:1")
    if isinstance(found, dict) and isinstance(found.get("data"), list):
        found = found["data"]
    if not isinstance(found, list):
        found = [found]
    for number, row in enumerate(found, start=1):
        yield _rows(row, f"{path}:{number}")


def _read_parquet(path: Path) -> Iterator[Row | Bad]:
    number = 0
    try:
        for number, row in enumerate(parquet_rows(path), start=1):
            if number == 1:
                _require_names(list(row), f"{path}:0")
            yield Row(f"{path}:{number}", row)
    except DataError as error:
        if error.where != str(path):
            raise
        raise DataError(error.what, where=f"{path}:{number + 1}:1", why=error.why, do=error.do) from error


# --- writing ----------------------------------------------------------------------------------------


def write_table(path: str | Path, rows: Iterable[Mapping[str, Any]], *, overwrite: bool = False) -> int:
    """Write rows to a CSV, JSONL or Parquet file, whole or not at all, and return how many there were.

    JSONL and Parquet keep every value. CSV takes texts, numbers and ids (those of several events with a space between),
    and an empty cell is a missing value; chats and lists of texts would not read back, and are refused.

    Raises:
        DataError: an unknown ending, a file that is there already, a value that the format cannot hold.
    """
    path = Path(path)
    write = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}.get(path.suffix.lower())
    if write is None:
        raise DataError(
            "A file of an unknown format", where=str(path), do=f"Its name must end in one of {', '.join(WRITES)}"
        )
    if path.exists() and not overwrite:
        raise DataError("There is a file already", where=str(path), do="Name another, or add --overwrite")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        count = write(partial, path, rows)
        os.replace(partial, path)
    except OSError as error:
        raise DataError("A file cannot be written", where=str(path), why=error.strerror or str(error)) from error
    except UnicodeEncodeError as error:
        raise DataError("A text cannot be written", where=str(path), why="it holds half of a character") from error
    finally:
        partial.unlink(missing_ok=True)
    return count


def _save(partial: Path, text: Iterable[str]) -> None:
    with partial.open("w", encoding="utf-8", newline="") as file:
        file.writelines(text)
        file.flush()
        os.fsync(file.fileno())


def _write_jsonl(partial: Path, path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    count = 0

    def lines() -> Iterator[str]:
        nonlocal count
        for row in rows:
            count += 1
            yield json.dumps(row, ensure_ascii=False) + "\n"

    _save(partial, lines())
    return count


def _write_csv(partial: Path, path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    table = list(rows)
    names = list(dict.fromkeys(name for row in table for name in row))
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(names)
    for number, row in enumerate(table, start=2):
        cells = {name: _ids(value) if name in ID_LISTS else value for name, value in row.items()}
        for name, value in cells.items():
            if isinstance(value, (dict, list, tuple)):
                chat = isinstance(value, list) and all(isinstance(part, dict) for part in value)
                kind = "an object" if isinstance(value, dict) else "a chat" if chat else "a list"
                raise DataError(
                    "CSV holds texts and numbers", where=f"{path}:{number}:{name}", why=f"found {kind}, {short(value)}",
                    do="Name a .jsonl or .parquet file, which hold chats and lists",
                )  # fmt: skip
        writer.writerow([_cell(cells.get(name)) for name in names])
    _save(partial, [buffer.getvalue()])
    return len(table)


def _ids(value: Any) -> Any:
    """Return ids with a space between, or the value as it is where one of them has a space itself."""
    whole = isinstance(value, (list, tuple)) and all(isinstance(part, str) and part.split() == [part] for part in value)
    return " ".join(value) if whole else value


def _cell(value: Any) -> Any:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else value


def _write_parquet(partial: Path, path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    pyarrow, parquet = require_pyarrow(path)
    table = list(rows)
    names = list(dict.fromkeys(name for row in table for name in row))
    columns = {}
    for name in names:
        try:
            columns[name] = pyarrow.array([row.get(name) for row in table])
        except (pyarrow.ArrowException, OverflowError) as error:
            raise DataError(
                "A column holds values of several types", where=f"{path}:{name}", why=first_line(error),
                do="Write JSONL, or make texts and chats one of the two with --chat",
            ) from error  # fmt: skip
    parquet.write_table(pyarrow.table(columns), partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    return len(table)
