"""The only door through which foreign tensors are loaded from disk, but for those that are read in place.

A file is read as safetensors, or as a torch archive by torch's restricted unpickler, once `align.unpickling` has seen
that it holds tensors and plain containers and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import ModelError
from align.textfiles import read_json
from align.unpickling import load_torch, require_plain

if TYPE_CHECKING:
    from torch import Tensor

MOST_HEADER_BYTES = 16 << 20
"""Bytes of the header of a safetensors file.

A hundred thousand tensors need 12 MB. The worst that JSON of this length unfolds to is 400 MB of memory.
"""
_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_CHOSEN = ("pytorch_model*.bin", "diffusion_pytorch_model*.bin", "adapter_model*.bin", "pytorch_lora_weights*.bin")
"""What transformers, diffusers and PEFT fall back to in a folder without safetensors."""
_WHOLE = ("model.safetensors", "pytorch_model.bin")


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
        return _tensors_in(load_torch(path), path)
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
        require_plain(file)


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
