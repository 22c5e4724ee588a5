"""Feedback in and out of files: what other tools, trainers and spreadsheets write and read."""

from align.feedback.exchange.layouts import LAYOUTS
from align.feedback.exchange.reading import Imported, import_file, read_feedback
from align.feedback.exchange.rows import UNRANKED, Reading
from align.feedback.exchange.tables import Bad, Row, read_table, write_table
from align.feedback.exchange.writing import EXPORTS, Exported, export_events, save_dataset

__all__ = [
    "EXPORTS", "LAYOUTS", "UNRANKED", "Bad", "Exported", "Imported", "Reading", "Row", "export_events",
    "import_file", "read_feedback", "read_table", "save_dataset", "write_table",
]  # fmt: skip
