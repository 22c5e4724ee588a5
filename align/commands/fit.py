"""`align fit`: a reward from what people said."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.output import add_dry_run, add_json, add_out, add_seed, give, table

INTERRUPTED = 130


def fit(options: argparse.Namespace) -> int:
    """Fit a reward as a config says."""
    from align.checks import require_valid
    from align.config import load_config
    from align.fit_config import FitConfig

    seed = [] if options.seed is None else [f"seed={options.seed}"]
    config = load_config(options.config, [*options.overrides, *seed], kind=FitConfig)
    require_valid(config)
    out = options.out or Path("runs") / config.name
    if options.dry_run:
        return give(options, _plan(config, out), _plan_text(config, out))
    return fit_into(options, config, out, overwrite=options.overwrite)


def fit_into(options: argparse.Namespace, config: Any, out: Path, *, overwrite: bool = False) -> int:
    """Fit a reward into a folder, or go on with the one that is there, and write its page."""
    from align.reports.training import write_report
    from rewards.fit import fit_reward

    result = fit_reward(config, out, overwrite=overwrite)
    found: dict[str, Any] = {"directory": str(result.directory), "status": result.status}
    if result.status == "stopped":
        give(options, found, f"stopped; `align resume {result.directory}` goes on")
        return INTERRUPTED
    for warning in result.card["warnings"]:
        sys.stderr.write(f"align: Warning: {warning}.\n")
    report = write_report(result.directory)
    found |= {"reward": str(result.directory / "reward"), "report": str(report), "card": result.card}
    return give(options, found, _card_text(result.card, result.directory, report))


def fit_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `align fit`."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or a recipe that `align configs list` shows")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="change a value, e.g. model.head=mlp steps=500"
    )
    parser.add_argument("--overwrite", action="store_true", help="start again, replacing the fit in the folder")
    add_out(parser, "the run folder (default: runs/NAME); an unfinished fit there is resumed")
    add_seed(parser)
    add_dry_run(parser)
    add_json(parser)


def _plan(config: Any, out: Path) -> dict[str, Any]:
    from rewards.fit_data import load_data, split_rows

    data = load_data(config.data.paths, config.data)
    parts, dropped = split_rows(data.rows, config.split, config.seed)
    return {
        "out": str(out), "observations": data.counts(), "parts": {name: len(rows) for name, rows in parts.items()},
        "between_parts": dropped,
    }  # fmt: skip


def _plan_text(config: Any, out: Path) -> str:
    found = _plan(config, out)
    rows = [(kind, str(n)) for kind, n in found["observations"].items()]
    rows += [(name, f"{n} rows") for name, n in found["parts"].items()]
    return f"{table(rows)}\nwould fit {config.model.backbone} into {out}"


def _card_text(card: Mapping[str, Any], directory: Path, report: Path) -> str:
    heldout, rows = card["heldout"], []
    if thumbs := heldout.get("thumbs"):
        rows.append(("thumbs", f"{thumbs['n']} held out, {thumbs['base_rate']:.1%} up; AUROC {_show(thumbs['auroc'])}"))
        low, high = thumbs["debiased_ece_ci"]
        rows.append((
            "calibration",
            f"debiased ECE {_show(thumbs['debiased_ece'])} ({_show(low)} to {_show(high)}); Brier "
            f"{_show(thumbs['brier'])}, that of the base rate {_show(thumbs['brier_of_base_rate'])}",
        ))  # fmt: skip
    for kind in ("comparisons", "rankings"):
        if pairs := heldout.get(kind):
            low, high = pairs["ci"]
            rows.append(
                (kind, f"{pairs['n']} pairs, {_show(pairs['without_ties'])} right ({_show(low)} to {_show(high)})")
            )
    if rated := heldout.get("ratings"):
        rows.append(("ratings", f"{rated['n']}, Spearman {_show(rated['spearman'])}"))
    if card["sparsity"]["status"] == "measured":
        rows.append(("weights", card["sparsity"]["sentence"]))
    rows += [("reward", str(directory / "reward")), ("report", str(report))]
    return table(rows)


def _show(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
