"""Tensors that lie in pieces over the files of a checkpoint, ours or a distributed one, read as if they were whole."""

from __future__ import annotations

import math
import mmap
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.checkpoint import pieces_in
from align.errors import ModelError
from align.sparsity.formats import FORMATS, ITEM_BYTES, TORCH_NAMES
from align.sparsity.sources import Entry, Source, mapped, open_safetensors
from align.unpickling import Placed


@dataclass(frozen=True)
class Piece:
    """A run of `count` entries of a flattened tensor: entries [first, first + count) of `entry`."""

    entry: Entry
    first: int
    count: int


@dataclass
class Files:
    """The files of a checkpoint, each mapped once."""

    maps: dict[Path, mmap.mmap] = field(default_factory=dict)

    def entry(self, path: Path, name: str, placed: Placed) -> Entry:
        """Return a tensor of a torch archive, mapped.

        Raises:
            ModelError: a tensor whose place does not fit its file, or of a format that is not known.
        """
        dtype, count = TORCH_NAMES.get(placed.dtype, ""), math.prod(placed.shape)
        if not dtype:
            raise ModelError("A tensor has a format that is not known", where=f"{path}, {name}", why=placed.dtype)
        if path not in self.maps:
            with path.open("rb") as file:
                self.maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        data, item = self.maps[path], ITEM_BYTES[dtype]
        reach = 1 + sum((n - 1) * step for n, step in zip(placed.shape, placed.stride, strict=True)) if count else 0
        held = min(placed.bytes, len(data) - placed.offset)
        if min((*placed.shape, *placed.stride, 0)) < 0 or max(reach, count) * item > held:
            raise ModelError("A tensor's place does not fit its file", where=f"{path}, {name}", why="it ends early")
        found = mapped(path, data, placed.offset, name, dtype, placed.shape)
        if not _in_order(placed):
            strides = tuple(step * item for step in placed.stride)
            view: NDArray[Any] = np.ndarray(placed.shape, f"u{item}", data, placed.offset, strides)
            found.read = lambda start, stop: np.asarray(view.flat[start:stop])
        return found


def _in_order(placed: Placed) -> bool:
    """Whether the entries lie one after the other, the last axis fastest."""
    step = 1
    for size, stride in zip(reversed(placed.shape), reversed(placed.stride), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def joined(name: str, shape: Sequence[int], pieces: Sequence[Piece], dtype: str = "F32") -> Entry:
    """Return the tensor that `pieces` make up, one after the other; what they have beyond it is padding.

    Args:
        dtype: of a tensor of no entry, which has no piece.

    Raises:
        ModelError: pieces that do not fill the tensor.
    """
    count, pieces = math.prod(shape), [piece for piece in pieces if piece.count]
    held = sum(piece.count for piece in pieces)
    if held < count or not pieces:
        if count:
            raise ModelError("A tensor is not whole", where=name, why=f"its pieces hold {held:,} of {count:,} entries")
        return Entry(name, dtype, tuple(shape), "", 0, lambda start, stop: np.empty(0, f"u{ITEM_BYTES[dtype]}"))
    ends = np.cumsum([piece.count for piece in pieces]).tolist()
    head = pieces[0].entry

    def read(start: int, stop: int) -> NDArray[Any]:
        parts, k = [], bisect_right(ends, start)
        while start < stop:
            piece, begin = pieces[k], ends[k] - pieces[k].count
            last = min(stop, ends[k])
            parts.append(piece.entry.read(piece.first + start - begin, piece.first + last - begin))
            start, k = last, k + 1
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, head.codes), *parts])

    def release() -> None:
        for piece in pieces:
            piece.entry.release()

    return Entry(name, head.dtype, tuple(shape), head.file, head.offset + pieces[0].first, read, release)


def tiles(
    name: str, shape: Sequence[int], boxes: Sequence[tuple[Sequence[int], Sequence[int], Entry]], dtype: str
) -> Entry:
    """Return the tensor that is cut into boxes: each at its offsets, of its sizes.

    Raises:
        ModelError: boxes that leave gaps or lie over one another.
    """
    runs: list[tuple[int, Piece]] = []
    for offsets, sizes, entry in boxes:
        if not math.prod(sizes):
            continue
        # Axes that the box spans whole, from the last one back, make up one run with the next axis.
        axis = len(shape) - 1
        while axis > 0 and sizes[axis] == shape[axis]:
            axis -= 1
        length = math.prod(sizes[max(axis, 0) :])
        outer = [np.arange(o, o + s) for o, s in zip(offsets[:axis], sizes[:axis], strict=True)]
        steps = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        starts = np.zeros(1, np.int64)
        for places, step in zip(outer, steps, strict=False):
            starts = (starts[:, None] + places[None, :] * step).reshape(-1)
        starts = starts + (offsets[axis] * steps[axis] if shape else 0)
        runs += [(start, Piece(entry, i * length, length)) for i, start in enumerate(starts.tolist())]
    runs.sort(key=lambda run: run[0])
    at = 0
    for start, piece in runs:
        if start != at:
            raise ModelError("A tensor's pieces leave gaps or overlap", where=name, why=f"at entry {min(start, at):,}")
        at = start + piece.count
    return joined(name, shape, [piece for _, piece in runs], dtype)


def open_pieces(path: Path, files: Sequence[Path], config: dict[str, Any]) -> Source:
    """Open the weights of a checkpoint of ours that no process had whole.

    Raises:
        ModelError: pieces that do not make up whole tensors.
    """
    found: dict[str, list[tuple[int, Entry]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    source = Source(str(path), "pieces", {}, config=config, files=list(files))
    for file in files:
        entries, placed = open_safetensors(file).entries, pieces_in(file)
        for name, (first, *shape) in placed.items():
            found.setdefault(name, []).append((first, entries[name]))
            shapes[name] = tuple(shape)
    for name, parts in found.items():
        boxes = [((first,), (entry.count,), entry) for first, entry in parts]
        whole = tiles(name, (math.prod(shapes[name]),), boxes, parts[0][1].dtype)
        source.entries[name] = replace(whole, shape=shapes[name])
    source.adapter = any(".lora_A." in name for name in source.entries)
    return source


def rounded(entry: Entry, dtype: str) -> Entry:
    """Return a tensor rounded to another format as it is read, ties to even."""
    fine, form = FORMATS[entry.dtype], FORMATS[dtype]

    def read(start: int, stop: int) -> NDArray[Any]:
        return form.encode(fine.values(entry.read(start, stop)).astype(np.float32))

    return Entry(entry.name, dtype, entry.shape, entry.file, entry.offset, read, entry.release)
