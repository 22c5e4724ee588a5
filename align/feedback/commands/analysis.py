"""`align feedback agreement, consistency, winrate, audit`, and the arguments of `report`: what the feedback is worth.

`report` is run by `align/commands/feedback.py`, since a page is made by align/reports, above this room.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import ConfigError
from align.output import add_dry_run, add_json, add_out, add_seed, examples, give, number, table, whole, words

if TYPE_CHECKING:
    from align.feedback.events import FeedbackEvent, Item

EXAMPLES: Mapping[str, Sequence[str]] = {
    "agreement": (
        "align feedback agreement feedback.db --key helpfulness",
        "align feedback agreement votes.csv --raters ann1,ann2,ann3 --categories 0,1,2 --json agreement.json",
        "align feedback agreement votes.json --raters ann1,ann2 --categories 0,1,2 --judge-file judge.json"
        " --judge-column result --join id --map Tie=0,garbage=0",
    ),
    "consistency": (
        "align feedback consistency feedback.db",
        "align feedback consistency --ratings ratings.csv --rankings rankings.csv --json consistency.json",
        "align feedback consistency --ratings r.csv --ratings-columns prompt,input,response,rating --rankings k.csv"
        " --rankings-columns prompt,input,response_a,response_b,preference",
    ),
    "winrate": (
        "align feedback winrate feedback.db",
        "align feedback winrate feedback.db --candidate new --baseline old --json winrate.json",
        "align feedback winrate --ratings r.csv --rankings k.csv --candidate new --baseline old",
    ),
    "audit": (
        "align feedback audit feedback.db --json audit.json",
        "align feedback audit feedback.db --quality helpfulness --outcome session_score --min-reacted 500",
        "align feedback audit --policies policies.csv",
    ),
    "report": ("align feedback report feedback.db", "align feedback report feedback.db --out feedback.html"),
}


def add(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the five verbs."""
    verbs = (
        ("agreement", "say how far annotators agree: kappas and alpha", run_agreement, _agreement_arguments),
        ("consistency", "compare ratings and rankings of the same outputs", run_consistency, _consistency_arguments),
        ("winrate", "say who wins, by ratings and by rankings", run_winrate, _winrate_arguments),
        ("audit", "look for bias, abuse, silence and signals to trust", run_audit, _audit_arguments),
        ("report", "write a page of all of it", _needs_cli, _report_arguments),
    )
    for name, what, run, arguments in verbs:
        parser = actions.add_parser(
            name, help=what, description=f"{what[0].upper()}{what[1:]}.", epilog=examples(*EXAMPLES[name])
        )
        arguments(parser)
        add_json(parser)
        parser.set_defaults(run=run)


def _needs_cli(options: argparse.Namespace) -> int:
    raise ConfigError("The page is written by `align feedback report`")


# --- verbs ------------------------------------------------------------------------------------------


def run_agreement(options: argparse.Namespace) -> int:
    """Give every coefficient of a store, or of a table with a column a rater."""
    from align.feedback.overview import agreement_of, plain, telling_pairs

    if options.raters:
        found = _table_agreement(options)
    else:
        if options.judge:
            raise ConfigError("A judge's file is compared with a table", do="Name its raters with --raters")
        events, items = load(options.source, options)
        found = {
            "signals": agreement_of(events, items, with_ai=options.with_ai, draws=options.draws, seed=options.seed)
        }
        if not found["signals"]:
            raise ConfigError(
                "Nothing was answered by two annotators" if events else "Nobody has answered yet",
                where=str(options.source),
                do="Check --key and --kind, or name the raters of a table with --raters",
            )  # fmt: skip
    if len(found["signals"]) == 1:
        found |= next(iter(found["signals"].values()))
    rows = []
    for name, signal in found["signals"].items():
        rows.append((name, f"{signal['n_items_shared']} of {signal['n_items']} with two answers or more"))
        coefficients = signal["coefficients"]
        pairs, left = telling_pairs(coefficients)
        for coefficient in (*(name for name in coefficients if ":" not in name), *pairs):
            c = coefficients[coefficient]
            note = f"  {c['reason']}" if "reason" in c else ""
            ci = _interval(c["ci"])
            counted = f"n {c['n_items']}, raters {c['n_raters']}"
            rows.append((f"  {coefficient}", f"{_number(c['value'])}  {ci}  {counted}{note}"))
        if left:
            rows.append(("  of two", f"{left} more kappas, which --json has"))
        won = ", ".join(f"{category} {n}" for category, n in signal["majority"].items())
        rows.append(("  majority", won))
        if judge := signal.get("judge"):
            told = ", ".join(
                f"{k} {_number(judge[k])}" for k in ("accuracy", "macro_precision", "macro_recall", "macro_f1")
            )
            rows.append(("  judge", f"{told}, n {judge['n']}"))
    return give(options, plain(found), table(rows))


