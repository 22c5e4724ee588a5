"""`align export`: what a run delivers, as another tool loads it, with its card."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from align.output import add_dry_run, add_json, add_out, dry, give

LAYOUTS = (
    "layout to write: of models of images diffusers-lora, peft, full (a pipeline folder, adapters merged) or comfyui "
    "(not opened in ComfyUI); of language models peft or full"
)


def export_model(source: str | Path, *, to: str, out: str | Path, dtype: str = "fp32") -> dict[str, Any]:
    """Write what a run delivers into the new folder `out`, with a model card; whole or not at all.

    Args:
        source: a run folder (its last checkpoint), or a checkpoint folder, of images or of text.
        to, dtype: see `align.diffusion.export.export` and `trainers.language_export.export_language`.

    Returns:
        the record that is written beside the weights as `export.json`.

    Raises:
        AlignError: see those two.
    """
    from align.reports.modelcard import write_card

    return _exporters(source)[1](source, to=to, out=out, dtype=dtype, finish=write_card)


def export(options: argparse.Namespace) -> int:
    """Write trained weights as another tool loads them."""
    call = {"to": options.to, "out": str(options.out), "dtype": options.dtype}
    if options.dry_run:
        found = _exporters(options.source)[0](options.source, **call)
        what = {"base": found.config.model.path, "step": found.step, "train": found.config.model.train}
        return dry(options, "export", {"source": options.source, **what, **call})
    record = export_model(options.source, **call)
    note = f"\n{record['note']}." if "note" in record else ""
    return give(options, record, f"wrote {options.out}\nload it with: {record['load']}{note}")


def _exporters(source: str | Path) -> tuple[Any, Any]:
    """Return what plans and what writes the export of such a source."""
    from trainers import find_source

    if find_source(source).language:
        from trainers.language_export import export_language, plan_language_export

        return plan_language_export, export_language
    from align.diffusion.export import export as export_images
    from align.diffusion.export import plan_export

    return plan_export, export_images


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `align export`."""
    parser.add_argument("source", metavar="SOURCE", help="a run folder (its last checkpoint), or a checkpoint folder")
    parser.add_argument("--to", required=True, metavar="LAYOUT", help=LAYOUTS)
    add_out(parser, "the weights and their card: a new folder", required=True)
    parser.add_argument(
        "--dtype", default="fp32", metavar="NAME", help="of the weights: fp32 (default), or bf16 for half the size"
    )
    add_dry_run(parser)
    add_json(parser)
