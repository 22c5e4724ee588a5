"""`align plan`: what a configuration holds on each accelerator, what fits, and the command that starts it."""

from __future__ import annotations

import argparse
import functools
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from align.commands.jobs import describe_job, measure_forward, reward_bytes
from align.errors import ConfigError
from align.output import add_config, add_dry_run, add_json, dry, give, number, positive, table
from align.plan import COUNTS, ENGINES, Job, Row, choose, launch
from align.plan import table as rows_of

SMALL = 2e7
"""Weights of a local model up to which a forward is timed without being asked for."""

EXTRAPOLATED = (
    "Extrapolated: measured are the bytes of weights, gradients and optimizer of small models on 1, 2 and 4 CPU "
    "processes (docs/scale.md says how far off it was); activations are counted on the architecture, 1.5 GB of "
    "overhead is assumed, a VAE's decoding is left out, and a step's time has no communication in it"
)


def plan(options: argparse.Namespace) -> int:
    """Say what a run would hold and take on 1 to 64 accelerators, and which of them it fits on."""
    if options.dry_run:
        from align.checks import require_valid
        from align.config import load_config

        config = load_config(options.config, options.overrides)
        require_valid(config)
        describe_job(config)
        what = {"run": config.name, "model": config.model.path, "gpus": options.gpus, "memory": options.memory}
        return dry(options, "plan", {**what, "timed here": options.measure})
    found = make_plan(
        options.config, options.overrides, gpus=options.gpus, memory_gb=options.memory, per_node=options.per_node,
        forward_seconds=options.forward_seconds, measure=options.measure,
    )  # fmt: skip
    return give(options, found, _text(found))


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `align plan`."""
    add_config(parser, "model.train=lora")
    parser.add_argument("--gpus", type=positive, default=8, metavar="N", help="accelerators you have (default: 8)")
    parser.add_argument("--memory", type=number, default=80.0, metavar="GB", help="of each, in GB (default: 80)")
    parser.add_argument("--per-node", type=positive, default=8, metavar="N", help="of each machine (default: 8)")
    parser.add_argument(
        "--forward-seconds", type=number, metavar="S", help="of one forward of the model for one row, where you know it"
    )
    parser.add_argument(
        "--measure", action="store_true", help="load the model and time that here; small local ones are timed unasked"
    )
    add_dry_run(parser)
    add_json(parser)


def make_plan(
    source: str | Path, overrides: Sequence[str] = (), *, gpus: int = 8, memory_gb: float = 80.0, per_node: int = 8,
    forward_seconds: float | None = None, measure: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Return the plan of a configuration, JSON-ready.

    Args:
        source, overrides: as `load_config` takes them.
        gpus: accelerators that there are; a recommendation is for so many at most.
        memory_gb: of each, in GB of 1e9 bytes.
        per_node: accelerators of a machine.
        forward_seconds: of one forward for one row.
        measure: load the model and time it.

    Raises:
        ConfigError: a configuration that cannot train, or a model whose size nothing tells.
    """
    from align.checks import require_valid
    from align.config import load_config

    config, memory = load_config(source, overrides), memory_gb * 1e9
    require_valid(config)
    job, about = describe_job(config)
    timed = "given" if forward_seconds is not None else "unknown"
    small = about["local"] and about["parameters"] <= SMALL and job.kind != "fit"  # whose forward is not timed here
    if forward_seconds is None and (measure or small):
        forward_seconds, timed = measure_forward(config), "measured here"
    rows = rows_of(job, memory, forward_seconds)
    best = choose(rows, gpus, per_node)
    verb = "fit" if config.trainer == "fit" else "train"
    command = functools.partial(_command, str(source), tuple(overrides), job, gpus, per_node, verb)
    return {
        "config": str(source), "name": config.name, "trainer": config.trainer, "gpus": gpus, "memory_gb": memory_gb,
        "per_node": per_node, **about, "rows_a_step": job.rows, "feq_a_row": job.feq, "feq_a_step": job.rows * job.feq,
        "forward_seconds": forward_seconds, "forward_seconds_are": timed,
        "engines": [_row(row) for row in rows],
        "recommendation": None if best is None else {**_row(best), "command": command(best, ())},
        "ranked": [row.engine for row in rows if best and row.fits and row.processes == best.processes],
        "would_fit": [] if best is not None else [
            {"changes": list(changes), **_row(row), "command": command(row, changes)}
            for changes, row in _remedies(source, overrides, config, gpus, per_node, memory)
        ],
        "fits_on_more": None if best is not None else next(
            ({"engine": row.engine, "processes": row.processes} for row in rows if row.fits), None
        ),
        "extrapolated": EXTRAPOLATED,
    }  # fmt: skip


