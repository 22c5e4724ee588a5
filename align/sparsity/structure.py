"""Where in a matrix the changes lie: channels, attention heads, and groups of m, beside what independence would give.

The null is that entries change independently, each with the chance that its tensor and the exponent of its W0 give:

    p_i = changed(e_i) / entries(e_i)

so that a channel of small weights, which shows more of any update, is not taken for one that was trained more. A
channel then has mean sum p_i and variance sum p_i (1 - p_i); a group of m has a Poisson-binomial law. Dispersion is
sum (n - mean)^2 / sum variance over channels: 1 under independence. The uniform null gives every entry of a tensor
the same p.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.sparsity.measure import CHUNK, Measures
from align.sparsity.pairs import TensorPair

GROUPS = ((1, 4), (2, 4), (4, 8))
"""n and m of the shares of groups of m consecutive inputs of which at most n changed."""
Array = NDArray[np.float64]
_ROLES = (
    ("rows", "query", r"(?:q|q_proj|to_q|query|add_q_proj)"), ("rows", "key", r"(?:k|k_proj|to_k|key|add_k_proj)"),
    ("rows", "value", r"(?:v|v_proj|to_v|value|add_v_proj)"),
    ("columns", "output", r"(?:o|o_proj|out_proj|to_out\.0|to_add_out)"),
)  # fmt: skip


@dataclass
class Channels:
    """Changed entries by channel, and their mean, variance and log chance of none under the null by magnitude."""

    size: int
    count: Array
    mean: Array
    variance: Array
    none: Array

    @classmethod
    def empty(cls, channels: int, size: int) -> Channels:
        """Return counters of `channels` channels of `size` entries."""
        return cls(size, *(np.zeros(channels) for _ in range(4)))

    def merged(self, by: int) -> Channels:
        """Return every `by` neighbours as one channel: the inputs of a convolution, the rows of a head."""
        parts = (a.reshape(-1, by).sum(1) for a in (self.count, self.mean, self.variance, self.none))
        return Channels(self.size * by, *parts)


@dataclass
class Structure:
    """What is counted of one matrix.

    Args:
        heads: by attention head, where the configuration gives their number; `role` says of what.
        groups: by m, of groups with 0..m changes: how many there are, would be by magnitude, and would be uniformly.
        kept, apart, energy: energy of the change that the best two of four neighbours keep, the same of entries that
            are no neighbours, and all of it.
    """

    rows: Channels
    columns: Channels
    heads: Channels | None = None
    role: str = ""
    groups: dict[int, Array] = field(default_factory=dict)
    kept: float = 0.0
    apart: float = 0.0
    energy: float = 0.0


def measure_structure(pair: TensorPair, found: Measures, configs: Sequence[Mapping[str, Any]] = ()) -> Structure | None:
    """Return the structure of a pair's changes, in a second pass over it; None of what is no matrix or is empty.

    Args:
        found: the measures of the first pass, which give the chances by exponent.
        configs: of the two models, for the number of heads.
    """
    if len(pair.shape) < 2 or not pair.count:
        return None
    rows, form = pair.shape[0], pair.format
    width = pair.count // rows
    chance = found.exponents_changed / np.maximum(found.exponents, 1)
    with np.errstate(divide="ignore"):
        table = np.stack([chance, chance * (1 - chance), np.log1p(-chance)]).astype(np.float32)
    down, across = Channels.empty(rows, width), Channels.empty(width, rows)
    result = Structure(down, across)
    sizes = [m for m in dict.fromkeys(m for _, m in GROUPS) if len(pair.shape) == 2 and width % m == 0]
    uniform = group_laws(np.full(8, found.different / pair.count, np.float32), sizes)
    result.groups = {
        m: np.stack([np.zeros(m + 1), np.zeros(m + 1), uniform[m] / (8 / m) * (pair.count / m)]) for m in sizes
    }
    for start in range(0, pair.count, CHUNK):
        stop = min(start + CHUNK, pair.count)
        old, new = pair.read(start, stop)
        changed = old != new
        chances = np.take(table, form.exponent(old), axis=1)
        parts = np.concatenate([changed[None].astype(np.float32), chances])
        for row, column, many, width_of in _blocks(start, stop, width):
            begin = row * width + column - start
            block = parts[:, begin : begin + many * width_of].reshape(len(parts), many, width_of)
            # Whole numbers below 2^24 are exact in single precision.
            for into, values in zip(_sums(down), block @ np.ones(width_of, np.float32), strict=True):
                into[row : row + many] += values
            for into, values in zip(_sums(across), np.ones(many, np.float32) @ block, strict=True):
                into[column : column + width_of] += values
        for m, law in group_laws(chances[0], sizes).items():
            result.groups[m][0] += np.bincount(changed.reshape(-1, m).sum(1, dtype=np.uint8), minlength=m + 1)
            result.groups[m][1] += law
        if 4 in sizes:
            with np.errstate(invalid="ignore", over="ignore"):
                moved = form.values(new) - form.values(old)
                power = np.where(np.isfinite(moved), moved, 0.0) ** 2
            result.energy += float(power.sum())
            result.kept += _best_two(*power.reshape(-1, 4).T)
            # Far apart, and not a multiple of the width: what two of four keep when they are no neighbours.
            result.apart += _best_two(*(np.roll(part, 1237 * k) for k, part in enumerate(power.reshape(-1, 4).T)))
    inner = math.prod(pair.shape[2:])
    result.columns = across.merged(inner) if inner > 1 else across
    if place := next(filter(None, (head_place(pair.name, pair.shape, config) for config in configs)), None):
        axis, result.role, size = place
        result.heads = getattr(result, axis).merged(size)
    pair.release()
    return result


def _sums(channels: Channels) -> tuple[Array, ...]:
    return channels.count, channels.mean, channels.variance, channels.none


def _blocks(start: int, stop: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a run of entries into rectangles: its first part of a row, whole rows, the last part."""
    while start < stop:
        row, column = divmod(start, width)
        whole = (stop - start) // width if column == 0 else 0
        across = width if whole else min(width - column, stop - start)
        yield row, column, max(whole, 1), across
        start += max(whole, 1) * across


