"""Write the tables in docs/ that repeat what the code knows: configuration keys, rewards, and metrics.

python scripts/docs_tables.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from align.config import DanceGRPOConfig, RewardConfig, config_types
from align.fit_config import FitConfig
from align.peering_config import PeeringConfig
from align.reports.glossary import GLOSSARY, LANGUAGE, LANGUAGE_TRAINERS, explain, writers
from align.textfiles import dump_value
from rewards.catalogue import BUILT_IN

DOCS = Path(__file__).parents[1] / "docs"


def configuration(model: type[BaseModel], prefix: str = "", section: BaseModel | None = None) -> list[str]:
    """Return one table row a configuration key, with the defaults of `section` where it is given."""
    found = []
    for name, info in model.model_fields.items():
        key, inner = f"{prefix}{name}", info.annotation
        default = info.default if section is None else getattr(section, name)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += configuration(inner, f"{key}.", default if isinstance(default, BaseModel) else None)
            continue
        found.append(f"| `{key}` | {_default(default)} | {info.description} |")
        if inner == tuple[RewardConfig, ...]:
            found += configuration(RewardConfig, f"{key}.0.")
        elif get_args(inner)[1:] == (RewardConfig,):
            found += configuration(RewardConfig, f"{key}.NAME.")
    return found


def language_configuration() -> list[str]:
    """Return one table row a key of the language-model trainers, with the trainers that have it."""
    found: dict[str, list[str]] = {}
    apart = (DanceGRPOConfig, FitConfig, PeeringConfig)
    kinds = {name: kind for name, kind in config_types().items() if kind not in apart}
    for name, kind in kinds.items():
        for row in configuration(kind):
            found.setdefault(row, []).append(name)
    return [f"| {'all' if len(names) == len(kinds) else ', '.join(names)} {row}" for row, names in found.items()]


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    return f"`{dump_value(list(value) if isinstance(value, tuple) else value)}`"


def metrics() -> list[str]:
    """Return one table row a key of metrics.jsonl."""
    families = ("reward/NAME/mean", "reward/NAME/std", "reward/NAME/fail_frac")
    return [f"| `{key}` | {explain(key)} |" for key in (*GLOSSARY, *families)]


def language_metrics() -> list[str]:
    """Return one table row a key that a language run logs, with the trainers that log it."""
    found = []
    for key in dict.fromkeys(("step", "loss", "accuracy", *LANGUAGE)):
        if key in LANGUAGE:
            names = writers(key)
            found.append(f"| `{key}` | {'all' if names == LANGUAGE_TRAINERS else ', '.join(names)} | {LANGUAGE[key]} |")
        else:
            found += [f"| `{key}` | {name} | {explain(key, name)} |" for name in writers(key)]
    return found


def rewards() -> list[str]:
    """Return one table row a reward that ships."""
    cards = [(c.name, c.definition.replace("|", r"\|"), c.range, c.media, c.licence) for c, _ in BUILT_IN]
    return [f"| `{name}` | {' | '.join(rest)} |" for name, *rest in cards]


def tables() -> list[tuple[str, str, list[str]]]:
    """Return page, table head and rows of every table."""
    return [
        ("cli.md", "| key | default | meaning |\n|---|---|---|\n", configuration(DanceGRPOConfig)),
        ("rewards.md", "| reward | what it is | range | media | licence |\n|---|---|---|---|---|\n", rewards()),
        ("cli.md", "| trainers | key | default | meaning |\n|---|---|---|---|\n", language_configuration()),
        ("llm_metrics.md", "| metric | trainers | what it is |\n|---|---|---|\n", language_metrics()),
        ("fit.md", "| key | default | meaning |\n|---|---|---|\n", configuration(FitConfig)),
        ("selection.md", "| key | default | meaning |\n|---|---|---|\n", configuration(PeeringConfig)),
        ("training.md", "| metric | what it is |\n|---|---|\n", metrics()),
    ]


def stale() -> list[str]:
    """Return the pages whose tables do not say what the code says."""
    return [page for page, head, rows in tables() if head + "\n".join(rows) + "\n" not in _text(page) + "\n"]


def write(page: str, head: str, rows: Sequence[str]) -> None:
    """Replace the rows below the table head `head` of a page."""
    before, _, rest = _text(page).partition(head)
    after = rest[rest.index("\n\n") :] if "\n\n" in rest else "\n"
    (DOCS / page).write_text(before + head + "\n".join(rows) + after, encoding="utf-8")


def _text(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def main() -> int:
    """Write the tables, or only say which are stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a page is stale")
    if parser.parse_args().check:
        found = stale()
        sys.stdout.write("".join(f"{page} is stale\n" for page in found))
        return int(bool(found))
    for table in tables():
        write(*table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
