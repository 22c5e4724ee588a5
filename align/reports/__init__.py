"""Reports: read a run folder's files and write one self-contained HTML page."""

from __future__ import annotations

from align.reports.training import write_report

__all__ = ["write_report"]