def group_laws(chance: NDArray[np.float32], sizes: Sequence[int]) -> dict[int, Array]:
    """Return, summed over groups, the chances of 0..m changes of m independent neighbours (Poisson-binomial).

    The law of a group is the convolution of those of its halves.

    Args:
        chance: of each entry.
        sizes: the m, powers of two that divide the number of entries.
    """
    law, m, found = np.stack([1 - chance, chance]), 1, {}
    while m < max(sizes, default=0):
        left, right, m = law[:, ::2], law[:, 1::2], 2 * m
        law = np.zeros((m + 1, left.shape[1]), np.float32)
        for i, part in enumerate(left):
            law[i : i + len(right)] += part * right
        if m in sizes:
            found[m] = law.sum(1, dtype=np.float64)
    return found


def _best_two(a: Array, b: Array, c: Array, d: Array) -> float:
    """Return the sum over groups of the largest two of four."""
    return float(np.maximum(np.maximum(a + b, c + d), np.maximum(a, b) + np.maximum(c, d)).sum())


def head_place(name: str, shape: Sequence[int], config: Mapping[str, Any]) -> tuple[str, str, int] | None:
    """Return along which axis the heads of an attention projection lie, what it projects to, and a head's size.

    Queries, keys and values have a block of rows a head, of which there are fewer of keys and values where heads share
    them; the output projection has a block of columns a head. None where the name or the configuration do not say.
    """
    component, _, rest = name.rpartition("/")
    config = config.get(component, {}) if component and component in config else config
    for key in ("vision_config", "text_config"):
        if isinstance(config.get(key), Mapping) and (key == "text_config" or re.search(r"vision|visual", name)):
            config = config[key]
    role = next((r for r in _ROLES if re.search(rf"(?:^|\.){r[2]}\.weight$", rest)), None)

    def number(*keys: str) -> int:
        return next((config[key] for key in keys if isinstance(config.get(key), int)), 0)

    heads = number("num_attention_heads", "n_head", "num_heads")
    size = number("head_dim", "attention_head_dim", "d_kv") or (
        number("hidden_size", "n_embd", "d_model") // heads if heads else 0
    )
    if role is None or not heads or not size or len(shape) != 2:
        return None
    many = (number("num_key_value_heads") or heads) if role[1] in ("key", "value") else heads
    return (role[0], role[1], size) if shape[0 if role[0] == "rows" else 1] == many * size else None