# What would make it fit


def _changes(config: Any, gpus: int) -> list[str]:
    """Return what makes a run smaller, what costs least first; adapters, which are another run, last."""
    model, found = config.model, []
    if not getattr(model, "gradient_checkpointing", True):
        found.append("model.gradient_checkpointing=true")
    if getattr(model, "dtype", "bf16") == "fp32":
        found.append("model.dtype=bf16")
    rewards = getattr(config, "rewards", ())
    if isinstance(rewards, tuple):
        for part in ("rewards", "heldout_rewards"):
            found += [
                f"{part}.{i}.args.placement=offload" for i, reward in enumerate(getattr(config, part, ()))
                if reward_bytes(reward) > 1e8
            ]  # fmt: skip
    if getattr(model, "offload", True) is False:
        found.append("model.offload=true")
    if (getattr(config, "microbatch", None) or 0) > gpus:
        found.append(f"microbatch={gpus}")
    if getattr(getattr(config, "batch", None), "tile", None) not in (None, 1):
        found.append("batch.tile=1")
    if getattr(getattr(config, "reference", None), "mode", "precomputed") != "precomputed" and model.train == "full":
        found.append("reference.mode=precomputed")
    if getattr(config.optimizer, "ema_decay", None) is not None:
        found.append("optimizer.ema_decay=null")
    return found


def _remedies(
    source: str | Path, overrides: Sequence[str], config: Any, gpus: int, per_node: int, memory: float
) -> Iterable[tuple[tuple[str, ...], Row]]:
    """Yield the smallest sets of changes that make a run fit: one alone or several together, and adapters."""
    from align.checks import require_valid
    from align.config import load_config

    def fits(changes: Sequence[str]) -> Row | None:
        try:
            changed = load_config(source, [*overrides, *changes])
            require_valid(changed)
        except ConfigError:  # such as a microbatch that does not divide the batch
            return None
        return choose(rows_of(describe_job(changed)[0], memory), gpus, per_node)

    single = _changes(config, gpus)
    together = [single[:n] for n in range(1, len(single) + 1)]
    lora = [["model.train=lora", *more] for more in ([], *together)] if config.model.train == "full" else []
    for group in ([[one] for one in single] + together, lora):
        found = ((changes, row) for changes in group if (row := fits(changes)) is not None)
        if first := next(found, None):
            yield tuple(first[0]), first[1]


def _command(
    source: str, overrides: tuple[str, ...], job: Job, gpus: int, per_node: int, verb: str, row: Row,
    changes: Sequence[str],
) -> str:  # fmt: skip
    words = [*overrides, *changes]
    if job.kind == "visual" and job.microbatch is None and row.room is not None and row.room < 16:
        words.append(f"batch.tile={row.room}")  # the run would derive more from memory that it has not filled yet
    return launch(shlex.join([source, *words]), row.engine, row.processes, per_node, verb=verb)


# What is shown


def _row(row: Row) -> dict[str, Any]:
    return {
        "engine": row.engine, "processes": row.processes, "fits": row.fits, "why_not": row.why_not,
        "peak_gb": row.held.peak / 1e9, "peak_is": row.held.phase,
        "parts_gb": {name: size / 1e9 for name, size in row.held.parts.items()},
        "rows_at_once": row.held.rows, "rows_that_fit": row.room, "step_seconds": row.seconds,
    }  # fmt: skip


