"""How fast checkpoints are compared, against what reading them costs and against the script behind the first paper.

    OMP_NUM_THREADS=1 python scripts/bench_sparsity.py --json bench.json [--sections compare,rank,overlap]

bits_over_limit      CPU time of summing both mapped files / of counting different codes, with numba   (>= .85)
battery_over_limit   the same of the whole comparison                                                  (>= .10)
..._numpy            both with numpy alone                                                             (>= .60 of bits)
two_threads          wall-clock of the comparison with one thread / with two                           (>= 1.6)
peak_anonymous_mb    anonymous memory of a whole `align sparsity compare` process                      (<= 300)
cpu_vs_authors       CPU time of their method, written again from its description / ours               (>= 100, 20)
delta_ratio          bytes of the bf16 weights / of their sparse delta
delta_table          the same of 33.5 million weights at five densities, and over the prototype's (>= .9)
rank                 CPU time of svdvals of a 4096 x 4096 delta / of a certified count above the noise edge    (>= 8)
overlap              CPU time of counting common bits of two torch bool masks of 785 million / in packed masks (>= 20)

Weights are N(0, 0.02) in bf16, the update is N(0, scale), everything lies in the page cache, one thread unless said.
`rank` sees a planted update of rank 16, and a dense one, through bf16; its arms alternate, and `whole` has in it what
`align sparsity rank` does besides: reading, the edge, and the 64 largest values. `overlap` also says the z of two
independent dense updates by each null, and with powers of two left in the strata of their neighbours.
"""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import over_rounds
from safetensors.torch import load_file, save_file

from align.run import describe_machine
from align.sparsity import spectrum
from align.sparsity.compare import compare
from align.sparsity.delta import write_delta
from align.sparsity.formats import FORMATS
from align.sparsity.masks import count_overlap
from align.sparsity.nulls import overlap_null
from align.sparsity.pairs import load_pair
from align.sparsity.ranks import MOST_VALUES, rank_of, read_update

TENSOR = 1 << 24
PROTOTYPE = {1e-7: 558, 1e-6: 109, 3e-6: 46, 1e-5: 17, 3e-5: 7.8}
"""Ratios measured of a prototype of the codec with zstd, by the standard deviation of a Gaussian update."""


