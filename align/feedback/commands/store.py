"""`align feedback import, export, convert, stats`: files into a store, a store into files, and what is in it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import ConfigError, DataError
from align.output import add_dry_run, add_json, add_overwrite, examples, finite, give, number, table, words
from align.registry import suggest

if TYPE_CHECKING:
    from align.feedback.events import FeedbackEvent, Item
    from align.feedback.exchange.rows import Reading
    from align.feedback.protocols import Converted

IMPORT_DUPLICATES = ("refuse", "first", "last", "all")
CONVERT_DUPLICATES = ("refuse", "first", "last", "mean")
FORMS = ("pairs", "unpaired", "scores", "rankings")
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")

EXAMPLES: Mapping[str, Sequence[str]] = {
    "import": (
        "align feedback import feedback.db thumbs.jsonl",
        "align feedback import feedback.db ratings.csv --scale 1-7 --columns prompt,input,response,rating",
        "align feedback import feedback.db votes.json --columns prompt=instruction,response_a=response1,"
        "response_b=response2,preference='annotator1|annotator2|annotator3' --identical skip",
        "align feedback import feedback.db log.parquet --keep-going --refused refused.jsonl",
    ),
    "export": (
        "align feedback export feedback.db events.jsonl",
        "align feedback export feedback.db pairs.parquet --as preference --key helpfulness",
        "align feedback export feedback.db thumbs --as unpaired",
    ),
    "convert": (
        "align feedback convert feedback.db pairs.parquet --to pairs --ties drop --min-gap 2",
        "align feedback convert ratings.csv kto.jsonl --to unpaired --scale 1-7 --up-from 5 --down-to 3",
        "align feedback convert feedback.db thumbs.jsonl --to unpaired --kind reaction --up love,like --down dislike",
    ),
    "stats": ("align feedback stats feedback.db", "align feedback stats feedback.db --check --json stats.json"),
}


def add(actions: Any) -> None:
    """Register the four verbs on the sub-parsers of `align feedback`."""
    verbs = (
        ("import", "add the feedback of files to a store", run_import, _import_arguments),
        ("export", "write the feedback of a store to a file", run_export, _export_arguments),
        ("convert", "turn ratings, rankings, pairs and thumbs into one another", run_convert, _convert_arguments),
        ("stats", "count what a store holds", run_stats, _stats_arguments),
    )
    for name, what, run, arguments in verbs:
        parser = actions.add_parser(
            name, help=what, description=f"{what[0].upper()}{what[1:]}.", epilog=examples(*EXAMPLES[name])
        )
        arguments(parser)
        add_json(parser)
        parser.set_defaults(run=run, flags=sorted(parser._option_string_actions))


# --- verbs ------------------------------------------------------------------------------------------


def run_import(options: argparse.Namespace) -> int:
    """Import files into a store, each whole or not at all unless `--keep-going`."""
    from align.feedback.exchange.reading import add_found, read_feedback, take_rows
    from align.feedback.exchange.tables import write_table
    from align.feedback.store import Store

    how, results = _reading(options, IMPORT_DUPLICATES), []
    if options.dry_run:
        for path in options.files:
            found = read_feedback(path, how, keep_going=options.keep_going)
            results.append({
                "file": str(path), "layout": found.layout, "rows": found.rows, "items": len(found.items),
                "events": len(found.events), "skipped": dict(found.skipped), "refused": len(found.refused),
            })  # fmt: skip
        lines = ["would import " + table(_flat(result)) for result in results]
        return give(options, {"store": str(options.store), "files": results}, "\n".join(lines))
    if options.refused and len(options.files) > 1:
        raise ConfigError("--refused names one file, and several are imported", do="Import them one by one")
    lines = []
    # All files are read before the store is opened, which makes its file: a mistake in one leaves nothing behind.
    read = [read_feedback(path, how, keep_going=options.keep_going) for path in options.files]
    with Store.open(options.store) as store:
        for path, found in zip(options.files, read, strict=True):
            done = add_found(store, found)
            result = {"file": str(path), **done.as_dict()}
            if done.refused:
                beside = options.refused or Path(f"{path}.refused.jsonl")
                write_table(beside, take_rows(path, done.refused), overwrite=True)
                result["refused_file"] = str(beside)
            results.append(result)
            lines.append(table(_flat({**result, "refused": len(done.refused)})))
            lines += [f"  {row.reason}" for row in done.refused[:5]]
            if done.statuses.get("superseded"):
                lines.append("  superseded: answered before by the same annotator under the same key; the newer counts")
    give(options, {"store": str(options.store), "files": results}, "\n".join(lines))
    return 0


def run_export(options: argparse.Namespace) -> int:
    """Write the current events of a store."""
    from align.feedback.exchange.writing import export_events
    from align.feedback.store import Store

    filters = _filters(options)
    with Store.open(options.store, create=False) as store:
        done = export_events(
            store, options.file, options.shape, chat=options.chat, overwrite=options.overwrite, **filters
        )
    found = {"file": done.path, "shape": options.shape, "rows": done.rows, "left_out": dict(done.left_out)}
    return give(options, found, table(_flat(found)))


def run_convert(options: argparse.Namespace) -> int:
    """Convert the current events of a store, or those of a file, and write the rows."""
    from align.feedback.exchange.writing import save

    events, items = _source(options)
    converted = _convert(options, events, items)
    rows = [_output_row(options.to, row, items, options.chat) for row in converted.rows]
    losses = converted.losses.as_dict()
    found: dict[str, Any] = {"file": str(options.file), "form": options.to, "rows": len(rows), "losses": losses}
    if options.to == "unpaired":
        up = sum(row["label"] for row in rows)
        found |= {"up": up, "down": len(rows) - up}
        if rows and up in (0, len(rows)) and not options.one_class:
            raise DataError(
                f"There are only thumbs {'up' if up else 'down'}", where=str(options.source),
                why=f"{len(rows)} of them, and none {'down' if up else 'up'}",
                do="Collect the other side, set --up-from and --down-to, or add --one-class",
            )  # fmt: skip
    reasons = {key: n for key, n in losses.items() if key not in ("seen", "used")}
    save(options.file, rows, overwrite=options.overwrite, lost=reasons)
    return give(options, found, table(_flat(found)))


def run_stats(options: argparse.Namespace) -> int:
    """Count what a store holds; with `--check` verify the file first."""
    from align.feedback.store import Store

    with Store.open(options.store, create=False) as store:
        if options.check:
            store.check()
        found = store.counts()
    shown = {key: value for key, value in found.items() if not key.endswith("_ms")}
    if found["first_ms"] is not None:
        shown["period"] = f"{_day(found['first_ms'])} to {_day(found['last_ms'])} UTC"
    shown["bytes"] = f"{found['bytes']:,}"
    if options.check:
        found["checked"], shown["check"] = True, "ok"
    return give(options, {"store": str(options.store), **found}, table(_flat(shown)))


def _day(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M")


def _flat(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a result as lines of two columns; nested counts are indented, empty ones left out."""
    rows = []
    for key, value in found.items():
        name = key.replace("_", " ")
        if isinstance(value, Mapping):
            rows += [(name, "")] if value else []
            rows += [(f"  {inner}", str(n)) for inner, n in value.items()]
        elif value not in (None, [], ""):
            rows.append((name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return rows


# --- conversion -------------------------------------------------------------------------------------


def _source(options: argparse.Namespace) -> tuple[list[FeedbackEvent], Mapping[str, Item]]:
    from align.feedback.exchange.reading import read_feedback
    from align.feedback.store import Store

    filters = _filters(options)
    if options.source.suffix.lower() in TABLES:
        found = read_feedback(options.source, _reading(options, CONVERT_DUPLICATES))
        return [event for event, _ in found.events if _passes(event, filters)], found.items
    with Store.open(options.source, create=False) as store:
        events = list(store.current(**filters))
        return events, store.items({name for event in events for name in event.items})


def _passes(event: FeedbackEvent, filters: Mapping[str, Any]) -> bool:
    since = filters.get("since")
    words = [(getattr(event, name), chosen) for name, chosen in filters.items() if name != "since"]
    return (since is None or event.ts >= since) and all(chosen is None or value in chosen for value, chosen in words)


def _convert(options: argparse.Namespace, events: Sequence[FeedbackEvent], items: Mapping[str, Item]) -> Converted[Any]:
    from align.feedback import protocols

    policy = "" if options.duplicates == "refuse" else options.duplicates
    if options.to == "pairs":
        return protocols.to_pairs(
            events, items, ties=options.ties, min_gap=options.min_gap, zscore=options.zscore, duplicates=policy,
            drop_identical=options.drop_identical,
        )  # fmt: skip
    if options.to == "unpaired":
        return protocols.to_unpaired(
            events, items, up_from=options.up_from, down_to=options.down_to, up=words(options.up),
            down=words(options.down), duplicates=policy,
        )  # fmt: skip
    if options.to == "scores":
        return protocols.to_scores(events, items, zscore=options.zscore, duplicates=policy)
    return protocols.to_rankings(events, items, duplicates=policy)


def _output_row(form: str, row: Any, items: Mapping[str, Item], chat: bool) -> dict[str, Any]:
    from align.feedback.exchange import writing

    about = {"events": list(row.events), "annotator": row.annotator, "key": row.key, "kind": row.kind}
    if form == "pairs":
        about |= {"margin": row.margin, "weight": row.weight, "tie": row.tie}
        return writing.pair_row(items[row.chosen], items[row.rejected], about, chat=chat)
    if form == "unpaired":
        return writing.unpaired_row(items[row.item], row.label, about, chat=chat)
    if form == "scores":
        return writing.score_row(items[row.item], row.score, about, chat=chat)
    return writing.ranking_row([items[name] for name in row.items], row.ranks, about, chat=chat)


# --- arguments --------------------------------------------------------------------------------------


def _reading(options: argparse.Namespace, policies: Sequence[str]) -> Reading:
    from align.feedback.exchange.rows import Reading, parse_scale

    named = [part.strip() for part in options.columns.split(",")] if options.columns else []
    mapped = [part for part in named if "=" in part]
    if mapped and len(mapped) < len(named):
        raise ConfigError(
            "A column map is one of two things", where=f"--columns {options.columns}",
            do="Give field=column for each, or the names of all columns of a file without a header",
        )  # fmt: skip
    try:
        scale = parse_scale(options.scale)
    except ValueError as error:
        raise ConfigError("A scale cannot be read", where=f"--scale {options.scale}", why=str(error)) from error
    if options.delimiter and len(options.delimiter) != 1:
        raise ConfigError("A delimiter is one character", where=f"--delimiter {options.delimiter}")
    return Reading(
        layout=options.format, columns=() if mapped else named,
        renamed={field.strip(): column.strip() for field, _, column in (part.partition("=") for part in mapped)},
        key=options.default_key, annotator=options.default_annotator, source=options.default_source,
        media=options.media, scale=scale, duplicates="all" if options.duplicates == "mean" else options.duplicates,
        policies=policies, identical=options.identical, missing=options.missing or "",
        best_is_high=options.best_is_high, salt=options.salt, delimiter=options.delimiter,
    )  # fmt: skip


def _reading_arguments(parser: argparse.ArgumentParser, policies: Sequence[str]) -> None:
    how = parser.add_argument_group("how a file is read")
    how.add_argument("--format", default="auto", metavar="LAYOUT", help="what the rows are (default: by their columns)")
    how.add_argument(
        "--columns", default="", metavar="MAP",
        help="names of all columns of a CSV file without a header, or field=column,... (data.text reaches into"
        " objects; rating=ann1|ann2 reads one answer an annotator)",
    )  # fmt: skip
    how.add_argument("--delimiter", default="", metavar="C", help="of CSV (default: a comma)")
    how.add_argument(
        "--default-key", default="quality", metavar="NAME", help="signal of rows that name none (default: quality)"
    )
    how.add_argument("--default-annotator", default="", metavar="NAME", help="annotator of rows that name none")
    how.add_argument("--default-source", default="human", metavar="WORD", help="user, human, ai or code")
    how.add_argument("--media", default="text", metavar="WORD", help="what responses are: text, image or video")
    how.add_argument("--scale", default="", metavar="LOW-HIGH", help="of ratings, e.g. 1-7")
    how.add_argument(
        "--duplicates", default="refuse", choices=policies, metavar="POLICY",
        help=f"answers that contradict each other and have no time: {', '.join(policies)}",
    )  # fmt: skip
    how.add_argument("--identical", default="refuse", metavar="POLICY", help="comparisons of equals: refuse, skip")
    how.add_argument(
        "--missing",
        default="",
        metavar="POLICY",
        help="rows without an answer: refuse, skip, exposure (default: exposure of labels and reactions, else refuse)",
    )
    how.add_argument("--best-is-high", action="store_true", help="ranks count upwards: the highest is the best")
    how.add_argument("--salt", default="", metavar="TEXT", help="replace annotators by hashes of this and their names")


def _filter_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_argument_group("which events (names with commas between)")
    for name in ("key", "kind", "annotator", "source"):
        which.add_argument(f"--{name}", default="", metavar="NAME", dest=f"only_{name}", help=f"only this {name}")
    which.add_argument("--since", default="", metavar="TIME", help="only from this time on, e.g. 2025-01-31")


def _filters(options: argparse.Namespace) -> dict[str, Any]:
    from align.feedback.events import KINDS, SOURCES
    from align.feedback.exchange.values import milliseconds

    names = ("key", "kind", "annotator", "source")
    filters: dict[str, Any] = {name: words(getattr(options, f"only_{name}")) or None for name in names}
    for name, known in (("kind", KINDS), ("source", SOURCES)):
        for word in filters[name] or ():
            if word not in known:
                raise ConfigError(f"Unknown {name} {word!r}", do=suggest(word, known))
    try:
        filters["since"] = milliseconds(options.since) or None
    except ValueError as error:
        raise ConfigError("A time cannot be read", where=f"--since {options.since}", why=str(error)) from error
    return filters


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="STORE", help="the store's file; made if there is none")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="CSV, TSV, JSON, JSONL or Parquet")
    _reading_arguments(parser, IMPORT_DUPLICATES)
    parser.add_argument("--keep-going", action="store_true", help="take the good rows, and list the others in a file")
    parser.add_argument("--refused", type=Path, metavar="FILE", help="that file (default: FILE.refused.jsonl)")
    add_dry_run(parser)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="STORE", help="the store's file")
    parser.add_argument(
        "file", type=Path, metavar="FILE", help=".jsonl, .parquet, .csv; a data set folder without ending"
    )
    shapes = "events (complete), plain, preference, unpaired, ranking"
    parser.add_argument("--as", dest="shape", default="events", metavar="SHAPE", help=f"{shapes}; TRL's columns")
    _writing_arguments(parser)
    _filter_arguments(parser)


