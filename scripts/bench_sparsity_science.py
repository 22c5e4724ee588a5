"""Is an update by rewards or preferences sparser than a supervised one? Digits flow model and tiny language model.

    python scripts/bench_sparsity_science.py --json FILE --cache DIR [--plot FILE.svg] [--arms grpo,grpo_lora,...]

Arms of a domain share the base, prompts and rows, training steps, updates, rows an update, optimizer, and the grid of
learning rates. The base is rounded to bf16 once, so every run starts on values of that format.

master     float32 weights; measured in float32, and as the bf16 snapshots that would be released
pure       bf16 weights under float32 compute: rounded after every optimizer step, moments in float32

identical  share of the weights whose bits are the base's, of adapters merged
dense      the same had a dense Gaussian update of that norm been rounded: the null
core       identical and dense without embeddings and output layer, whose rows of unused tokens get no gradient
excess     of the core, identical - dense: what rounding does not explain
norm       norm of the change over that of the base
gain       how much better the model became: held-out reward; pairs told apart, AUC and change of nats a token

Rows at one learning rate compare arms whose steps have one size. Rows at one norm, between rates by a line over the
logarithm of the norm, compare arms that went equally far. Without both, a share says which rate was chosen.

A cell is one (arm, rate, seed, master or pure). It is written to the cache when it is done, and a run that was
interrupted resumes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from align.config import RunConfig, load_config
from align.diffusion.policy import resolve_model
from align.reports.charts import Series, line_chart, sheet
from align.run import describe_machine
from trainers import trainer_for
from trainers.language_model import resolve_language_model

VISUAL = ("evaluation.every=0", "tracking.samples_every=0", "checkpoint.every=0", "checkpoint.keep=1")
LANGUAGE = ("evaluation.every=0", "evaluation.prompts=0", "checkpoint.every=0", "checkpoint.keep=1")
ARMS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "grpo": ("digits", "digits/dance_grpo", ("model.train=full",)),
    "supervised": ("digits", "digits/supervised", ("model.train=full",)),
    "grpo_lora": ("digits", "digits/dance_grpo", ("model.train=lora",)),
    "supervised_lora": ("digits", "digits/supervised", ("model.train=lora",)),
    "kto": ("language", "kto/smoke", ()),
    "bco": ("language", "bco/smoke", ()),
    "sft": ("language", "sft/smoke", ()),
}
"""Domain, recipe, and what differs from it."""
PRECISIONS = ("master", "pure")
SHARES = ("identical", "dense", "core_identical", "core_dense")
VIEWS = {"master": ("BF16", "F32"), "pure": ("BF16",)}


@dataclass(frozen=True)
class Grid:
    """What is run: every arm at every rate, from every seed, in both precisions."""

    arms: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    precisions: tuple[str, ...]
    steps: Mapping[str, int]
    samples: int

    def config(self, arm: str, rate: float, seed: int, bases: Mapping[str, Path]) -> RunConfig:
        """Return the configuration of a cell."""
        domain, recipe, own = ARMS[arm]
        shared = (*VISUAL, f"evaluation.final_samples={self.samples}") if domain == "digits" else LANGUAGE
        told = [f"optimizer.lr={rate!r}", f"seed={seed}", f"steps={self.steps[domain]}", "sparsity.dtype=bf16"]
        told += [f"sparsity.every={max(1, self.steps[domain] // 4)}", f"model.path={bases[domain]}"]
        return load_config(recipe, [*shared, *own, *told])


# Bases


def base_of(domain: str, cache: Path) -> Path:
    """Return the folder that all arms of a domain start from, its trained part rounded to bf16 and stored so.

    The language model is first trained on liked answers for a while, as a random one has nothing to keep.
    """
    folder = cache / f"base-{domain}"
    if folder.is_dir():
        return folder
    making = folder.with_name(folder.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    if domain == "digits":
        shutil.copytree(resolve_model("digits"), making)
        _round_files(making / "transformer")
    else:
        run = cache / "base-language-run"
        trainer_for(load_config("sft/smoke", [*LANGUAGE, "steps=60", "seed=1000"]), out=run).train()
        shutil.copytree(resolve_language_model("tiny"), making)
        shutil.copyfile(next(run.glob("checkpoints/step_*/model.safetensors")), making / "model.safetensors")
        _round_files(making)
    making.rename(folder)
    return folder


def _round_files(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    for path in folder.glob("*.safetensors"):
        half = {n: w.bfloat16() if w.is_floating_point() else w for n, w in load_file(path).items()}
        save_file(half, path, metadata={"format": "pt"})


# Cells


@contextlib.contextmanager
def rounded(precision: str) -> Iterator[None]:
    """Within the block of a pure run, keep every trained weight on values of bf16 after each optimizer step."""

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    weight.copy_(weight.bfloat16())

    handle = register_optimizer_step_post_hook(hook) if precision == "pure" else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def run_cell(config: RunConfig, name: str, precision: str, cache: Path) -> dict[str, Any]:
    """Train one cell, or read what an earlier call found; return its shares, norms and how good it became."""
    values = json.dumps([config.model_dump(mode="json"), precision], sort_keys=True)
    stem = f"{name}_{precision}_{hashlib.sha256(values.encode()).hexdigest()[:10]}"
    path, folder = cache / f"{stem}.json", cache / "runs" / stem
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    shutil.rmtree(folder, ignore_errors=True)
    began = time.process_time()
    with rounded(precision):
        result = trainer_for(config, out=folder).train()
    receipt = json.loads((folder / "sparsity.json").read_text(encoding="utf-8"))
    if receipt["status"] != "measured":
        raise SystemExit(f"{stem}: {receipt['why']}")
    views = {view["compared_in"] or view["dtype"]: view for view in receipt["views"]}
    found = {
        "lr": config.optimizer.lr, "seed": config.seed, "precision": precision, "steps": receipt["steps"],
        "views": {
            form: {
                "identical": view["bit_identical"], "dense": view["expected_bit_identical_if_dense"],
                "norm": view["relative_norm"] or 0.0,
                "core_identical": _core(view, "bit_identical"),
                "core_dense": _core(view, "expected_bit_identical_if_dense"),
            }
            for form, view in views.items()
        },
        "gain": _gain(result.summary), "cpu_seconds": time.process_time() - began,
    }  # fmt: skip
    writing = path.with_suffix(".writing")
    writing.write_text(json.dumps(found), encoding="utf-8")
    writing.replace(path)
    shutil.rmtree(folder)
    return found


def _core(view: Mapping[str, Any], key: str) -> float:
    """Return a share without embeddings and output layer."""
    kept = [row for kind, row in view["modules"].items() if kind not in ("embedding", "head")]
    return sum(row[key] * row["parameters"] for row in kept) / sum(row["parameters"] for row in kept)


def _gain(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return how much better the model became: by held-out reward, pairs told apart, or nats a token."""
    if "heldout_gain" in summary:
        return {"heldout": summary["heldout_gain"]["mean"]}
    kept = ("pair_accuracy_after", "auc_after", "nats_change_after")
    return {
        name: value["mean"] if isinstance(value, dict) else value
        for name in kept
        if (value := summary.get(name)) is not None
    }


