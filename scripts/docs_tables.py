"""Write the tables in docs/ that repeat what the code knows: configuration keys, rewards, and metrics.

python scripts/docs_tables.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from align.config import DanceGRPOConfig, RewardConfig
from align.reports.glossary import GLOSSARY, explain
from align.textfiles import dump_value
from rewards.catalogue import BUILT_IN

DOCS = Path(__file__).parents[1] / "docs"


def configuration(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return one table row a configuration key."""
    found = []
    for name, info in model.model_fields.items():
        key, inner = f"{prefix}{name}", info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += configuration(inner, f"{key}.")
            continue
        found.append(f"| `{key}` | {_default(info.default)} | {info.description} |")
        if inner == tuple[RewardConfig, ...]:
            found += configuration(RewardConfig, f"{key}.0.")
    return found


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    return f"`{dump_value(list(value) if isinstance(value, tuple) else value)}`"


def metrics() -> list[str]:
    """Return one table row a key of metrics.jsonl."""
    families = ("reward/NAME/mean", "reward/NAME/std", "reward/NAME/fail_frac")
    return [f"| `{key}` | {explain(key)} |" for key in (*GLOSSARY, *families)]


def rewards() -> list[str]:
    """Return one table row a reward that ships."""
    cards = [(c.name, c.definition.replace("|", r"\|"), c.range, c.media, c.licence) for c, _ in BUILT_IN]
    return [f"| `{name}` | {' | '.join(rest)} |" for name, *rest in cards]


def write(page: str, head: str, rows: Sequence[str]) -> None:
    """Replace the rows below the table head `head` of a page."""
    path = DOCS / page
    before, _, rest = path.read_text(encoding="utf-8").partition(head)
    after = rest[rest.index("\n\n") :] if "\n\n" in rest else "\n"
    path.write_text(before + head + "\n".join(rows) + after, encoding="utf-8")


if __name__ == "__main__":
    write("cli.md", "| key | default | meaning |\n|---|---|---|\n", configuration(DanceGRPOConfig))
    write("rewards.md", "| reward | what it is | range | media | licence |\n|---|---|---|---|---|\n", rewards())
    write("training.md", "| metric | what it is |\n|---|---|\n", metrics())
