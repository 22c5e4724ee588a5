"""Which weights moved, as bits on the disk; how two runs' masks overlap, and how much they would by chance.

Of every tensor a mask file holds `NAME` (bits, lowest first, of entries whose code changed), `NAME::up` (of those
that grew), `NAME::exponents` (entries of W0 by biased exponent, and those of them that changed), `NAME::powers` (the
same of powers of two alone), `NAME::format` they were compared in, and `NAME::sha256` of W0 in it. The histograms are
all that the null by magnitude needs. Powers of two are strata of their own: the value next to them towards zero is only
half a spacing away, so every run moves them more often than their neighbours of the same exponent.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.errors import ConfigError, DataError
from align.seeding import seed as derive_seed
from align.sparsity.compare import Comparison, compare
from align.sparsity.container import SafetensorsWriter, read_container, whole
from align.sparsity.formats import FORMATS, Codes, Format
from align.sparsity.measure import CHUNK, Counts, Measures
from align.sparsity.nulls import overlap_null
from align.sparsity.pairs import TensorPair, load_pair
from align.sparsity.sources import Side, Source, label, open_source

NULLS = ("uniform", "per_tensor", "by_magnitude")
MATCHES = ("tensor", "magnitude")
Bits = NDArray[np.uint8]


class MaskSink:
    """Writes the mask of a comparison as its codes go by."""

    def __init__(self, writer: SafetensorsWriter) -> None:
        self._writer = writer
        self._up: list[Bits] = []

    def begin(self, pair: TensorPair) -> None:
        """A tensor begins."""
        self._pair, self._up, self._sha = pair, [], hashlib.sha256()
        self._powers = np.zeros((2, pair.format.exponents), np.int64)
        self._writer.begin(pair.name, "U8", (-(-pair.count // 8),))

    def add(self, old: Codes, new: Codes) -> None:
        """Its next codes; chunks hold a multiple of eight, but for the last."""
        self._sha.update(np.ascontiguousarray(old).tobytes())
        self._writer.write(np.packbits(old != new, bitorder="little"))
        form = self._pair.format
        power = (old & old.dtype.type((1 << form.mantissa) - 1)) == 0
        for row, held in enumerate((power, power & (old != new))):
            self._powers[row] += np.bincount(form.exponent(old[held]), minlength=form.exponents)
        low, high = form.magnitude(old), form.magnitude(new)
        below, under = old >> (form.bits - 1) != 0, new >> (form.bits - 1) != 0
        grew = np.where(below, ~under & ((low | high) != 0) | under & (high < low), ~under & (high > low))
        self._up.append(np.packbits(grew, bitorder="little"))

    def end(self, found: Measures) -> None:
        """It has ended."""
        name = self._pair.name
        self._writer.add(f"{name}::up", np.concatenate([np.empty(0, np.uint8), *self._up]))
        self._writer.add(f"{name}::exponents", np.stack([found.exponents, found.exponents_changed]))
        self._writer.add(f"{name}::powers", self._powers)
        self._writer.add_bytes(f"{name}::format", self._pair.format.name.encode())
        self._writer.add(f"{name}::sha256", np.frombuffer(self._sha.digest(), np.uint8))


def write_mask(base: Side, tuned: Side, path: str | Path, *, form: str = "", structure: bool = False) -> Comparison:
    """Compare two checkpoints, in `form` where one is given, and write which entries changed to `path`."""
    with SafetensorsWriter(path, {"align": "mask", "base": label(base), "tuned": label(tuned)}) as writer:
        return compare(base, tuned, form=form, sinks=[MaskSink(writer)], structure=structure)


def write_control(mask: str | Path, base: str | Path, path: str | Path, *, match: str, seed: int) -> dict[str, Any]:
    """Write a random mask that has as many entries of every tensor as `mask` has, and return counts.

    Args:
        mask: the mask to be compared with.
        base: the model that it was made from.
        match: "tensor" draws among all entries of a tensor, "magnitude" among those of each exponent of W0, so that the
            control names as many small weights and as many large ones.
        seed: of the draw, with the name of each tensor.

    Raises:
        ConfigError: another `match`.
        DataError: a mask of another base.
    """
    if match not in MATCHES:
        raise ConfigError(f"There is no match {match!r}", do=f"Choose one of {', '.join(MATCHES)}")
    given, source = read_mask(mask), open_source(base)
    entries = {name: source.entries.get(name) for name in given.names}
    if all("/" in name for name in source.entries):  # a pipeline: the mask is of one of its components
        entries = {n: next((e for k, e in source.entries.items() if k.partition("/")[2] == n), None) for n in entries}
    about = {"align": "mask", "base": str(base), "control_of": str(mask), "match": match, "seed": str(seed)}
    changed = common = 0
    with SafetensorsWriter(path, about) as writer:
        for name, entry in entries.items():
            form, (total, many) = given.format(name), given.exponents(name)
            if entry is None or entry.count != int(total.sum()):
                raise DataError("A mask is of another model", where=str(mask), why=f"{base} has no such {name}")
            codes = form.of(entry.dtype, entry.read(0, entry.count))
            if hashlib.sha256(np.ascontiguousarray(codes).tobytes()).digest() != given.base_sha256(name):
                raise DataError("A mask is of another base", where=str(mask), why=f"{name} differs in {base}")
            if not np.array_equal(np.bincount(form.exponent(codes), minlength=form.exponents), total):
                raise DataError("A mask does not fit its own counts", where=f"{mask}, {name}")
            drawn = _draw(form.exponent(codes), many, match, np.random.default_rng(derive_seed(seed, name, "control")))
            bits = np.packbits(drawn, bitorder="little")
            writer.add(name, bits)
            found = np.bincount(form.exponent(codes[drawn]), minlength=form.exponents)
            writer.add(f"{name}::exponents", np.stack([total, found.astype(np.int64)]))
            writer.add_bytes(f"{name}::format", form.name.encode())
            writer.add(f"{name}::sha256", np.frombuffer(given.base_sha256(name), np.uint8))
            changed += int(many.sum())
            common += count_overlap(bits, whole(given.source.entries[name]))
            entry.release()
    parameters = sum(int(given.exponents(name)[0].sum()) for name in given.names)
    return {"parameters": parameters, "chosen": changed, "density": changed / max(parameters, 1), "common": common}


def _draw(exponents: NDArray[np.int64], many: Counts, match: str, random: np.random.Generator) -> NDArray[np.bool_]:
    drawn = np.zeros(len(exponents), bool)
    if match == "tensor":
        drawn[random.choice(len(exponents), int(many.sum()), replace=False)] = True
        return drawn
    order = np.argsort(exponents, kind="stable")
    ends = np.cumsum(np.bincount(exponents, minlength=len(many)))
    for exponent in np.flatnonzero(many):
        group = order[ends[exponent - 1] if exponent else 0 : ends[exponent]]
        drawn[group[random.choice(len(group), int(many[exponent]), replace=False)]] = True
    return drawn


@dataclass
class Mask:
    """A mask file: bits by tensor, mapped."""

    path: str
    source: Source

    @property
    def names(self) -> list[str]:
        """Its tensors."""
        return [name for name in self.source.entries if "::" not in name]

    def exponents(self, name: str) -> NDArray[np.int64]:
        """Return entries of W0, and those that changed, by biased exponent."""
        return self._table(f"{name}::exponents")

    def strata(self, name: str) -> NDArray[np.int64]:
        """Return the same by exponent, powers of two apart."""
        powers = self._table(f"{name}::powers")
        return np.concatenate([self.exponents(name) - powers, powers], axis=1)

    def _table(self, key: str) -> NDArray[np.int64]:
        entry = self.source.entries[key]
        return whole(entry).view(np.int64).reshape(entry.shape)

    def format(self, name: str) -> Format:
        """Return the format that it was compared in."""
        entry = self.source.entries.get(f"{name}::format")
        found = "" if entry is None else whole(entry).tobytes().decode("ascii", "replace")
        if found not in FORMATS or self.exponents(name).shape != (2, FORMATS[found].exponents):
            raise DataError(
                "A mask does not say what it was compared in", where=f"{self.path}, {name}",
                do="Write it again with `align sparsity compare --mask`",
            )  # fmt: skip
        return FORMATS[found]

    def chosen(self, name: str) -> NDArray[np.int64]:
        """Return the places of the entries that it names, in the flattened tensor."""
        count = int(self.exponents(name)[0].sum())
        return np.flatnonzero(np.unpackbits(whole(self.source.entries[name]), count=count, bitorder="little"))

    def base_sha256(self, name: str) -> bytes:
        """Return the hash of the codes of W0."""
        return whole(self.source.entries[f"{name}::sha256"]).tobytes()


def read_mask(path: str | Path) -> Mask:
    """Open a mask file.

    Raises:
        ModelError, DataError: not a readable mask file.
    """
    source, _ = read_container(path, "mask")
    found = Mask(str(path), source)
    for name in found.names:
        bits, total = source.entries[name].count, int(found.exponents(name)[0].sum())
        if bits != -(-total // 8) or (f"{name}::up" in source.entries and source.entries[f"{name}::up"].count != bits):
            raise DataError("A mask does not fit its own counts", where=f"{path}, {name}")
    return found


def bits_set(bits: Bits) -> int:
    """Return how many bits are set, in words of eight bytes."""
    many = len(bits) // 8 * 8
    words = bits[:many].view(np.uint64)
    return int(_popcount(words).sum(dtype=np.int64)) + int(np.unpackbits(bits[many:]).sum())


def _popcount(words: NDArray[np.uint64]) -> NDArray[Any]:
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(words)
    # numpy 1.26: the usual sums of neighbouring bits.
    m1, m2, m4 = (np.uint64(m) for m in (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F))
    w = words - ((words >> np.uint64(1)) & m1)
    w = (w & m2) + ((w >> np.uint64(2)) & m2)
    w = (w + (w >> np.uint64(4))) & m4
    return (w * np.uint64(0x0101010101010101)) >> np.uint64(56)


def count_overlap(first: Bits, second: Bits) -> int:
    """Return how many bits are set in both, in chunks that stay in the cache."""
    step = 1 << 17
    return sum(bits_set(first[a : a + step] & second[a : a + step]) for a in range(0, len(first), step))


def overlap(base: str | Path | None, runs: Sequence[str | Path]) -> dict[str, Any]:
    """Compare which weights two or more runs from one base moved.

    One-sided |I1 n I2| / |I1| and / |I2|, Jaccard |I1 n I2| / |I1 u I2|, Dice 2 |I1 n I2| / (|I1| + |I2|), the share of
    common entries that moved the same way, the mask drift |I1 xor I2| / n (SAD), and, of checkpoints, the cosine of the
    two visible updates, over all entries (`cosine`) and over the common ones (`cosine_common`). Each overlap stands
    beside what independent masks of the same densities would have, uniformly, within each tensor, and within each
    tensor and exponent of W0 (powers of two apart), with z = (n12 - E) / sqrt(Var).

    Args:
        base: the common start; not needed where all `runs` are mask files.
        runs: checkpoints or mask files.

    Raises:
        DataError: fewer than two runs, or masks of different bases.
    """
    if len(runs) < 2:
        raise DataError("An overlap needs two runs or more", do="Give another checkpoint or mask file")
    with tempfile.TemporaryDirectory(prefix="align-masks-") as folder:
        masks, checkpoints = [], []
        for i, run in enumerate(runs):
            if is_mask(run):
                masks.append(read_mask(run))
                continue
            if base is None:
                raise DataError("A checkpoint has no mask without its base", where=str(run), do="Give --base BASE")
            path = Path(folder) / f"{i}.safetensors"
            write_mask(base, run, path)
            masks.append(Mask(str(run), read_mask(path).source))
            checkpoints.append(i)
        pairs = []
        for i, j in itertools.combinations(range(len(masks)), 2):
            found = _overlap(masks[i], masks[j])
            known = base is not None and {i, j} <= set(checkpoints)
            whole_, common = _cosines(base, runs[i], runs[j]) if known else (None, None)
            pairs.append(
                {"first": str(runs[i]), "second": str(runs[j]), **found, "cosine": whole_, "cosine_common": common}
            )
    return {"base": None if base is None else str(base), "runs": [str(run) for run in runs], "pairs": pairs}


def is_mask(path: str | Path) -> bool:
    """Return whether a path is a mask file, by its first bytes."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(8 + 256)
    return b'"align": "mask"' in head