def _table_agreement(options: argparse.Namespace) -> dict[str, Any]:
    from align.feedback.agreement import (
        all_coefficients,
        answers_of_table,
        categories_of,
        classification_report,
        encode,
        majority,
        majority_counts,
    )
    from align.feedback.columns import cell, label_cell, read_rows

    raters = words(options.raters)
    renamed = _map(options.map)
    rows, clusters, joins = [], [], []
    for place, row in read_rows(options.source, words(options.columns)):
        rows.append([_renamed(label_cell(cell(row, rater, place)), renamed) for rater in raters])
        if options.cluster:
            clusters.append(str(cell(row, options.cluster, place)))
        if options.judge:
            joins.append(label_cell(cell(row, options.join, place)))
    categories = [label_cell(word) for word in words(options.categories)] or categories_of(rows)
    answers = answers_of_table(rows, raters, categories=categories, ordered=options.ordered, clusters=clusters or None)
    counts = answers.counts()
    found: dict[str, Any] = {
        "coefficients": {
            name: c.as_dict() for name, c in all_coefficients(answers, draws=options.draws, seed=options.seed).items()
        },
        "majority": majority_counts(answers), "n_items": len(counts), "n_raters": len(raters),
        "n_items_shared": int((counts.sum(1) >= 2).sum()), "categories": categories,
    }  # fmt: skip
    if options.judge:
        said: dict[Any, Any] = {}
        for place, row in read_rows(options.judge):
            label = _renamed(label_cell(cell(row, options.judge_column, place)), renamed)
            said.setdefault(label_cell(cell(row, options.join, place)), label)
        guess = encode([[said.get(name)] for name in joins], categories)[:, 0]
        found["judge"] = classification_report(majority(counts), guess, len(categories))
    return {"signals": {"table": found}}


def run_consistency(options: argparse.Namespace) -> int:
    """Give the consistency report of two files, or of a store."""
    from align.feedback.consistency import consistency, join_files
    from align.feedback.overview import plain
    from align.feedback.views import joined_of

    if bool(options.ratings) != bool(options.rankings) or bool(options.ratings) == bool(options.source):
        raise ConfigError(
            "Consistency compares two protocols", do="Give --ratings and --rankings, or a store that holds both"
        )
    if options.source:
        events, items = load(options.source, options)
        within = {"annotator": True, "pooled": False}.get(options.join)
        joined = joined_of(events, items, within=within, duplicates=options.duplicates)
    else:
        joined = join_files(
            options.ratings, options.rankings, ratings_columns=words(options.ratings_columns),
            rankings_columns=words(options.rankings_columns), duplicates=options.duplicates,
        )  # fmt: skip
    found = plain(
        consistency(
            joined,
            tie_band=options.tie_band,
            drop_identical=options.drop_identical,
            elicitation=options.elicitation,
            draws=options.draws,
            seed=options.seed,
        )
    )
    return give(options, found, _consistency_text(found))


