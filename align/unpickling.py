"""The one unpickler: torch archives by their outline, and what torch itself may be given of them.

Of checkpoints that are read in place only the outline is unpickled: where tensors lie, with inert stand-ins for
whatever classes are named. A file that torch's restricted unpickler is to load is outlined first. Nothing that a file
says is ever run.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError, _Unpickler
from typing import Any
from zipfile import _ECD_OFFSET, _ECD_SIZE, _EndRecData

from align.errors import ModelError, first_line

MOST_PICKLED_BYTES = 16 << 20
"""Bytes of the pickle in a torch archive, and of the archive's table of files."""
MOST_UNPICKLED_BYTES = 256 << 20
"""What one pickle may make, as estimated from its opcodes; a hundred thousand tensors make 200 MB."""
# What zipfile and torch's restricted unpickler, which is written in Python, run into on bytes that nobody pickled.
_UNREADABLE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
    TypeError, ValueError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def load_torch(path: Path) -> Any:
    """Return what a file that torch saved holds, its tensors mapped into memory where it is an archive.

    Raises:
        ModelError: a truncated or foreign file, or one that asks for anything but tensors.
    """
    import torch

    archive = require_plain(path)
    with _foreign(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)


def require_plain(path: Path) -> bool:
    """Refuse what torch's own unpickler is not to be given: it bounds no memory, and calls more than tensors need.

    Returns:
        Whether the file is an archive, and not one of torch before 1.6.

    Raises:
        ModelError: see `load_torch`.
    """
    with _foreign(path), path.open("rb") as file:
        archive = file.read(2) == b"PK"
        if archive:
            _outline(path, _ALSO)
        else:
            file.seek(0)
            whole = path.stat().st_size
            pickles = _Outline(file.read(MOST_PICKLED_BYTES), _ALSO, defaultdict(lambda: (0, whole)))
            for _ in range(5):  # a magic number, the version, sizes, the object, the names of its storages
                pickles.load()
        return archive


@contextlib.contextmanager
def _foreign(path: Path) -> Iterator[None]:
    """Say in our words why a file of weights is refused."""
    try:
        yield
    except (UnpicklingError, *_UNREADABLE) as error:
        asked = next((line for line in str(error).splitlines() if "global" in line.lower()), "")
        if isinstance(error, UnpicklingError) and asked:
            raise ModelError(
                "A file of weights asks for more than tensors", where=str(path), why=asked.strip()[:200],
                do="Do not trust it. Ask for a safetensors file",
            ) from error  # fmt: skip
        raise ModelError(
            "A file of weights cannot be read", where=str(path),
            why="it is not what torch saves" if "Weights only load failed" in str(error)
            else first_line(error)[:200],
            do="Fetch it again",
        ) from error  # fmt: skip


