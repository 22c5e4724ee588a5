"""Registry[T]: a name, a lazily imported factory, and a suggestion when the name is mistyped."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar, cast

from align.errors import ConfigError

T = TypeVar("T")


def suggest(word: str, choices: Iterable[str]) -> str:
    """Return "Did you mean 'x'?" for the closest of `choices`, or the list of all of them."""
    options = sorted(choices)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Choose one of: {', '.join(options)}" if options else "None is available"


def require_known(word: str, choices: Collection[str], kind: str) -> None:
    """Refuse a word that is none of `choices`.

    Raises:
        ConfigError: with the closest of them.
    """
    if word not in choices:
        raise ConfigError(f"Unknown {kind} {word!r}", do=suggest(word, choices))


class Registry(Generic[T]):
    """Names of one kind of thing.

    An entry is either an object or a string "package.module:attribute" that is imported when it is
    first asked for. Packages add entries through the entry-point `group`, which is read only when a
    name is not found among the built-in ones, or when all are listed.

    Args:
        kind: what an entry is, for messages ("reward", "model family").
        group: entry-point group of third-party entries, e.g. "align.rewards".
        entries: built-in lazy entries.
    """

    def __init__(self, kind: str, *, group: str = "", entries: dict[str, str] | None = None) -> None:
        self.kind, self.group = kind, group
        self._entries: dict[str, T | str] = dict(entries or {})
        self._external_read = not group

    def register(self, name: str, value: T | None = None) -> Callable[[T], T]:
        """Add `value` under `name`; without a value, a decorator that does."""

        def add(entry: T) -> T:
            known = self._entries.get(name)
            if known is not None and not isinstance(known, str) and known is not entry:
                raise ConfigError(f"The {self.kind} name {name!r} is taken", do="Register under another name")
            self._entries[name] = entry
            return entry

        if value is not None:
            add(value)
        return add

    def _read_external(self) -> None:
        if not self._external_read:
            self._external_read = True
            for point in entry_points(group=self.group):
                self._entries.setdefault(point.name, point.value)

    def __contains__(self, name: str) -> bool:
        if name not in self._entries:
            self._read_external()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._read_external()
        return iter(sorted(self._entries))

    def get(self, name: str) -> T:
        """Return the entry called `name`, importing it if need be.

        Raises:
            ConfigError: no such name (with the closest one), or its module cannot be imported.
        """
        if name not in self:
            raise ConfigError(f"Unknown {self.kind} {name!r}", do=suggest(name, self))
        entry = self._entries[name]
        if isinstance(entry, str):
            self._entries[name] = entry = self._load(name, entry)
        return entry

    def _load(self, name: str, entry: str) -> T:
        module, _, attribute = entry.partition(":")
        given = name == entry  # by its place, which may be a file of the folder at hand
        if given and os.getcwd() not in sys.path:  # a console script has its own folder there
            sys.path.append(os.getcwd())
        what = f"The {self.kind} {name!r} cannot be loaded"
        try:
            home = importlib.import_module(module)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                what, where=entry, why=str(error), do="Start in the folder of that file, or put it on PYTHONPATH"
                if given else "Install what it needs; `align doctor` lists what is missing",
            ) from error  # fmt: skip
        if not hasattr(home, attribute):
            public = [n for n in vars(home) if not n.startswith("_")]
            raise ConfigError(what, where=entry, why=f"{module} has no {attribute!r}", do=suggest(attribute, public))
        return cast(T, getattr(home, attribute))
