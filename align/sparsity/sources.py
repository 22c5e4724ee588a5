"""Checkpoints as tables of tensors that are mapped, not loaded: every layout, one kind of entry.

Safetensors headers are parsed here and the data stays in the page cache; torch archives come through
`align/weights.py`, mapped as well. An entry gives any run of its codes as unsigned integers.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.checkpoint import delivered_group, files_of, in_pieces
from align.errors import ModelError
from align.sparsity.formats import ITEM_BYTES, TORCH_NAMES
from align.textfiles import read_json
from align.weights import header_bytes, load_tensors

STEMS = ("model", "diffusion_pytorch_model", "pytorch_model", "adapter_model", "pytorch_lora_weights")
ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")


@dataclass
class Entry:
    """One stored tensor: its shape, where it lies, and its codes.

    Args:
        read: returns the codes of entries [start, stop) of the flattened tensor.
        release: lets the pages of the tensor go.
        factors: of a merged adapter, what was added: the product of these two.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    read: Callable[[int, int], NDArray[Any]]
    release: Callable[[], None] = lambda: None
    factors: tuple[NDArray[Any], NDArray[Any]] | None = None

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """How many bytes it takes."""
        return self.count * ITEM_BYTES[self.dtype]

    @property
    def codes(self) -> np.dtype[Any]:
        """The unsigned integers that `read` returns."""
        return np.dtype(f"u{ITEM_BYTES[self.dtype]}")


@dataclass
class Source:
    """A checkpoint: its tensors by name, and what was read of its configuration.

    Args:
        aliases: names of tensors that are stored once under another name.
        config: of the model, or of the adapter where `adapter` is true.
        masters: the same weights in fp32 as the optimizer keeps them, where they are stored.
        training: optimizer, learning rate and steps, as far as the checkpoint says.
    """

    path: str
    layout: str
    entries: dict[str, Entry]
    aliases: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    adapter: bool = False
    files: list[Path] = field(default_factory=list)
    masters: dict[str, Entry] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def tied(self) -> bool:
        """Whether the configuration ties the output layer to the embedding."""
        text = self.config.get("text_config")
        inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
        return bool(self.config.get("tie_word_embeddings", inner))


Side = str | Path | Source | Mapping[str, Any] | Any
"""A file or folder of weights, what was opened of one, or a model in memory: an `nn.Module`, or its tensors by name."""


def label(side: Side) -> str:
    """Return what a side is called."""
    if isinstance(side, Source):
        return side.path
    return str(side) if isinstance(side, (str, Path)) else f"{type(side).__name__} in memory"


def open_source(path: Side) -> Source:
    """Open a file or a folder of weights, or take a model in memory as it is.

    A folder is a transformers or diffusers model, a diffusers pipeline, a PEFT adapter, a checkpoint or run of
    ours, a DeepSpeed or torch distributed checkpoint, or anything that holds one file of weights, its shards, or
    their index. A model's folder with a DeepSpeed checkpoint within it has that one's masters.

    Raises:
        ModelError: nothing there, or a file that is truncated, foreign, or lacks what an index names.
    """
    if isinstance(path, Source):
        return path
    if not isinstance(path, (str, Path)):
        return _live(path)
    path = Path(path).expanduser()
    if path.is_file():
        return _from_files(
            str(path),
            "file",
            [path],
            _json(path.with_name("adapter_config.json")) or _json(path.with_name("config.json")),
        )
    if not path.is_dir():
        raise ModelError("There are no weights", where=str(path), why="there is no such file or folder")
    if (path / "model_index.json").is_file():
        return _pipeline(path)
    from align.sparsity.dcp import open_dcp
    from align.sparsity.zero import open_zero, zero_folder

    step = zero_folder(path)
    if step == path:
        return open_zero(path, step, _json(path / "config.json"))
    for inner in (path, *sorted(path.glob("pytorch_model_fsdp_*"))):  # as accelerate names the part of a checkpoint
        if (inner / ".metadata").is_file():
            return open_dcp(inner, _json(path / "config.json"))
    if files := _files(path):
        adapter = _json(path / "adapter_config.json") or _own_adapter(path)
        if in_pieces(files):
            from align.sparsity.pieces import open_pieces

            return open_pieces(path, files, adapter)
        found = _from_files(
            str(path), "adapter" if adapter else "folder", files, adapter or _json(path / "config.json")
        )
        if step is not None and not found.adapter:
            beside = open_zero(path, step, {})
            found.masters, found.training = beside.masters, beside.training
        return found
    if step is not None:
        return open_zero(path, step, _json(path / "config.json"))
    steps = sorted(
        (p for p in (path / "checkpoints").glob("step_*") if p.name[5:].isdecimal()), key=lambda p: int(p.name[5:])
    )
    if steps and _files(steps[-1]):
        found = open_source(steps[-1])
        found.path, found.layout = str(path), f"run, {steps[-1].name}"
        return found
    if any(path.glob("*.distcp")):
        raise ModelError(
            "A distributed checkpoint lacks its index", where=str(path), why="there is no .metadata in it",
            do="Copy it too; its name begins with a dot",
        )  # fmt: skip
    raise ModelError(
        "This folder holds no weights", where=str(path), why="it has no file of weights, no index and no pipeline",
        do="Give a folder with model.safetensors, or the file itself",
    )  # fmt: skip