def timed(work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Return the seconds of one call by a clock."""
    began = clock()
    work()
    return clock() - began


def ratio(rows: Sequence[Mapping[str, float]], name: str, a: str, b: str) -> dict[str, Any]:
    """Return the median over rounds of one arm's seconds over another's, under a name, and their range beside it."""
    return over_rounds(name, [row[a] / row[b] for row in rows])


def write_pair(folder: Path, millions: int, scale: float) -> tuple[Path, Path]:
    """Save a base and a tuned model of random weights."""
    count = max(2, round(millions * 1e6 / TENSOR))
    paths = (folder / "base.safetensors", folder / "tuned.safetensors")
    base, tuned = {}, {}
    for i in range(count):
        made = torch.Generator().manual_seed(i)
        weight = (0.02 * torch.randn(TENSOR, generator=made)).bfloat16()
        base[f"layers.{i}.mlp.weight"] = weight.reshape(4096, -1)
        tuned[f"layers.{i}.mlp.weight"] = (
            (weight.float() + scale * torch.randn(TENSOR, generator=made)).bfloat16().reshape(4096, -1)
        )
    save_file(base, paths[0])
    save_file(tuned, paths[1])
    return paths


def read_both(paths: tuple[Path, Path]) -> int:
    """Map both files and sum their words: the least that touching every byte costs."""
    total = 0
    for path in paths:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            words = np.frombuffer(data, np.uint64, len(data) // 8)
            total ^= sum(int(words[a : a + (1 << 15)].sum()) for a in range(0, len(words), 1 << 15))
            del words
    return total


def authors_method(paths: tuple[Path, Path]) -> tuple[float, float]:
    """Return overall and layer-averaged sparsity as the first paper's script is described: all differences joined.

    Both models in memory, one difference a parameter, `isclose` in bf16 at 1e-5, all differences concatenated for the
    whole, and an unweighted mean over tensors for the layers.
    """
    base, tuned = load_file(paths[0]), load_file(paths[1])
    deltas, layers = [], []
    for name, weight in base.items():
        delta = (tuned[name] - weight).flatten()
        deltas.append(delta)
        layers.append(torch.isclose(delta, torch.zeros_like(delta), rtol=0, atol=1e-5).sum().item() / delta.numel())
    joined = torch.cat(deltas)
    equal = torch.isclose(joined, torch.zeros_like(joined), rtol=0, atol=1e-5).sum().item()
    return equal / joined.numel(), sum(layers) / len(layers)


def delta_table(folder: Path) -> list[dict[str, float]]:
    """Return how many times smaller than 33.5 million weights their delta is, over a range of densities."""
    rows = []
    for scale, prototype in PROTOTYPE.items():
        found = write_delta(*write_pair(folder, 33, scale), folder / "table.delta")
        ratio = found["ratio"]
        rows.append(
            {
                "density": found["changed"] / (found["dense_bytes"] / 2), "ratio": ratio, "prototype": prototype,
                "share": ratio / prototype,
            }
        )  # fmt: skip
    return rows


def measure(paths: tuple[Path, Path], folder: Path, rounds: int) -> dict[str, Any]:
    """Return every figure for one pair of files."""
    arms: dict[str, Callable[[], object]] = {
        "limit": lambda: read_both(paths), "authors": lambda: authors_method(paths),
        "one_thread": lambda: compare(*paths, threads=1), "two_threads": lambda: compare(*paths, threads=2),
    }  # fmt: skip
    for kernel in ("numpy", "numba"):
        for name, level in (("bits", "bits"), ("battery", "full")):
            arms[f"{name}_{kernel}"] = lambda k=kernel, lv=level: compare(*paths, level=lv, threads=1, kernel=k)
    rows = []
    for turn in range(rounds + 1):  # the first warms up
        clocks = {arm: time.perf_counter if arm.endswith(("thread", "threads")) else time.process_time for arm in arms}
        row = {arm: timed(work, clocks[arm]) for arm, work in arms.items()}
        row["limit"] = min(row["limit"], timed(arms["limit"], time.process_time))
        rows += [row] if turn else []
    found: dict[str, Any] = {"cpu_vs_authors": {}}
    for name in ("bits", "battery"):
        found |= ratio(rows, f"{name}_over_limit", "limit", f"{name}_numba")
        found |= ratio(rows, f"{name}_over_limit_numpy", "limit", f"{name}_numpy")
        found["cpu_vs_authors"] |= ratio(rows, name, "authors", f"{name}_numba")
    found |= ratio(rows, "two_threads", "one_thread", "two_threads")
    found["seconds"] = {arm: statistics.median(row[arm] for row in rows) for arm in arms}
    found["limit_gb_s"] = sum(path.stat().st_size for path in paths) / found["seconds"]["limit"] / 1e9
    found["same_as_authors"] = compare(*paths).as_dict()["sparsity_authors_mode"] == authors_method(paths)[0]
    file = folder / "compare.json"
    command = [sys.executable, "-m", "align.cli", "sparsity", "compare", *map(str, paths), "--json", str(file)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    whole = json.loads(file.read_text(encoding="utf-8"))
    found |= {key: whole[key] for key in ("peak_anonymous_mb", "density", "parameters")}
    delta = write_delta(*paths, folder / "delta.safetensors")
    (folder / "table").mkdir()
    table = delta_table(folder / "table")
    return found | {"delta_ratio": delta["ratio"], "delta_codec": delta["codec"], "delta_table": table}


def write_delta_pair(folder: Path, kind: str, side: int) -> tuple[Path, Path]:
    """Save one square matrix before and after an update of rank 16, of 3e-5 an entry, or a dense one of 1e-4."""
    made = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(side, side, generator=made)).bfloat16()
    if kind == "planted":
        up, down = torch.randn(side, 16, generator=made), torch.randn(16, side, generator=made)
        update = 3e-5 / 4 * up @ down
    else:
        update = 1e-4 * torch.randn(side, side, generator=made)
    paths = (folder / f"{kind}-base.safetensors", folder / f"{kind}-tuned.safetensors")
    save_file({"w": weight}, paths[0])
    save_file({"w": (weight.float() + update).bfloat16()}, paths[1])
    return paths


def rank_figures(folder: Path, kinds: Sequence[str], side: int, rounds: int) -> dict[str, Any]:
    """Return what a count of singular values above the noise edge costs, beside all singular values."""
    found: dict[str, Any] = {"side": side}
    for kind in kinds:
        (pair,) = load_pair(*write_delta_pair(folder, kind, side)).pairs
        update = read_update(pair)
        if isinstance(update, str):
            raise SystemExit(update)
        matrix, edge, row = update.matrix, update.edge, rank_of(pair)
        many = row["above_edge"] >= MOST_VALUES

        def count(matrix: Any = matrix, edge: float = edge, many: bool = many) -> spectrum.Count:
            scaled, scale = spectrum.unit_scaled(matrix)
            return spectrum.count_above(scaled, edge * scale, many=many)

        seen: list[torch.Tensor] = []
        arms: dict[str, Callable[[], Any]] = {
            "count": count, "whole": lambda pair=pair: rank_of(pair),
            "torch": lambda matrix=matrix, seen=seen: seen.append(torch.linalg.svdvals(torch.from_numpy(matrix))),
        }  # fmt: skip
        rows = [{name: timed(work) for name, work in arms.items()} for _ in range(rounds)]
        seconds = {name: statistics.median(row[name] for row in rows) for name in arms}
        proved = count()
        found[kind] = {
            "density": float(np.mean(matrix != 0)), "above_edge": proved.above, "certificate": proved.certificate,
            "proof": proved.proof, "svdvals_above_edge": int(np.sum(seen[-1].numpy() > edge)),
            **ratio(rows, "svdvals_over_count", "torch", "count"), "cpu_seconds": seconds,
        }  # fmt: skip
    return found


def overlap_figures(millions: int, rounds: int) -> dict[str, Any]:
    """Return what counting the common bits of two masks costs, and z of two independent dense updates."""
    rng = np.random.default_rng(0)
    bits = [rng.integers(0, 256, round(millions * 1e6) // 8, np.uint8) for _ in range(2)]
    bools = [torch.from_numpy(np.unpackbits(b).view(np.bool_)) for b in bits]
    if count_overlap(*bits) != int((bools[0] & bools[1]).count_nonzero()):
        raise SystemExit("packed and torch masks disagree")
    arms = {"packed": lambda: count_overlap(*bits), "torch": lambda: (bools[0] & bools[1]).count_nonzero()}
    rows = [{name: timed(work) for name, work in arms.items()} for _ in range(rounds + 1)][1:]  # the first warms up
    return {
        "millions": millions, **ratio(rows, "torch_over_packed", "torch", "packed"),
        "cpu_seconds": {name: statistics.median(row[name] for row in rows) for name in arms},
    }  # fmt: skip


def independent_z(seed: int, size: int = 1 << 24) -> dict[str, float]:
    """Return z of the overlap of two dense updates that share nothing but their base, by each null."""
    form, rng = FORMATS["BF16"], np.random.default_rng(seed)
    old = form.encode(rng.standard_normal(size, np.float32) * np.float32(0.02))
    values = form.values(old).astype(np.float32)
    masks = [form.encode(values + np.float32(s) * rng.standard_normal(size, np.float32)) != old for s in (1.5e-5, 3e-5)]
    held = 2 * form.exponent(old) + (old & 127 == 0)
    strata = [np.bincount(held[m], minlength=512) for m in (np.ones(size, bool), *masks)]
    nulls = {
        "by_magnitude": strata, "powers_of_two_not_apart": [s.reshape(-1, 2).sum(1) for s in strata],
        "uniform": [s.sum(keepdims=True) for s in strata],
    }  # fmt: skip
    both, found = int(np.count_nonzero(masks[0] & masks[1])), {}
    for name, null in nulls.items():
        mean, variance = overlap_null([(null[0], null[1], null[2])])
        found[name] = (both - mean) / variance**0.5
    return found


def main() -> int:
    """Run the benchmark and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="where to write the figures")
    parser.add_argument("--millions", type=int, default=96, help="weights of the pair, in millions (default: 96)")
    parser.add_argument("--scale", type=float, default=1.2e-5, help="standard deviation of the update")
    parser.add_argument("--sections", default="compare,rank,overlap", help="what to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of alternating arms (default: 3)")
    parser.add_argument("--kinds", default="planted,dense", help="updates whose rank is measured (default: both)")
    parser.add_argument("--side", type=int, default=4096, help="rows and columns of the delta (default: 4096)")
    parser.add_argument("--mask-millions", type=int, default=785, help="bits of a mask, in millions (default: 785)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sections, found = options.sections.split(","), {}
    with tempfile.TemporaryDirectory() as folder:
        if "compare" in sections:
            found |= measure(write_pair(Path(folder), options.millions, options.scale), Path(folder), options.rounds)
        if "rank" in sections:
            found["rank"] = rank_figures(Path(folder), options.kinds.split(","), options.side, options.rounds)
        if "overlap" in sections:
            found["overlap"] = overlap_figures(options.mask_millions, options.rounds)
            found["independent"] = [independent_z(seed) for seed in range(4)]
    found |= describe_machine()
    text = json.dumps(found, indent=2)
    if options.json:
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
