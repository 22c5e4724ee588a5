"""What P[Love] recovers of worlds whose truth is known: ranks, coordinated accounts, probabilities.

    python scripts/bench_plove.py --json FILE --cache DIR [--seeds 100-119] [--calibration-seeds 100-102]

gain          Spearman of the fitted reward with the true quality of all outputs: robust less naive, paired by seed
              (above 0 in `corrupted`, at least -.01 in `clean`); `other` is a world the likelihood does not describe
accounts      precision and recall of the listed accounts among the coordinated ones (at least .9 and .6)
calibration   of P(up | shown) on held-out people: debiased ECE (at most .03), Brier beside that of the base rate,
              AUROC beside that of the uncalibrated reward (within .01)

naive is cross-entropy of the thumbs. robust has effects of people, `users.trim: auto` and rates of mistakes that are
fitted; `known` is robust with the true rates given. Both arms share the ridge, the steps and the split. Every cell is
a whole `align fit`; it is kept in the cache when it is done, and a run that was cut short goes on. `--tune --seeds 0-9`
is how the ridge was chosen: by the naive arm.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from align.config import load_config
from align.feedback.bias import spearman
from align.feedback.resampling import bootstrap_sums, wilson
from align.feedback.simulate import Simulation, SimulationConfig, simulate
from align.groupstats import bootstrap_mean
from align.run import describe_machine
from align.tracking import replace_text
from align.types import Samples
from rewards import get_reward
from rewards.evaluate import auroc, debiased_calibration_error
from rewards.fit import fit_reward
from rewards.fit_data import FitData, observe
from rewards.fit_split import split_rows
from rewards.fitted import calibrated
from rewards.outputs import sample_of

CAMPAIGN = "always-up-"
HONEST = SimulationConfig(
    users=200, shown_per_user=60, reaction_rate=0.25, annoyed=0.6, pleased=0.3, raters=0, vocabulary=40
)
CORRUPTED = replace(HONEST, users=194, always_up=6, false_thumbs=0.05)
WORLDS = {
    "corrupted": CORRUPTED,
    "clean": HONEST,
    "other": replace(CORRUPTED, tails=3.0, ambiguity=0.5),
    # How much of their list the accounts have to themselves: of 240 outputs, from a quarter to all of them.
    "list of 120": replace(CORRUPTED, campaign=120),
    "list of 180": replace(CORRUPTED, campaign=180),
    "no list": replace(CORRUPTED, campaign=240),
}
ARMS: dict[str, dict[str, Any]] = {
    "naive": {},
    "robust": {"users": {"effects": True, "trim": "auto"}, "objective": {"mistakes": "fitted"}},
    "known": {
        "users": {"effects": True, "trim": "auto"}, "objective": {"rho_up": 0.05, "rho_down": 0.05},
    },
}  # fmt: skip
LISTS = ("list of 120", "list of 180", "no list")
FIT = {"steps": 100, "batch_size": 4096, "ridge": 0.1, "lr": 2e-2}
Ranks = dict[tuple[str, str], list[dict[str, Any]]]
RIDGES = (0.1, 0.3, 1.0)


@functools.lru_cache(maxsize=4)
def world_of(name: str, seed: int) -> Simulation:
    """Return a world, once for all arms of a seed."""
    return simulate(replace(WORLDS[name], seed=seed))


def fit_config(seed: int, settings: dict[str, Any], arm: str, **sections: Any) -> Any:
    """Return the config of a fit; all arms share everything but their own sections."""
    return load_config({
        "trainer": "fit", "name": arm, "seed": seed, "steps": settings["steps"], "batch_size": settings["batch_size"],
        "data": {"paths": ["simulated"]}, "split": {"by": ["prompt"], "heldout": 0.05, "calibration": 0},
        "calibration": "none", "model": {"backbone": "words", "ridge": settings["ridge"]},
        "optimizer": {"lr": settings["lr"], "weight_decay": 0.0}, "checkpoint": {"every": 0}, **ARMS[arm], **sections,
    })  # fmt: skip


def scores_of(folder: Path, world: Simulation) -> dict[str, float]:
    """Return the fitted reward, before calibration, of every output of a world."""
    pairs = [sample_of(item) for item in world.items.values()]
    samples = Samples([prompt for prompt, _ in pairs], texts=[text for _, text in pairs])
    scores = get_reward("fitted", path=str(folder), output="score").score(samples).values[:, 0]
    return dict(zip(world.items, scores.tolist(), strict=True))


def rank_cell(folder: Path, name: str, arm: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Fit one arm to one world: the Spearman of its scores with the true quality, and whom it listed."""
    world, config = world_of(name, seed), fit_config(seed, settings, arm)
    data = observe(world.events, FitData(dict(world.items)), config.data)
    card = fit_reward(config, folder / "run", data=data).card
    score = scores_of(folder / "run", world)
    return {
        "spearman": spearman(np.array([score[item] for item in world.quality]), np.array(list(world.quality.values()))),
        "thumbs": card["trained_on"], "listed": [row["account"] for row in card["trimmed_users"]],
        "coordinated": WORLDS[name].always_up, "mistakes": card["observation_models"]["mistakes"],
    }  # fmt: skip


