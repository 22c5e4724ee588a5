"""What each algorithm needs, in denoiser forwards, to gain what DanceGRPO gains: digits flow model, several seeds.

    python scripts/bench_algorithms.py --json FILE --cache DIR [--plot FILE.svg] [--arms dance,window,...]

Every arm tries the same learning rates on the same tuning seeds, as often as every other; the rate with the largest
mean gain is then run on other seeds. Arms of a seed share prompts, held-out noise and, within a sampler, noise.

gain       held-out reward by the ODE, minus that before training; a mean of three evaluations, as is its F_eq
to_95      F_eq until the gain is 95 % of the last gain of DanceGRPO, median over the seeds
ratio      to_95 / the median to_95 of DanceGRPO
reached    share of the seeds that get there within what the arm may spend

A cell is one (arm, rate, seed). It is written to the cache when it is done, and a run that was interrupted resumes.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.config import RunConfig, load_config
from align.reports.charts import Series, line_chart, sheet
from align.run import describe_machine
from align.tracking import read_jsonl
from trainers import trainer_for

BASELINE = "dance"
LONG = ("sampler.solver_steps=25",)
WINDOW = (*LONG, "trained_steps.move_every=3")
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    BASELINE: ("digits/dance_grpo", LONG),
    "window": ("digits/window", WINDOW),
    "flash": ("digits/flash", WINDOW),
    "fast": ("digits/fast", ()),
    "guard": ("digits/guard", LONG),
    "dppo": ("digits/dppo", LONG),
    "nft": ("digits/nft", ()),
    "awm": ("digits/awm", ()),
    "dgpo": ("digits/dgpo", ()),
}
"""Recipe of every arm, and what differs from it: the schedules of the papers where they use 25 solver steps."""
FORWARD = ("nft", "awm", "dgpo")
EVALUATIONS, SMOOTH, SHARE_OF_GAIN, DRAWS = 8, 3, 0.95, 2000


@dataclass(frozen=True)
class Grid:
    """What is run: one cell for each tuning seed and rate, then one for each seed at the best rate."""

    arms: tuple[str, ...]
    rates: tuple[float, ...]
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    budget: int
    spend: float
    overrides: tuple[str, ...]

    def config(self, arm: str, rate: float, seed: int) -> RunConfig:
        """Return the configuration of a cell."""
        steps = self.steps(arm)
        recipe, own = ARMS[arm]
        every = max(1, steps // EVALUATIONS)
        return load_config(
            recipe,
            [*self.overrides, *own, f"optimizer.lr={rate!r}", f"seed={seed}", f"steps={steps}",
             f"evaluation.every={every}", "checkpoint.every=10", "checkpoint.keep=1", "tracking.samples_every=0"],
        )  # fmt: skip

    def steps(self, arm: str) -> int:
        """Return the training steps of an arm: `budget` of DanceGRPO, `spend` of its F_eq for the others."""
        if arm == BASELINE:
            return self.budget
        return _steps_for(arm, self.spend * self.budget * _cost(BASELINE, 1, self.overrides)[0], self.overrides)


@functools.cache
def _cost(arm: str, steps: int, overrides: tuple[str, ...]) -> tuple[float, ...]:
    """Return F_eq a sample of each of the first `steps` training steps."""
    recipe, own = ARMS[arm]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_for(load_config(recipe, [*overrides, *own]), out=Path(folder) / "run")
        return tuple(trainer.ledger(trainer.table_at(step))["feq_per_sample"] for step in range(1, steps + 1))


@functools.cache
def _steps_for(arm: str, feq: float, overrides: tuple[str, ...]) -> int:
    """Return how many training steps an arm has for `feq` a sample."""
    most = math.ceil(feq / min(_cost(arm, 1, overrides))) + 1
    return max(1, int(np.searchsorted(np.cumsum(_cost(arm, most, overrides)), feq, side="right")))


# Cells


def run_cell(config: RunConfig, name: str, cache: Path) -> dict[str, Any]:
    """Train one cell, or read what an earlier call found; return its curve."""
    values = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    stem = f"{name}_{hashlib.sha256(values.encode()).hexdigest()[:10]}"
    path, folder = cache / f"{stem}.json", cache / "runs" / stem
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    trainer_for(config, out=folder).train()
    spent = {row["step"]: row["feq_total"] for row in read_jsonl(folder / "metrics.jsonl")[0]}
    seen = {row["step"]: row for row in read_jsonl(folder / "evaluation.jsonl")[0]}
    samples = config.prompts_per_step * config.group_size
    found = {
        "steps": sorted(seen),
        "feq": [spent.get(step, 0.0) / samples for step in sorted(seen)],
        "heldout": [seen[step]["heldout"]["mean"] for step in sorted(seen)],
        "reward": [seen[step]["reward"]["mean"] for step in sorted(seen)],
        "summary": json.loads((folder / "summary.json").read_text(encoding="utf-8")),
        "lr": config.optimizer.lr,
        "seed": config.seed,
    }
    writing = path.with_suffix(".writing")
    writing.write_text(json.dumps(found), encoding="utf-8")
    writing.replace(path)
    shutil.rmtree(folder)
    return found


def smooth(values: Sequence[float]) -> np.ndarray:
    """Return each value's mean with the two before it."""
    return np.array([np.mean(values[max(0, i + 1 - SMOOTH) : i + 1]) for i in range(len(values))])


