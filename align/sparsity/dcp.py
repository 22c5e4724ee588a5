"""torch.distributed.checkpoint folders read in place: FSDP, FSDP2, and whatever else saves through DCP.

`.metadata` is a pickle that says of every tensor which boxes it is cut into, and where each lies; its classes are
replaced by inert stand-ins. A box is an uncompressed torch archive within a `.distcp` file, so its data is mapped.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from align.errors import ModelError
from align.sparsity.formats import TORCH_NAMES
from align.sparsity.pieces import Files, tiles
from align.sparsity.sources import Entry, Source
from align.unpickling import outline, outline_of_pickle

_METADATA = "torch.distributed.checkpoint.metadata"
INERT = (
    *(f"{_METADATA}.{name}" for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    "torch.distributed.checkpoint.filesystem._StorageInfo", "pathlib.PosixPath", "pathlib.WindowsPath",
    "pathlib._local.PosixPath", "pathlib._local.WindowsPath",
)  # fmt: skip
"""Classes of which `.metadata` holds objects; they are neither imported nor run."""
_MODEL = ("model", "module", "state_dict", "model_state_dict")
_MASTER = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.fp32_param\.(.+)")
"""Megatron's distributed optimizer keeps its masters under the names of the weights."""
_OTHER = re.compile(
    r"(?:chained_\d+\.)?(?:optim|optimizers?|optimizer_states?|lr_schedulers?|scheduler|dataloader|train_state|rng_state)"
    r"(?:\.|$)"
)


def open_dcp(path: Path, config: dict[str, Any]) -> Source:
    """Open the model of a DCP folder; states of optimizers and loaders are left where they are.

    Raises:
        ModelError: metadata that cannot be read, a file that is missing or truncated, or compressed boxes.
    """
    try:
        return _open(path, config)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise ModelError(
            "A distributed checkpoint is not laid out as expected", where=str(path / ".metadata"),
            why=f"{type(error).__name__}: {str(error)[:150]}", do="Convert it with dcp_to_torch_save",
        ) from error  # fmt: skip


def _open(path: Path, config: dict[str, Any]) -> Source:
    about = outline_of_pickle(path / ".metadata", INERT)
    tensors, plan = about.get("state_dict_metadata"), about.get("planner_data") or {}
    places = {(key.get("fqn"), tuple(key.get("offset") or ())): info for key, info in about.get("storage_data").items()}
    files, source = Files(), Source(str(path), "torch distributed checkpoint", {}, config=config)
    used: set[Path] = set()
    for key, tensor in tensors.items():
        shape = tensor.get("size")
        if shape is None:  # bytes, not a tensor
            continue
        steps = [str(step) for step in plan.get(key, (key,))]
        dotted = ".".join(steps)
        master = _MASTER.fullmatch(dotted)
        inside = next((i for i, step in enumerate(steps[:-1]) if step in _MODEL), -1)
        if master is None and any(_OTHER.match(step) for step in (steps if inside < 0 else steps[:inside])):
            continue
        boxes = []
        for box in tensor.get("chunks"):
            offsets, sizes = tuple(box.get("offsets")), tuple(box.get("sizes"))
            if not math.prod(sizes):
                continue
            entry, file = _box(path, files, key, places[key, offsets], sizes)
            boxes.append((offsets, sizes, entry))
            used.add(file)
        name = master[1] if master else ".".join(steps[inside + 1 :])
        table = source.masters if master else source.entries
        dtype = TORCH_NAMES.get(str(tensor.get("properties").state[0]), "F32")
        if name in table:
            raise ModelError(
                "A distributed checkpoint holds several models", where=str(path), why=f"{key} and another are {name}",
                do="Save the one to compare by itself",
            )  # fmt: skip
        table[name] = tiles(name, tuple(shape), boxes, dtype)
    if not source.entries:
        raise ModelError("A distributed checkpoint holds no model", where=str(path), why="it has no tensor of one")
    source.masters = {name: entry for name, entry in source.masters.items() if name in source.entries}
    source.files = sorted(used)
    source.layout += f", {len(used)} files"
    return source


def _box(path: Path, files: Files, key: str, info: Any, sizes: tuple[int, ...]) -> tuple[Entry, Path]:
    name = str(info.get("relative_path"))
    file = path / name
    if Path(name).name != name or not file.is_file():
        raise ModelError("A distributed checkpoint lacks a file", where=str(path), why=f"it names {name!r}")
    if info.get("transform_descriptors"):
        raise ModelError(
            "A distributed checkpoint is compressed", where=str(file), why=str(info.get("transform_descriptors"))
        )
    begin, length = int(info.get("offset")), int(info.get("length"))
    if begin < 0 or length < 0 or begin + length > file.stat().st_size:
        raise ModelError(
            "A distributed checkpoint is truncated", where=str(file), why=f"{key} ends at {begin + length:,}"
        )
    placed = outline(file, begin=begin, end=begin + length)
    if tuple(placed.shape) != sizes:
        raise ValueError(f"{key} has the shape {placed.shape} where {sizes} was stated")
    return files.entry(file, key, placed), file