def describe_channels(parts: Sequence[Channels]) -> dict[str, Any]:
    """Return how evenly changes lie over channels, of one or more matrices, as JSON values.

    `gini` is that of the changed entries over channels, `top_tenth` the share of them in the tenth of channels that
    has most, both averaged over matrices by their changed entries; the expected ones are of counts drawn with the
    null's means and variances.
    """
    total = sum(float(c.count.sum()) for c in parts)
    spread = sum(float(((c.count - c.mean) ** 2).sum()) for c in parts)
    variance = sum(float(c.variance.sum()) for c in parts)
    plain = plain_variance = 0.0
    uneven = np.zeros(4)
    random = np.random.default_rng(0)
    for c in parts:
        density = float(c.count.mean()) / c.size
        plain += float(((c.count - density * c.size) ** 2).sum())
        plain_variance += c.size * density * (1 - density) * len(c.count)
        drawn = np.maximum(random.normal(c.mean, np.sqrt(np.maximum(c.variance, 0))), 0)
        uneven += np.array([f(x) for x in (c.count, drawn) for f in (gini, _top_tenth)]) * float(c.count.sum())
    shares = (uneven / total).tolist() if total else [None] * 4
    return {
        "channels": sum(len(c.count) for c in parts), "untouched": int(sum((c.count == 0).sum() for c in parts)),
        "untouched_expected": float(sum(np.exp(c.none).sum() for c in parts)),
        "dispersion": spread / variance if variance > 0 else None,
        "dispersion_uniform": plain / plain_variance if plain_variance > 0 else None,
        "gini": shares[0], "gini_expected": shares[2], "top_tenth": shares[1], "top_tenth_expected": shares[3],
    }  # fmt: skip


def gini(counts: Array) -> float:
    """Return the Gini coefficient sum_i (2 i - n - 1) x_i / (n sum x) of x in ascending order; 0 of nothing."""
    n, total = len(counts), float(counts.sum())
    order = 2 * np.arange(1, n + 1) - n - 1
    return float(order @ np.sort(counts)) / (n * total) if total else 0.0


def _top_tenth(counts: Array) -> float:
    total = float(counts.sum())
    return float(np.sort(counts)[-max(1, round(len(counts) / 10)) :].sum()) / total if total else 0.0


def describe_structure(parts: Sequence[Structure]) -> dict[str, Any]:
    """Return the structure of one or more matrices as JSON values."""
    found: dict[str, Any] = {axis: describe_channels([getattr(s, axis) for s in parts]) for axis in ("rows", "columns")}
    heads = [s.heads for s in parts if s.heads is not None]
    found["heads"] = describe_channels(heads) if heads else None
    for n, m in GROUPS:
        held = [s.groups[m] for s in parts if m in s.groups]
        if held:
            law = sum(held, np.zeros((3, m + 1)))
            seen, by_magnitude, uniform = (law[:, : n + 1].sum(1) / law[0].sum()).tolist()
            shares = {"share": seen, "by_magnitude": by_magnitude, "uniform": uniform}
            found.setdefault("groups", {})[f"{n}:{m}"] = shares
    energy = sum(s.energy for s in parts)
    if energy and math.isfinite(energy):
        found["energy_kept_2_4"] = {
            "share": sum(s.kept for s in parts) / energy, "no_neighbours": sum(s.apart for s in parts) / energy
        }  # fmt: skip
    return found


def structure_row(found: Structure) -> dict[str, Any]:
    """Return the structure of one matrix as JSON values, with the density of every head."""
    row = describe_structure([found])
    if found.heads is not None:
        size = found.heads.size
        row["heads"] |= {
            "role": found.role, "density": (found.heads.count / size).tolist(),
            "expected": (found.heads.mean / size).tolist(),
        }  # fmt: skip
    return row


def structure_as_text(found: Mapping[str, Any]) -> list[str]:
    """Return lines on structure, as people read them."""

    def line(what: str, c: Mapping[str, Any]) -> str:
        spread = "–" if c["dispersion"] is None else f"{c['dispersion']:.2f}"
        return (
            f"{what}: {c['untouched']:,} of {c['channels']:,} untouched (expected {c['untouched_expected']:,.0f}), "
            f"dispersion {spread} (1 if independent given magnitudes)"
        )

    names = {"rows": "output channels", "columns": "input channels", "heads": "attention heads"}
    lines = [line(name, found[key]) for key, name in names.items() if found.get(key)]
    for kind, share in (found.get("groups") or {}).items():
        n, _, m = kind.partition(":")
        lines.append(
            f"at most {n} changed of {m} neighbours: {100 * share['share']:.2f} % of groups "
            f"(independent given magnitudes {100 * share['by_magnitude']:.2f} %)"
        )
    return lines
