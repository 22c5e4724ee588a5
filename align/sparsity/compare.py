"""Two checkpoints compared in one streaming pass, and the result as numbers that say what they are.

Every entry is read once, in the order of the base on the disk; no tensor is ever loaded whole.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from align.errors import ConfigError, ModelError
from align.sparsity.formats import FORMATS, Codes
from align.sparsity.masters import MasterMeasures, describe_masters, master_notes, masters_as_text, measure_masters
from align.sparsity.measure import CHUNK, ULP_BINS, Kernels, Measures, Pass, Scratch, kernels, new_scratch
from align.sparsity.nulls import expected_identical
from align.sparsity.pairs import Pairing, TensorPair, load_pair
from align.sparsity.sources import Side
from align.sparsity.structure import (
    Structure,
    describe_structure,
    measure_structure,
    structure_as_text,
    structure_row,
)

LEVELS = ("full", "bits")
POWERS = tuple(range(-30, 3))
BLIND = 0.05
"""Share of weights whose spacing is within a tolerance, above which the tolerance cannot tell equal from moved."""
_LAYER = re.compile(r"^(.*?(?:^|[./])\d+)[.](.+)$")
_KINDS = (
    ("modulation", r"norm\w*\.linear|adaln|modulation"),
    ("norm", r"norm|ln_|layernorm|\bln\b"), ("embedding", r"embed|wte|wpe"), ("head", r"lm_head|proj_out|score"),
    ("attention", r"attn|attention|\bq\b|q_proj|k_proj|v_proj|o_proj|qkv|to_q|to_k|to_v|to_out"),
    ("mlp", r"mlp|ffn|feed_forward|\bff\b|fc\d|gate_proj|up_proj|down_proj|dense"), ("convolution", r"conv"),
)  # fmt: skip


class Sink(Protocol):
    """What else is made of the codes as they go by: a mask file, for one."""

    def begin(self, pair: TensorPair) -> None:
        """A tensor begins."""

    def add(self, old: Codes, new: Codes) -> None:
        """Its next codes."""

    def end(self, found: Measures) -> None:
        """It has ended."""


@dataclass(frozen=True)
class Comparison:
    """What two checkpoints have in common, tensor by tensor, and what it took to find out."""

    pairing: Pairing
    tensors: list[tuple[TensorPair, Measures]]
    level: str
    kernels: str
    threads: int
    seconds: float
    bytes_read: int
    peak_anonymous_mb: float
    masters: list[MasterMeasures] = field(default_factory=list)
    structure: dict[str, Structure] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the whole result as JSON values; shares are fractions of 1."""
        return describe(self)


def compare(
    base: Side,
    tuned: Side,
    *,
    level: str = "full",
    form: str = "",
    threads: int | None = None,
    kernel: str = "auto",
    sinks: Sequence[Sink] = (),
    structure: bool = False,
) -> Comparison:
    """Compare two checkpoints.

    Args:
        base, tuned: files or folders, see `align.sparsity.sources.open_source`, or a model in memory, as an `nn.Module`
            or its state_dict, which is read where it is; or what was
            opened; an adapter as `tuned` is merged.
        level: "full", or "bits" for the bit-identical share alone, at the speed of memory.
        form: compare in this format, such as "BF16"; in the coarser of a tensor's two when empty.
        threads: tensors compared at once; every core but at most eight by default, one where there are sinks.
        kernel: "numba", "numpy", or "auto".
        structure: also count channels, attention heads and n:m groups, in a second pass over every matrix.

    Raises:
        ModelError: a side that cannot be read, quantised weights, or different models.
    """  # fmt: skip
    if level not in LEVELS:
        raise ConfigError(f"There is no level {level!r}", do=f"Choose one of {', '.join(LEVELS)}")
    if form and form not in FORMATS:
        raise ConfigError(f"There is no format {form!r}", do=f"Choose one of {', '.join(FORMATS)}")
    if structure and level != "full":
        raise ConfigError("Structure needs the whole comparison", where=f"level {level!r}", do='Use level "full"')
    began = time.perf_counter()
    pairing, use = load_pair(base, tuned, form=form), kernels(kernel)
    many = 1 if sinks else max(1, threads or min(os.cpu_count() or 1, 8))
    peak, scratches = [anonymous_mb()], [new_scratch() for _ in range(many)]

    def note() -> None:
        peak[0] = max(peak[0], anonymous_mb())

    masters: dict[str, MasterMeasures | None] = {}
    shapes: dict[str, Structure | None] = {}
    configs = (pairing.base.config, pairing.tuned.config)

    def one(pair: TensorPair) -> tuple[TensorPair, Measures]:
        scratch = scratches.pop()
        try:
            found = _measure(pair, use, scratch, level, sinks, note)
            if level == "full":
                masters[pair.name] = measure_masters(pair, found, use, scratch)
                shapes[pair.name] = measure_structure(pair, found, configs) if structure else None
        finally:
            scratches.append(scratch)
        note()
        return pair, found

    ordered = list(pairing.iter_tensors())
    if many == 1:
        tensors = [one(pair) for pair in ordered]
    else:
        with ThreadPoolExecutor(many) as pool:
            tensors = list(pool.map(one, ordered))
    read = sum(
        p.base.bytes // max(p.base.count, 1) * p.count + p.tuned.bytes // max(p.tuned.count, 1) * p.count
        for p in ordered
    )
    names = [pair.name for pair in ordered if level == "full"]  # in an order that no thread decides
    held = [m for name in names if (m := masters[name]) is not None]
    found = {name: s for name in names if (s := shapes[name]) is not None}
    return Comparison(pairing, tensors, level, use.name, many, time.perf_counter() - began, read, peak[0], held, found)


