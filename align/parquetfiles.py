"""Rows of Parquet files, without trust in how little a file may unfold to how much.

A column can say a value once and repeat it a billion times. So batches are cut small where values are long, and what
has been unfolded is counted against the size of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.errors import AlignError, DataError

MOST_CHUNK_BYTES = 256 << 20
"""Bytes of one column in one row group, unpacked: a page of it is unpacked whole."""
MOST_BATCH_BYTES = 64 << 20
"""What a batch may take in memory: so many rows are read at once that this holds even if each is the longest."""
FREE_BYTES, MOST_UNFOLDING = 128 << 20, 100
"""A file may unfold to the first of these, and to the second times its own size."""
_ROW_BYTES = 300
"""What a row takes as a mapping, whatever is in it."""


def require_pyarrow(path: Path, error: type[AlignError] = DataError) -> tuple[Any, Any]:
    """Return the modules `pyarrow` and `pyarrow.parquet`.

    Args:
        path: the file that needs them.
        error: what to raise without them.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as missing:
        raise error("Parquet needs pyarrow", where=str(path), do="Run `pip install pyarrow`") from missing
    return pyarrow, parquet


def parquet_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file; the columns are known to have names that differ.

    Raises:
        DataError: no such file, not Parquet, a name that stands twice, or a file that unfolds to far more than it is.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError("There is no such file", where=str(path), do="Check the path")
    pyarrow, parquet = require_pyarrow(path)
    unfolded, most = 0, max(FREE_BYTES, MOST_UNFOLDING * path.stat().st_size)
    try:
        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if len(set(names)) < len(names):
                raise DataError("A table names two columns alike", where=str(path), why=", ".join(names))
            for group in range(table.num_row_groups):
                batch = _rows_at_once(table.metadata.row_group(group), path)
                for found in table.iter_batches(batch_size=batch, row_groups=[group]):
                    plain = (c.dictionary_decode() if hasattr(c, "dictionary_decode") else c for c in found.columns)
                    unfolded += sum(column.nbytes for column in plain) + _ROW_BYTES * len(found)
                    if unfolded > most:
                        raise DataError(
                            "A Parquet file unfolds to far more than it is", where=str(path),
                            why=f"to more than {most >> 20} MB", do="Save its rows as JSONL, if they are meant",
                        )  # fmt: skip
                    yield from found.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, ValueError) as error:
        raise DataError(
            "A file is not Parquet, or is damaged", where=str(path), why=(str(error).splitlines() or [""])[0][:200],
            do="Write it again",
        ) from error  # fmt: skip


def _rows_at_once(group: Any, path: Path) -> int:
    texts = 0
    for i in range(group.num_columns):
        column = group.column(i)
        if column.total_uncompressed_size > MOST_CHUNK_BYTES:
            raise DataError(
                "A row group of a Parquet file is too large", where=f"{path}, column {column.path_in_schema}",
                why=f"{column.total_uncompressed_size:,} bytes", do="Write it with row groups of fewer rows",
            )  # fmt: skip
        if column.physical_type == "BYTE_ARRAY":
            texts += column.total_uncompressed_size
    return int(max(1, min(4096, MOST_BATCH_BYTES // max(texts, 1))))
