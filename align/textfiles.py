"""Text that people wrote: UTF-8 with the place of a bad byte, YAML with the line of every value.

YAML is read by the rules of YAML 1.2: `off`, `on`, `yes` and `no` are words, `1e-5` is a number, and
a key given twice is an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import AlignError, ConfigError

if TYPE_CHECKING:
    from yaml.nodes import Node

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


@dataclass
class Document:
    """A YAML document: its value, the comment on its first line, and each entry's line and trailing comment."""

    value: Any
    header: str = ""
    lines: dict[str, int] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)


def parse_scalar(text: str) -> Any:
    """Return what a plain YAML 1.2 scalar means: None, a bool, an int, a float or the text itself."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
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

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(
            "A file is not YAML",
            where=f"{where}:{mark.line + 1}" if mark else where,
            why=" ".join(filter(None, (error.context, error.problem))),
            do="Check indentation, quotes and the space after each colon",
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError("A file is not YAML", where=where, why=str(error).splitlines()[0]) from error
    rows = text.splitlines()
    document = Document(None, header=rows[0][1:].strip() if rows and rows[0].startswith("#") else "")
    if node is not None:
        document.value = _build(node, "", document, rows, where, ())
    return document


def _build(node: Node, key: str, document: Document, rows: list[str], where: str, above: tuple[Node, ...]) -> Any:
    from yaml.nodes import MappingNode, ScalarNode, SequenceNode

    line = node.start_mark.line + 1
    document.lines.setdefault(key, line)
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