def _overlap(first: Mask, second: Mask) -> dict[str, Any]:
    names = [name for name in first.names if name in set(second.names)]
    strata, both, same = [], 0, 0
    directed = all(f"{name}::up" in mask.source.entries for mask in (first, second) for name in names)
    for name in names:
        if first.base_sha256(name) != second.base_sha256(name):
            raise DataError(
                "Two masks have different bases",
                where=f"{first.path} and {second.path}",
                why=name,
                do="Give runs from one base",
            )
        a, b = first.source.entries[name], second.source.entries[name]
        step = CHUNK
        for start in range(0, a.count, step):
            stop = min(start + step, a.count)
            common = a.read(start, stop) & b.read(start, stop)
            both += bits_set(common)
            if directed:
                up, other = (mask.source.entries[f"{name}::up"].read(start, stop) for mask in (first, second))
                same += bits_set(common & ~(up ^ other))
        apart = all(f"{name}::powers" in mask.source.entries for mask in (first, second))
        (n, n1), (_, theirs) = (mask.strata(name) if apart else mask.exponents(name) for mask in (first, second))
        strata.append((n, n1, theirs))
    if not strata:
        raise DataError("Two masks have no tensor in common", where=f"{first.path} and {second.path}")
    n, n1, n2 = (int(sum(s[k].sum() for s in strata)) for k in range(3))
    per_tensor = [tuple(np.array([part.sum()]) for part in s) for s in strata]
    models = {"uniform": [tuple(np.array([v]) for v in (n, n1, n2))], "per_tensor": per_tensor, "by_magnitude": strata}
    nulls = {}
    for kind in NULLS:
        mean, variance = overlap_null(models[kind])
        z = (both - mean) / math.sqrt(variance) if variance > 0 else None
        nulls[kind] = {"expected": mean, "one_sided": [_of(mean, n1), _of(mean, n2)], "z": z}
    return {
        "parameters": n, "changed": [n1, n2], "density": [_of(n1, n), _of(n2, n)], "common": both,
        "one_sided": [_of(both, n1), _of(both, n2)], "jaccard": _of(both, n1 + n2 - both),
        "dice": _of(2 * both, n1 + n2), "sign_agreement": _of(same, both) if directed else None,
        "mask_drift": _of(n1 + n2 - 2 * both, n),
        "nulls": nulls,
        "left_out": sorted(set(first.names) ^ set(second.names)),
    }  # fmt: skip


