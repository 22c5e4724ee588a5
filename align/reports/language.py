"""The page of a language model's run: whether it tells good answers from bad ones better than before, and at what cost.

Judged on held-out rows alone: by the pairs among them, else by the AUC of all of them, and a supervised run by the
nats a token costs. Reads the files of the run folder and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from align.reports.answers import answers_of, changed
from align.reports.charts import Series, line_chart
from align.reports.glossary import LANGUAGE_CHARTS, explain
from align.reports.moved import MOVED_CHARTS, moved_charts, moved_context
from align.reports.page import brief, count, duration, finite, number, percent, signed
from align.reports.runfiles import (
    Row,
    RunFiles,
    as_estimate,
    charts,
    column,
    curve,
    page_context,
    points,
    trainer_of,
)
from align.reports.verdict import Verdict, change_text, cost_sentence, difference, how_it_ended, messages, split_alarms

__all__ = ["LanguageOutcome", "judge_language", "language_context", "language_outcome", "language_verdict"]

FEW, STUCK, OVERFITTED = 50, 0.5, 0.15
"""Caveats: fewer held-out units; z0 at 0 in a larger share; a training AUC above the held-out one by more."""

WARNINGS_SHOWN = 3


@dataclass(frozen=True)
class Headline:
    """The number a run is judged by: its key in evaluation.jsonl, how it is said, and which way is better.

    Args:
        share: it is a share, told in percent.
    """

    key: str
    name: str
    unit: str
    share: bool = False
    better: int = 1


PAIRS = Headline("pair_accuracy", "pair accuracy", "pairs", share=True)
AUC = Headline("auc", "AUC of the implicit reward", "rows")
CONSTRAINED = Headline("constrained", "constrained reward", "prompts")
NATS = Headline("nats_per_token", "nats per token", "rows", better=-1)


@dataclass(frozen=True)
class LanguageOutcome:
    """First and last held-out evaluation, every value an estimate, and the change of the headline."""

    headline: Headline
    first: Row
    last: Row
    gain: Row
    step: int | None

    @property
    def before(self) -> Row:
        """The headline before training."""
        return as_estimate(self.first.get(self.headline.key))

    @property
    def after(self) -> Row:
        """The headline at the last evaluation."""
        return as_estimate(self.last.get(self.headline.key))


def language_context(files: RunFiles) -> Row:
    """Return what language.html shows of a run."""
    evaluations = [_estimates(row) for row in files.evaluations]
    found, trainer = language_outcome(trainer_of(files), evaluations), trainer_of(files)
    answers = answers_of(files.generations)
    cost, loss = _cost(files), f"{explain('loss', trainer)} {LANGUAGE_CHARTS['Loss']}"
    return {
        **page_context(files),
        "verdict": language_verdict(files),
        "tiles": _TILES.get(trainer, _tiles)(files, found, cost),
        "charts": charts(
            {**_charts(files.metrics, evaluations), **moved_charts(files.metrics)},
            {**LANGUAGE_CHARTS, **MOVED_CHARTS, "Loss": loss},
        ),
        "moved": moved_context(files),
        "heldout": _heldout(found, trainer),
        "answers": answers,
        "answers_lead": changed(answers),
        "steps": (found.first.get("step"), found.last.get("step")),
        "rows": found.last.get("n"),
        "data": _data(files),
    }


def language_verdict(files: RunFiles) -> Verdict:
    """Return what a language model's run came to."""
    evaluations = [_estimates(row) for row in files.evaluations]
    return judge_language(language_outcome(trainer_of(files), evaluations), files, _cost(files))


def _estimates(row: Row) -> Row:
    """Return an evaluation with the ends of the AUC's interval inside its estimate."""
    low, high = (finite(row.get(f"auc_ci_{end}")) for end in ("low", "high"))
    if low is None or high is None or isinstance(row.get("auc"), dict):
        return row
    rest = {key: value for key, value in row.items() if not key.startswith("auc_ci_")}
    return {**rest, "auc": {"mean": row.get("auc"), "ci_low": low, "ci_high": high, "n": row.get("n")}}


