"""What is wrong with a config, in one sentence each: where it stands, what was found and expected, what it means."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from align.errors import ConfigError
from align.registry import suggest
from align.textfiles import dump_value

_EXPECTED = {
    "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "finite_number": "a finite number", "bool_type": "true or false", "string_type": "text",
    "tuple_type": "a list", "list_type": "a list", "dict_type": "key: value pairs", "model_type": "key: value pairs",
    "model_attributes_type": "key: value pairs", "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "letters, digits, '.', '_' and '-'",
}  # fmt: skip
_BOUNDS = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}


def explain(error: ValidationError, origins: Mapping[str, str], where: str, model: type[BaseModel]) -> ConfigError:
    """Return one sentence for the first problem: file and line, dotted key, found, expected, or the closest key.

    Args:
        origins: of values by dotted key, as `align.config_sources.read_values` returns them.
        where: the name of the config.
        model: its type.
    """
    problems = error.errors(include_url=False)
    first = _first(problems)
    key = ".".join(map(str, first["loc"]))
    more = f" ({len(problems) - 1} more like it follow{'s' if len(problems) == 2 else ''})" if len(problems) > 1 else ""
    inside = (origin for name, origin in origins.items() if name.startswith(f"{key}."))
    place = origins.get(key) or next(inside, "") or where or "config"
    if first["type"] == "extra_forbidden":
        return ConfigError(f"Unknown key {key!r}", where=place, do=_closest(first["loc"], model) + more)
    if first["type"] == "missing" and isinstance(first["loc"][-1], int):
        pair = ".".join(map(str, first["loc"][:-1]))
        return ConfigError(
            f"The value of {pair!r} is wrong", where=origins.get(pair) or where or "config",
            why=f"found {dump_value(first['input'])}, expected 2 numbers",
            do=_described(first["loc"][:-1], model) + more,
        )  # fmt: skip
    if first["type"] == "missing":
        return ConfigError(
            f"The key {key!r} is missing", where=where or "config", do=_described(first["loc"], model) + more
        )
    expected = _expected(first["type"], first.get("ctx", {}), first["msg"])
    return ConfigError(
        f"The value of {key!r} is wrong",
        where=place,
        why=f"found {found_text(first['input'])}, expected {expected}",
        do=_described(first["loc"], model) + more,
    )


def found_text(value: Any) -> str:
    """Return a value of a config as an error shows it, with the kind of thing that it is."""
    kinds = {dict: "key: value pairs", list: "a list", str: "text", bool: "true or false"}
    if value is None:
        return "nothing"
    if isinstance(value, (dict, list)):
        return kinds[type(value)] if value else f"an empty {type(value).__name__}"
    name = kinds.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
    return f"{value!r} ({name})"


def described_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, description) of every field below `model`; items of a list are `0`, of a mapping `NAME`."""
    for name, info in model.model_fields.items():
        key = f"{prefix}.{name}" if prefix else name
        yield key, info.description or ""
        inner = info.annotation
        if listed := _listed(inner):
            place, section = listed
            yield from described_keys(section, f"{key}.{place}")
        elif isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from described_keys(inner, key)


def _first(problems: Sequence[Any]) -> Any:
    """Return the problem to name: a mistyped key leaves one missing too, and the mistake is the first of the two."""
    section = problems[0]["loc"][:-1]
    unknown = (p for p in problems if p["type"] == "extra_forbidden" and p["loc"][:-1] == section)
    return next(unknown, problems[0]) if problems[0]["type"] == "missing" else problems[0]


def _expected(kind: str, context: Mapping[str, Any], message: str) -> str:
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind == "literal_error":
        return f"one of {context['expected'].replace(' or ', ', ')}"
    if kind in _BOUNDS:
        return f"a number {_BOUNDS[kind]} {next(iter(context.values())):g}"
    if kind in ("too_short", "too_long"):
        limit = context.get("min_length", context.get("max_length"))
        return f"{'at least' if kind == 'too_short' else 'at most'} {limit} item{'s' if limit != 1 else ''}"
    return message


def _listed(annotation: Any) -> tuple[str, type[BaseModel]] | None:
    """Return how a section of a list, or of a mapping by names of the user's, is spelled in a key, and its type."""
    inside = get_args(annotation)
    for origin, place, section in ((tuple, "0", inside[:1]), (dict, "NAME", inside[1:])):
        if get_origin(annotation) is origin and isinstance(section[0], type) and issubclass(section[0], BaseModel):
            return place, section[0]
    return None


def _generic(loc: Sequence[int | str], model: type[BaseModel]) -> list[str]:
    field = model.model_fields.get(str(loc[0])) if loc else None
    listed = _listed(field.annotation) if field is not None else None
    named = listed is not None and listed[0] == "NAME"
    return ["0" if isinstance(part, int) else "NAME" if named and i == 1 else part for i, part in enumerate(loc)]


def _described(loc: Sequence[int | str], model: type[BaseModel]) -> str:
    text = dict(described_keys(model)).get(".".join(_generic(loc, model)), "")
    return (
        f"Meaning: {text[0].lower() if text[1:2].islower() else text[:1]}{text[1:].removesuffix('.')}" if text else ""
    )


def _closest(loc: Sequence[int | str], model: type[BaseModel]) -> str:
    """Suggest the key of that name in another section, else the closest one in the same section."""
    *parents, last = _generic(loc, model)
    known = dict(described_keys(model))
    section = ".".join(parents)
    elsewhere = [key for key in known if key.rpartition(".")[2] == last and not re.search(r"\.(0|NAME)\.", key)]
    if len(elsewhere) == 1:
        return f"Did you mean {elsewhere[0]!r}?"
    here = [key for key in known if key.rpartition(".")[0] == section]
    hint = suggest(f"{section}.{last}" if section else last, here)
    if ".NAME." in hint:
        return hint.replace(".NAME.", f".{loc[1]}.")
    return hint.replace(".0.", f".{next(part for part in loc if isinstance(part, int))}.") if ".0." in hint else hint
