"""The fenced blocks of the documentation, and the words after a fence that say how a block is tested.

The first word is the language; then come `key: value`, which pages do not show. docs/extending.md tells writers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

LANGUAGES = {"bash", "python", "yaml", "json", "text", "html", "ini", "toml"}
NEEDS = {"weights", "gpu", "network", "time"}
KEYS = {"needs": {"bash", "python"}, "over": {"yaml"}, "file": LANGUAGES - {"bash"}}
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})(.*)$")


class Wrong(Exception):
    """The documentation has a mistake, at this place."""


@dataclass(frozen=True)
class Block:
    """What stands between two fences.

    Args:
        page, line: where the first fence stands; the page relative to the repository.
        needs: what a stranger's machine may lack: the commands are then dry runs.
        over: the recipe that a part of a configuration is laid over.
        file: the name under which the page speaks of the text later.
    """

    page: str
    line: int
    language: str
    text: str
    needs: tuple[str, ...] = ()
    over: str = ""
    file: str = ""

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(text: str, page: str) -> Iterator[Block]:
    """Yield the blocks of a page; raise `Wrong` for a fence that is not understood or not closed."""
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        fence = FENCE.match(line)
        if fence is None:
            if line.lstrip(" >*-").startswith(("```", "~~~")):
                raise Wrong(f"{page}:{number}: a fence stands at the beginning of its line")
            continue
        body = []
        for _, inner in lines:
            if inner.strip() == fence[1]:
                break
            body.append(inner)
        else:
            raise Wrong(f"{page}:{number}: the block does not end")
        yield _block(page, number, fence[2].strip(), "\n".join(body) + "\n")


def _block(page: str, line: int, info: str, text: str) -> Block:
    language, _, rest = info.partition(" ")
    if language not in LANGUAGES:
        raise Wrong(f"{page}:{line}: a block is {', '.join(sorted(LANGUAGES))}, and not {language!r}")
    told = dict(re.findall(r"(\w+): ([^\s:,]+(?:, [^\s:,]+)*)(?= \w+:|$)", rest))
    if " ".join(f"{key}: {value}" for key, value in told.items()) != rest:
        raise Wrong(f"{page}:{line}: after the language come `key: value`, and not {rest!r}")
    for key in told:
        if language not in KEYS.get(key, ()):
            raise Wrong(f"{page}:{line}: a block of {language} has no {key!r}")
    needs = tuple(told.pop("needs", "").split(", ")) if "needs" in told else ()
    if unknown := set(needs) - NEEDS:
        raise Wrong(f"{page}:{line}: a block needs {', '.join(sorted(NEEDS))}, and not {', '.join(sorted(unknown))}")
    return Block(page, line, language, text, needs, **told)


def page_blocks(path: Path) -> list[Block]:
    """Return the blocks of a page of ours."""
    return list(read_blocks(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))))
