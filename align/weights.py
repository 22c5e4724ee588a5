"""The only door through which foreign tensors are loaded from disk.

A file is read as safetensors, or as a torch archive by torch's restricted unpickler, which looks up tensors and
plain containers and nothing else. Of checkpoints that are read in place only the outline is unpickled: where tensors
lie, with inert stand-ins for whatever classes are named. Nothing a file says is ever run. Where the hash of a
published file is known, the file is checked against it before it is opened.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import pickle
import struct
import threading
import zipfile
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError, _Unpickler
from typing import TYPE_CHECKING, Any
from zipfile import _ECD_OFFSET, _ECD_SIZE, _EndRecData

from align.errors import ModelError, first_line
from align.textfiles import read_json

if TYPE_CHECKING:
    from torch import Tensor

MOST_HEADER_BYTES = 16 << 20
"""Bytes of the header of a safetensors file, of the pickle in a torch archive, and of the archive's table of files.

A hundred thousand tensors need 12 MB. The worst that JSON of this length unfolds to is 400 MB of memory.
"""
MOST_UNPICKLED_BYTES = 256 << 20
"""What one pickle may make, as estimated from its opcodes; a hundred thousand tensors make 200 MB."""
_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_CHOSEN = ("pytorch_model*.bin", "diffusion_pytorch_model*.bin", "adapter_model*.bin", "pytorch_lora_weights*.bin")
"""What transformers, diffusers and PEFT fall back to in a folder without safetensors."""
_WHOLE = ("model.safetensors", "pytorch_model.bin")
# What zipfile and torch's restricted unpickler, which is written in Python, run into on bytes that nobody pickled.
_UNREADABLE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
    TypeError, ValueError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """A published file of weights: where it is, and how to know it.

    Args:
        repo: hub repository, "owner/name".
        file: path inside it.
        sha256: of the file, or its first digits where no more are known; empty where no hash has been published.
        bytes: size of the file, 0 where unknown.
        revision: commit of the repository, the newest when None.
    """

    repo: str
    file: str
    sha256: str = ""
    bytes: int = 0
    revision: str | None = None


def locate(weights: Weights, path: str | Path | None = None) -> Path:
    """Return the file of `weights`: at `path`, a file or a folder that holds it, else from the hub or its cache.

    The size and the hash are checked where they are known, also of a local file.

    Raises:
        ModelError: no such file, a hub that cannot be reached, or a file that is not the published one.
    """
    if path is not None:
        found = Path(path).expanduser()
        inside = [found / name for name in (weights.file, Path(weights.file).name)]
        found = next((p for p in inside if p.is_file()), found)
        if not found.is_file():
            raise ModelError(
                "The weights are not there", where=str(path),
                why=f"there is no {Path(weights.file).name} in it" if Path(path).is_dir() else "there is no such file",
                do=f"Give the file {weights.file} of {weights.repo}",
            )  # fmt: skip
    else:
        found = download(weights.repo, weights.file, weights.revision)
    require_file(found, weights)
    return found


def download(repo: str, file: str, revision: str | None = None) -> Path:
    """Return a hub file from the local cache, fetched on first use.

    Raises:
        ModelError: the hub cannot be reached, or has no such file.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file, revision=revision))
    except (OSError, ValueError, RuntimeError) as error:  # what the hub client raises derives from one of these
        raise ModelError(
            "Weights could not be fetched", where=f"{repo}, {file}", why=first_line(error),
            do="Download the file where there is a network, and give its path",
        ) from error  # fmt: skip


def download_folder(repo: str, revision: str | None = None) -> Path:
    """Return the folder of a hub repository's safetensors, configuration and tokenizer; no code, nothing pickled.

    Raises:
        ModelError: the hub cannot be reached, or the repository holds no safetensors.
    """
    from huggingface_hub import snapshot_download

    kinds = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=kinds))
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            "There is no such folder, and the hub has no model of that name to be fetched", where=repo,
            why=first_line(error),
            do="Give the path of a folder, or download the repository where there is a network",
        ) from error  # fmt: skip
    if not any(folder.glob("*.safetensors")):
        raise ModelError("The repository holds no safetensors", where=repo, do="Convert its weights, and give a folder")
    return folder


def download_pipeline(repo: str) -> Path:
    """Return the folder of a diffusers pipeline on the hub: its parts in safetensors, no code, nothing pickled.

    Raises:
        ModelError: the hub cannot be reached, or has no such pipeline.
    """
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(repo, use_safetensors=True))
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            "There is no such folder, and the hub has no pipeline of that name to be fetched", where=repo,
            why=first_line(error),
            do="Give the path of a folder, or download the repository where there is a network",
        ) from error  # fmt: skip