def gains(cell: Mapping[str, Any]) -> np.ndarray:
    """Return the smoothed gain at each evaluation; it belongs to the smoothed F_eq, so that no arm is made late."""
    return smooth(np.asarray(cell["heldout"]) - cell["heldout"][0])


def feq_to(cell: Mapping[str, Any], target: float) -> float:
    """Return the F_eq a sample at which the gain is first `target`, between evaluations by a line; inf if never."""
    feq, gain = smooth(cell["feq"]), gains(cell)
    there = np.flatnonzero(gain >= target)
    if not len(there):
        return math.inf
    i = int(there[0])
    if i == 0:
        return 0.0
    return float(feq[i - 1] + (target - gain[i - 1]) / (gain[i] - gain[i - 1]) * (feq[i] - feq[i - 1]))


# Statistics


def with_interval(values: Sequence[float], middle: Callable[..., Any] = np.median) -> dict[str, float | None]:
    """Return a median with its 95 % bootstrap interval over seeds; None stands for a value that was never reached."""
    found = np.asarray(values, dtype=float)
    picks = np.random.default_rng(0).integers(0, len(found), (DRAWS, len(found)))
    drawn = np.sort(middle(found[picks], axis=1))
    ends = {"median": middle(found), "ci_low": drawn[int(0.025 * DRAWS)], "ci_high": drawn[int(0.975 * DRAWS)]}
    return {name: float(v) if math.isfinite(v) else None for name, v in ends.items()}


def tune(grid: Grid, arm: str, cache: Path, may_go_on: Callable[[], bool]) -> dict[float, list[float]] | None:
    """Return the last gains of every rate on the tuning seeds; None when time is up."""
    found: dict[float, list[float]] = {}
    for rate in grid.rates:
        for seed in grid.tuning_seeds:
            if not may_go_on():
                return None
            cell = run_cell(grid.config(arm, rate, seed), f"{arm}_lr{rate:g}_seed{seed}", cache)
            found.setdefault(rate, []).append(float(gains(cell)[-1]))
            _say(f"{arm} lr {rate:g} seed {seed}: gain {found[rate][-1]:+.3f}")
    return found


def measure(grid: Grid, cache: Path, may_go_on: Callable[[], bool]) -> dict[str, Any]:
    """Run the grid and return what was found of each arm; arms that time did not suffice for are left out."""
    tuned = {arm: found for arm in grid.arms if (found := tune(grid, arm, cache, may_go_on))}
    best = {arm: max(found, key=lambda rate: float(np.mean(found[rate]))) for arm, found in tuned.items()}
    cells: dict[str, dict[int, Any]] = {arm: {} for arm in tuned}
    for seed in grid.seeds:  # seed by seed, so that what there is can be compared
        for arm in tuned:
            if may_go_on():
                config = grid.config(arm, best[arm], seed)
                cells[arm][seed] = run_cell(config, f"{arm}_lr{best[arm]:g}_seed{seed}", cache)
                _say(f"{arm} seed {seed}: gain {gains(cells[arm][seed])[-1]:+.3f}")
    return {
        arm: {
            "lr": best[arm], "tuning": {f"{rate:g}": values for rate, values in tuned[arm].items()},
            **compare(cells[arm], cells.get(BASELINE, {})),
        }
        for arm in tuned
    }  # fmt: skip