def _measure(
    pair: TensorPair, use: Kernels, scratch: Scratch, level: str, sinks: Sequence[Sink], note: Callable[[], None]
) -> Measures:
    for sink in sinks:
        sink.begin(pair)
    work = Pass(pair.format, use, scratch) if level == "full" else None
    different = exactly = 0
    step = CHUNK if work or sinks else 4 * CHUNK
    for start in range(0, pair.count, step):
        stop = min(start + step, pair.count)
        old, new = pair.read(start, stop)
        if work is None:
            different += use.count(old, new)
        else:
            work.add(old, new)
        if pair.mixed:
            a, b = pair.read_exact(start, stop)
            exactly += int(np.count_nonzero(a == b))
        for sink in sinks:
            sink.add(old, new)
        if start % (64 * step) == 0:
            note()
    found = work.finish() if work else Measures(pair.format.name, parameters=pair.count, different=different)
    found.equal_exactly = exactly
    for sink in sinks:
        sink.end(found)
    pair.release()
    return found


def anonymous_mb() -> float:
    """Return the process's anonymous resident memory in MB; NaN where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1000
    return math.nan


def layer_of(name: str) -> tuple[str, str]:
    """Return the layer a tensor belongs to, up to its first number, and what it is there."""
    match = _LAYER.match(name)
    stem = name.removesuffix(".weight")
    return (match[1], match[2].removesuffix(".weight")) if match else ("(outside layers)", stem)


def kind_of(name: str) -> str:
    """Return the type of module a tensor belongs to, by its name."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def pooled(parts: Iterable[Measures]) -> list[Measures]:
    """Return the sums by format."""
    found: dict[str, Measures] = {}
    for part in parts:
        found[part.format] = found[part.format] + part if part.format in found else part
    return list(found.values())


def summary(parts: Sequence[Measures], level: str = "full") -> dict[str, Any]:
    """Return the shares and norms of tensors together."""
    sums = pooled(parts)
    n = sum(m.parameters for m in sums)
    share = {"parameters": n, "bit_identical": _share(n - sum(m.different for m in sums), n)}
    if level == "bits":
        return share
    visible = sum(m.different - m.zero_sign for m in sums)
    energy, base = sum(m.energy for m in sums), sum(m.base_energy for m in sums)
    rounding = math.sqrt(sum(_tuned_spacing(m) for m in sums)) / 2
    norm = math.sqrt(energy)
    return share | {
        "density": _share(visible, n),
        "sparsity_1e-5": _share(n - sum(m.beyond + m.nan for m in sums), n),
        "sparsity_authors_mode": _share(n - sum(m.beyond_authors for m in sums), n),
        "expected_bit_identical_if_dense": _expected(parts, n, aligned=True),
        "expected_bit_identical_if_dense_unaligned": _expected(parts, n, aligned=False),
        "sign_flips": _share(sum(m.sign_flips for m in sums), n),
        "norm": norm, "l1": sum(m.l1 for m in sums), "largest": max((m.largest for m in sums), default=0.0),
        "base_norm": math.sqrt(base), "relative_norm": norm / math.sqrt(base) if base else None,
        "rounding_norm": rounding, "precision_floor": rounding / norm if norm else None,
    }  # fmt: skip


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _expected(parts: Sequence[Measures], n: int, *, aligned: bool) -> float:
    total = 0.0
    for m in parts:
        finite = m.exponents.copy()
        finite[-1] = 0
        total += expected_identical(m.energy, finite, FORMATS[m.format].spacing(), aligned=aligned) + int(
            m.exponents[-1]
        )
    return total / n if n else 1.0


