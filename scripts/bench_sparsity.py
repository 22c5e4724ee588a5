"""How fast checkpoints are compared, against what reading them costs and against the script behind the first paper.

    python scripts/bench_sparsity.py --json bench.json [--millions 96] [--scale 1.2e-5]

bits_over_limit      CPU time of summing both mapped files / of counting different codes, with numba   (>= .85)
battery_over_limit   the same of the whole comparison                                                  (>= .10)
..._numpy            both with numpy alone                                                             (>= .60 of bits)
two_threads          wall-clock of the comparison with one thread / with two                           (>= 1.6)
peak_anonymous_mb    anonymous memory of a whole `align sparsity compare` process                      (<= 300)
cpu_vs_authors       CPU time of their method, written again from its description / ours               (>= 100, 20)
overlap_vs_torch     time of counting common bits in torch bool masks / in packed masks                (>= 20)
delta_ratio          bytes of the bf16 weights / of their sparse delta
delta_table          the same of 33.5 million weights at five densities, and over the prototype's (>= .9)

Weights are N(0, 0.02) in bf16, the update is N(0, scale), everything lies in the page cache, one thread unless said.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from align.run import describe_machine
from align.sparsity.compare import compare
from align.sparsity.delta import write_delta
from align.sparsity.masks import count_overlap

TENSOR = 1 << 24
PROTOTYPE = {1e-7: 558, 1e-6: 109, 3e-6: 46, 1e-5: 17, 3e-5: 7.8}
"""Ratios measured of a prototype of the codec with zstd, by the standard deviation of a Gaussian update."""


def cpu_seconds(work: Callable[[], object], rounds: int = 3, clock: Callable[[], float] = time.process_time) -> float:
    """Return the median seconds of `work` after one run that warms up."""
    work()
    taken = []
    for _ in range(rounds):
        began = clock()
        work()
        taken.append(clock() - began)
    return statistics.median(taken)


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


def measure(paths: tuple[Path, Path], folder: Path) -> dict[str, Any]:
    """Return every figure for one pair of files."""
    limit = cpu_seconds(lambda: read_both(paths))
    found: dict[str, Any] = {"limit_gb_s": sum(path.stat().st_size for path in paths) / limit / 1e9}
    times: dict[str, dict[str, float]] = {}
    for kernel in ("numpy", "numba"):
        levels = (("bits", "bits"), ("battery", "full"))
        times[kernel] = {
            name: cpu_seconds(lambda k=kernel, lv=level: compare(*paths, level=lv, threads=1, kernel=k))
            for name, level in levels
        }
        again = cpu_seconds(lambda: read_both(paths))
        limit = min(limit, again)
    for name in ("bits", "battery"):
        found[f"{name}_over_limit"] = limit / times["numba"][name]
        found[f"{name}_over_limit_numpy"] = limit / times["numpy"][name]
    wall = [cpu_seconds(lambda n=n: compare(*paths, threads=n), clock=time.perf_counter) for n in (1, 2)]
    found["two_threads"] = wall[0] / wall[1]
    authors = cpu_seconds(lambda: authors_method(paths), rounds=1)
    found["cpu_vs_authors"] = {name: authors / times["numba"][name] for name in ("bits", "battery")}
    found["cpu_seconds"] = {"limit": limit, "authors": authors, **times}
    found["same_as_authors"] = compare(*paths).as_dict()["sparsity_authors_mode"] == authors_method(paths)[0]
    file = folder / "compare.json"
    command = [sys.executable, "-m", "align.cli", "sparsity", "compare", *map(str, paths), "--json", str(file)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    whole = json.loads(file.read_text(encoding="utf-8"))
    found |= {key: whole[key] for key in ("peak_anonymous_mb", "density", "parameters")}
    rng = np.random.default_rng(0)
    bits = [rng.integers(0, 256, whole["parameters"] // 8, np.uint8) for _ in range(2)]
    bools = [torch.from_numpy(np.unpackbits(b)).bool() for b in bits]
    packed = cpu_seconds(lambda: count_overlap(*bits))
    found["overlap_vs_torch"] = cpu_seconds(lambda: (bools[0] & bools[1]).count_nonzero()) / packed
    delta = write_delta(*paths, folder / "delta.safetensors")
    (folder / "table").mkdir()
    table = delta_table(folder / "table")
    return found | {"delta_ratio": delta["ratio"], "delta_codec": delta["codec"], "delta_table": table}


def main() -> int:
    """Run the benchmark and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="where to write the figures")
    parser.add_argument("--millions", type=int, default=96, help="weights of the pair, in millions (default: 96)")
    parser.add_argument("--scale", type=float, default=1.2e-5, help="standard deviation of the update")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pair(Path(folder), options.millions, options.scale)
        found = measure(paths, Path(folder)) | {"machine": describe_machine()}
    text = json.dumps(found, indent=2)
    if options.json:
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