def language_outcome(trainer: str, evaluations: list[Row]) -> LanguageOutcome:
    """Return before and after. Pairs go before the AUC where they are what is trained on, or half of the rows."""
    first, last = (evaluations[0], evaluations[-1]) if len(evaluations) > 1 else ({}, {})
    pairs, rows = finite(as_estimate(last.get("pair_accuracy")).get("n")) or 0, finite(last.get("n")) or 0
    own = {"sft": NATS, "rluf": CONSTRAINED}.get(trainer)
    headline = own or (PAIRS if pairs and (trainer == "dpo" or 4 * pairs >= rows) else AUC)
    before, after = as_estimate(first.get(headline.key)), as_estimate(last.get(headline.key))
    paired = last.get("nats_change") if headline is NATS else None
    gain = paired if isinstance(paired, dict) else difference(before, after)
    return LanguageOutcome(headline, first, last, gain, evaluations[-1]["step"] if evaluations else None)


def judge_language(found: LanguageOutcome, files: RunFiles, cost: Row) -> Verdict:
    """Say whether the run improved the model, by the interval of the headline's change on held-out rows."""
    standing, past = split_alarms(files.warnings, found.step)
    low, high = finite(found.gain.get("ci_low")), finite(found.gain.get("ci_high"))
    if found.headline.better < 0 and low is not None and high is not None:
        low, high = -high, -low
    if standing:
        kind, title = "alarm", "Alarm"
    elif finite(found.gain.get("mean")) is None:
        kind, title = "open", "No verdict yet"
    elif low is None or high is None:
        kind, title = "open", "No interval, no verdict"
    elif low > 0:
        kind, title = "good", "Improved"
    elif high < 0:
        kind, title = "bad", "Got worse"
    else:
        kind, title = "flat", "No clear change"
    caveats = [*messages(standing[-2:]), *how_it_ended(files.record, cost["step"]), *past]
    caveats += [*_raised(files.warnings), *_caveats(found, files)]
    return Verdict(kind, title, _sentence(found), cost_sentence(cost), tuple(caveats))


def _raised(warnings: list[Row]) -> list[str]:
    found = messages([w for w in warnings if w.get("level") == "warning"])
    more = len(found) - WARNINGS_SHOWN
    return [*found[:WARNINGS_SHOWN], *([f"{more} more under Warnings and alarms."] if more > 0 else [])]


