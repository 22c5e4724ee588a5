"""`align sparsity`: what an update moved, how runs overlap, sparse deltas, and the page about it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from align.errors import ConfigError
from align.output import add_dry_run, add_json, add_out, add_seed, dry, examples, give, positive, table
from align.sparsity import FORMS


def needs_action(options: argparse.Namespace) -> int:
    """Refuse `align sparsity` alone."""
    raise ConfigError("`align sparsity` needs an action", do="See `align sparsity --help`")


def _compare(options: argparse.Namespace) -> int:
    from align.sparsity.compare import as_text, compare

    call: dict[str, Any] = {"base": options.base, "tuned": options.tuned, "level": options.level}
    call |= {"threads": options.threads, "mask": options.mask, "structure": options.structure}
    call |= {"compared_in": options.form or ""}
    form = FORMS.get(options.form, "")
    if options.level != "full" and (options.mask is not None or options.structure):
        flag = "--structure" if options.mask is None else "--mask"
        raise ConfigError(f"{flag} needs the whole comparison", where=flag, do="Leave out --level bits")
    if options.threads is not None and options.mask is not None:
        raise ConfigError("A mask is written tensor by tensor", where="--threads", do="Leave it out")
    if options.dry_run:
        return _plan(options, "compare", call)
    if options.mask is not None:
        from align.sparsity.masks import write_mask

        found = write_mask(options.base, options.tuned, options.mask, form=form, structure=options.structure)
    else:
        found = compare(
            options.base, options.tuned, level=options.level, form=form, threads=options.threads,
            structure=options.structure,
        )  # fmt: skip
    result = found.as_dict()
    return give(options, result, as_text(result))


def _read(*sides: str) -> None:
    """Open what a dry run names, masks among it, and refuse what cannot be read."""
    from align.sparsity.masks import is_mask, read_mask
    from align.sparsity.sources import open_source

    for side in sides:
        (read_mask if is_mask(side) else open_source)(side)


def _overlap(options: argparse.Namespace) -> int:
    from align.sparsity.masks import as_text, overlap

    if options.dry_run:
        _read(*options.runs, *filter(None, (options.base,)))
        return dry(options, "overlap", {"base": options.base, "runs": options.runs})
    found = overlap(options.base, options.runs)
    return give(options, found, as_text(found))


def _control(options: argparse.Namespace) -> int:
    from align.sparsity.masks import write_control

    out = options.out or Path("control.mask")
    call = {"mask": options.given, "base": options.base, "match": options.match, "seed": options.seed or 0}
    if options.dry_run:
        _read(options.given, options.base)
        return dry(options, "draw a control of", {**call, "out": str(out)})
    found = write_control(options.given, options.base, out, match=options.match, seed=options.seed or 0)
    return give(
        options, found, f"wrote {out}: {found['chosen']:,} of {found['parameters']:,} weights, as many of every "
        f"{'tensor' if options.match == 'tensor' else 'tensor and exponent'} as {options.given} has"
    )  # fmt: skip


def _equal(options: argparse.Namespace) -> int:
    from align.sparsity.equality import as_text, equality

    call = {"mask": options.mask, "init": options.init, "full": options.full}
    if options.dry_run:
        _read(options.first, options.second, options.mask, options.init, *filter(None, (options.full,)))
        return dry(options, "compare", {"first": options.first, "second": options.second, **call})
    found = equality(options.first, options.second, **call)
    return give(options, found, as_text(found))


def _rank(options: argparse.Namespace) -> int:
    from align.sparsity.ranks import as_text, rank

    if options.dry_run:
        return _plan(options, "measure the ranks of", {"base": options.base, "tuned": options.tuned})
    found = rank(options.base, options.tuned, level=options.level)
    return give(options, found, as_text(found))


def export_delta(base: str | Path, tuned: str | Path, out: str | Path) -> dict[str, Any]:
    """Write what turns `base` into `tuned` to the file `out`, with its card beside it.

    Returns:
        what `align.sparsity.delta.write_delta` does, and where the `card` is.

    Raises:
        ModelError: see there.
    """
    from align.reports.modelcard import write_delta_card
    from align.sparsity.delta import write_delta

    found = write_delta(base, tuned, out)
    return {**found, "card": str(write_delta_card(Path(out), str(base), str(tuned), found))}


def _delta(options: argparse.Namespace) -> int:
    out = options.out or Path("delta.safetensors")
    if options.dry_run:
        return _plan(options, "write a delta of", {"base": options.base, "tuned": options.tuned, "out": str(out)})
    found = export_delta(options.base, options.tuned, out)
    size = f"{found['bytes'] / 1e6:,.1f} MB, {found['ratio']:.1f} times smaller than the weights"
    return give(options, found, f"wrote {out}: {size}\ncard: {found['card']}")


def _apply(options: argparse.Namespace) -> int:
    from align.sparsity.delta import apply_delta

    out = options.out or Path("applied")
    if options.dry_run:
        from align.sparsity.container import read_container

        _read(options.base)
        read_container(options.delta, "delta")
        return dry(options, "apply", {"base": options.base, "delta": options.delta, "out": str(out)})
    found = apply_delta(options.base, options.delta, out)
    return give(options, found, f"wrote {out}: {found['tensors']} tensors, every hash as in the delta")


def _report(options: argparse.Namespace) -> int:
    out = options.out or Path("sparsity.html")
    call = {"base": options.base, "tuned": options.tuned, "other_runs": options.other, "out": str(out)}
    call["rank"] = options.rank
    if options.dry_run:
        return _plan(options, "report on", call)
    from align.reports.sparsity import write_report

    level = None if options.rank == "none" else options.rank
    found = write_report(options.base, options.tuned, out, others=options.other or (), rank_level=level)
    rows = [(kind, str(path)) for kind, path in found["files"].items()]
    return give(options, {**found["result"], "files": {k: str(p) for k, p in found["files"].items()}}, table(rows))


def _plan(options: argparse.Namespace, verb: str, call: dict[str, Any]) -> int:
    """Open both sides, so that a dry run refuses what the run would refuse, and say what would be done."""
    from align.sparsity.pairs import load_pair

    pairing = load_pair(options.base, options.tuned)
    counts = {"tensors": len(pairing.pairs), "parameters": sum(pair.count for pair in pairing.pairs)}
    return dry(options, verb, {**call, **counts, "coverage": pairing.coverage})


_EXAMPLES = {
    "compare": ("base tuned --json sparsity.json", "base tuned --form bf16 --mask run.mask"),
    "overlap": ("run-a run-b --base base", "a.mask b.mask"),
    "control": ("run.mask --base base --match magnitude --out control.mask",),
    "equal": ("run-a run-b --mask run.mask --init base",),
    "rank": ("base tuned --json rank.json",),
    "delta": ("base tuned --out tuned.delta",),
    "apply": ("base tuned.delta --out tuned-again",),
    "report": ("base tuned --out sparsity.html",),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `align sparsity`."""
    actions = parser.add_subparsers(metavar="ACTION", required=True, parser_class=type(parser), dest="action")

    def action(name: str, what: str, run: Any) -> argparse.ArgumentParser:
        shown = examples(*(f"align sparsity {name} {line}" for line in _EXAMPLES[name]))
        found = actions.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", epilog=shown)
        found.set_defaults(run=run)
        return found

    compare = action("compare", "measure what changed between two checkpoints", _compare)
    _add_sides(compare)
    compare.add_argument(
        "--level", choices=("full", "bits"), default="full", help="bits: the bit-identical share alone (default: full)"
    )
    compare.add_argument(
        "--form", choices=tuple(FORMS), help="bring both sides to this format first (default: the coarser)"
    )
    compare.add_argument(
        "--structure", action="store_true", help="also channels, attention heads and n:m groups, in a second pass"
    )
    compare.add_argument("--mask", metavar="FILE", help="also write which weights changed, as a mask")
    compare.add_argument(
        "--threads", type=positive, metavar="N", help="tensors at once (default: the cores, at most 8)"
    )

    overlap = action("overlap", "compare which weights several runs moved, beside what chance would give", _overlap)
    overlap.add_argument("runs", metavar="RUN", nargs="+", help="checkpoints of runs from one base, or mask files")
    overlap.add_argument("--base", metavar="BASE", help="their common start; not needed where all runs are mask files")

    control = action("control", "draw a random mask with as many weights of every tensor as another", _control)
    control.add_argument("given", metavar="MASK", help="the mask that it is a control of")
    control.add_argument("--base", metavar="BASE", required=True, help="the model that the mask was made from")
    control.add_argument(
        "--match", choices=("tensor", "magnitude"), default="tensor",
        help="as many in every tensor, or in every exponent of its weights (default: tensor)",
    )  # fmt: skip
    add_seed(control, 0)
    add_out(control, "the mask (default: control.mask)")

    equal = action("equal", "compare two fine-tunes: overall, within a mask, and beside no training", _equal)
    equal.add_argument("first", metavar="A", help="a fine-tune")
    equal.add_argument("second", metavar="B", help="another one from the same model")
    equal.add_argument("--mask", metavar="FILE", required=True, help="the mask that one of them was limited to")
    equal.add_argument("--init", metavar="I", required=True, help="the model before training")
    equal.add_argument("--full", metavar="F", help="the fine-tune of all weights (default: A)")

    rank = action("rank", "count the directions of an update that stand above rounding noise", _rank)
    _add_sides(rank)
    rank.add_argument(
        "--level",
        choices=("fast", "full"),
        default="fast",
        help="full: also all singular values, principal angles and the spectral shift (default: fast)",
    )

    delta = action("delta", "write what turns a base into a tuned model, bit for bit", _delta)
    _add_sides(delta)
    add_out(delta, "the delta, its card in PATH.md (default: delta.safetensors)")

    apply = action("apply", "turn a base and a delta into the tuned model", _apply)
    apply.add_argument("base", type=_side, metavar="BASE", help="the model that the delta was made from")
    apply.add_argument("delta", metavar="DELTA", help="the file that `align sparsity delta` wrote")
    add_out(apply, "the model, a new folder (default: applied)")

    report = action("report", "write a page about what an update moved", _report)
    _add_sides(report)
    report.add_argument(
        "--other",
        action="append",
        metavar="RUN",
        help="another run from the same base, for its overlap; may be given again",
    )
    report.add_argument(
        "--rank",
        choices=("none", "fast", "full"),
        default="fast",
        help="how much is said of ranks and spectra; fast takes seconds for a matrix of 4096 x 4096 (default: fast)",
    )
    add_out(report, "the page; Markdown and JSON lie beside it (default: sparsity.html)")

    for found in actions.choices.values():
        add_dry_run(found)
        add_json(found)
        found.set_defaults(flags=sorted(found._option_string_actions))


def _side(name: str) -> str:
    """Return the folder of an embedded model, which is built on first use; any other name as it is."""
    from align.published import is_embedded

    if not is_embedded(name) or Path(name).exists():
        return name
    if name == "tiny":
        from trainers.tiny_language import tiny_model

        return str(tiny_model())
    from align.diffusion.policy import resolve_model

    return str(resolve_model(name))


def _add_sides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "base", type=_side, metavar="BASE", help="the model before: a file or a folder of weights, or digits or tiny"
    )
    parser.add_argument("tuned", metavar="TUNED", help="the model after; an adapter is merged into BASE")