# Figures


def at_norm(cells: Sequence[Mapping[str, Any]], form: str, norm: float, key: str) -> float | None:
    """Return a figure of one seed's cells at a norm, by a line over log norm; None beyond their norms."""
    points = sorted((c["views"][form]["norm"], c["views"][form][key]) for c in cells if c["views"][form]["norm"] > 0)
    if len(points) < 2 or not points[0][0] <= norm <= points[-1][0]:
        return None
    xs, ys = zip(*points, strict=True)
    return float(np.interp(math.log(norm), np.log(xs), ys))


def common_norm(arms: Mapping[str, Sequence[Mapping[str, Any]]], form: str) -> float | None:
    """Return the geometric middle of the norms that all arms reach from all seeds; None where there is none."""
    lows, highs = [], []
    for cells in arms.values():
        for seed in {c["seed"] for c in cells}:
            norms = [c["views"][form]["norm"] for c in cells if c["seed"] == seed and c["views"][form]["norm"] > 0]
            lows.append(min(norms, default=math.inf))
            highs.append(max(norms, default=0.0))
    low, high = max(lows, default=math.inf), min(highs, default=0.0)
    return math.sqrt(low * high) if 0 < low < high else None


def figures(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the table: by domain, precision and format, at each rate and at one norm."""
    rows = []
    for domain in ("digits", "language"):
        for precision in PRECISIONS:
            for form in VIEWS[precision]:
                arms: dict[str, list[Mapping[str, Any]]] = {}
                for cell in cells:
                    if ARMS[cell["arm"]][0] == domain and cell["precision"] == precision:
                        arms.setdefault(cell["arm"], []).append(cell)
                about = {"domain": domain, "precision": precision, "format": form}
                for rate in sorted({c["lr"] for own in arms.values() for c in own}):
                    for arm, own in arms.items():
                        there = [c for c in own if c["lr"] == rate]
                        if there:
                            views = [c["views"][form] for c in there]
                            gain = {k: float(np.mean([c["gain"][k] for c in there])) for k in there[0]["gain"]}
                            rows.append(
                                {**about, "arm": arm, "matched": "rate", "at": rate, "gain": gain, **_spread(views)}
                            )
                norm = common_norm(arms, form)
                for arm, own in arms.items() if norm else ():
                    views = [
                        {key: at_norm([c for c in own if c["seed"] == seed], form, norm, key)
                         for key in SHARES} | {"norm": norm}
                        for seed in sorted({c["seed"] for c in own})
                    ]  # fmt: skip
                    rows.append({**about, "arm": arm, "matched": "norm", "at": norm, **_spread(views)})
    return rows


def _spread(views: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return means over seeds, and the least and the largest excess over the null."""
    excess = [view["core_identical"] - view["core_dense"] for view in views]
    means = {key: float(np.mean([view[key] for view in views])) for key in (*SHARES, "norm")}
    return {**means, "excess": float(np.mean(excess)), "excess_low": min(excess), "excess_high": max(excess),
            "seeds": len(views)}  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| domain | weights, seen in | matched | arm | identical | if dense | core identical | if dense "
        "| excess (least, largest seed) | norm | gain |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        matched = f"{row['matched']} {row['at']:.2g}"
        excess = f"{100 * row['excess']:+.2f} ({100 * row['excess_low']:+.2f}, {100 * row['excess_high']:+.2f})"
        lines.append(
            f"| {row['domain']} | {row['precision']}, {row['format']} | {matched} | {row['arm']} "
            f"| {' | '.join(f'{100 * row[key]:.2f} %' for key in SHARES)} | {excess} | {row['norm']:.2g} "
            f"| {', '.join(f'{k} {v:+.3f}' for k, v in row.get('gain', {}).items())} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return an SVG of the excess in the core over the norm, a panel a domain and precision."""
    panels = []
    for domain, precision in dict.fromkeys((r["domain"], r["precision"]) for r in rows):
        found = [r for r in rows if (r["domain"], r["precision"], r["format"], r["matched"]) ==
                 (domain, precision, "BF16", "rate") and r["norm"] > 0]  # fmt: skip
        names = list(dict.fromkeys(r["arm"] for r in found))
        series = []
        for name in names:
            mine = [r for r in found if r["arm"] == name]
            own = sorted((math.log10(r["norm"]), r["core_identical"] - r["core_dense"]) for r in mine)
            series.append(Series(name, [x for x, _ in own], [y for _, y in own], sparse=True))
        where = "log10 of norm of the change / norm of the base"
        drawn = line_chart(series, percent=True, reference=(0, ""), x_label=where)
        panels.append((f"{domain}, {precision} weights: identical in bf16 beyond rounding", drawn))
    return sheet(panels)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def measure(grid: Grid, cache: Path, may_go_on: Callable[[], bool]) -> list[dict[str, Any]]:
    """Run the grid, seed by seed, and return its cells; those that time did not suffice for are left out."""
    bases = {domain: base_of(domain, cache) for domain in dict.fromkeys(ARMS[arm][0] for arm in grid.arms)}
    cells = []
    for seed in grid.seeds:
        for precision in grid.precisions:
            for rate in grid.rates:
                for arm in grid.arms:
                    if not may_go_on():
                        return cells
                    config = grid.config(arm, rate, seed, bases)
                    cell = run_cell(config, f"{arm}_lr{rate:g}_seed{seed}", precision, cache)
                    view = cell["views"]["BF16"]
                    _say(
                        f"{arm} lr {rate:g} seed {seed} {precision}: {100 * view['identical']:.2f} % identical, "
                        f"{100 * view['dense']:.2f} % if dense, norm {view['norm']:.2g}, {cell['cpu_seconds']:.0f} s"
                    )
                    cells.append({"arm": arm, **cell})
    return cells


def main() -> None:
    """Run what is missing of the grid, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def listed(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
        return lambda text: tuple(kind(part) for part in text.split(","))

    parser.add_argument("--json", required=True, type=Path, help="file to write the figures to")
    parser.add_argument("--cache", required=True, type=Path, help="folder of bases, finished and unfinished cells")
    parser.add_argument("--plot", type=Path, help="SVG to draw")
    parser.add_argument("--arms", type=listed(str), default=tuple(ARMS), help=f"of {', '.join(ARMS)}")
    parser.add_argument("--rates", type=listed(float), default=(1e-6, 1e-5, 1e-4, 1e-3), help="rates of every arm")
    parser.add_argument("--seeds", type=listed(int), default=(0, 1, 2))
    parser.add_argument("--precisions", type=listed(str), default=PRECISIONS)
    parser.add_argument("--steps", type=int, default=30, help="training steps of the digits' arms")
    parser.add_argument("--language-steps", type=int, default=48, help="training steps of the language model's arms")
    parser.add_argument("--samples", type=int, default=512, help="held-out samples before and after, of the digits")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no cell after so many seconds")
    args = parser.parse_args()
    if unknown := [a for a in args.arms if a not in ARMS] + [p for p in args.precisions if p not in PRECISIONS]:
        parser.error(f"{', '.join(unknown)} is unknown")
    steps = {"digits": args.steps, "language": args.language_steps}
    grid = Grid(args.arms, args.rates, args.seeds, args.precisions, steps, args.samples)
    args.cache.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    cells = measure(grid, args.cache, lambda: time.monotonic() - began < args.seconds)
    rows = figures(cells)
    result = {"rows": rows, "cells": cells, "grid": grid.__dict__, "command": sys.argv[1:], **describe_machine()}
    args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    sys.stdout.write(table(rows))
    if args.plot is not None:
        args.plot.write_text(plot(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