def calibration_cell(folder: Path, name: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Fit P(up | shown) to 200 people with a quarter of the negatives, calibrate it on as many, measure it on 400."""
    four = replace(WORLDS[name], users=4 * WORLDS[name].users, always_up=4 * WORLDS[name].always_up, seed=seed)
    world = simulate(four)
    config = fit_config(
        seed, settings, "robust", calibration="temperature",
        data={"paths": ["simulated"], "silence": "negative", "negative_share": 0.25},
        split={"by": ["user"], "heldout": 0.48, "calibration": 0.27},
    )  # fmt: skip
    data = observe(world.events, FitData(dict(world.items)), config.data)
    card = fit_reward(config, folder / "run", data=data).card
    listed = {row["account"] for row in card["trimmed_users"]}
    whole = [data.rows[i] for i in split_rows(data.rows, config.split, config.seed)[0]["heldout"]]
    score, rows = scores_of(folder / "run", world), [row for row in whole if row.user not in listed]
    plain = auroc(np.array([score[row.items[0]] for row in rows]), np.array([row.value for row in rows]))
    p, seen = (np.array(column) for column in zip(*[(score[row.items[0]], row.value) for row in whole], strict=True))
    found = card["heldout"]["thumbs"]
    kept = ("n", "clusters", "base_rate", "mean_probability", "auroc", "auprc", "brier", "brier_of_base_rate", "ece",
            "debiased_ece", "debiased_ece_ci")  # fmt: skip
    return {key: found[key] for key in kept} | {
        "auroc_uncalibrated": plain, "listed": sorted(listed), "coordinated": four.always_up,
        "debiased_ece_with_the_listed": debiased_calibration_error(calibrated(p, card["calibration"]), seen),
    }  # fmt: skip


def gains(cells: Ranks, world: str, arm: str) -> dict[str, Any]:
    """Return the paired gain of an arm over naive, with a bootstrap over the seeds."""
    seeds = len(cells[world, arm])
    values = {name: np.array([cell["spearman"] for cell in cells[world, name][:seeds]]) for name in ("naive", arm)}
    return bootstrap_mean(values[arm] - values["naive"], np.arange(len(values[arm]))).as_dict() | {
        "naive": float(values["naive"].mean()), arm: float(values[arm].mean()),
        "least": float((values[arm] - values["naive"]).min()),
        "thumbs": float(np.mean([cell["thumbs"] for cell in cells[world, "naive"]])),
        "mistakes": {k: float(np.mean([c["mistakes"][k] for c in cells[world, arm]])) for k in ("rho_up", "rho_down")},
    }  # fmt: skip


def accounts(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Return precision and recall over all seeds, with a bootstrap of seeds, and the seeds that reach both bars."""
    right = np.array([sum(name.startswith(CAMPAIGN) for name in cell["listed"]) for cell in cells], dtype=float)
    listed = np.array([len(cell["listed"]) for cell in cells], dtype=float)
    there = np.array([cell["coordinated"] for cell in cells], dtype=float)
    both = (right >= 0.9 * listed) & (right >= 0.6 * there)
    found: dict[str, Any] = {"coordinated": there.sum(), "listed": listed.sum(), "right": right.sum()}
    for name, whole in (("precision", listed), ("recall", there)):
        if not whole.sum():
            continue
        table = np.stack([right, whole], 1)
        found[name] = float(right.sum() / whole.sum())
        found[f"{name}_ci"] = list(bootstrap_sums(table, lambda sums: sums[:, 0] / np.maximum(sums[:, 1], 1e-9)))
        found[f"{name}_wilson"] = list(wilson(right.sum(), whole.sum()))
    return found | {"seeds_with_both": int(both.sum()), "seeds": len(cells)}


def span(text: str) -> list[int]:
    """Return the seeds of `100-119`, or of `3`."""
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


@dataclass(frozen=True)
class Cells:
    """The cells of a cache under some settings: each is read, or made."""

    cache: Path
    settings: dict[str, Any]

    def get(self, stem: str, work: Callable[[Path], dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
        """Return a cell, made in a folder of its own where it is not there; another setting is another cell."""
        path = self.cache / f"{stem}.json"
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if found["settings"] == settings:
                return found
        began = time.process_time()
        with tempfile.TemporaryDirectory() as name:
            os.environ["ALIGN_CACHE"] = name  # embeddings of a world serve nobody else
            found = work(Path(name))
        found |= {"settings": settings, "cpu_seconds": time.process_time() - began}
        replace_text(path, json.dumps(found, indent=1) + "\n")
        return found

    def ranks(self, worlds: Sequence[str], arms: Sequence[str], seeds: Sequence[int], **changed: Any) -> Ranks:
        """Return rank cells by (world, arm), all of a seed before the next one."""
        found: Ranks = {(world, arm): [] for world in worlds for arm in arms}
        settings = self.settings | changed
        for seed in seeds:
            for world, arm in found:
                stem = f"{world.replace(' ', '_')}_{arm}_ridge{settings['ridge']:g}_seed{seed}"
                work = functools.partial(rank_cell, name=world, arm=arm, seed=seed, settings=settings)
                found[world, arm].append(self.get(stem, work, settings))
        return found

    def calibrations(self, world: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Return the calibration cells of a world."""
        return [
            self.get(
                f"calibration_{world}_seed{seed}",
                functools.partial(calibration_cell, name=world, seed=seed, settings=self.settings), self.settings,
            )
            for seed in seeds
        ]  # fmt: skip


def probabilities(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the means over seeds, and the worst seed."""
    keys = ("n", "base_rate", "auroc", "auroc_uncalibrated", "brier", "brier_of_base_rate", "ece", "debiased_ece",
            "debiased_ece_with_the_listed")  # fmt: skip
    return {key: float(np.mean([cell[key] for cell in cells])) for key in keys} | {
        "largest_debiased_ece": max(cell["debiased_ece"] for cell in cells),
        "least_brier_gain": min(cell["brier_of_base_rate"] - cell["brier"] for cell in cells), "seeds": len(cells),
    }  # fmt: skip


def measure(made: Cells, options: argparse.Namespace) -> dict[str, Any]:
    """Return all figures, the most important cells first."""
    seeds = span(options.seeds)
    cells = made.ranks(("corrupted", "clean", "other"), ("naive", "robust"), seeds)
    calibration = {name: made.calibrations(name, span(options.calibration_seeds)) for name in ("corrupted", "other")}
    # Whom a fit lists does not depend on how long it is trained.
    lists = made.ranks(LISTS, ("robust",), span(options.list_seeds), steps=1)
    cells |= made.ranks(("corrupted",), ("known",), span(options.list_seeds))
    every = [cell for part in (cells, lists, calibration) for group in part.values() for cell in group]
    return {
        "gain": {world: gains(cells, world, "robust") for world in ("corrupted", "clean", "other")}
        | {"corrupted, rates known": gains(cells, "corrupted", "known")},
        "accounts": {world: accounts(cells[world, "robust"]) for world in ("corrupted", "clean", "other")}
        | {world: accounts(found) for (world, _), found in lists.items()},
        "calibration": {name: probabilities(found) for name, found in calibration.items()},
        "cpu_seconds": sum(cell["cpu_seconds"] for cell in every),
        "settings": made.settings | {"seeds": options.seeds}, "worlds": {n: asdict(w) for n, w in WORLDS.items()},
        **describe_machine(),
    }  # fmt: skip


def tune(made: Cells, seeds: Sequence[int]) -> dict[str, float]:
    """Return the mean Spearman of the naive arm in the corrupted world under each ridge."""
    found = {
        ridge: made.ranks(("corrupted",), ("naive",), seeds, ridge=ridge)["corrupted", "naive"] for ridge in RIDGES
    }
    return {f"{ridge:g}": float(np.mean([cell["spearman"] for cell in cells])) for ridge, cells in found.items()}


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, metavar="FILE", help="where the figures go")
    parser.add_argument("--cache", required=True, type=Path, help="folder of finished cells")
    parser.add_argument("--seeds", default="100-119", help="of the worlds")
    parser.add_argument("--list-seeds", default="100-104", help="of the worlds with longer lists, and of the arm known")
    parser.add_argument("--calibration-seeds", default="100-102", help="of the calibration")
    parser.add_argument("--steps", type=int, default=FIT["steps"], help="of a fit")
    parser.add_argument("--ridge", type=float, default=FIT["ridge"], help="of the reward's weights, in all arms")
    parser.add_argument("--tune", action="store_true", help="only compare ridges by the naive arm; with --seeds 0-9")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    made = Cells(options.cache, FIT | {"steps": options.steps, "ridge": options.ridge})
    found = tune(made, span(options.seeds)) if options.tune else measure(made, options)
    Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    shown = ("gain", "accounts", "calibration") if not options.tune else tuple(found)
    sys.stdout.write(json.dumps({key: found[key] for key in shown}, indent=1) + "\n")


if __name__ == "__main__":
    main()