def _text(found: dict[str, Any]) -> str:
    what = "all" if found["train"] == "full" else "adapters of"
    head = [
        ("model", f"{found['model']}, {_number(found['parameters'])} weights ({found['sizes_are']})"),
        ("trains", f"{what} {_number(found['trained'])} weights, {found['dtype']}, {found['trainer']}"),
        ("cost",
         f"{found['feq_a_row']:g} F_eq a row x {found['rows_a_step']} rows = {found['feq_a_step']:,.0f} a step"),
        ("forward", _forward(found)),
        ("activations", found["activations_are"]),
    ]  # fmt: skip
    return "\n".join([
        table(head), "", f"peak GB on each of so many accelerators; * fits {found['memory_gb']:g} GB", _matrix(found),
        "", *_advice(found), "", f"{found['extrapolated']}.",
    ])  # fmt: skip


def _forward(found: dict[str, Any]) -> str:
    if found["forward_seconds"] is None:
        return "unknown, so no step is timed; give --forward-seconds S, or --measure where the model is"
    return f"{found['forward_seconds']:.3g} s a row ({found['forward_seconds_are']})"


def _matrix(found: dict[str, Any]) -> str:
    cells = {(row["engine"], row["processes"]): row for row in found["engines"]}
    order = [name for names in ENGINES.values() for name in names]
    engines = sorted({row["engine"] for row in found["engines"]}, key=order.index)
    lines = ["".join(["accelerators".ljust(14), *(f"{n:>9}" for n in COUNTS)])]
    for engine in engines:
        row = [engine.ljust(14)]
        for n in COUNTS:
            cell = cells.get((engine, n))
            shown = "" if cell is None else "-" if cell["why_not"] else f"{cell['peak_gb']:.3g}{'*' * cell['fits']}"
            row.append(f"{shown:>9}")
        lines.append("".join(row).rstrip())
    seconds = {row["processes"]: row["step_seconds"] for row in found["engines"] if not row["why_not"]}
    if found["forward_seconds"] is not None:
        lines.append(
            "".join(["s a step".ljust(14), *(f"{seconds[n]:>9.3g}" if n in seconds else " " * 9 for n in COUNTS)])
        )
    return "\n".join(lines)


def _advice(found: dict[str, Any]) -> list[str]:
    best = found["recommendation"]
    if best is not None:
        others = ", ".join(name for name in found["ranked"] if name != best["engine"])
        return [
            f"recommended: {best['engine']} on {best['processes']}" + (f"; then {others}" if others else ""),
            _parts(best), *_when(best), "", f"  {best['command']}",
        ]  # fmt: skip
    rows = [row for row in found["engines"] if not row["why_not"] and row["processes"] <= found["gpus"]]
    least = min(rows, key=lambda row: row["peak_gb"])
    lines = [f"nothing fits on {found['gpus']}; the least is {least['engine']} on {least['processes']}", _parts(least)]
    for other in found["would_fit"]:
        lines += ["", f"fits with {' '.join(other['changes'])}: {other['engine']} on {other['processes']}, "
                  f"{other['peak_gb']:.3g} GB", f"  {other['command']}"]  # fmt: skip
    more = found["fits_on_more"]
    if more is not None:
        lines += ["", f"as it is, it fits on {more['processes']} accelerators with {more['engine']}"]
    elif not found["would_fit"]:
        lines += ["", "no change that is known here makes it fit: take accelerators with more memory"]
    return lines


def _when(row: dict[str, Any]) -> list[str]:
    rows = row["rows_that_fit"]
    at_once = f"; {rows} rows fit into a training microbatch" if rows is not None else ""
    return [f"  the peak is while {row['peak_is']}{at_once}"]


def _parts(row: dict[str, Any]) -> str:
    return table([(f"  {name}", f"{size:.3g} GB") for name, size in row["parts_gb"].items() if size >= 5e-7])


def _number(count: float) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M" if count >= 1e6 else f"{count:,.0f}"