def _tuned_spacing(m: Measures) -> float:
    return float(np.sum(m.exponents_tuned[:-1] * FORMATS[m.format].spacing()[:-1] ** 2))


def ulp_histogram(parts: Sequence[Measures]) -> dict[str, int]:
    """Return changed entries by steps between codes; with "zero_sign" and "nan" they add up to all that changed."""
    counts = sum((m.ulp for m in parts), np.zeros(len(ULP_BINS), np.int64))
    found = dict(zip(ULP_BINS, counts.tolist(), strict=True))
    return {**found, "zero_sign": sum(m.zero_sign for m in parts), "nan": sum(m.nan for m in parts)}


def tolerance_curve(parts: Sequence[Measures]) -> list[dict[str, Any]]:
    """Return the share of entries with |E| <= tolerance at powers of two, and of weights too coarse to show less."""
    n = sum(m.parameters for m in parts)
    rows = []
    for power in POWERS:
        fine = sum(int(m.exponents[:-1][FORMATS[m.format].spacing()[:-1] <= 2.0**power].sum()) for m in parts)
        rows.append(
            {
                "tolerance": 2.0**power,
                "within": _share(sum(m.within(power) for m in parts), n),
                "blind": _share(fine, n) if n else 0.0,
            }
        )
    return rows


def describe(found: Comparison) -> dict[str, Any]:
    """Return a comparison as JSON values."""
    parts = [m for _, m in found.tensors]
    sums, pairing = pooled(parts), found.pairing
    if found.level == "full" and not sum(m.parameters for m in sums):
        raise ModelError("There is nothing to compare", where=pairing.base.path, why="every tensor is empty")
    kinds: dict[str, int] = {}
    for pair, _ in found.tensors:
        kinds[pair.format.name] = kinds.get(pair.format.name, 0) + pair.count
    result: dict[str, Any] = {
        "base": pairing.base.path, "tuned": pairing.tuned.path, "level": found.level,
        "dtype": max(kinds, key=lambda kind: kinds[kind], default=""), "dtypes": kinds, **summary(parts, found.level),
    }  # fmt: skip
    if found.level == "full":
        result |= {
            "ulp_histogram": ulp_histogram(sums),
            "tolerance_curve": tolerance_curve(sums),
            "top_energy": {f"{s:g}": _finite(_largest(sums).top_energy(s)) for s in (0.01, 0.05, 0.1, 0.2)},
            "nan": {"base": sum(m.nan_base for m in sums), "tuned": sum(m.nan_tuned for m in sums)},
            "infinite": sum(m.infinite for m in sums),
            "untouched": {
                "tensors": sum(not m.different for m in parts if m.parameters),
                "parameters": sum(m.parameters for m in parts if not m.different),
            },
            "masters": describe_masters(found.masters, summary([m.found for m in found.masters]))
            if found.masters
            else None,
            "structure": describe_structure(list(found.structure.values())) if found.structure else None,
            "layers": _grouped(found, lambda name: layer_of(name)[0]),
            "modules": _grouped(found, kind_of),
        }
    keys = ("missing", "extra", "renamed", "tied", "untied", "retyped", "resized", "reshaped", "left_out")
    result |= {
        "coverage": pairing.coverage, "keys": {key: getattr(pairing, key) for key in keys},
        "compared_in": pairing.form, "layout": {"base": pairing.base.layout, "tuned": pairing.tuned.layout},
        "training": pairing.tuned.training,
        "seconds": found.seconds, "bytes_read": found.bytes_read, "peak_anonymous_mb": _finite(found.peak_anonymous_mb),
        "kernels": found.kernels, "threads": found.threads,
        "per_tensor": [
            _row(pair, m, found.level)
            | ({"structure": structure_row(found.structure[pair.name])} if pair.name in found.structure else {})
            for pair, m in found.tensors
        ],
    }  # fmt: skip
    result["notes"] = notes(result)
    return result


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _largest(sums: Sequence[Measures]) -> Measures:
    """Return what the magnitudes of all formats add up to; their bins are the same."""
    whole = Measures(sums[0].format)
    for m in sums:
        whole.parameters += m.parameters
        whole.magnitude = whole.magnitude + m.magnitude
    return whole


def _grouped(found: Comparison, by: Any) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[Measures]] = {}
    for pair, m in found.tensors:
        groups.setdefault(by(pair.name), []).append(m)
    return {name: summary(parts) for name, parts in groups.items()}


def _row(pair: TensorPair, m: Measures, level: str) -> dict[str, Any]:
    row = {"name": pair.name, "shape": list(pair.shape), "dtype": pair.format.name, **summary([m], level)}
    if pair.mixed:
        row |= {"stored": [pair.base.dtype, pair.tuned.dtype], "equal_exactly": _share(m.equal_exactly, m.parameters)}
    return row