def _writing_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chat", action="store_true", help="write every prompt and response as a chat")
    add_overwrite(parser, "replace the file")


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a store, or a file that `import` would read")
    parser.add_argument(
        "file", type=Path, metavar="FILE", help=".jsonl, .parquet, .csv; a data set folder without ending"
    )
    parser.add_argument(
        "--to", required=True, choices=FORMS, metavar="LAYOUT", help=f"layout to write: {', '.join(FORMS)}"
    )
    parser.add_argument("--ties", default="drop", choices=("drop", "half", "keep"), help="of pairs (default: drop)")
    parser.add_argument(
        "--min-gap", type=number, default=0.0, metavar="X", help="ratings closer than this make no pair"
    )
    parser.add_argument("--zscore", action="store_true", help="ratings in standard deviations of their annotator")
    parser.add_argument("--drop-identical", action="store_true", help="leave out pairs of equal responses")
    parser.add_argument("--up-from", type=finite, metavar="X", help="thumbs up for ratings from X up")
    parser.add_argument("--down-to", type=finite, metavar="X", help="thumbs down for ratings up to X, none between")
    parser.add_argument("--up", default="", metavar="NAMES", help="reactions that are a thumb up")
    parser.add_argument("--down", default="", metavar="NAMES", help="reactions that are a thumb down")
    parser.add_argument("--one-class", action="store_true", help="write thumbs though all point one way")
    _writing_arguments(parser)
    _filter_arguments(parser)
    _reading_arguments(parser, CONVERT_DUPLICATES)


def _stats_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="STORE", help="the store's file")
    parser.add_argument("--check", action="store_true", help="verify the file and every link in it first")
