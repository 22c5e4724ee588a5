"""`align check`: what a config or a data file will do, and what is wrong with it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from align.commands.runs import run_config
from align.errors import DataError
from align.output import add_json, add_overrides, give, positive, sentence, table, word


def check(options: argparse.Namespace) -> int:
    """Say what a configuration, a run's, or a file of prompts or feedback will do."""
    from align.checks import describe_config, describe_prompts
    from align.commands.dry import config_findings, learnt_from
    from align.config import load_config
    from align.offline_checks import describe_image_feedback, is_image_feedback_file
    from align.preferences import describe_preferences, is_preference_file
    from align.prompts import FORMATS

    source = Path(options.file)
    if is_image_feedback_file(source):
        found = describe_image_feedback(source)
        return give(options, found, _image_feedback_text(found))
    _refuse_other_forms(source)
    if is_preference_file(source):
        found = describe_preferences(source)
        if options.tokenizer is not None:
            from align.preferences import load_preferences
            from trainers.data_check import describe_lengths
            from trainers.language_model import load_tokenizer

            tokenizer = load_tokenizer(options.tokenizer)
            found["lengths"] = describe_lengths(load_preferences(source), tokenizer, max_length=options.max_length)
        return give(options, found, _preferences_text(found))
    if source.suffix.lower() in FORMATS:
        found = describe_prompts(source, image_column=options.image_column)
        return give(options, found, _prompts_text(found))
    if source.is_dir():
        config = run_config(source, options.overrides)
    else:
        config = load_config(options.file, options.overrides)
    found = describe_config(config, config_findings(config))
    data, rows = learnt_from(config) if found["valid"] else ({}, [])
    give(options, {**found, **data}, "\n".join([config_text(found), *([table(rows)] if rows else [])]))
    return 0 if found["valid"] else 2


def _refuse_other_forms(source: Path) -> None:
    """Refuse a file of feedback that trainers do not read and `align feedback convert` does."""
    from align.feedback.exchange.layouts import detect
    from align.feedback.exchange.tables import Row, read_table

    ending, layout, first = source.suffix.lower(), "", None
    if ending not in (".csv", ".jsonl", ".parquet", ".json", ".tsv") or not source.is_file():
        return
    if ending == ".json" and not source.read_text(encoding="utf-8", errors="replace").lstrip().startswith("["):
        return  # a config, perhaps
    try:
        first = next(iter(read_table(source)), None)
        layout = detect(first) if isinstance(first, Row) else ""
    except DataError:
        pass  # what is wrong with the file is said by whoever reads it
    fields = getattr(first, "fields", {})
    known = len(fields) < 2 or {"prompt", "chosen", "completion", "messages", "text"} & set(fields)
    if {"label", "score"} & set(fields) and not {"completion", "chosen", "messages", "text", "image"} & set(fields):
        known = False  # feedback on answers whose column goes by another name
    convert = f"`align feedback convert {source.name} thumbs.jsonl --to unpaired`"
    if not known and not layout:
        raise DataError(
            "The columns are neither those of prompts nor of feedback", where=str(source),
            why=f"they are {', '.join(map(str, fields))}",
            do=f"Rename them, or run {convert[:-1]} --columns prompt=COLUMN,response=COLUMN,label=COLUMN`",
        )  # fmt: skip
    if ending in (".json", ".tsv") or not known or layout == "helpsteer":
        raise DataError(
            "Trainers do not read feedback in this form", where=str(source),
            why=f"it is {layout}" if layout else f"it is a {ending} file", do=f"Run {convert}, or --to pairs",
        )  # fmt: skip