def _consistency_text(found: Mapping[str, Any]) -> str:
    n, notes = found["n"], found["notes"]
    rows = [
        ("pairs", f"{n} compared, {found['skipped']} skipped for a missing rating"),
        ("inconsistent", f"{_percent(found['inconsistency'])}  {_interval(found['ci'], True)} (Wilson)"),
        ("", f"{_interval(found['ci_cluster'], True)} (bootstrap of {found['n_prompts']} prompts)"),
        ("kappa", _number(found["kappa"])),
        ("contradictions", f"{found['flips']} flips among {found['both_strict']} pairs strict on both sides"),
        ("lost resolution", f"{found['rating_tie_strict_ranking']} rating ties ranked strictly,"
         f" {found['strict_rating_ranking_tie']} strict ratings ranked as ties"),
        ("matrix", "rows inferred from ratings, columns ranked"),
        ("", f"{'':<7}{'equal':>8}{'a':>8}{'b':>8}"),
        *(("", f"{name:<7}" + "".join(f"{v:>8}" for v in row))
          for name, row in zip(("equal", "a", "b"), found["matrix"], strict=True)),
        *((f"gap {row['gap']}", f"{row['consistent']} of {row['n']} consistent, {row['flips']} flips")
          for row in found["by_gap"]),
        ("triads", "{intransitive} of {triads} run in a circle".format(**found["transitivity"])),
    ]  # fmt: skip
    clashes = notes.get("conflicting_ratings", 0), notes.get("conflicting_rankings", 0)
    if any(clashes):
        counted = f"{clashes[0]} ratings and {clashes[1]} rankings were given again differently"
        rows.append(("conflicts", f"{counted}; the {notes['duplicates_policy']} counts ({notes['conflicts'][0]})"))
    if not n:
        rows.append(("nothing", "no ranked pair has both ratings; do prompt, input and response read the same?"))
    return table(rows)


def run_winrate(options: argparse.Namespace) -> int:
    """Give win rates under both protocols, and strengths of all models."""
    from align.feedback.columns import read_rows
    from align.feedback.overview import plain, strengths_of
    from align.feedback.views import wins_of
    from align.feedback.winrate import both_protocols, require_models, wins_of_rows

    if bool(options.candidate) != bool(options.baseline):
        raise ConfigError("A win rate is of one model over another", do="Give --candidate and --baseline")
    if not options.source and not (options.ratings and options.rankings and options.candidate):
        raise ConfigError(
            "There is nothing to win", do="Give a store, or --ratings, --rankings, --candidate and --baseline"
        )
    found: dict[str, Any] = {"candidate": options.candidate, "baseline": options.baseline}
    if options.source:
        events, items = load(options.source, options)
        found["strengths"] = strengths_of(
            events, items, model=options.model, bootstrap=options.draws if options.bootstrap else 0, seed=options.seed
        )
        if options.candidate:
            rated, ranked, models = wins_of(events, items, options.candidate, options.baseline)
            require_models(models, options.candidate, options.baseline)
            found |= both_protocols(rated, ranked)
    else:
        rows = [
            read_rows(path, words(columns))
            for path, columns in (
                (options.ratings, options.ratings_columns), (options.rankings, options.rankings_columns)
            )
        ]  # fmt: skip
        rated, ranked, notes = wins_of_rows(*rows, options.candidate, options.baseline)
        found |= {**both_protocols(rated, ranked), "notes": notes}
    return give(options, plain(found), _winrate_text(plain(found)))


def _winrate_text(found: Mapping[str, Any]) -> str:
    rows = []
    for protocol in ("ratings", "rankings"):
        if one := found.get(protocol):
            half = "" if one["half"] is None else f" ± {100 * one['half']:.1f}"
            counts = "n {n}: {win} won, {tie} tied, {loss} lost".format(**one)
            rate = "–" if one["rate"] is None else f"{100 * one['rate']:.1f}{half} %"
            rows.append((f"by {protocol}", f"{rate}  {counts}"))
    if shared := found.get("shared"):
        rows.append(("agreement", f"{_percent(shared['agreement'])} of {shared['n']} prompts with both"))
    strengths = found.get("strengths", {})
    if "reason" in strengths:
        rows.append(("strengths", strengths["reason"]))
    for item in strengths.get("items", ()):
        rows.append((item["name"], f"{_number(item['strength'])} ± {_number(item['error'])}"))
    if strengths.get("intercept") is not None:
        counted = f"{_number(strengths['intercept'])} ± {_number(strengths['intercept_error'])}"
        rows.append(("shown first", counted))
    return table(rows)


