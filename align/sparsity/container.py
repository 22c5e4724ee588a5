"""Safetensors files written a tensor at a time: whole or not at all, in bounded memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.errors import ConfigError, DataError
from align.sparsity.sources import Entry, Source, open_safetensors

_NAMES = {"u1": "U8", "u2": "U16", "u4": "U32", "i8": "I64", "i1": "I8", "f4": "F32"}


class SafetensorsWriter:
    """Spools data beside `path` and puts the whole file in its place at the end; an error leaves nothing behind."""

    def __init__(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        self.path, self.metadata = Path(path), dict(metadata or {})
        self._header: dict[str, Any] = {}
        self._spool = self.path.with_name(self.path.name + ".writing")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._spool.open("wb")
        except OSError as error:
            raise ConfigError("The file cannot be written", where=str(path), why=error.strerror or "") from error
        self._open: tuple[str, str, tuple[int, ...], int] | None = None

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abandon()
            return
        self._close_tensor()
        self._file.close()
        header = json.dumps({"__metadata__": self.metadata, **self._header}).encode()
        header += b" " * (-len(header) % 8)
        final = self.path.with_name(self.path.name + ".sealing")
        try:
            with final.open("wb") as out, self._spool.open("rb") as data:
                out.write(len(header).to_bytes(8, "little") + header)
                shutil.copyfileobj(data, out, 1 << 20)
                out.flush()
                os.fsync(out.fileno())
            os.replace(final, self.path)
        finally:
            final.unlink(missing_ok=True)
            self._spool.unlink(missing_ok=True)

    def abandon(self) -> None:
        """Remove what was written so far."""
        self._file.close()
        self._spool.unlink(missing_ok=True)

    def begin(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """Begin a tensor, whose bytes `write` then takes."""
        self._close_tensor()
        self._open = (name, dtype, shape, self._file.tell())

    def write(self, data: bytes | NDArray[Any]) -> None:
        """Add bytes to the tensor that was begun."""
        self._file.write(data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes())

    def add(self, name: str, array: NDArray[Any]) -> None:
        """Write a small tensor whole."""
        self.begin(name, _NAMES[array.dtype.str[1:]], array.shape)
        self.write(array)

    def add_bytes(self, name: str, data: bytes) -> None:
        """Write bytes as a tensor of them."""
        self.begin(name, "U8", (len(data),))
        self.write(data)

    def _close_tensor(self) -> None:
        if self._open:
            name, dtype, shape, begin = self._open
            self._header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, self._file.tell()]}
            self._open = None


def read_container(path: str | Path, kind: str) -> tuple[Source, dict[str, str]]:
    """Open a file that a `SafetensorsWriter` wrote as `kind`, and return it with its metadata.

    Raises:
        ModelError: no readable safetensors file.
        DataError: one of another kind.
    """
    source = open_safetensors(path)
    with open(source.files[0], "rb") as file:
        metadata = json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__") or {}
    if metadata.get("align") != kind:
        raise DataError(
            f"This is no {kind} of ours", where=str(path), do=f"Give a file that `align sparsity` wrote as a {kind}"
        )
    return source, metadata


def whole(entry: Entry) -> NDArray[Any]:
    """Return all codes of a small tensor."""
    return entry.read(0, entry.count)
