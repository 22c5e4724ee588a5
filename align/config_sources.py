"""Where the values of a config come from, key by key: a file, what it extends, the command line; and as YAML again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from align.config_errors import found_text
from align.errors import ConfigError
from align.recipes import list_recipes, read_recipe
from align.registry import suggest
from align.textfiles import Document, dump_value, parse_yaml, read_text


def read_values(
    source: str | Path | Mapping[str, Any], above: tuple[str, ...] = ()
) -> tuple[dict[str, Any], dict[str, str], str]:
    """Return the values of a config with what it extends, their origins by dotted key, and its name.

    Args:
        source: path, recipe name or nested mapping.
        above: the configs that extend it.

    Raises:
        ConfigError: no such file or recipe, not YAML, empty, or a config that extends itself.
    """
    document, where = _read(source)
    value = document.value
    if value is None:
        raise ConfigError("A config is empty", where=where, do="Give a model and data, or begin with `extends: RECIPE`")
    if not isinstance(value, dict):
        raise ConfigError("A config is a list of `key: value` lines", where=where, why=f"found {found_text(value)}")
    origins = _file_origins(document, where) if where else dict.fromkeys(dict(leaves(value)), "Python")
    base = value.pop("extends", None)
    origins.pop("extends", None)
    if base is None:
        return value, origins, where
    if not isinstance(base, str) or not base:
        raise ConfigError("A config extends one other", where=where, why=f"extends is {found_text(base)}")
    beside = Path(source).parent / base if not isinstance(source, Mapping) else Path(base)
    name = str(beside) if beside.is_file() else base
    if name in above:
        raise ConfigError("A config extends itself", where=where, why=" -> ".join([*above, name]))
    under, under_origins, _ = read_values(name, (*above, name))
    under.pop("about", None)  # it tells of the other config
    under_origins.pop("about", None)
    for key in [k for k in under_origins if _replaced(k, value)]:
        del under_origins[key]
    return _merged(under, value), {**under_origins, **origins}, where


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict) and key != "args"
        result[key] = _merged(result[key], value) if both else value
    return result


def _replaced(key: str, over: Any) -> bool:
    """Whether the dotted `key` of a base config is overwritten, itself or a section or list above it."""
    for part in key.split("."):
        if not isinstance(over, dict):
            return True
        if part not in over:
            return False
        over = over[part]
    return True


def _read(source: str | Path | Mapping[str, Any]) -> tuple[Document, str]:
    if isinstance(source, Mapping):
        return Document(_copy(source)), ""
    path = Path(source)
    names = [name for name, _ in list_recipes()]
    if isinstance(source, str) and source in names and not path.is_file():
        return parse_yaml(read_recipe(source), f"configs/{source}.yaml"), f"configs/{source}.yaml"
    if path.suffix not in (".yaml", ".yml") and not path.exists():
        raise ConfigError(f"There is no config file and no recipe {str(source)!r}", do=suggest(str(source), names))
    return parse_yaml(read_text(path), str(source)), str(source)


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _copy(part) for key, part in value.items()}
    return [_copy(part) for part in value] if isinstance(value, (list, tuple)) else value


def _file_origins(document: Document, where: str) -> dict[str, str]:
    """Origins by dotted key: the recorded ones of a saved config whose values are untouched, else FILE:LINE."""
    origins = {key: f"{where}:{line}" for key, line in document.lines.items()}
    if document.header == _header(document.value):
        origins.update(document.comments)
    return origins


def _header(value: Any) -> str:
    """The first comment of a resolved config: whoever edits a value below makes it untrue."""
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
    return f"align config, resolved; values {digest}"


def override(data: dict[str, Any], origins: dict[str, str], setting: str) -> None:
    """Set what a "dotted.key=value" says in the values of a config, and where they came from.

    Raises:
        ConfigError: no such item or section, or no key=value.
    """
    key, equals, text = setting.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise ConfigError(
            f"An override is key=value, and {setting!r} is not", where="command line", do="Write e.g. steps=100"
        )
    value = parse_yaml(text, f"command line, {key}").value
    *parents, last = key.split(".")
    here: Any = data
    for depth, part in enumerate(parents):
        here = _enter(here, part, key, depth, make=True)
    if isinstance(here, list):
        _enter(here, last, key, len(parents), make=False)
        here[int(last)] = value
    else:
        here[last] = value
    for stale in [name for name in origins if name.startswith(key + ".")]:
        del origins[stale]
    origins.update(dict.fromkeys([key, *dict(leaves(value, key))], "command line"))


def _enter(here: Any, part: str, key: str, depth: int, *, make: bool) -> Any:
    """Return the entry `part` of `here`, a dict made where there is none yet."""
    if isinstance(here, list):
        if not part.isdecimal() or int(part) >= len(here):
            raise ConfigError(
                f"The key {key!r} points at no item of its list", where="command line",
                why=f"{'.'.join(key.split('.')[:depth])} has {len(here)} items, numbered from 0",
            )  # fmt: skip
        return here[int(part)]
    child = here.get(part)
    if child is None and make:
        child = here[part] = {}
    if make and not isinstance(child, (dict, list)):
        raise ConfigError(
            f"The key {key!r} does not exist", where="command line",
            why=f"{'.'.join(key.split('.')[: depth + 1])} is a single value",
        )  # fmt: skip
    return child


def leaves(value: Any, key: str = "", *, without: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of everything that is not a section or a list of sections.

    Args:
        without: leave out fields that are annotated with it.
    """
    if isinstance(value, BaseModel):
        parts: list[tuple[str, Any]] = [
            (name, getattr(value, name))
            for name, field in type(value).model_fields.items()
            if without not in field.metadata
        ]
    elif isinstance(value, dict) and value:
        parts = list(value.items())
    elif isinstance(value, (list, tuple)) and any(isinstance(part, (BaseModel, dict)) for part in value):
        parts = [(str(i), part) for i, part in enumerate(value)]
    else:
        yield key, value
        return
    for name, part in parts:
        yield from leaves(part, f"{key}.{name}" if key else name, without=without)


def resolved_yaml(values: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """Return the values of a config as YAML, a comment on each line saying where the value came from."""
    rows = [f"# {_header(values)}"]
    _render(values, "", 0, origins, rows)
    return "\n".join(rows) + "\n"


def _render(value: Any, key: str, depth: int, origins: Mapping[str, str], rows: list[str]) -> None:
    for name, part in value.items():
        dotted, pad = f"{key}.{name}" if key else name, "  " * depth
        if isinstance(part, dict) and part:
            rows.append(f"{pad}{dump_value(name)}:")
            _render(part, dotted, depth + 1, origins, rows)
        elif isinstance(part, list) and any(isinstance(item, dict) for item in part):
            rows.append(f"{pad}{dump_value(name)}:")
            for i, item in enumerate(part):
                inner: list[str] = []
                _render(item, f"{dotted}.{i}", 0, origins, inner)
                rows.extend(f"{pad}  {'- ' if n == 0 else '  '}{row}" for n, row in enumerate(inner))
        else:
            rows.append(f"{pad}{dump_value(name)}: {dump_value(part)}  # {origins.get(dotted, 'default')}")