def _own_adapter(path: Path) -> dict[str, Any]:
    """Return the settings of the LoRA of a checkpoint of ours, in PEFT's words."""
    model = (_json(path / "state.json").get("config") or {}).get("model") or {}
    lora = model.get("lora") or {}
    return {"lora_alpha": lora["alpha"]} if model.get("train") == "lora" and "alpha" in lora else {}


def open_safetensors(path: str | Path) -> Source:
    """Open one safetensors file, whatever its name ends in.

    Raises:
        ModelError: no file, or not a whole safetensors file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ModelError("There is no such file", where=str(path))
    source = Source(str(path), "file", {}, files=[path])
    source.entries |= {entry.name: entry for entry in _safetensors(path, source)}
    return source


def _pipeline(path: Path) -> Source:
    """Open every component of a diffusers pipeline that holds weights; names begin with the component."""
    whole = Source(str(path), "diffusers pipeline", {})
    for part in sorted(p for p in path.iterdir() if p.is_dir()):
        files = _files(part)
        if not files:
            continue
        found = _from_files(str(part), "component", files, {})
        whole.config[part.name] = _json(part / "config.json")
        whole.entries |= {f"{part.name}/{name}": entry for name, entry in found.entries.items()}
        whole.aliases |= {f"{part.name}/{a}": f"{part.name}/{b}" for a, b in found.aliases.items()}
        whole.files += found.files
    if not whole.entries:
        raise ModelError(
            "A pipeline holds no weights", where=str(path), why="no folder beside model_index.json has any"
        )
    for name, entry in whole.entries.items():
        entry.name = name
    return whole


def _files(folder: Path) -> list[Path]:
    """Return the files of weights of a folder: one, or the shards that an index names or that number themselves.

    Of a checkpoint of ours it is the running average where there is one, as that is what is delivered.
    """
    if (folder / "manifest.json").is_file() and (own := files_of(folder, delivered_group(folder))):
        return own
    for stem in STEMS:
        for ending in (".safetensors", ".bin"):
            index = folder / f"{stem}{ending}.index.json"
            if (folder / f"{stem}{ending}").is_file():
                return [folder / f"{stem}{ending}"]
            if index.is_file():
                return _indexed(index)
    found = [p for p in sorted(folder.iterdir()) if p.suffix in ENDINGS and p.is_file()]
    shards = [match for p in found if (match := _SHARD.fullmatch(p.name))]
    if shards:
        total = int(shards[0][3])
        if len(shards) != total or len({m[1] for m in shards}) > 1:
            raise ModelError("Shards are missing", where=str(folder), why=f"{len(shards)} of {total} are there")
        return [folder / match[0] for match in shards]
    if len(found) > 1:
        raise ModelError(
            "A folder holds several files of weights, and no index", where=str(folder),
            why=", ".join(p.name for p in found[:4]), do="Give the file that is meant",
        )  # fmt: skip
    return found


def _indexed(index: Path) -> list[Path]:
    table = _json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ModelError("An index of shards cannot be read", where=str(index), why="it has no weight_map")
    shards = list(dict.fromkeys(table.values()))
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or not (index.parent / shard).is_file():
            raise ModelError(
                "An index names a file that is not there", where=str(index), why=f"it names {shard!r}",
                do="Fetch the shard, or the checkpoint again",
            )  # fmt: skip
    return [index.parent / shard for shard in shards]


def _from_files(path: str, layout: str, files: list[Path], config: dict[str, Any]) -> Source:
    source = Source(path, layout, {}, config=config, files=files)
    for file in files:
        if file.suffix not in ENDINGS:
            raise ModelError("This is no file of weights", where=str(file), do=f"Give one of {', '.join(ENDINGS)}")
        read = _safetensors if file.suffix == ".safetensors" else _torch
        for entry in read(file, source):
            if entry.name in source.entries:
                raise ModelError("Two shards hold the same tensor", where=str(file), why=entry.name)
            source.entries[entry.name] = entry
    set_aliases_apart(source)
    index = next(
        (file.parent / f"{m[1]}{m[4]}.index.json" for file in files if (m := _SHARD.fullmatch(file.name))), None
    )
    named = _json(index).get("weight_map", {}) if index and index.is_file() else {}
    if absent := sorted(set(named) - set(source.entries) - set(source.aliases)):
        raise ModelError(
            "An index names tensors that no shard holds",
            where=str(index),
            why=f"{absent[0]} and {len(absent) - 1} more",
        )
    if any(".lora_A." in name for name in source.entries):
        source.adapter, source.layout = True, "adapter"
    return source


def set_aliases_apart(source: Source) -> None:
    """Keep one entry of those that share a place."""
    places: dict[tuple[str, int, tuple[int, ...]], str] = {}
    for name, entry in list(source.entries.items()):
        place = (entry.file, entry.offset, entry.shape)
        if entry.count and places.setdefault(place, name) != name:
            source.aliases[name] = places[place]
            del source.entries[name]


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = read_json(path, ModelError)
    return found if isinstance(found, dict) else {}


def _safetensors(path: Path, source: Source) -> list[Entry]:
    """Parse the header of a safetensors file (8 bytes of length, JSON, data) and map its data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = header_bytes(path)
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", None) or {}
            rows = [
                (name, str(v["dtype"]), tuple(map(int, v["shape"])), *map(int, v["data_offsets"]))
                for name, v in header.items()
            ]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ModelError(
                "The header of a safetensors file cannot be read", where=str(path), why=str(error)[:200]
            ) from error
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if "lora_adapter_metadata" in metadata and not source.config:
        source.config = _nested(metadata["lora_adapter_metadata"])
    for name, dtype, shape, begin, end in rows:
        if dtype not in ITEM_BYTES:
            raise ModelError("A tensor has a format that is not known", where=f"{path}, {name}", why=dtype)
        if min((begin, *shape)) < 0 or end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
            raise ModelError(
                "A tensor's place does not fit its shape",
                where=f"{path}, {name}",
                why=f"{begin} to {end} for {list(shape)} of {dtype}",
            )
        if 8 + length + end > size:
            raise ModelError(
                "A safetensors file is truncated", where=str(path),
                why=f"{name} ends at byte {8 + length + end:,} of {size:,}", do="Fetch it again",
            )  # fmt: skip
    return [mapped(path, data, 8 + length + begin, *row) for *row, begin, _ in rows]


