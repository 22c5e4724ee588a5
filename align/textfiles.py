"""Text that people wrote: UTF-8 with the place of a bad byte, YAML with the line of every value.

YAML is read by the rules of YAML 1.2: `off`, `on`, `yes` and `no` are words, `1e-5` is a number, and
a key given twice is an error.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import AlignError, ConfigError, first_line

if TYPE_CHECKING:
    from yaml.nodes import Node

MOST_JSON_BYTES = 64 << 20
"""Bytes of a JSON file that is read whole; the longest known ones, tokenizers, have 35 MB."""
MOST_JSON_VALUES = 3_000_000
"""Values of one, by its commas and brackets. Each takes about 80 bytes of memory; the largest tokenizers have half."""
MOST_YAML_BYTES = 1 << 20
"""Bytes of a YAML file; the parser is slow, and recipes have 5 kB."""
MOST_YAML_VALUES = 100_000
"""Values of one, once what its aliases stand for is written out; one with a long dotted name counts as several."""
MOST_ROW_BYTES = 16 << 20
"""Bytes of one line of a table, and characters of one of its cells; JSON unfolds to 24 times that at worst."""

MOST_DIGITS = 1000
"""Digits of an integer, for which Python takes time that grows with their square; what has more is read as a float."""

_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= {word: value for value in (True, False) for word in (str(value).lower(), str(value), str(value).upper())}
_BARE = re.compile(r"[A-Za-z_](?:[\w/.-]| (?=\w))*", re.ASCII)
_RESERVED = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
_SPECIAL = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}


def read_text(path: str | Path, error: type[AlignError] = ConfigError) -> str:
    """Return the text of a UTF-8 file, without a byte-order mark.

    Raises:
        AlignError (of the type `error`): no such file, not readable, or not UTF-8 (line and byte named).
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError as missing:
        raise error("There is no such file", where=str(path), do="Check the path") from missing
    except IsADirectoryError as folder:
        raise error("A file is needed, and this is a folder", where=str(path)) from folder
    except OSError as problem:
        raise error("A file cannot be read", where=str(path), why=problem.strerror or str(problem)) from problem
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as bad:
        start = bad.start + (3 if raw.startswith(b"\xef\xbb\xbf") else 0)
        raise error(
            "A file is not UTF-8 text",
            where=f"{path}, line {raw[:start].count(10) + 1}",
            why="it starts like UTF-16"
            if raw[:2] in (b"\xff\xfe", b"\xfe\xff")
            else f"byte 0x{raw[start]:02x} at offset {start} is part of no character",
            do="Save the file as UTF-8",
        ) from bad


def read_lines(path: str | Path, error: type[AlignError] = ConfigError) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their ends, as they are read; see `read_text`.

    Raises:
        AlignError (of the type `error`): see `read_text`; or a line of more than `MOST_ROW_BYTES`.
    """
    path, number, offset = Path(path), 0, 0
    if not path.is_file():
        read_text(path, error)  # says what is wrong
    with path.open("rb") as file:
        while raw := file.readline(MOST_ROW_BYTES + 1):
            number += 1
            if len(raw) > MOST_ROW_BYTES:
                raise error(
                    "A line is too long", where=f"{path}, line {number}",
                    why=f"more than {MOST_ROW_BYTES >> 20} MB", do="Break it into rows",
                )  # fmt: skip
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as bad:
                at = offset + len(raw) - len(bad.object) + bad.start
                raise error(
                    "A file is not UTF-8 text", where=f"{path}, line {number}",
                    why="it starts like UTF-16" if number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff")
                    else f"byte 0x{bad.object[bad.start]:02x} at offset {at} is part of no character",
                    do="Save the file as UTF-8",
                ) from bad  # fmt: skip
            offset += len(raw)


def read_csv(
    path: str | Path, error: type[AlignError] = ConfigError, delimiter: str = ","
) -> Iterator[tuple[int, int, list[str]]]:
    """Yield the rows of a CSV file as (first line, last line, cells), as they are read.

    Raises:
        AlignError (of the type `error`): see `read_lines`; or a row of more than `MOST_ROW_BYTES`.
        csv.Error: it is no CSV, from the row on that follows the last one that was yielded.
    """
    held, done = 0, 0

    def lines() -> Iterator[str]:
        nonlocal held
        for line in read_lines(path, error):
            held += len(line)
            if held > MOST_ROW_BYTES:
                raise error(
                    "A row is too long", where=f"{path}, line {done + 1}", why=f"more than {MOST_ROW_BYTES >> 20} MB",
                    do="Look for a quote that is never closed",
                )  # fmt: skip
            yield from io.StringIO(line, newline="")

    csv.field_size_limit(MOST_ROW_BYTES)
    reader = csv.reader(lines(), strict=True, delimiter=delimiter)
    for cells in reader:
        first, done, held = done + 1, reader.line_num, 0
        yield first, done, cells


def read_json_text(path: str | Path, error: type[AlignError] = ConfigError) -> str:
    """Return the text of a JSON file, once it is known that what it holds fits into memory.

    Raises:
        AlignError (of the type `error`): see `read_text`; or a file that is too large or holds too many values.
    """
    path = Path(path)
    if path.is_file() and path.stat().st_size > MOST_JSON_BYTES:
        raise error("A JSON file is too large", where=str(path), why=f"more than {MOST_JSON_BYTES >> 20} MB")
    text = read_text(path, error)
    if sum(map(text.count, ",[{")) > MOST_JSON_VALUES:
        raise error("A JSON file holds too much", where=str(path), why=f"more than {MOST_JSON_VALUES:,} values")
    return text


def read_json(path: str | Path, error: type[AlignError] = ConfigError) -> Any:
    """Return what a JSON file holds.

    Raises:
        AlignError (of the type `error`): see `read_json_text`; or a file that is no JSON, or nested too deeply.
    """
    text = read_json_text(path, error)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as bad:
        reason = f"line {bad.lineno}: {bad.msg}" if isinstance(bad, json.JSONDecodeError) else str(bad)
        raise error("A file is not JSON", where=str(path), why=reason) from bad


@dataclass
class Document:
    """A YAML document: its value, the comment on its first line, and each entry's line and trailing comment."""

    value: Any
    header: str = ""
    lines: dict[str, int] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    weight: int = 0