def check_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `align check`."""
    parser.add_argument("file", metavar="FILE", help="a config, a recipe's name, a run folder, or a prompt file")
    add_overrides(parser, "sampler.eta=0.2 rewards.0.weight=2")
    parser.add_argument(
        "--image-column", metavar="NAME", help="of a prompt file: the column of image paths, to be checked too"
    )
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="of a file of thumbs or pairs: the model whose tokens are counted"
    )
    parser.add_argument(
        "--max-length", type=positive, default=1024, metavar="N", help="with it: tokens of a row (default: 1024)"
    )
    add_json(parser)


def config_text(found: dict[str, Any]) -> str:
    """Return what `describe_config` found as people read it."""
    if found["trainer"] in ("fit", "peering"):
        what = "a reward" if found["trainer"] == "fit" else "a reward of ratings and one of rankings, each"
        rows = [("run", f"{found['name']}: {what} fitted in {found['steps']} steps")]
    else:
        rows = _language_rows(found) if "ledger" not in found else _visual_rows(found)
    for finding in found["findings"]:
        advice = f" {sentence(finding['do'])}" if finding["do"] else ""
        where = f" ({finding['key']})" if finding["key"] else ""
        rows.append((finding["level"], f"{finding['message']}{where}.{advice}"))
    return table(rows)


def _language_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    length = f"{found['steps']} steps" if found["steps"] else f"{found['epochs']} epochs"
    unit, more = ("prompt", ", beside drawing completions") if found["trainer"] == "rluf" else ("row", "")
    return [
        ("run", f"{found['name']}: {found['trainer']}, {length}, {found['batch_size']} {unit}s an update"),
        ("batches", f"{found['accumulation']} microbatches of {found['microbatch']} {unit}s over all processes"),
        ("cost", f"{found['forwards']} forwards a {unit}, a backward pass counted as two{more}"),
    ]


def _offline_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    ledger = found["ledger"]
    rows = "pairs" if found["loss"] == "dpo" else "thumbs"
    cost = "{train_forwards} x {k} + {free_forwards} of the reference".format(**ledger)
    return [
        ("run", f"{found['name']}: {found['loss']}, {found['steps']} updates of {found['batch_size']} {rows}"),
        ("cost", f"{ledger['feq_per_sample']} F_eq an image = {cost}"),
        ("trains", f"{ledger['trained_steps']} noise level{'s' * (ledger['trained_steps'] > 1)} of every row"),
    ]  # fmt: skip


def _visual_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    if found["trainer"] == "offline":
        return _offline_rows(found)
    ledger = found["ledger"]
    cost = "{feq_per_sample:g} F_eq a sample = {rollout_forwards} + {train_forwards:g} x {k:g}".format(**ledger)
    reverse = found["trainer"] == "dance_grpo"
    what = f"of {ledger['solver_steps']} solver steps" if reverse else "noise levels of every sample"
    rows = [
        ("run", f"{found['name']}: {found['steps']} steps of {ledger['samples_per_step']} samples"),
        ("updates", f"{ledger['updates_per_step']} of each rollout"),
        ("cost", cost + (f" + {ledger['free_forwards']:g}" if ledger["free_forwards"] else "")),
        ("trains", f"{ledger['trained_steps']} {what}"),
        ("measures", _evaluation(found)),
        *_memory_row(found["memory_gb"]),
    ]  # fmt: skip
    if reverse and found["loss"] == "dppo":
        rows.append(("bound", f"{found['dppo_threshold']:g} nats of KL per latent dimension; no ratio is clipped"))
    elif reverse and found["loss"] != "clip":
        rows.append(("clip", f"{found['clip_range']:g} of ratios, their logarithm times each step's std: no nats"))
    elif reverse:
        unit = "per latent dimension" if found["logprob_reduction"] == "mean" else "in all"
        nats = found["clip_nats"]
        whole = "" if nats is None else f"; {nats:.3g} nats over {found['latent_dim']} dimensions"
        rows.append(("clip", f"{found['clip_range']:g} nats {unit}{whole}"))
    return rows


def _evaluation(found: dict[str, Any]) -> str:
    told, ledger = found["evaluation"], found["ledger"]
    between = f", {told['between']} x {told['samples']} on the way" if told["between"] else ""
    trained = ledger["feq_per_sample"] * ledger["samples_per_step"] * found["steps"]
    share = f" = {told['feq'] / trained:.2g} of training's" if trained else ""
    return f"2 x {told['final_samples']} samples{between}, {told['feq_per_sample']} F_eq each{share}"


def _memory_row(memory: dict[int, float]) -> list[tuple[str, str]]:
    if not memory:
        return []
    one, eight = (f"{memory[n]:.3g} GB" for n in (1, 8))
    return [("memory", f"{one} of weights and optimizer; {eight} on each of 8 under zero2; activations on top")]


def _prompts_text(found: dict[str, Any]) -> str:
    rows = [("prompts", f"{found['prompts']} in {found['source']}"), ("first", found["first"])]
    rows += [("longest", f"{found['longest']} characters"), ("metadata", word(found["metadata"]) or "none")]
    if found["duplicates"]:
        rows.append(("warning", f"{found['duplicates']} prompts repeat an earlier one, up to case and spaces"))
    return table(rows)


def _preferences_text(found: dict[str, Any]) -> str:
    rows = [("rows", f"{found['rows']} in {found['source']}"), ("prompts", f"{found['prompts']} different ones")]
    rows += [("thumbs", f"{found['up']} up, {found['down']} down, {found['unlabelled']} without a label")]
    rows += [(name, str(found[name])) for name in ("pairs", "scored", "chats", "rows_with_images") if found[name]]
    if found["pairs"] or found["sorted_by_label"]:
        order = "pairs stand side by side" if found["pairs"] else "sorted by label"
        rows.append(("order", f"{order}, which is fine: every update mixes both classes"))
    if "lengths" in found:
        from trainers.data_check import lengths_text

        rows.append(("lengths", lengths_text(found["lengths"])))
    rows.append(("trains", word(found["trainers"])))
    if found["unread_columns"]:
        rows.append(("unread", ", ".join(found["unread_columns"])))
    return table([*rows, *(("warning", text) for text in found["warnings"])])


def _image_feedback_text(found: dict[str, Any]) -> str:
    rows = [("rows", f"{found['rows']} in {found['source']}"), ("prompts", str(found["prompts"]))]
    rows.append(("thumbs", f"{found['up']} up, {found['down']} down; {found['pairs']} pairs"))
    rows.append(("trains", f"trainer offline, objective.loss {word(found['losses']) or 'none of them'}"))
    return table(rows)
