"""Sparse delta checkpoints: what to add to a base to get a tuned model back, bit for bit.

Of every tensor in blocks of 2^22 entries: which entries changed, as packed bits or as gaps of one byte, whichever is
smaller compressed, and by how many steps each code moved, in one byte, with larger steps set aside. Steps are taken
on codes ordered without joining +0 and -0, so that every bit pattern comes back, NaN payloads included:

    order(c) = c for a positive sign, c with all bits but the sign flipped for a negative one, as a signed integer

Compression is zstd level 1 where pyarrow is installed, else zlib level 6; the file says which. Hashes of both
sides of every tensor are kept: another base is refused, and so is a result that does not come out as it went in.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.errors import ConfigError, DataError, ModelError
from align.sparsity.container import SafetensorsWriter, read_container, whole
from align.sparsity.formats import FORMATS, ITEM_BYTES, Codes
from align.sparsity.sources import ENDINGS, Entry, Source, open_source

BLOCK = 1 << 22
ESCAPE = -128
_MOST_JSON = 1_000_000


def _codec(name: str = "") -> tuple[str, Callable[[bytes], bytes], Callable[[bytes, int], bytes]]:
    """Return name, compress and decompress of the codec called `name`, or of the best one installed."""
    if name != "zlib":
        try:
            import pyarrow
        except ModuleNotFoundError as error:
            if name == "zstd":
                raise ConfigError("This delta needs pyarrow", do="pip install pyarrow") from error
        else:
            codec = pyarrow.Codec("zstd", compression_level=1)

            def expand_zstd(data: bytes, size: int) -> bytes:
                try:
                    return pyarrow.CompressedInputStream(pyarrow.py_buffer(data), "zstd").read(size + 1)
                except OSError as error:
                    raise ValueError(str(error)) from error

            return "zstd", lambda data: codec.compress(data, asbytes=True), expand_zstd

    def expand(data: bytes, size: int) -> bytes:
        work = zlib.decompressobj()
        return work.decompress(data, size + 1)  # never much more than it should be, whatever the file says

    return "zlib", lambda data: zlib.compress(data, 6), expand


def _bounded(expand: Callable[[bytes, int], bytes]) -> Callable[[bytes, int], bytes]:
    def checked(data: bytes, size: int) -> bytes:
        if not 0 <= size <= 8 * BLOCK:
            raise ValueError(f"a part claims {size:,} bytes")
        found = expand(data, size) if size else b""
        if len(found) != size:
            raise ValueError(f"a part has {len(found):,} bytes instead of {size:,}")
        return found

    return checked


def ordered(codes: Codes) -> NDArray[np.signedinteger]:
    """Return codes as signed integers in the order of their values, -0 below +0; `ordered` undoes itself."""
    bits = codes.dtype.itemsize * 8
    signed = codes.view(f"i{codes.dtype.itemsize}")
    return np.where(signed < 0, signed ^ signed.dtype.type((1 << (bits - 1)) - 1), signed)


def write_delta(base: str | Path, tuned: str | Path, path: str | Path) -> dict[str, Any]:
    """Write what turns `base` into `tuned` to `path`, and return sizes.

    Tensors that are new, or of another shape or format, are stored whole.

    Raises:
        ModelError: a side that cannot be read, or an adapter.
    """
    first, second = open_source(base), open_source(tuned)
    if first.adapter or second.adapter:
        raise ModelError("An adapter is a delta already", where=str(base if first.adapter else tuned))
    codec, squeeze, _ = _codec()
    tensors: dict[str, Any] = {}
    metadata = {"align": "delta", "codec": codec, "base": str(base), "tuned": str(tuned)}
    dense = changed = 0
    with SafetensorsWriter(path, metadata) as writer:
        for name, new in second.entries.items():
            old = first.entries.get(name)
            like = old is not None and (old.dtype, old.shape) == (new.dtype, new.shape) and new.dtype in FORMATS
            dense += new.bytes
            row: dict[str, Any] = {"dtype": new.dtype, "shape": list(new.shape), "sha256": _sha256(new), "blocks": []}
            if like and old is not None:
                row["base_sha256"] = _sha256(old)
                for k, start in enumerate(range(0, new.count, BLOCK)):
                    stop = min(start + BLOCK, new.count)
                    a, b = old.read(start, stop), new.read(start, stop)
                    where = np.flatnonzero(a != b)
                    changed += len(where)
                    row["blocks"].append(
                        _write_block(writer, f"{name}::{k}", a[where], b[where], where, stop - start, squeeze)
                    )
            else:
                changed += new.count
                for k, start in enumerate(range(0, new.count, BLOCK)):
                    data = new.read(start, min(start + BLOCK, new.count)).tobytes()
                    writer.add_bytes(f"{name}::{k}::whole", squeeze(data))
                    row["blocks"].append({"bytes": len(data)})
            tensors[name] = row
            new.release()
            if old is not None:
                old.release()
        about = {
            "tensors": tensors,
            "aliases": second.aliases,
            "removed": sorted(set(first.entries) - set(second.entries)),
        }
        writer.add_bytes("::about", squeeze(json.dumps(about).encode()))
        writer.metadata["about_bytes"] = str(len(json.dumps(about).encode()))
    size = Path(path).stat().st_size
    return {
        "delta": str(path),
        "bytes": size,
        "dense_bytes": dense,
        "ratio": dense / size,
        "changed": changed,
        "codec": codec,
    }


def _write_block(
    writer: SafetensorsWriter, key: str, old: Codes, new: Codes, where: NDArray[np.int64], size: int,
    squeeze: Callable[[bytes], bytes],
) -> dict[str, Any]:  # fmt: skip
    """Write one block of a tensor, and return its counts and its choice of layout."""
    marks = np.zeros(size, np.bool_)
    marks[where] = True
    bits, gaps = np.packbits(marks, bitorder="little").tobytes(), _gaps(where)
    packed, gapped = squeeze(bits), squeeze(gaps) if len(gaps) < len(bits) else b""
    layout = "gaps" if gapped and len(gapped) < len(packed) else "bits"
    step = _difference(ordered(new), ordered(old))
    small = (step > ESCAPE) & (step < 128)
    narrow = np.where(small, step, ESCAPE).astype(np.int8)
    wide = step[~small].tobytes()
    writer.add_bytes(f"{key}::where", gapped if layout == "gaps" else packed)
    writer.add_bytes(f"{key}::steps", squeeze(narrow.tobytes()))
    writer.add_bytes(f"{key}::wide", squeeze(wide))
    return {
        "layout": layout,
        "changed": len(where),
        "where": len(gaps if layout == "gaps" else bits),
        "wide": len(wide),
    }


def _difference(a: NDArray[np.signedinteger], b: NDArray[np.signedinteger]) -> NDArray[np.int64]:
    with np.errstate(over="ignore"):  # of doubles it may wrap around, and wraps back on the way in
        return a.astype(np.int64) - b.astype(np.int64)


def _gaps(where: NDArray[np.int64]) -> bytes:
    """Return the distances between changed entries less one, a byte each; 255 stands for 255 and no entry."""
    gap = np.diff(where, prepend=-1) - 1
    long = gap // 255
    out = np.full(int(long.sum()) + len(gap), 255, np.uint8)
    out[np.cumsum(long + 1) - 1] = gap % 255
    return out.tobytes()


def _places(gaps: bytes) -> NDArray[np.int64]:
    steps = np.frombuffer(gaps, np.uint8).astype(np.int64)
    ends = steps < 255
    return np.cumsum(steps + ends)[ends] - 1


def apply_delta(base: str | Path, delta: str | Path, out: str | Path) -> dict[str, Any]:
    """Write the tuned model to the folder `out`, with the base's configuration beside it.

    The weights of each component are one safetensors file, whatever shards the tuned model had.

    Raises:
        DataError: another base, a damaged delta, or a result whose hash is not that of the tuned model.
        ConfigError: `out` is there already.
    """
    out = Path(out)
    if out.exists():
        raise ConfigError("The folder is there already", where=str(out), do="Give another one with --out")
    source, metadata = read_container(delta, "delta")
    expand = _bounded(_codec(metadata.get("codec", ""))[2])
    origin = open_source(base)
    try:
        size = int(metadata["about_bytes"])
        about = json.loads(expand(whole(source.entries["::about"]).tobytes(), size))
        tensors, aliases = dict(about["tensors"]), dict(about["aliases"])
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            made = Path(folder) / out.name
            _copy_beside(origin, made)
            _write_components(origin, source, tensors, aliases, expand, made)
            made.rename(out)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, zlib.error) as error:
        raise DataError(
            "The delta is damaged", where=str(delta), why=str(error)[:200], do="Write it again, or fetch it again"
        ) from error
    return {"model": str(out), "tensors": len(tensors), "verified": True}


def _write_components(
    origin: Source, source: Source, tensors: dict[str, Any], aliases: dict[str, str],
    expand: Callable[[bytes, int], bytes], made: Path,
) -> None:  # fmt: skip
    components = sorted({name.rpartition("/")[0] for name in (*tensors, *aliases)})
    if odd := [c for c in components if c in (".", "..") or Path(c).name != c]:
        raise ValueError(f"it names a folder {odd[0]!r}")
    if aliases:
        tensors |= {alias: tensors[name] | {"as": name} for alias, name in aliases.items()}
    for component in components:
        stem = (
            "model"
            if (made / component / "config.json").is_file() and not _is_diffusers(origin, component)
            else "diffusion_pytorch_model"
        )
        stem = stem if component else "model"
        with SafetensorsWriter(made / component / f"{stem}.safetensors", {"format": "pt"}) as writer:
            for name in sorted(n for n in tensors if n.rpartition("/")[0] == component):
                row = tensors[name]
                writer.begin(name.rpartition("/")[2], row["dtype"], tuple(row["shape"]))
                sha = hashlib.sha256()
                for codes in _rebuilt(row.get("as", name), row, origin, source, expand):
                    data = codes.tobytes()
                    sha.update(data)
                    writer.write(data)
                if sha.hexdigest() != row["sha256"]:
                    raise DataError(
                        "The delta does not give the tuned model back",
                        where=name,
                        why="its sha256 differs",
                        do="Fetch the delta again",
                    )


def _is_diffusers(origin: Source, component: str) -> bool:
    return any(f.parent.name == component and f.stem.startswith("diffusion_pytorch_model") for f in origin.files)


def _rebuilt(
    name: str, row: dict[str, Any], origin: Source, source: Source, expand: Callable[[bytes, int], bytes]
) -> Iterator[Codes]:
    code = f"u{ITEM_BYTES[row['dtype']]}"
    if "base_sha256" not in row:
        for k, block in enumerate(row["blocks"]):
            yield np.frombuffer(expand(whole(source.entries[f"{name}::{k}::whole"]).tobytes(), block["bytes"]), code)
        return
    old = origin.entries.get(name)
    if (
        old is None
        or old.dtype != row["dtype"]
        or list(old.shape) != row["shape"]
        or _sha256(old) != row["base_sha256"]
    ):
        raise DataError(
            "The delta belongs to another base",
            where=f"{origin.path}, {name}",
            do="Give the model the delta was made from",
        )
    for k, block in enumerate(row["blocks"]):

        def part(what: str, size: int, key: str = f"{name}::{k}") -> bytes:
            return expand(whole(source.entries[f"{key}::{what}"]).tobytes(), size)

        start = k * BLOCK
        codes = old.read(start, min(start + BLOCK, old.count)).copy()
        marks = part("where", block["where"])
        where = (
            _places(marks)
            if block["layout"] == "gaps"
            else np.flatnonzero(np.unpackbits(np.frombuffer(marks, np.uint8), count=len(codes), bitorder="little"))
        )
        step = np.frombuffer(part("steps", block["changed"]), np.int8).astype(np.int64)
        step[step == ESCAPE] = np.frombuffer(part("wide", block["wide"]), np.int64)
        with np.errstate(over="ignore"):
            moved = (ordered(codes[where]).astype(np.int64) + step).astype(f"i{codes.dtype.itemsize}")
        codes[where] = ordered(moved.view(code)).view(code)
        yield codes
    old.release()


def _sha256(entry: Entry) -> str:
    sha = hashlib.sha256()
    for start in range(0, entry.count, BLOCK):
        sha.update(entry.read(start, min(start + BLOCK, entry.count)).tobytes())
    return sha.hexdigest()


def _copy_beside(origin: Source, made: Path) -> None:
    """Copy what lies beside the base's weights: configurations and tokenizers, no weights and no index of them."""
    made.mkdir()
    root = Path(origin.path)
    if not root.is_dir():
        return
    for path in sorted(root.rglob("*")):
        kept = path.suffix in (".json", ".txt", ".model", ".jinja") and not path.name.endswith(".index.json")
        inside = path.relative_to(root).parts
        if (
            path.is_file()
            and kept
            and path.suffix not in ENDINGS
            and len(inside) <= 2
            and path.stat().st_size <= 64 * _MOST_JSON
        ):
            target = made.joinpath(*inside)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