def parse_scalar(text: str) -> Any:
    """Return what a plain YAML 1.2 scalar means: None, a bool, an int, a float or the text itself."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text) and len(text) < MOST_DIGITS:
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return float(_SPECIAL[text.lower()]) if text.lower() in _SPECIAL else text


def parse_yaml(text: str, where: str) -> Document:
    """Parse one YAML document; `where` names it in messages.

    Raises:
        ConfigError: not YAML, a key given twice, a key that is not text, or a document that contains itself.
    """
    import yaml

    if len(text) > MOST_YAML_BYTES:
        raise ConfigError("A YAML file is too large", where=where, why=f"more than {MOST_YAML_BYTES >> 20} MB")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError as error:
        raise ConfigError("A file is not YAML", where=where, why="it is nested too deeply") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(
            "A file is not YAML",
            where=f"{where}:{mark.line + 1}" if mark else where,
            why=" ".join(filter(None, (error.context, error.problem))),
            do="Check indentation, quotes and the space after each colon",
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError("A file is not YAML", where=where, why=first_line(error)) from error
    rows = text.splitlines()
    document = Document(None, header=rows[0][1:].strip() if rows and rows[0].startswith("#") else "")
    if node is not None:
        try:
            document.value = _build(node, "", document, rows, where, ())
        except RecursionError as error:
            raise ConfigError("A file is not YAML", where=where, why="it is nested too deeply") from error
    return document


def _build(node: Node, key: str, document: Document, rows: list[str], where: str, above: tuple[Node, ...]) -> Any:
    from yaml.nodes import MappingNode, ScalarNode, SequenceNode

    line = node.start_mark.line + 1
    document.lines.setdefault(key, line)
    document.weight += 1 + len(key) // 64
    if document.weight > MOST_YAML_VALUES:
        raise ConfigError(
            "A YAML file holds too much", where=f"{where}:{line}",
            why=f"its aliases stand for more than {MOST_YAML_VALUES:,} values", do="Write out what is meant",
        )  # fmt: skip
    if isinstance(node, ScalarNode):
        return parse_scalar(node.value) if node.style is None else node.value
    if any(node is parent for parent in above):
        raise ConfigError("A YAML value contains itself", where=f"{where}:{line}", do="Write the value out")
    above = (*above, node)
    if isinstance(node, SequenceNode):
        return [
            _build(child, f"{key}.{i}" if key else str(i), document, rows, where, above)
            for i, child in enumerate(node.value)
        ]
    if not isinstance(node, MappingNode):
        raise ConfigError("A YAML value is of no known kind", where=f"{where}:{line}")
    result: dict[str, Any] = {}
    for name_node, child in node.value:
        line = name_node.start_mark.line + 1
        if not isinstance(name_node, ScalarNode):
            raise ConfigError("A key must be text", where=f"{where}:{line}")
        name = name_node.value
        dotted = f"{key}.{name}" if key else name
        if name in result:
            raise ConfigError(
                f"The key {dotted!r} is given twice",
                where=f"{where}:{line}",
                why=f"first on line {document.lines[dotted]}",
                do="Keep one of them",
            )
        document.lines[dotted] = line
        end = child.end_mark
        inline = isinstance(child, ScalarNode) or child.flow_style
        tail = rows[end.line][end.column :].strip() if inline and end.line < len(rows) else ""
        if tail.startswith("#"):
            document.comments[dotted] = tail[1:].strip()
        result[name] = _build(child, dotted, document, rows, where, above)
    return result


def dump_value(value: Any) -> str:
    """Return `value` (None, bool, number, text, or lists and dicts of them) as YAML on one line.

    YAML 1.1 and 1.2 readers see the same value: a word such as `off` is quoted.
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{dump_value(name)}: {dump_value(part)}" for name, part in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(dump_value, value)) + "]"
    if isinstance(value, float):
        if not math.isfinite(value):
            return ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"
        mantissa, mark, exponent = repr(value).partition("e")
        return f"{mantissa if '.' in mantissa else mantissa + '.0'}{mark}{exponent}"
    if isinstance(value, str):
        if _BARE.fullmatch(value) and value.lower() not in _RESERVED:
            return value
        quoted = json.dumps(value, ensure_ascii=False)
        return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted)
    return json.dumps(value)