def run_audit(options: argparse.Namespace) -> int:
    """Give the audit of a store, or validate an offline metric on policies."""
    from align.feedback.overview import audit, plain
    from align.feedback.signals import SignalGates

    if not options.source and not options.policies:
        raise ConfigError("There is nothing to audit", do="Give a store, or --policies")
    found: dict[str, Any] = {}
    if options.source:
        events, items = load(options.source, options)
        gates = SignalGates(
            options.min_reacted, options.min_coverage, options.max_top_user_share, not options.no_outcome
        )
        found = audit(events, items, quality=options.quality, outcome=options.outcome, gates=gates, seed=options.seed)
        found["missing"] = _missing(events)
    if options.policies:
        found["offline_online"] = _offline_online(options)
    found = plain(found)
    return give(options, found, _audit_text(found))


def _missing(events: Sequence[FeedbackEvent]) -> list[str]:
    """Return what the events do not say, and what can therefore not be audited."""
    from align.feedback.views import ANSWERS

    answers = [e for e in events if e.kind in ANSWERS]
    found = [] if answers else ["no answers, so there is nothing to measure"]
    if not any(e.kind == "exposure" or e.exposure == "shown" for e in events):
        found.append("no exposures (what was shown), so there are no rates and no test of silence")
    if answers and not any(e.annotator for e in answers):
        found.append("no annotators, so nobody's habits can be looked at")
    return found


def _offline_online(options: argparse.Namespace) -> dict[str, Any]:
    from align.feedback.columns import cell, number_cell, read_rows
    from align.feedback.signals import offline_online

    sides: dict[str, dict[str, float]] = {"offline": {}, "online": {}}
    for place, row in read_rows(options.policies):
        for side, values in sides.items():
            values[str(cell(row, "policy", place))] = number_cell(cell(row, side, place), side, place)
    return offline_online(sides["offline"], sides["online"], seed=options.seed)


def _audit_text(found: Mapping[str, Any]) -> str:
    rows = []
    for name, signal in found.get("exposures", {}).items():
        c, verdict = signal["coverage"], signal["selection"]["verdict"]
        rows.append((name, f"{c['n_reacted']} of {c['n_shown']} shown ({_percent(c['coverage'])}), "
                     f"{_percent(c['positive_share'])} positive; verdict: {verdict}"))  # fmt: skip
        for gate in signal["selection"]["gates"]:
            if not gate["holds"]:
                state = "not measured" if gate["holds"] is None else _number(gate["measured"])
                rows.append((f"  {gate['gate']}", f"{state}, asked {gate['asked']}"))
        if silence := signal.get("silence"):
            p = f", p {silence['p']:.2g}" if "p" in silence else ""
            rows.append(("  silence", f"{silence['verdict']}{p}"))
    bias = found.get("bias", {}).get("comparisons", {})
    for name in ("p_longer", "p_first", "p_list", "p_emoji"):
        if bias.get(name, {}).get("n"):
            entry = bias[name]
            rows.append((name, f"{_number(entry['share'])}  {_interval(entry['ci'])}  n {entry['n']}"))
    people = found.get("people", {})
    for signal, annotators in people.get("annotators", {}).items():
        flagged = [(row["annotator"], f"{', '.join(row['flags'])} in {signal}") for row in annotators if row["flags"]]
        said = sum(row["n"] for row in annotators)
        rows += [(signal, f"annotators {len(annotators)}, flagged {len(flagged)}, answers {said}"), *flagged]
    rows += [(" and ".join(r["annotators"]), f"agree on {_percent(r['agreement'])} of {r['n']} in {r['signal']}")
             for r in people.get("coordinated", ())]  # fmt: skip
    rows += [
        (r["annotator"], f"{r['n']} answers in a row, {r['median_gap_ms']:.0f} ms apart")
        for r in people.get("bursts", ())
    ]
    for judge in found.get("judges", ()):
        told = f"agrees with people on {_percent(judge['pairs'].get('agreement'))} of {judge['pairs']['n']} pairs"
        rows.append((judge["judge"], f"{told}, coverage {_percent(judge['coverage'])}"))
    if online := found.get("offline_online"):
        told = f"r {_number(online['r'])} {_interval(online['ci'])}, rho {_number(online['rho'])}"
        rows.append(("offline metric", f"{online['verdict']}: {told}, k {online['k']}"))
    rows += [("missing", what) for what in found.get("missing", ())]
    return table(rows) if rows else "nothing to report"


