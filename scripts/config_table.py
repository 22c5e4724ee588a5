"""Write the table of configuration keys in docs/cli.md anew from `align/config.py`.

python scripts/config_table.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from align.config import DanceGRPOConfig, RewardConfig
from align.textfiles import dump_value

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
HEAD = "| key | default | meaning |\n|---|---|---|\n"


def rows(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return one table row a key."""
    found = []
    for name, info in model.model_fields.items():
        key, inner = f"{prefix}{name}", info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += rows(inner, f"{key}.")
            continue
        found.append(f"| `{key}` | {_default(info.default)} | {info.description} |")
        if inner == tuple[RewardConfig, ...] and name == "rewards":
            found += rows(RewardConfig, f"{key}.0.")
    return found


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    return f"`{dump_value(list(value) if isinstance(value, tuple) else value)}`"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(HEAD)
    after = rest[rest.index("\n\n") :] if "\n\n" in rest else "\n"
    PAGE.write_text(before + HEAD + "\n".join(rows(DanceGRPOConfig)) + after, encoding="utf-8")