def require_file(path: Path, weights: Weights) -> None:
    """Refuse a file that is not the published one.

    Raises:
        ModelError: another size or another sha256.
    """
    size = path.stat().st_size
    if weights.bytes and size != weights.bytes:
        raise ModelError(
            "These are not the published weights", where=str(path), why=f"{size:,} bytes instead of {weights.bytes:,}",
            do=f"Fetch {weights.file} of {weights.repo} again",
        )  # fmt: skip
    if weights.sha256 and not (digest := file_sha256(path)).startswith(weights.sha256):
        raise ModelError(
            "These are not the published weights", where=str(path),
            why=f"its sha256 begins {digest[:12]}, that of the published file {weights.sha256[:12]}",
            do=f"Fetch {weights.file} of {weights.repo} again",
        )  # fmt: skip


def file_sha256(path: str | Path) -> str:
    """Return the sha256 of a file; worked out once while it does not change."""
    stat = os.stat(path)
    return _file_sha256(str(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _file_sha256(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(path: str | Path) -> str:
    """Return the sha256 of a file of weights; of a folder, that over the names and hashes of its files of weights."""
    path = Path(path)
    if not path.is_dir():
        return file_sha256(path)
    files = [p for p in sorted(path.iterdir()) if p.suffix in (".safetensors", *_TORCH)]
    return hashlib.sha256("\n".join(f"{p.name} {file_sha256(p)}" for p in files).encode()).hexdigest()


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a file, or of a folder of shards, by name, on the CPU.

    A checkpoint that keeps its weights one level down, under "state_dict", "model" or "module", is opened there.

    Raises:
        ModelError: a truncated or foreign file, one that asks for anything but tensors, or a missing shard.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise ModelError("The weights are not there", where=str(path), why="there is no such file")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    if path.suffix in _TORCH:
        return _tensors_in(_load_torch(path), path)
    raise ModelError(
        "This is no file of weights", where=str(path), why=f"its name ends in {path.suffix or 'nothing'}",
        do=f"Give a .safetensors file, or one of {', '.join(_TORCH)}",
    )  # fmt: skip


def _load_folder(folder: Path) -> dict[str, Tensor]:
    for name in _WHOLE:
        if (folder / name).is_file():
            return load_tensors(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return {key: value for shard in read_shards(index) for key, value in load_tensors(shard).items()}
    raise ModelError(
        "This folder holds no weights", where=str(folder), why=f"it has neither {' nor '.join(_WHOLE)}, nor an index"
    )


def read_shards(index: Path) -> list[Path]:
    """Return the files that an index of shards names, which lie in its own folder.

    Raises:
        ModelError: an index that cannot be read, or that names what is no file of its folder.
    """
    table = read_json(index, ModelError)
    found = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(found, dict) or not found:
        raise ModelError("An index of shards cannot be read", where=str(index), why="it has no weight_map")
    for shard in found.values():  # by name: in a hub cache the file itself is a link to elsewhere
        if not isinstance(shard, str) or Path(shard).name != shard or not (index.parent / shard).is_file():
            raise ModelError(
                "An index names what is no file of its folder", where=str(index), why=f"it names {str(shard)[:200]!r}",
                do="Fetch the shard, or the checkpoint again",
            )  # fmt: skip
    return [index.parent / shard for shard in dict.fromkeys(found.values())]


def header_bytes(path: Path) -> int:
    """Return how long the header of a safetensors file is.

    Raises:
        ModelError: a file that cannot have such a header, or one of more than `MOST_HEADER_BYTES`.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size < 10 or length > size - 8:
        raise ModelError(
            "A safetensors file is truncated or foreign", where=str(path),
            why=f"its header would be {length:,} bytes in a file of {size:,}",
        )  # fmt: skip
    if length > MOST_HEADER_BYTES:
        raise ModelError(
            "The header of a safetensors file is too long", where=str(path),
            why=f"{length / 1e6:.0f} MB, where {MOST_HEADER_BYTES / 1e6:.0f} MB is the most that is parsed",
            do="Save the weights again without what fills its header",
        )  # fmt: skip
    return length


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a safetensors file, by name, by its header alone.

    Raises:
        ModelError: a header that is too long, or that does not describe the file.
    """
    from safetensors import SafetensorError, safe_open

    header_bytes(path)
    try:
        with safe_open(path, "np") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError("A safetensors file cannot be read", where=str(path), why=str(error)[:200]) from error


def require_whole(folder: str | Path) -> None:
    """Refuse adapters where a model to train is asked for: transformers loads them into a model of its own making.

    Raises:
        ModelError: the folder holds adapters.
    """
    if (Path(folder) / "adapter_config.json").is_file():
        raise ModelError(
            "A model to train cannot be adapters alone", where=str(folder),
            do="Merge them first: `align export RUN --to full --out MODEL`, then model.path: MODEL",
        )  # fmt: skip


def require_inert(folder: str | Path) -> None:
    """Refuse a folder of transformers, diffusers or PEFT that their loaders should not be given.

    Looked at before they are: how much JSON there is, and how deep; where an index of shards points; headers of
    safetensors; what pickles ask for; and settings that name code. Nothing is loaded.

    Raises:
        ModelError: naming the file.
    """
    folder = Path(folder)
    if not folder.is_dir():  # a name on the hub, which is fetched through `download_folder`
        return
    for file in sorted(folder.glob("*.json")):
        if file.name.endswith(".index.json"):
            read_shards(file)
            continue
        said = read_json(file, ModelError)
        if isinstance(said, dict) and (name := _names_code(said)):
            raise ModelError(
                "A model's settings ask for code to be run", where=str(file), why=f"{name} is {said[name]!r}"[:200],
                do="Do not trust it, or remove the setting",
            )  # fmt: skip
    tensors = sorted(folder.glob("*.safetensors"))
    for file in tensors:
        read_shapes(file)
    for file in () if tensors else sorted(file for pattern in _CHOSEN for file in folder.glob(pattern)):
        _require_plain(file)


def _names_code(said: Mapping[str, Any]) -> str:
    """Return the setting that would have a library import or fetch code, empty where there is none.

    What `auto_map` names is left to `trust_remote_code=False`: many models that are built in have one, too.
    """
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        if "/" in str(said.get(name) or ""):  # a kernel on the hub
            return name
    if said.get("megatron_config"):  # of PEFT: `megatron_core` is imported then
        return "megatron_core" if "megatron_core" in said else "megatron_config"
    return "auto_mapping" if said.get("auto_mapping") else ""


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header_bytes(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError("A safetensors file cannot be read", where=str(path), why=str(error)) from error


def _load_torch(path: Path) -> Any:
    import torch

    archive = _require_plain(path)
    with _foreign(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)


def _require_plain(path: Path) -> bool:
    """Refuse what torch's own unpickler is not to be given: it bounds no memory, and calls more than tensors need.

    Returns:
        Whether the file is an archive, and not one of torch before 1.6.
    """
    with _foreign(path), path.open("rb") as file:
        archive = file.read(2) == b"PK"
        if archive:
            _outline(path, _ALSO)
        else:
            file.seek(0)
            whole = path.stat().st_size
            pickles = _Outline(file.read(MOST_HEADER_BYTES), _ALSO, defaultdict(lambda: (0, whole)))
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


def _tensors_in(found: Any, path: Path) -> dict[str, Tensor]:
    import torch

    for _ in range(3):
        if isinstance(found, Mapping) and found and all(torch.is_tensor(value) for value in found.values()):
            claimed = sum(value.numel() * value.element_size() for value in found.values())
            if claimed > 4 * path.stat().st_size + (1 << 20):  # a few may be tied; none repeats itself
                raise ModelError(
                    "A file claims more weights than it holds", where=str(path), why=f"it claims {claimed:,} bytes"
                )
            return {str(key): value for key, value in found.items()}
        if not isinstance(found, Mapping):
            break
        found = next((found[key] for key in ("state_dict", "model", "module") if key in found), None)
    raise ModelError("A file holds no table of tensors", where=str(path), why=f"found {type(found).__name__}")


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
        if table[_ECD_SIZE] > MOST_HEADER_BYTES:
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
            if members["data.pkl"].file_size > MOST_HEADER_BYTES:
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
        if path.stat().st_size > MOST_HEADER_BYTES:
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


def structure_sha256(state: Mapping[str, Any]) -> str:
    """Return the sha256 of a model's shape: one line `key [d0, d1, ...]` a tensor, sorted by key.

    It tells two architectures apart without their weights, and can be worked out on the meta device.
    """
    lines = [f"{key} {list(state[key].shape)}" for key in sorted(state)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@contextlib.contextmanager
def without_storage() -> Iterator[None]:
    """Build modules whose parameters take no memory (the meta device), for `load_into` to fill; buffers are real.

    What a checkpoint does not hold, such as tables of frequencies, is a buffer that no file would fill. Only the
    thread that enters is affected.
    """
    from torch.nn import Module, Parameter
    from torch.nn.modules.module import register_module_parameter_registration_hook

    owner = threading.get_ident()

    def to_meta(module: Module, name: str, parameter: Parameter | None) -> Any:
        if parameter is None or threading.get_ident() != owner:
            return None
        return Parameter(parameter.detach().to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


def load_into(module: Any, state: Mapping[str, Tensor], where: str, *, unused: Iterable[str] = ()) -> None:
    """Load `state` into a torch module, every key and every shape accounted for.

    Args:
        unused: keys of `state` that the module knowingly does without.

    Raises:
        ModelError: naming the first key that is missing, left over, or of another shape.
    """
    own, given = dict(module.state_dict()), {k: v for k, v in state.items() if k not in set(unused)}
    for what, keys in (("lacks", own.keys() - given.keys()), ("has a foreign", given.keys() - own.keys())):
        if keys:
            first, more = min(keys), f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ModelError("Weights of another model", where=where, why=f"the file {what} tensor {first}{more}")
    for key, value in given.items():
        if own[key].shape != value.shape:
            raise ModelError(
                "Weights of another model", where=f"{where}, {key}",
                why=f"shape {tuple(value.shape)} instead of {tuple(own[key].shape)}",
            )  # fmt: skip
    module.load_state_dict(given, assign=any(p.is_meta for p in own.values()))
