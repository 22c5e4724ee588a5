"""How a run ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunResult:
    """How a run ended: its folder, its status ("complete" or "stopped") and its summary, if complete."""

    directory: Path
    status: str
    summary: dict[str, Any]
