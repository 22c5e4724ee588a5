"""The recipes that ship with `align`: listed, found and copied without parsing or importing anything heavy."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from align.errors import ConfigError
from align.registry import suggest
from align.textfiles import parse_scalar


def _recipes() -> dict[str, Traversable]:
    found: dict[str, Traversable] = {}
    for folder in files("configs").iterdir():
        if folder.is_dir():
            for file in folder.iterdir():
                if file.name.endswith(".yaml"):
                    found[f"{folder.name}/{file.name.removesuffix('.yaml')}"] = file
    return dict(sorted(found.items()))


def list_recipes() -> list[tuple[str, str]]:
    """Return (name, what it is about) of every shipped recipe, sorted by name."""
    result = []
    for name, file in _recipes().items():
        rows = file.read_text(encoding="utf-8").splitlines()
        about = next((row.removeprefix("about:").strip() for row in rows if row.startswith("about:")), "")
        quoted = len(about) > 1 and about[0] == about[-1] and about[0] in "'\""
        result.append((name, about[1:-1] if quoted else str(parse_scalar(about) or "")))
    return result


def read_recipe(name: str) -> str:
    """Return the YAML text of the recipe `name`, comments and all.

    Raises:
        ConfigError: no such recipe (with the closest one).
    """
    recipes = _recipes()
    if name not in recipes:
        raise ConfigError(f"There is no recipe {name!r}", do=suggest(name, recipes))
    return recipes[name].read_text(encoding="utf-8")


def list_engines() -> list[str]:
    """Return the names of the DeepSpeed settings that ship."""
    return sorted(file.name.removesuffix(".json") for file in (files("configs") / "deepspeed").iterdir())


def read_engine(name: str) -> str:
    """Return the JSON text of the DeepSpeed settings `name`."""
    return (files("configs") / "deepspeed" / f"{name}.json").read_text(encoding="utf-8")


def copy_recipe(name: str, destination: str | Path, *, overwrite: bool = False) -> Path:
    """Copy the recipe `name` to `destination` (a folder keeps the recipe's file name) and return the file.

    Raises:
        ConfigError: no such recipe, or the file exists and `overwrite` is False.
    """
    text = read_recipe(name)
    path = Path(destination)
    if path.is_dir() or str(destination).endswith("/"):
        path = path / f"{name.rpartition('/')[2]}.yaml"
    if path.exists() and not overwrite:
        raise ConfigError("The file exists already", where=str(path), do="Choose another name, or give --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