# --- sources and words ------------------------------------------------------------------------------


def load(source: Path, options: argparse.Namespace) -> tuple[list[FeedbackEvent], Mapping[str, Item]]:
    """Return the current events and items of a store, or of a table that `import` would read."""
    from align.feedback.columns import ENDINGS
    from align.feedback.views import of_key

    key, kind = getattr(options, "key", "") or None, getattr(options, "kind", "") or None
    ratings_key = getattr(options, "ratings_key", "") or None
    if Path(source).suffix.lower() in ENDINGS:
        from align.feedback.exchange import read_feedback

        found = read_feedback(source)
        said, items = found.standing(), found.items
        _require_key(source, key, {e.key for e, _ in found.events})
    else:
        from align.feedback.store import Store

        with Store.open(source, create=False) as store:
            said, items = list(store.current(key=None if ratings_key else key, kind=kind)), store.items()
            if key and not any(e.key == key for e in said):
                _require_key(source, key, {e.key for e in store.current()})
    _require_key(source, ratings_key, {e.key for e in said if e.kind == "ordinal"}, "--ratings-key", "no ratings")
    return [e for e in said if of_key(e, key, ratings_key) and kind in (None, e.kind)], items


def _require_key(
    source: Path, key: str | None, known: set[str], flag: str = "--key", none: str = "no feedback"
) -> None:
    from align.feedback.views import BOOKKEEPING

    if key and key not in known:
        names = sorted(name for name in known if not name.endswith(BOOKKEEPING))
        raise ConfigError(
            f"Nothing has the key {key!r}", where=str(source),
            why=f"the keys are {', '.join(names)}" if names else f"it holds {none}",
            do=f"Choose one of them, or leave {flag} out" if names else "Import some",
        )  # fmt: skip


def _map(text: str) -> dict[str, Any]:
    from align.feedback.columns import label_cell

    found = {}
    for part in words(text):
        name, mark, value = part.partition("=")
        if not mark:
            raise ConfigError("A map of labels is NAME=LABEL,...", where=f"--map {text}")
        found[name.strip()] = label_cell(value)
    return found


def _renamed(label: Any, renamed: Mapping[str, Any]) -> Any:
    return renamed.get(label, label) if isinstance(label, str) else label


def _number(value: Any) -> str:
    return "–" if value is None or value != value else f"{value:.4f}"


def _percent(value: Any) -> str:
    return "–" if value is None or value != value else f"{100 * value:.1f} %"


def _interval(ends: Sequence[Any], percent: bool = False) -> str:
    shown = _percent if percent else _number
    return "" if ends[0] is None or ends[0] != ends[0] else f"[{shown(ends[0])}, {shown(ends[1])}]"


# --- arguments --------------------------------------------------------------------------------------


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draws", type=whole, default=1000, metavar="N", help="bootstrap draws (default: 1000)")
    add_seed(parser, 0)


def _source_argument(parser: argparse.ArgumentParser, *, optional: bool) -> None:
    what = "a store, or a file that `import` would read"
    parser.add_argument("source", type=Path, metavar="SOURCE", help=what, **({"nargs": "?"} if optional else {}))
    parser.add_argument("--key", default="", metavar="NAME", help="only this signal or dimension")


def _agreement_arguments(parser: argparse.ArgumentParser) -> None:
    _source_argument(parser, optional=False)
    parser.add_argument("--kind", default="", metavar="NAME", help="only this kind: binary, ordinal, pairwise, ...")
    parser.add_argument("--with-ai", action="store_true", help="count AI annotators among the raters")
    wide = parser.add_argument_group("a table with a row an item and a column a rater")
    wide.add_argument("--raters", default="", metavar="NAMES", help="the columns, with commas between")
    wide.add_argument("--columns", default="", metavar="MAP", help="names of all columns of a headerless CSV")
    wide.add_argument("--categories", default="", metavar="LABELS", help="all labels, in order (default: those used)")
    wide.add_argument("--ordered", action="store_true", help="their order means something: weights, ordinal alpha")
    wide.add_argument("--cluster", default="", metavar="NAME", help="column to resample by, such as the prompt")
    wide.add_argument(
        "--judge-file", dest="judge", type=Path, metavar="FILE", help="a table with a judge's label of the same items"
    )
    wide.add_argument("--judge-column", default="judge", metavar="NAME", help="its column (default: judge)")
    wide.add_argument("--join", default="id", metavar="NAME", help="column that both tables share (default: id)")
    wide.add_argument("--map", default="", metavar="NAME=LABEL", help="labels to read as others, e.g. Tie=0,garbage=0")
    _common(parser)