def _of(part: float, whole_: float) -> float | None:
    return part / whole_ if whole_ else None


def _cosines(base: str | Path, first: str | Path, second: str | Path) -> tuple[float | None, float | None]:
    """Return the cosine of two visible updates, over finite entries, and that over entries which both changed."""
    one, two = load_pair(base, first), load_pair(base, second)
    others = {pair.name: pair for pair in two.pairs}
    dot, squares = 0.0, np.zeros(4)
    for pair in one.iter_tensors():
        other = others.get(pair.name)
        if other is None or other.count != pair.count:
            continue
        for start in range(0, pair.count, CHUNK):
            stop = min(start + CHUNK, pair.count)
            (w, x), (v, y) = pair.read_exact(start, stop), other.read_exact(start, stop)
            with np.errstate(invalid="ignore", over="ignore"):
                d, e = x - w, y - v
            held = np.isfinite(d) & np.isfinite(e)
            d, e = d[held], e[held]
            both = (d != 0) & (e != 0)
            dot, squares = dot + float(d @ e), squares + np.array([d @ d, e @ e, d[both] @ d[both], e[both] @ e[both]])
        pair.release()
        other.release()
    norms = np.sqrt([squares[0] * squares[1], squares[2] * squares[3]])
    return tuple(float(dot / norm) if norm else None for norm in norms)