def compare(cells: Mapping[int, Any], baseline: Mapping[int, Any]) -> dict[str, Any]:
    """Return an arm's figures beside the medians of the baseline, on the seeds that both have."""
    seeds = [seed for seed in cells if seed in baseline]
    if not seeds:
        return {"seeds": []}
    last = float(np.median([gains(cell)[-1] for cell in baseline.values()]))
    target = SHARE_OF_GAIN * last
    own = [feq_to(cells[seed], target) for seed in seeds]
    theirs = float(np.median([feq_to(cell, target) for cell in baseline.values()]))
    first = cells[seeds[0]]
    return {
        "seeds": seeds,
        "steps": first["steps"][-1],
        "feq": first["feq"][-1],
        "feq_per_step": first["feq"][-1] / first["steps"][-1],
        "gain": with_interval([float(gains(cells[seed])[-1]) for seed in seeds]),
        "to_95": with_interval(own),
        "ratio": with_interval([feq / theirs for feq in own]),
        "ratios": [feq / theirs if math.isfinite(feq) else None for feq in own],
        "target": target,
        "reached": float(np.mean(np.isfinite(own))),
        "curve": {
            "feq": smooth(first["feq"]).tolist(),
            "gain": np.median([gains(cells[seed]) for seed in seeds], axis=0).tolist(),
        },
        "diversity": float(np.median([
            cells[seed]["summary"]["diversity_after"] / cells[seed]["summary"]["diversity_before"] for seed in seeds
        ])),
    }  # fmt: skip


# What is shown


def table(arms: Mapping[str, Any]) -> str:
    """Return the rows of a Markdown table."""

    def shown(entry: Mapping[str, float | None], form: str) -> str:
        low, middle, high = (
            "not reached" if entry[k] is None else format(entry[k], form) for k in ("ci_low", "median", "ci_high")
        )
        return f"{middle} [{low}, {high}]"

    rows = [
        "| arm | rate | steps | F_eq a sample and step | last gain | F_eq to 95 % | ratio | reached | diversity |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, found in arms.items():
        if found["seeds"]:
            rows.append(
                f"| {arm} | {found['lr']:g} | {found['steps']} | {found['feq_per_step']:.1f} "
                f"| {shown(found['gain'], '+.3f')} | {shown(found['to_95'], '.0f')} | {shown(found['ratio'], '.2f')} "
                f"| {found['reached']:.0%} | {found['diversity']:.2f} |"
            )
    return "\n".join(rows) + "\n"


def plot(arms: Mapping[str, Any]) -> str:
    """Return an SVG of the median gain over F_eq: trajectory arms above, clean-sample arms below."""
    shown = {arm: found for arm, found in arms.items() if found["seeds"]}
    panels = []
    for title, names in (
        ("along the trajectory", [arm for arm in shown if arm not in FORWARD]),
        ("from clean samples", [arm for arm in shown if arm in (BASELINE, *FORWARD)]),
    ):
        series = [Series(arm, shown[arm]["curve"]["feq"], shown[arm]["curve"]["gain"], sparse=True) for arm in names]
        drawn = line_chart(
            series,
            from_zero=True,
            reference=(shown[BASELINE]["target"], "95 % of DanceGRPO"),
            x_label="F_eq a sample of each step, added up",
        )
        panels.append((f"Held-out gain, {title}", drawn))
    return sheet(panels, columns=1)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def main() -> None:
    """Run what is missing of the grid, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def listed(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
        return lambda text: tuple(kind(part) for part in text.split(","))

    parser.add_argument("--json", required=True, type=Path, help="file to write the figures to")
    parser.add_argument("--cache", required=True, type=Path, help="folder of finished and unfinished cells")
    parser.add_argument("--plot", type=Path, help="SVG to draw")
    parser.add_argument("--arms", type=listed(str), default=tuple(ARMS), help=f"of {', '.join(ARMS)}")
    parser.add_argument(
        "--rates", type=listed(float), default=(1e-3, 3e-3, 1e-2), help="learning rates every arm tries"
    )
    parser.add_argument("--tuning-seeds", type=listed(int), default=(0,))
    parser.add_argument("--seeds", type=listed(int), default=(100, 101, 102, 103, 104))
    parser.add_argument("--budget", type=int, default=16, help="training steps of DanceGRPO")
    parser.add_argument("--spend", type=float, default=0.5, help="share of DanceGRPO's F_eq that another arm may spend")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no cell after so many seconds")
    parser.add_argument(
        "overrides", nargs="*", help="key=value of every arm's configuration, such as model.path=digits"
    )
    args = parser.parse_intermixed_args()
    if unknown := [arm for arm in (*args.arms, BASELINE) if arm not in ARMS or arm == BASELINE not in args.arms]:
        parser.error(f"--arms: {', '.join(unknown)} is unknown or missing; {BASELINE} must be there")
    grid = Grid(args.arms, args.rates, args.tuning_seeds, args.seeds, args.budget, args.spend, tuple(args.overrides))
    args.cache.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    found = measure(grid, args.cache, lambda: time.monotonic() - began < args.seconds)
    result = {"arms": found, "grid": grid.__dict__, "command": sys.argv[1:], **describe_machine()}
    args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    sys.stdout.write(table(found))
    if args.plot is not None and found.get(BASELINE, {}).get("seeds"):
        args.plot.write_text(plot(found), encoding="utf-8")


if __name__ == "__main__":
    main()