def _files(parser: argparse.ArgumentParser, ratings: str, rankings: str) -> None:
    parser.add_argument(
        "--ratings-key", default="", metavar="NAME",
        help="only these ratings, where rankings have another key (default: --key)",
    )  # fmt: skip
    files = parser.add_argument_group("two files instead of a store: CSV, TSV, JSON, JSONL or Parquet")
    files.add_argument("--ratings", type=Path, metavar="FILE", help=f"with the columns {ratings}")
    files.add_argument("--ratings-columns", default="", metavar="NAMES", help="its columns, where it has no header")
    files.add_argument("--rankings", type=Path, metavar="FILE", help=f"with the columns {rankings}")
    files.add_argument("--rankings-columns", default="", metavar="NAMES", help="its columns, where it has no header")


def _consistency_arguments(parser: argparse.ArgumentParser) -> None:
    _source_argument(parser, optional=True)
    _files(parser, "prompt, input, response, rating", "prompt, input, response_a, response_b, preference")
    parser.add_argument(
        "--duplicates", default="first", choices=("first", "last", "mean"), metavar="POLICY",
        help="answers that contradict each other, in a file or a store: first, last, mean (default: first)",
    )  # fmt: skip
    parser.add_argument("--tie-band", type=number, default=0.0, metavar="X", help="ratings this close are a tie")
    parser.add_argument("--drop-identical", action="store_true", help="leave out pairs of equal responses")
    parser.add_argument(
        "--elicitation",
        default="unknown",
        choices=("same_screen", "separate", "unknown"),
        help="how both were asked (default: unknown)",
    )
    parser.add_argument(
        "--ratings-of", dest="join", default="auto", choices=("auto", "annotator", "pooled"),
        help="of a store: each annotator's rankings with its own ratings, or with everybody's mean (default: auto)",
    )  # fmt: skip
    _common(parser)


def _winrate_arguments(parser: argparse.ArgumentParser) -> None:
    _source_argument(parser, optional=True)
    _files(parser, "prompt, input, model, rating", "prompt, input, model_a, model_b, preference")
    parser.add_argument("--candidate", default="", metavar="MODEL", help="whose wins are counted")
    parser.add_argument("--baseline", default="", metavar="MODEL", help="over whom")
    parser.add_argument(
        "--strengths", dest="model", default="", metavar="NAME",
        help="how they are worked out: bradley_terry, davidson, rao_kupper (default: davidson where there are ties)",
    )  # fmt: skip
    parser.add_argument("--bootstrap", action="store_true", help="intervals of strengths by resampling prompts")
    _common(parser)


def _judged_by(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quality", default="", metavar="KEY", help="ratings that are the independent quality label")
    parser.add_argument("--outcome", default="", metavar="KEY", help="signal that is a user's delayed outcome")


def _audit_arguments(parser: argparse.ArgumentParser) -> None:
    _source_argument(parser, optional=True)
    _judged_by(parser)
    parser.add_argument("--policies", type=Path, metavar="FILE", help="table of policy, offline, online to validate")
    gates = parser.add_argument_group("gates a signal must pass before anything is trained on it")
    gates.add_argument("--min-reacted", type=whole, default=200, metavar="N", help="reactions (default: 200)")
    gates.add_argument("--min-coverage", type=number, default=0.001, metavar="X", help="a shown item (default: 0.001)")
    gates.add_argument(
        "--max-top-user-share", type=number, default=0.5, metavar="X", help="of the top 1 %% of users (default: 0.5)"
    )
    gates.add_argument("--no-outcome", action="store_true", help="do not ask for a correlation with an outcome")
    _common(parser)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="STORE", help="the store's file")
    add_out(parser, "the page (default: beside the store)")
    _judged_by(parser)
    _common(parser)
    add_dry_run(parser)
