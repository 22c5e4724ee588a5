"""The tensors of two checkpoints side by side, and everything that has no counterpart."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.errors import ModelError
from align.sparsity.adapters import merged, plain
from align.sparsity.formats import FORMATS, QUANTISED, Format
from align.sparsity.sources import Entry, Side, Source, label, open_source

BUFFER = re.compile(r"(inv_freq|running_mean|running_var|num_batches_tracked|position_ids|masked_bias)$")
RESIZED = re.compile(r"(embed|lm_head|wte|vocab|shared|score)", re.IGNORECASE)


@dataclass(frozen=True)
class TensorPair:
    """One tensor on both sides, in the coarser of the two formats where these differ.

    Args:
        count: entries that both have; a resized vocabulary is compared over its common rows.
        masters: the same tensor as the optimizers hold it, in fp32, where the tuned side says; the base's weights as
            stored where it has no masters.
    """

    name: str
    format: Format
    shape: tuple[int, ...]
    count: int
    base: Entry
    tuned: Entry
    masters: TensorPair | None = None

    @property
    def mixed(self) -> bool:
        """Whether the two sides are stored in different formats."""
        return self.base.dtype != self.tuned.dtype

    def read(self, start: int, stop: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the codes of both sides in `format`; a finer side is rounded to it, ties to even."""
        return self._codes(self.base, start, stop), self._codes(self.tuned, start, stop)

    def read_exact(self, start: int, stop: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the exact values of both sides."""
        sides = (self.base, self.tuned)
        base, tuned = (FORMATS[side.dtype].values(side.read(start, stop)) for side in sides)
        return base, tuned

    def _codes(self, side: Entry, start: int, stop: int) -> NDArray[Any]:
        return self.format.of(side.dtype, side.read(start, stop))

    def release(self) -> None:
        """Let the pages of both sides go."""
        self.base.release()
        self.tuned.release()


@dataclass
class Pairing:
    """Two checkpoints matched, and what could not be.

    Args:
        missing, extra: names in the base only, and in the tuned model only, with their numbers of entries.
        renamed: base name to tuned name, of pairs whose names differ.
        tied: names that share another's storage or are tied by the configuration; counted once.
        untied: names that the base ties and the tuned model stores apart, or the other way round.
        retyped: names stored in two formats, with both.
        resized: names of which only common rows are compared, with both shapes.
        reshaped: names whose shapes differ otherwise; not compared.
        left_out: buffers and integer tensors, with whether their bytes agree.
        form: the format that every tensor is compared in, where one was asked for.
    """

    base: Source
    tuned: Source
    pairs: list[TensorPair] = field(default_factory=list)
    missing: dict[str, int] = field(default_factory=dict)
    extra: dict[str, int] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    tied: list[str] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)
    retyped: dict[str, list[str]] = field(default_factory=dict)
    resized: dict[str, list[list[int]]] = field(default_factory=dict)
    reshaped: dict[str, list[list[int]]] = field(default_factory=dict)
    left_out: dict[str, bool] = field(default_factory=dict)
    form: str = ""

    @property
    def coverage(self) -> float:
        """The share of the larger side's entries that are compared."""
        compared = sum(pair.count for pair in self.pairs)
        lost = sum(math.prod(b) for b, _ in self.reshaped.values())
        lost_tuned = sum(math.prod(t) for _, t in self.reshaped.values())
        rest = max(sum(self.missing.values()) + lost, sum(self.extra.values()) + lost_tuned)
        return compared / (compared + rest) if compared + rest else 1.0

    def iter_tensors(self) -> Iterator[TensorPair]:
        """Go through the pairs in the order in which the base lies on the disk."""
        yield from sorted(self.pairs, key=lambda pair: (pair.base.file, pair.base.offset, pair.name))


def load_pair(base: Side, tuned: Side, *, form: str = "") -> Pairing:
    """Open two checkpoints and match their tensors by name, then by name without wrappers' prefixes.

    An adapter is compared merged into the other side.

    Args:
        form: a name in `FORMATS` that both sides are brought to; the coarser of a tensor's two when empty.

    Raises:
        ModelError: a side that cannot be read, quantised weights, or models of which less than half is common.
    """
    first, second = open_source(base), open_source(tuned)
    if first.adapter:
        raise ModelError(
            "The base is an adapter", where=label(base), do="Give the model that both were trained from as BASE"
        )
    if second.adapter:
        second = merged(first, second, form)
    found = Pairing(first, second, form=form)
    left, right = dict(first.entries), dict(second.entries)
    for source, own, other in (
        (first, left, second),
        (second, right, first),
    ):  # tied on one side: compared all the same
        own |= {alias: own[name] for alias, name in source.aliases.items() if name in own and alias in other.entries}
    _strip_component(left, right)
    names = {name: name for name in left if name in right}
    rest = {plain(name): name for name in right if name not in names}
    for name in [n for n in left if n not in names]:
        if (other := rest.get(plain(name))) is not None:
            names[name] = other
            found.renamed[name] = other
    _sort_out_tied(found, left, right, names)
    for name, other in names.items():
        _match(found, name, left[name], right[other])
    found.pairs = [_with_masters(found, pair, names[pair.name]) for pair in found.pairs]
    taken = set(names.values())
    found.missing = {name: e.count for name, e in left.items() if name not in names and _matters(name, e)}
    found.extra = {name: e.count for name, e in right.items() if name not in taken and _matters(name, e)}
    _require_comparable(found)
    return found


def _strip_component(left: dict[str, Entry], right: dict[str, Entry]) -> None:
    """Compare one component of a pipeline with a folder of that component alone."""
    for pipeline, single in ((left, right), (right, left)):
        if any("/" in name for name in pipeline) and not any("/" in name for name in single):
            parts = {name.partition("/")[0] for name in pipeline}
            best = max(
                parts, key=lambda p: sum(n.partition("/")[2] in single for n in pipeline if n.startswith(p + "/"))
            )
            kept = {n.partition("/")[2]: e for n, e in pipeline.items() if n.startswith(best + "/")}
            pipeline.clear()
            pipeline.update(kept)


def _sort_out_tied(found: Pairing, left: dict[str, Entry], right: dict[str, Entry], names: dict[str, str]) -> None:
    """Drop what is stored or tied under another name, and say where only one side ties it."""
    both = found.base.tied and found.tuned.tied
    for source, other, own in ((found.base, found.tuned, left), (found.tuned, found.base, right)):
        for alias in source.aliases:
            (found.untied if alias in other.entries else found.tied).append(alias)
        for head in [name for name in own if plain(name) == "lm_head.weight" and (source.tied or other.tied)]:
            (found.tied if both else found.untied).append(head)
            if both:
                del own[head]
    for name in [name for name, other in names.items() if name not in left or other not in right]:
        del names[name]
    found.tied, found.untied = sorted(set(found.tied)), sorted(set(found.untied))


def _match(found: Pairing, name: str, base: Entry, tuned: Entry) -> None:
    if BUFFER.search(name) or base.dtype not in FORMATS or tuned.dtype not in FORMATS:
        found.left_out[name] = _same_bytes(base, tuned)
        return
    count, shape = base.count, base.shape
    if base.shape != tuned.shape:
        common = len(base.shape) == len(tuned.shape) >= 1 and base.shape[1:] == tuned.shape[1:]
        shapes = [list(base.shape), list(tuned.shape)]
        if not (common and RESIZED.search(name)):
            found.reshaped[name] = shapes
            return
        found.resized[name] = shapes
        shape = (min(base.shape[0], tuned.shape[0]), *base.shape[1:])
        count = math.prod(shape)
    kinds = {base.dtype, tuned.dtype}
    if len(kinds) > 1:
        found.retyped[name] = [base.dtype, tuned.dtype]
    # Neither of bf16 and fp16 is the coarser; both are exact in fp32.
    form = (
        "F32" if kinds == {"BF16", "F16"} else min(kinds, key=lambda kind: (FORMATS[kind].bits, FORMATS[kind].mantissa))
    )
    found.pairs.append(TensorPair(name, FORMATS[found.form or form], shape, count, base, replace(tuned)))


def _with_masters(found: Pairing, pair: TensorPair, other: str) -> TensorPair:
    """Add what the optimizers hold of a pair, where that is finer than what is compared; adapters have none of it."""
    if found.tuned.layout.startswith("adapter"):
        return pair
    base = found.base.masters.get(pair.name, pair.base)
    tuned = found.tuned.masters.get(other, pair.tuned)
    if FORMATS[tuned.dtype].bits <= pair.format.bits or pair.format.bits != 16 or base.shape != tuned.shape:
        return pair
    return replace(pair, masters=TensorPair(pair.name, FORMATS["F32"], pair.shape, pair.count, base, tuned))


def _same_bytes(base: Entry, tuned: Entry) -> bool:
    if base.dtype != tuned.dtype or base.shape != tuned.shape:
        return False
    step = 1 << 17
    return all(
        np.array_equal(base.read(a, min(a + step, base.count)), tuned.read(a, min(a + step, base.count)))
        for a in range(0, base.count, step)
    )


def _matters(name: str, entry: Entry) -> bool:
    return not BUFFER.search(name) and entry.dtype in FORMATS


def _require_comparable(found: Pairing) -> None:
    for source in (found.base, found.tuned):
        codes = [
            n for n, e in source.entries.items()
            if (e.dtype in QUANTISED and len(e.shape) > 1) or n.endswith(("qweight", "weight_packed"))
        ]  # fmt: skip
        if codes or source.config.get("quantization_config"):
            raise ModelError(
                "Quantised weights do not compare by their codes", where=source.path,
                why=f"the scale of {codes[0]} lies elsewhere" if codes else "its config has a quantization_config",
                do="Dequantise both sides, and compare those",
            )  # fmt: skip
    if not found.base.entries or not found.tuned.entries:
        empty = found.base if not found.base.entries else found.tuned
        raise ModelError("A checkpoint holds no tensor", where=empty.path)
    if not found.pairs and found.coverage == 1:
        raise ModelError(
            "There are no floating-point weights to compare", where=f"{found.base.path} and {found.tuned.path}",
            why=f"what both have are integers or buffers, such as {next(iter(found.left_out), 'none')}",
        )  # fmt: skip
    if found.coverage < 0.5 or not found.pairs:
        odd = next(iter([*found.reshaped, *found.missing, *found.extra]), "")
        shapes = (
            f", whose shapes are {found.reshaped[odd][0]} and {found.reshaped[odd][1]}" if odd in found.reshaped else ""
        )
        raise ModelError(
            "These are different models", where=f"{found.base.path} and {found.tuned.path}",
            why=f"{found.coverage:.0%} of the entries have a counterpart; {odd or 'no float tensor'}{shapes} has none",
            do="Give a base and a model that was trained from it",
        )  # fmt: skip
