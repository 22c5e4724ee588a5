"""What a healthy result looks like beside a sick one, for the pages of the pillars: pictures of two real runs each.

    python scripts/pillar_pictures.py [rewards] [rluf] [feedback] [sparsity] --out docs/pictures --cache DIR

rewards   6,000 simulated thumbs: the shipped fit, and a perceptron without ridge, calibration or end
rluf      rluf/moderate where people also love what is unsafe: safety as a hard judge, and as a reward by weight
feedback  ratings by six honest people; by four, one who always says 7, and two who copy
sparsity  kto on the tiny language model at four rates: float32 weights, and bf16 weights without a master

Runs and cells are kept in the cache, so that a picture can be drawn again. Nothing in a picture is drawn by hand.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bench_sparsity_science import Grid, base_of, run_cell
from markupsafe import Markup

from align.config import load_config
from align.feedback.audit import audit_annotators
from align.feedback.overview import agreement_of
from align.feedback.simulate import SimulationConfig, simulate
from align.feedback.store import Store
from align.reports.charts import Series, line_chart, sheet
from align.reports.dots import Dot, dot_chart
from align.reports.fit import reliability_plot
from align.tracking import read_jsonl
from rewards.fit import fit_reward
from trainers import trainer_for

Panel = tuple[str, Markup]

THUMBS = SimulationConfig(prompts=400, users=150, shown_per_user=100, reaction_rate=0.4, vocabulary=40, raters=0)
HALF = "split.heldout=0.5"
OVERFITTED = ("model.head=mlp", "model.ridge=0", "steps=1500", "calibration=none", "split.calibration=0")
UNSAFE_LOVED = ("rewards.love.args.animals=[gold,cat,dog,fox]", "evaluation.every=10", "monitor.action=warn")
BY_WEIGHT = ("rewards.safety.role=utility", "rewards.safety.weight=0.1")
RATERS = {
    "Six honest people": SimulationConfig(users=0, severity=0.05),
    "Four, one who always says 7, two who copy": SimulationConfig(
        users=0, severity=0.05, raters=4, constant=1, coordinated=2
    ),
}
RATES = (1e-6, 1e-5, 1e-4, 1e-3)


def rewards(cache: Path) -> list[Panel]:
    """Fit the same thumbs twice; the chart is that of the fit's own page."""
    store = cache / "thumbs.db"
    if not store.exists():
        world = simulate(THUMBS)
        with Store.open(store) as open_store:
            open_store.add(list(world.items.values()), world.events)
    panels = []
    for title, told in (("As it ships", ()), ("Overfitted", OVERFITTED)):
        out = cache / f"fit_{'over' if told else 'ships'}"
        config = load_config("fit/thumbs", [f"data.paths=[{store}]", HALF, *told])
        card = fit_reward(config, out).card["heldout"]["thumbs"]
        about = f"debiased ECE {card['debiased_ece']:.3f}, AUROC {card['auroc']:.2f}, Brier {card['brier']:.3f}"
        panels.append((f"{title}: {about}", reliability_plot(card["reliability"])))
    return panels


def rluf(cache: Path) -> list[Panel]:
    """Train the same rewards twice, and draw the held-out means of what is trained on and of safety."""
    panels = []
    for title, told in (("Safety is a hard judge", ()), ("Safety is a reward of weight 0.1", BY_WEIGHT)):
        out = cache / f"rluf_{'weight' if told else 'judge'}"
        if not (out / "summary.json").exists():
            trainer_for(load_config("rluf/moderate", [*UNSAFE_LOVED, *told]), out=out, overwrite=True).train()
        rows = read_jsonl(out / "evaluation.jsonl")[0]
        series = []
        for name, key in (("love", "reward"), ("helpfulness", "reward"), ("safety", "reward" if told else "judge")):
            found = [row[f"{key}/{name}"] for row in rows]
            means, lows, highs = ([row[end] for row in found] for end in ("mean", "ci_low", "ci_high"))
            series.append(Series(name, [row["step"] for row in rows], means, lows, highs))
        drawn = line_chart(series, percent=True, from_zero=True)
        panels.append((f"{title}: held-out answers", drawn))
    return panels


def feedback(cache: Path) -> list[Panel]:
    """Audit two sets of raters; the chart is that of the report: how far each rates from the others."""
    panels = []
    for title, config in RATERS.items():
        world = simulate(config)
        rated = [event for event in world.events if event.kind == "ordinal"]
        alpha = next(iter(agreement_of(rated, world.items).values()))["coefficients"]["krippendorff_ordinal"]
        audited = audit_annotators(rated, world.items)
        flags: dict[str, set[str]] = {}
        for pair in audited["coordinated"]:
            for name in pair["annotators"]:
                flags.setdefault(name, set()).add("coordinated")
        dots = []
        for row in next(iter(audited["annotators"].values())):
            mine = [*row["flags"], *flags.get(row["annotator"], ())]
            half = 1.96 * row["severity_error"]
            ends = row["severity"] - half, row["severity"] + half
            dots.append(Dot(row["annotator"], row["severity"], *ends, f"n {row['n_shared']}", 5 if mine else 0))
            if mine:
                dots[-1] = replace(dots[-1], label=f"{row['annotator']}: {', '.join(mine)}")
        chart = dot_chart(dots, low=-2.5, high=2.5, reference=(0.0, "points above or below the others"), left=210)
        panels.append((f"{title}: alpha {alpha['value']:.2f}", chart))
    return panels


def sparsity(cache: Path) -> list[Panel]:
    """Train at each rate in both precisions; what is identical to the base in bf16, and what rounding would leave."""
    grid = Grid(("kto",), RATES, (0,), ("master", "pure"), {"language": 60}, 0)
    bases = {"language": base_of("language", cache)}
    panels = []
    for title, precision in (("float32 weights, seen in bf16", "master"), ("bf16 weights without a master", "pure")):
        views = [
            run_cell(grid.config("kto", rate, 0, bases), f"kto_lr{rate}", precision, cache)["views"]["BF16"]
            for rate in RATES
        ]
        x = [math.log10(rate) for rate in RATES]
        series = [
            Series("bit-identical to the base", x, [view["core_identical"] for view in views], sparse=True),
            Series("if a dense update were rounded", x, [view["core_dense"] for view in views], sparse=True),
        ]
        drawn = line_chart(series, percent=True, from_zero=True, x_label="log10 of the learning rate")
        apart = max(abs(view["core_identical"] - view["core_dense"]) for view in views)
        panels.append((f"KTO, {title}: at most {100 * apart:.1f} points apart", drawn))
    return panels


PICTURES: dict[str, Callable[[Path], list[Panel]]] = {
    "rewards": rewards, "rluf": rluf, "feedback": feedback, "sparsity": sparsity,
}  # fmt: skip


def main() -> None:
    """Read the arguments and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help=f"of {', '.join(PICTURES)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="the folder of the pictures")
    parser.add_argument("--cache", type=Path, required=True, help="the folder of the runs behind them")
    options = parser.parse_args()
    if unknown := set(options.pictures) - set(PICTURES):
        parser.error(f"no such picture: {', '.join(sorted(unknown))}")
    options.cache.mkdir(parents=True, exist_ok=True)
    for name in options.pictures or PICTURES:
        path = options.out / f"healthy_{name}.svg"
        path.write_text(sheet(PICTURES[name](options.cache)), encoding="utf-8")


if __name__ == "__main__":
    main()
