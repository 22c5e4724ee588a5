"""How a run ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunResult:
    """How a run ended: its folder, its status and its summary, which a run that was stopped has not.

    Status: "complete", "stopped", or "hacked" where the hack monitor stopped it.
    """

    directory: Path
    status: str
    summary: dict[str, Any]