@dataclass(frozen=True)
class Placed:
    """A tensor of a torch archive, left on the disk.

    Args:
        dtype: torch's name of it, "bfloat16".
        stride: in entries.
        offset: byte of the file at which the first entry lies.
        bytes: that its storage has from there on.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    bytes: int


class Inert:
    """Stands in for an object of a class that is not imported: the arguments and the state it was pickled with."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        """Return an attribute of the object, None where it has none of that name."""
        return self.state.get(name) if isinstance(self.state, Mapping) else None


_STORAGES = {
    "BFloat16": ("bfloat16", 2), "Half": ("float16", 2), "Float": ("float32", 4), "Double": ("float64", 8),
    "Long": ("int64", 8), "Int": ("int32", 4), "Short": ("int16", 2), "Char": ("int8", 1), "Byte": ("uint8", 1),
    "Bool": ("bool", 1), "ComplexFloat": ("complex64", 8), "ComplexDouble": ("complex128", 16),
}  # fmt: skip
_ALSO = (
    "torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_qtensor", "torch._utils._rebuild_sparse_tensor",
    "torch.storage.UntypedStorage", "torch.device", "torch.QInt8Storage", "torch.QUInt8Storage", "torch.QInt32Storage",
    *(f"torch.{name}" for name in (
        "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "uint16", "uint32", "uint64", "per_tensor_affine",
        "per_channel_affine", "qint8", "quint8", "qint32",
    )),
)  # fmt: skip
"""Names in a file of weights that torch resolves, and that nothing here is read in place by."""
_COSTS = {
    pickle.MARK: 88,
    pickle.EMPTY_LIST: 88,
    pickle.EMPTY_DICT: 88,
    pickle.LIST: 88,
    pickle.DICT: 88,
    pickle.TUPLE: 64,
    pickle.TUPLE1: 64,
    pickle.TUPLE2: 64,
    pickle.TUPLE3: 72,
    pickle.REDUCE: 250,
    pickle.NEWOBJ: 250,
    pickle.NEWOBJ_EX: 250,
    pickle.BUILD: 100,
    pickle.LONG_BINPUT: 100,
    pickle.MEMOIZE: 100,
}
"""Bytes of memory that opcodes take, for one or two of the file. Numbers and texts take up to 16 for each of theirs."""
_NEEDLESS = (
    pickle.BYTEARRAY8,
    pickle.NEXT_BUFFER,
    pickle.READONLY_BUFFER,
    pickle.EMPTY_SET,
    pickle.FROZENSET,
    pickle.ADDITEMS,
    pickle.INST,
    pickle.OBJ,
    pickle.PERSID,
)
"""Opcodes that no checkpoint has; the first makes room for as many bytes as it is told."""


def _dispatch() -> dict[int, Callable[[Any], None]]:
    """Return what the opcodes do: those of `_NEEDLESS` are refused, those of `_COSTS` counted."""

    def refuse(reader: Any) -> None:
        raise UnpicklingError("it has an opcode that no checkpoint needs")

    def counted(load: Callable[[Any], None], cost: int) -> Callable[[Any], None]:
        def run(reader: Any) -> None:
            reader.made += cost
            if reader.made > MOST_UNPICKLED_BYTES:
                raise UnpicklingError("it makes more objects than a checkpoint has")
            load(reader)

        return run

    table = dict(_Unpickler.dispatch)
    table |= {code[0]: counted(table[code[0]], cost) for code, cost in _COSTS.items()}
    return table | {code[0]: refuse for code in _NEEDLESS}


class _Outline(_Unpickler):
    """Looks up containers, tensors as `Placed`, the names in `inert` as stand-ins, and nothing else.

    The table is made anew for every file, so that no file can change what the next one finds in it. The unpickler is
    the one in Python: that in C answers extension codes from a cache of the process, and a file sizes its memory.
    """

    dispatch = _dispatch()

    def __init__(self, data: bytes, inert: Iterable[str], records: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(io.BytesIO(data))
        self._records, self.made = records, 0
        storages = {f"torch.{kind}Storage": kind for kind in _STORAGES}
        dtypes = {f"torch.{name}": name for name, _ in _STORAGES.values()}
        self._known: dict[str, Any] = {
            "collections.OrderedDict": OrderedDict, "torch.Size": tuple, "torch.Tensor": "Tensor",
            "torch._utils._rebuild_tensor_v2": lambda place, first, shape, stride, *_: self._place(
                place, first, shape, stride
            ),
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
            "torch._tensor._rebuild_from_type_v2": lambda rebuild, kind, arguments, state: rebuild(*arguments),
            "torch.serialization._get_layout": lambda name: name,
            **dtypes, **storages, **{name: type(name.rpartition(".")[2], (Inert,), {}) for name in inert},
        }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        found = self._known.get(f"{module}.{name}")
        if found is None:
            raise UnpicklingError(f"it asks for the global {module}.{name}")
        return found

    def get_extension(self, code: int) -> Any:
        """Refuse the codes that stand for globals a process has registered."""
        raise UnpicklingError(f"it asks for the global of extension code {code}")

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, *_ = pid
        return kind, self._records[str(key)]

    def _place(self, place: Any, first: int, shape: Any, stride: Any) -> Placed:
        kind, (offset, size) = place
        dtype, item = _STORAGES[kind]
        if not 0 <= first * item <= size:
            raise ValueError("a tensor begins outside of its storage")
        return Placed(dtype, tuple(shape), tuple(stride), offset + first * item, size - first * item)


def outline(path: str | Path, inert: Iterable[str] = (), *, begin: int = 0, end: int | None = None) -> Any:
    """Return what a torch archive holds, its tensors as `Placed`; no tensor is read.

    Args:
        inert: full names of classes of which objects become `Inert`; all others are refused.
        begin, end: bytes of the file that are the archive.

    Raises:
        ModelError: a file that is truncated, compressed, foreign, or names a class that is not allowed.
    """
    with _unreadable(Path(path)):
        return _outline(Path(path), inert, begin, end)


def _outline(path: Path, inert: Iterable[str], begin: int = 0, end: int | None = None) -> Any:
    with path.open("rb") as file:
        part = _Part(file, begin, path.stat().st_size if end is None else end)
        table = _EndRecData(part)  # what zipfile itself reads first: how long the table of members is, and where
        if table is None:
            raise ValueError("the end of the archive is missing")
        if table[_ECD_SIZE] > MOST_PICKLED_BYTES:
            raise ValueError("its table of members is too long")
        with zipfile.ZipFile(io.BufferedReader(part)) as archive:
            if archive.start_dir != table[_ECD_OFFSET]:
                raise ValueError("something stands before the archive")
            # Other readers look names up without regard to case, and take the first of two.
            members = {member.filename.partition("/")[2].lower(): member for member in archive.infolist()}
            if len(members) < len(archive.infolist()):
                raise ValueError("it has two members of one name")
            if any(m.compress_type != zipfile.ZIP_STORED for m in members.values()):
                raise ValueError(f"it is compressed, and claims {sum(m.file_size for m in members.values()):,} bytes")
            if members["data.pkl"].file_size > MOST_PICKLED_BYTES:
                raise ValueError("its outline is too long")
            order = members.get("byteorder")
            if order and (order.file_size > 6 or archive.read(order) != b"little"):
                raise ValueError("its numbers are big-endian")
            data = archive.read(members["data.pkl"])
        records = {}
        for name, member in members.items():
            if name.startswith("data/"):
                file.seek(begin + member.header_offset + 26)  # the lengths of name and extra field, then these
                start = begin + member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
                if start + member.file_size > part.end:
                    raise ValueError("it ends early")
                records[name.removeprefix("data/")] = (start, member.file_size)
        return _Outline(data, inert, records).load()


def outline_of_pickle(path: str | Path, inert: Iterable[str]) -> Any:
    """Return what a bare pickle holds, with stand-ins for the classes in `inert`; see `outline`."""
    path = Path(path)
    with _unreadable(path):
        if path.stat().st_size > MOST_PICKLED_BYTES:
            raise ValueError("it is too long")
        return _Outline(path.read_bytes(), inert, {}).load()


class _Part(io.RawIOBase):
    """Bytes [begin, end) of a file, as a file."""

    def __init__(self, file: Any, begin: int, end: int) -> None:
        self._file, self._begin, self.end, self._at = file, begin, end, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.end - self._begin}[whence]
        self._at = start + offset
        if self._at < 0:
            raise OSError("a place before the beginning")
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._begin + self._at)
        data = self._file.read(max(0, min(len(buffer), self.end - self._begin - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@contextlib.contextmanager
def _unreadable(path: Path) -> Iterator[None]:
    """Say in our words why a file of weights could not be unpickled."""
    try:
        yield
    except (UnpicklingError, *_UNREADABLE) as error:
        why = first_line(error)[:200]
        if "global" in why:
            raise ModelError(
                "A checkpoint asks for a class that is not allowed", where=str(path), why=why,
                do="Do not trust it, or save it without that object",
            ) from error  # fmt: skip
        raise ModelError(
            "A checkpoint cannot be read", where=str(path), why=why, do="Save or fetch it again"
        ) from error