def _nested(text: Any) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, TypeError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key.rpartition(".")[2]: value for key, value in found.items()}


def mapped(path: Path, data: mmap.mmap, offset: int, name: str, dtype: str, shape: tuple[int, ...]) -> Entry:
    """Return the tensor that lies at byte `offset` of a mapped file."""
    item = ITEM_BYTES[dtype]

    def read(start: int, stop: int) -> NDArray[Any]:
        found = (
            np.frombuffer(data, f"u{item}", stop - start, offset + start * item)
            if stop > start
            else np.empty(0, f"u{item}")
        )
        return found if found.flags.aligned else found.copy()

    def release() -> None:
        # Pages before and after the tensor belong to its neighbours, which may be read at the same time.
        page = mmap.PAGESIZE
        begin, end = -(-offset // page) * page, (offset + math.prod(shape) * item) // page * page
        if end > begin and hasattr(data, "madvise"):
            data.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    return Entry(name, dtype, shape, str(path), offset, read, release)


def _torch(path: Path, source: Source) -> list[Entry]:
    return _tensors(load_tensors(path), str(path))


def _live(model: Mapping[str, Any] | Any) -> Source:
    """Open a model in memory, wherever its tensors are; of those that are not on the CPU a chunk is copied at a time.

    Raises:
        ModelError: neither a module nor tensors by name, or tensors that are not here as a whole.
    """
    import torch

    state = model.state_dict() if isinstance(model, torch.nn.Module) else model
    if not isinstance(state, Mapping):
        raise ModelError(
            "This is no model", where=label(model), do="Give a path, an nn.Module, or a dictionary of its tensors"
        )
    held = {str(name): value for name, value in state.items() if torch.is_tensor(value)}
    for name, value in held.items():
        if value.is_meta or hasattr(value, "full_tensor"):
            raise ModelError(
                "A tensor is not here as a whole", where=f"{label(model)}, {name}",
                why="it has no storage" if value.is_meta else "this process holds a shard of it",
                do="Gather it, or compare the checkpoint it is saved in",
            )  # fmt: skip
    config = getattr(getattr(model, "config", None), "to_dict", dict)()
    source = Source(
        label(model), "in memory", {entry.name: entry for entry in _tensors(held, label(model))}, config=config
    )
    set_aliases_apart(source)
    source.adapter = any(".lora_A." in name for name in source.entries)
    return source


def _tensors(state: Mapping[str, Any], where: str) -> list[Entry]:
    import torch

    found = []
    for name, tensor in state.items():
        dtype = TORCH_NAMES.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None or tensor.layout != torch.strided:
            raise ModelError(
                "A tensor has a format that is not known",
                where=f"{where}, {name}",
                why=f"{tensor.dtype}, {tensor.layout}",
            )
        flat = tensor.detach().contiguous().reshape(-1)
        read = _reader(flat, {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[ITEM_BYTES[dtype]])
        found.append(Entry(name, dtype, tuple(tensor.shape), where, tensor.data_ptr(), read))
    return found


def _reader(flat: Any, integer: Any) -> Callable[[int, int], NDArray[Any]]:
    def read(start: int, stop: int) -> NDArray[Any]:
        codes = flat[start:stop].cpu().view(integer).numpy()
        return codes.view(f"u{codes.dtype.itemsize}")

    return read