def as_text(found: dict[str, Any]) -> str:
    """Return overlaps beside their nulls, as people read them."""
    lines = []
    for pair in found["pairs"]:
        sides = " / ".join("–" if v is None else f"{100 * v:.1f} %" for v in pair["one_sided"])
        lines.append(f"{pair['first']} and {pair['second']}: {sides} of what each moved, the other moved too")
        for kind in reversed(NULLS):
            null = pair["nulls"][kind]
            chance = " / ".join("–" if v is None else f"{100 * v:.1f} %" for v in null["one_sided"])
            z = "–" if null["z"] is None else f"{null['z']:+.1f}"
            lines.append(f"  by chance, {kind.replace('_', ' ')}: {chance}, z {z}")
        agree, cosine = pair["sign_agreement"], pair["cosine"]
        lines.append(
            f"  same direction {'–' if agree is None else f'{100 * agree:.1f} %'}, Jaccard {pair['jaccard'] or 0:.3f}, "
            f"Dice {pair['dice'] or 0:.3f}, masks differ at {100 * (pair['mask_drift'] or 0):.2f} %"
            + ("" if cosine is None else f", cosine {cosine:.4f}")
            + ("" if pair["cosine_common"] is None else f" ({pair['cosine_common']:.4f} of common entries)")
        )
        if pair["left_out"]:
            lines.append(f"  left out, as one side lacks them: {len(pair['left_out'])} tensors")
    return "\n".join(lines)