def _caveats(found: LanguageOutcome, files: RunFiles) -> list[str]:
    """Return what the numbers themselves hold against the verdict."""
    caveats = []
    if finite(_mapping(files.record.get("tokens")).get("heldout_rows")) == 0:
        caveats.append("No rows were held out, so nothing can be said: set data.heldout_fraction or data.heldout_path.")
    change, better = finite(found.gain.get("mean")), found.headline.better
    if change is None:
        return caveats
    n = finite(found.after.get("n")) or finite(found.last.get("n"))
    if n is not None and n < FEW:
        caveats.append(f"Only {count(n)} held-out {found.headline.unit} stand behind this.")
    up, down = (_mean(found.last.get(f"log_ratio/{name}")) for name in ("up", "down"))
    if up is not None and down is not None and better * change > 0 and down < up < 0:
        caveats.append(
            f"Thumbs-up answers became less likely too, by {number(-up)} nats an answer; thumbs-down ones fell further."
        )
    later = files.metrics[len(files.metrics) // 4 :]
    floor = _average(column(later, "z0_at_zero"))
    if floor is not None and floor > STUCK:
        caveats.append(
            f"KTO's z0 was 0 in {percent(floor, 0)} of the microbatches after the first quarter: it did little."
        )
    seen, unseen = _average(column(files.metrics[-10:], "auc")), _mean(found.last.get("auc"))
    if seen is not None and unseen is not None and seen > unseen + OVERFITTED:
        caveats.append(
            f"The AUC is {number(seen)} on the rows of the last updates and {number(unseen)} on held-out rows: "
            "the model may be learning its rows by heart."
        )
    if found.headline is CONSTRAINED:
        caveats.append(
            "These rewards are what the run was trained on. A judge that it never saw, or people, tell whether its "
            "answers are better."
        )
    if found.headline in (PAIRS, AUC):
        caveats.append(
            "This is how the model ranks given answers by their log-probs. Whether the answers it writes are better, "
            f"only reading them tells{'; some stand below' if files.generations else ''}."
        )
    return caveats


def _sentence(found: LanguageOutcome) -> str:
    headline = found.headline
    if finite(found.gain.get("mean")) is None:
        return "There are not two held-out evaluations to compare yet, so nothing can be said about improvement."
    text = change_text(f"Held-out {headline.name}", found.before, found.after, found.gain, share=headline.share)
    n = finite(found.after.get("n")) or finite(found.last.get("n"))
    text += f", {count(n)} {headline.unit})" if n else ")"
    if headline is PAIRS and _mean(found.last.get("auc")) is not None:
        text += f", AUC went from {number(_mean(found.first.get('auc')))} to {number(_mean(found.last.get('auc')))}"
    margins = [_mean(row.get("rewards/margin")) for row in (found.first, found.last)]
    if None not in margins:
        text += f", the margin of the implicit reward from {number(margins[0])} to {number(margins[1])}"
    return text + "."


def _cost(files: RunFiles) -> Row:
    """Return what the whole run took; its summary, which counts the final evaluation, goes before the last step."""
    last = files.metrics[-1] if files.metrics else {}

    def took(key: str) -> float | None:
        whole, sofar = finite(files.summary.get(key)), finite(last.get(f"{key}_total"))
        return sofar if whole is None else whole

    memory = [v for v in column(files.metrics, "peak_memory_mb") if v is not None]
    return {
        "step": last.get("step", 0), "seconds": took("seconds"), "cpu_seconds": took("cpu_seconds"),
        "memory": max(memory, default=None),
    }  # fmt: skip


def _tiles(files: RunFiles, found: LanguageOutcome, cost: Row) -> list[Row]:
    """Return the tiles of a run that compares with the model before training."""
    first, last, step = found.first, found.last, files.metrics[-1] if files.metrics else {}
    moved = _mean(last.get("log_ratio_per_token"))
    up, down = (_mean(last.get(f"rewards/{name}")) for name in ("up", "down"))
    tiles = [
        _estimate_tile("Held-out pair accuracy", first, last, "pair_accuracy", percent),
        _estimate_tile("Held-out AUC", first, last, "auc", number),
        _tile(
            "Held-out reward margin", signed(_mean(last.get("rewards/margin"))), f"up {signed(up)}, down {signed(down)}"
        ),
        _kl_tile(last) or _tile("Log-ratio per token", signed(moved), "nats; 0 is the model before training"),
    ]
    if "z0" in step:
        share = _average(column(files.metrics, "z0_at_zero"))
        tiles.append(
            _tile("Reference point z0", number(step["z0"]), f"nats; at 0 in {percent(share, 0)} of microbatches")
        )
    if "delta" in step:
        sides = " and ".join(number(step.get(f"delta/mean_{name}")) for name in ("down", "up"))
        tiles.append(
            _tile("Reward shift delta", number(step["delta"]), f"between {sides}" if "delta/mean_up" in step else "")
        )
    tiles += [_balance_tile(files, trainer_of(files)), *_cost_tiles(cost)]
    return [t for t in tiles if t]


def _supervised_tiles(files: RunFiles, found: LanguageOutcome, cost: Row) -> list[Row]:
    first, last, step = found.first, found.last, files.metrics[-1] if files.metrics else {}
    change = found.gain
    low, high = finite(change.get("ci_low")), finite(change.get("ci_high"))
    interval = "" if low is None or high is None else f"95 % CI {signed(low)} to {signed(high)}"
    tokens = _mapping(files.record.get("tokens"))
    tiles = [
        _estimate_tile("Held-out nats per token", first, last, "nats_per_token", number),
        _tile("Change", signed(change.get("mean")), interval or "nats a token, before to after"),
        _estimate_tile("Held-out perplexity", first, last, "perplexity", lambda v: brief(v, 3)),
        _tile("Training rows", count(tokens.get("rows")), f"{count(files.record.get('completion_tokens'))} tokens"),
        _tile("Real tokens", percent(step.get("real_token_share")), "of the last batch; the rest is padding"),
        *_cost_tiles(cost),
    ]
    return [t for t in tiles if t]


def _judged_tiles(files: RunFiles, found: LanguageOutcome, cost: Row) -> list[Row]:
    """Return the tiles of a run that is judged by answers of its own."""
    first, last = found.first, found.last
    tiles = [
        _estimate_tile("Constrained reward", first, last, "constrained", number),
        *(_estimate_tile(key.partition("/")[2], first, last, key, number) for key in last if key.startswith("reward/")),
        _estimate_tile("Every judge passes", first, last, "judge/all", percent),
        _kl_tile(last),
        _estimate_tile("Tokens an answer", first, last, "answer_tokens", number),
        *_cost_tiles(cost),
    ]
    return [t for t in tiles if t]


_TILES = {"sft": _supervised_tiles, "rluf": _judged_tiles}


def _estimate_tile(what: str, first: Row, last: Row, key: str, show: Callable[[Any], str]) -> Row:
    found = as_estimate(last.get(key))
    if key not in last:
        return {}
    low, high = finite(found.get("ci_low")), finite(found.get("ci_high"))
    interval = "" if low is None or high is None else f"95 % CI {show(low)} to {show(high)}; "
    return _tile(what, show(found.get("mean")), f"{interval}before: {show(_mean(first.get(key)))}")


def _kl_tile(last: Row) -> Row:
    found = as_estimate(last.get("kl"))
    low, high = finite(found.get("ci_low")), finite(found.get("ci_high"))
    if "kl" not in last:
        return {}
    interval = "" if low is None or high is None else f"95 % CI {number(low)} to {number(high)}; "
    return _tile("KL divergence", number(found.get("mean")), f"{interval}nats an answer")


def _balance_tile(files: RunFiles, trainer: str) -> Row:
    tokens, weights = _mapping(files.record.get("tokens")), _mapping(files.record.get("weights"))
    up, down = finite(tokens.get("up")), finite(tokens.get("down"))
    if trainer == "dpo":
        return _tile("Training pairs", count(files.record.get("pairs")), "as many thumbs up as down")
    if up is None or down is None or not up + down:
        return {}
    note = f"{count(up)} up, {count(down)} down"
    if weights:
        note += f"; weights {brief(weights.get('desirable'))} and {brief(weights.get('undesirable'))}"
    return _tile("Thumbs up in training", percent(up / (up + down)), note)


def _cost_tiles(cost: Row) -> list[Row]:
    processor = f"{duration(cost['cpu_seconds'])} of processor" if cost["cpu_seconds"] is not None else ""
    memory = "–" if cost["memory"] is None else f"{count(cost['memory'])} MB"
    return [_tile("Time", duration(cost["seconds"]), processor), _tile("Peak memory", memory, "of one process or GPU")]


def _tile(what: str, big: str, note: str) -> Row:
    return {"what": what, "big": big, "note": note}


def _charts(rows: list[Row], evaluations: list[Row]) -> dict[str, Markup]:
    """Return the drawings by title, empty where the trainer has no such number."""
    classes = (("rewards/up", "thumbs up", 2), ("rewards/down", "thumbs down", 1), ("rewards/margin", "margin", 0))
    running = (("delta/mean_up", "mean of thumbs up", 2), ("delta/mean_down", "mean of thumbs down", 1))
    pairs = points(evaluations, [("pair_accuracy",)], "held-out pair accuracy", 6)
    nats = points(evaluations, [("nats_per_token",)], "held-out nats per token", 6)

    def named(start: str) -> list[Series]:
        keys = [key for key in (evaluations[-1] if evaluations else {}) if key.startswith(f"{start}/")]
        return [points(evaluations, [(key,)], key.partition("/")[2], i) for i, key in enumerate(keys)]

    return {
        "Constrained reward": line_chart(
            [curve(rows, "constrained", "completions", colour=0),
             points(evaluations, [("constrained",)], "held-out answers", 1)],
        ),
        "Rewards of held-out answers": line_chart(named("reward")),
        "Held-out answers that judges pass": line_chart(named("judge"), percent=True),
        "Valid completions": line_chart(
            [curve(rows, "valid", "valid", colour=2), curve(rows, "kl_exceeded", "beyond the bound", colour=1),
             curve(rows, "learnt_prompts", "prompts learnt from", colour=0)],
            percent=True, from_zero=True,
        ),
        "Held-out pair accuracy": line_chart([pairs], percent=True, reference=(50.0, "chance")),
        "AUC of the implicit reward": line_chart(
            [
                curve(rows, "auc", "rows of the update", colour=0),
                points(evaluations, [("auc",)], "held-out rows", 1),
            ],
            reference=(0.5, "chance"),
        ),
        "Held-out nats per token": line_chart([nats]),
        "Change of nats per token": line_chart([points(evaluations, [("nats_change",)], "nats a token", 1)]),
        "Loss": line_chart([curve(rows, "loss", colour=0)]),
        "Held-out rewards": line_chart([points(evaluations, [(key,)], name, colour) for key, name, colour in classes]),
        "Rewards in training": line_chart([curve(rows, key, name, colour=colour) for key, name, colour in classes]),
        "Log-ratio per token": line_chart([points(evaluations, [("log_ratio_per_token",)], "nats a token", 4)]),
        "Reference point z0": line_chart(
            [curve(rows, "z0", "z0", colour=4), curve(rows, "z0_mean", "before the cut at 0", colour=6)]
        ),
        "z0 at its floor": line_chart(
            [curve(rows, "z0_at_zero", "share of microbatches", colour=4)], percent=True, from_zero=True
        ),
        "Reward shift delta": line_chart(
            [curve(rows, "delta", "delta", colour=4), *(curve(rows, key, name, colour=c) for key, name, c in running)]
        ),
        "Distance to the model before training": line_chart([points(evaluations, [("kl",)], "nats an answer", 4)]),
        "Length of the model's answers": line_chart(
            [points(evaluations, [("answer_tokens",)], "tokens", 3)], from_zero=True
        ),
        "Thumbs up in each update": line_chart(
            [
                curve(rows, "share_up", "thumbs up", colour=2),
                curve(rows, "one_class_share", "microbatches of one class", colour=1),
            ],
            percent=True,
            from_zero=True,
        ),
        "Real tokens": line_chart(
            [curve(rows, "real_token_share", "real tokens", colour=6)], percent=True, from_zero=True
        ),
        "Gradient norm": line_chart([curve(rows, "grad_norm", "gradient norm", colour=5)], from_zero=True),
        "Learning rate": line_chart([curve(rows, "lr", "learning rate", colour=3)], from_zero=True),
    }  # fmt: skip


def _heldout(found: LanguageOutcome, trainer: str) -> list[Row]:
    """Return before, after, change and sentence of every number measured at the first and the last evaluation."""
    rows = []
    for key in found.last:
        before, after = as_estimate(found.first.get(key)), as_estimate(found.last[key])
        a, b = finite(before.get("mean")), finite(after.get("mean"))
        if key not in ("step", "n", "seconds", "nats_change") and a is not None and b is not None:
            text = explain(key, trainer)
            rows.append({"key": key, "before": before, "after": after, "change": b - a, "text": text})
    return rows


def _data(files: RunFiles) -> list[Row]:
    """Return what run.json says of the rows, the classes, the reference and the processes, with a sentence each."""
    record, rows = files.record, []
    tokens, weights = _mapping(record.get("tokens")), _mapping(record.get("weights"))

    def add(what: str, value: Any, show: Callable[[Any], str], text: str) -> None:
        if isinstance(value, str) or finite(value) is not None:
            rows.append({"what": what, "value": show(value), "text": text})

    add("Training rows", tokens.get("rows"), count, "After rows that cannot be used were left out.")
    if trainer_of(files) not in ("sft", "rluf"):
        add("Thumbs up", tokens.get("up"), count, "Answers that are liked, or chosen.")
        add("Thumbs down", tokens.get("down"), count, "Answers that are disliked, or rejected.")
    add("Weight of thumbs up", weights.get("desirable"), brief, "By which their losses are multiplied.")
    add("Weight of thumbs down", weights.get("undesirable"), brief, "By which their losses are multiplied.")
    add("Held-out rows", tokens.get("heldout_rows"), count, "Never trained on; no prompt is on both sides.")
    for reason, dropped in _mapping(tokens.get("dropped")).items():
        add("Rows left out", dropped, count, f"{reason}.")
    for name, share in _mapping(tokens.get("truncated")).items():
        add(f"Cut at the end, thumbs {name}", share, percent, "Share of these rows longer than data.max_length.")
    add("Longest row", tokens.get("longest"), count, "Tokens of prompt and completion.")
    add("Model before training", record.get("reference"), str, _REFERENCES.get(str(record.get("reference")), ""))
    add("Engine", record.get("engine"), str, "What carries the updates out.")
    add("Processes", record.get("processes"), count, "Results do not depend on their number.")
    return rows


_REFERENCES = {
    "lora_off": "The same weights with the adapters switched off.",
    "copy": "A frozen copy of the weights.",
    "precomputed": "Its log-probs were computed once and kept on disk.",
    "none": "This trainer does not compare with it.",
}


def _mapping(value: Any) -> Row:
    return value if isinstance(value, dict) else {}


def _mean(value: Any) -> float | None:
    return finite(as_estimate(value).get("mean"))


def _average(values: list[float | None]) -> float | None:
    found = [v for v in values if v is not None]
    return sum(found) / len(found) if found else None