def notes(result: dict[str, Any]) -> list[str]:
    """Return what a reader must know before quoting a number of `result`, a sentence each."""
    found, keys = [], result["keys"]
    for key, what in (("missing", "are in the base only"), ("extra", "are in the tuned model only")):
        if keys[key]:
            found.append(
                f"{len(keys[key])} tensors ({sum(keys[key].values()):,} entries) {what} and were not compared."
            )
    if keys["reshaped"]:
        found.append(f"{len(keys['reshaped'])} tensors have two shapes and were not compared.")
    if keys["resized"]:
        found.append(f"{len(keys['resized'])} tensors were resized; only the rows that both have were compared.")
    if keys["untied"]:
        found.append(f"Tied on one side only: {', '.join(keys['untied'][:3])}.")
    if result["compared_in"]:
        found.append(f"Both sides were brought to {result['compared_in']} first, as a copy stored in it would be.")
    elif keys["retyped"]:
        found.append(
            f"{len(keys['retyped'])} tensors are stored in two formats; they were compared rounded to the coarser one. "
            "Rounding alone makes entries equal; per_tensor has the share that agrees exactly."
        )
    changed = [name for name, same in keys["left_out"].items() if not same]
    if changed:
        found.append(f"{len(changed)} buffers or integer tensors differ and are not counted: {', '.join(changed[:3])}.")
    if result["level"] == "bits":
        return found
    if result["nan"]["base"] or result["nan"]["tuned"]:
        found.append(
            f"{result['nan']['base']:,} entries of the base and {result['nan']['tuned']:,} of the tuned model are NaN."
        )
    if result["infinite"]:
        found.append(f"{result['infinite']:,} changes from or to infinity are left out of all norms.")
    found += master_notes(result["masters"]) if result["masters"] else []
    if result["bit_identical"] == 1:
        return [*found, "The two are bit-identical: nothing was trained, or nothing was large enough to be stored."]
    still = result["untouched"]
    if still["tensors"]:
        n, at_rest = result["parameters"], still["parameters"]
        found.append(
            f"{still['tensors']} tensors ({100 * at_rest / n:.1f} % of the weights) did not change at all, and "
            f"{100 * _share(round(result['bit_identical'] * n) - at_rest, n - at_rest):.2f} % of the others are "
            "bit-identical; the null is taken tensor by tensor, and expects no change in those at rest."
        )
    dense, from_master = (result[f"expected_bit_identical_if_dense{k}"] for k in ("", "_unaligned"))
    if FORMATS[result["dtype"]].bits == 16:
        found.append(
            f"Measured in {result['dtype']}: an update smaller than half the spacing of a weight leaves no trace. "
            f"A dense update of the same norm would leave {100 * dense:.1f} % bit-identical "
            f"(starting on values of the format; {100 * from_master:.1f} % from a finer master)."
        )
    floor = result["precision_floor"]
    if floor is not None and floor > 0.3:
        found.append(
            f"Rounding can hide an update of up to {floor:.2g} times the norm of what is seen (half the norm of all "
            "spacings): norms, concentration and any spectrum describe what is visible."
        )
    return found


def as_text(result: dict[str, Any]) -> str:
    """Return the headline and what belongs beside it, as people read it."""
    lines = [
        f"{100 * result['bit_identical']:.2f} % of {result['parameters']:,} weights are bit-identical "
        f"in {result['dtype']}"
    ]
    if result["level"] == "full":
        floor = result["precision_floor"]
        lines += [
            f"expected {100 * result['expected_bit_identical_if_dense']:.2f} % if a dense update of the same norm "
            f"were rounded ({100 * result['expected_bit_identical_if_dense_unaligned']:.2f} % from a finer master)",
            f"precision floor {'–' if floor is None else f'{floor:.2g} times the norm of the change'}",
            f"|change| <= 1e-5: {100 * result['sparsity_1e-5']:.2f} % exactly, "
            f"{100 * result['sparsity_authors_mode']:.2f} % in the arithmetic of {result['dtype']}",
            f"norm {result['norm']:.4g}, {100 * (result['relative_norm'] or 0):.3g} % of the base; "
            f"{100 * result['sign_flips']:.3g} % changed sign",
        ]
        lines += [masters_as_text(result["masters"])] if result["masters"] else []
        lines += structure_as_text(result["structure"]) if result["structure"] else []
    lines += [f"note: {note}" for note in result["notes"]]
    lines.append(f"{result['bytes_read'] / 1e9:.3g} GB in {result['seconds']:.2f} s")
    return "\n".join(lines)
