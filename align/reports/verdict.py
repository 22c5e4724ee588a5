"""What a run came to, in plain words, no kinder than its numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from align.reports.page import brief, count, duration, finite, number, percent, signed

Row = dict[str, Any]

ACCURACY_LOSS, DIVERSITY_KEPT = 0.01, 0.8
"""A gain is called one with losses below -1 point of held-out accuracy or below .8 of the base's diversity."""

FEW_PROMPTS = 10
"""Intervals that resample fewer prompts than this are too narrow."""


@dataclass(frozen=True)
class Outcome:
    """Before and after, each an estimate {mean, ci_low, ci_high, n}; `paired` when `gain` has its own interval."""

    before: Row
    after: Row
    gain: Row
    reward_before: Row
    reward_after: Row
    accuracy: tuple[float | None, float | None]
    diversity: tuple[float | None, float | None]
    paired: bool
    step: int | None
    measure: str = "Held-out reward"
    prompts: float | None = None

    @property
    def change(self) -> float | None:
        """The change of the held-out reward."""
        return finite(self.gain.get("mean"))


@dataclass(frozen=True)
class Verdict:
    """kind: "good", "mixed", "flat", "bad", "alarm" or "open"."""

    kind: str
    title: str
    sentence: str
    cost: str
    caveats: tuple[str, ...]


def outcome(summary: Row, evaluations: list[Row]) -> Outcome:
    """Take before and after from summary.json, or from the first and the last evaluation where there is none."""
    step = evaluations[-1]["step"] if evaluations else None
    prompts = finite(evaluations[-1].get("prompts")) if evaluations else None
    if _mean(summary.get("heldout_before")) is not None and _mean(summary.get("heldout_after")) is not None:
        gain = summary.get("heldout_gain")
        return Outcome(
            summary["heldout_before"],
            summary["heldout_after"],
            gain if isinstance(gain, dict) else difference(summary["heldout_before"], summary["heldout_after"]),
            _estimate(summary.get("reward_before")),
            _estimate(summary.get("reward_after")),
            (finite(summary.get("heldout_accuracy_before")), finite(summary.get("heldout_accuracy_after"))),
            (finite(summary.get("diversity_before")), finite(summary.get("diversity_after"))),
            paired=isinstance(gain, dict),
            step=step,
            measure=str(summary.get("heldout_measure") or "Held-out reward"),
            prompts=prompts,
        )
    first, last = (evaluations[0], evaluations[-1]) if len(evaluations) > 1 else ({}, {})
    before, after = _estimate(first.get("heldout")), _estimate(last.get("heldout"))
    return Outcome(
        before,
        after,
        difference(before, after),
        _estimate(first.get("reward")),
        _estimate(last.get("reward")),
        (_accuracy(first), _accuracy(last)),
        (finite(first.get("diversity")), finite(last.get("diversity"))),
        paired=False,
        step=step,
        prompts=prompts,
    )


def judge(found: Outcome, warnings: list[Row], record: Row, cost: Row, *, has_heldout: bool) -> Verdict:
    """Say whether the run improved the model, by the interval of the held-out gain and by its alarms.

    Args:
        cost: step, and as far as known feq, feq_total, seconds and cpu_seconds.
        has_heldout: whether the run has a reward it is not trained on.
    """
    caveats = _caveats(found, has_heldout)
    caveats += how_it_ended(record, cost.get("step", 0))
    standing, past = split_alarms(warnings, found.step)
    caveats += past
    kind, title = _verdict(found, standing, caveats)
    if kind == "alarm":
        caveats[:0] = messages(standing[-2:])
    return Verdict(kind, title, _sentence(found), cost_sentence(cost), tuple(caveats))


def how_it_ended(record: Row, done: Any) -> list[str]:
    """Return the caveat of a run that is not complete."""
    status = record.get("status")
    if status == "complete":
        return []
    how = {
        "running": "was still running, or died without a word,", "stopped": "was stopped", "failed": "failed",
        "hacked": "was stopped by the hack monitor",
    }  # fmt: skip
    end = how.get(str(status), "has no recorded end; it stood")
    return [f"The run {end} at step {done} of {record.get('steps_planned') or 'an unknown number'}."]


def split_alarms(warnings: list[Row], step: int | None) -> tuple[list[Row], list[str]]:
    """Return the alarms that went off at the last evaluation's step or later, and the caveat of those only before."""
    alarms = [w for w in warnings if w.get("level") == "alarm"]
    standing = [w for w in alarms if step is None or (finite(w.get("step")) or 0) >= step]
    if not alarms or standing:
        return standing, []
    steps = ", ".join(str(w.get("step")) for w in alarms)
    return [], [f"An alarm went off at step {steps} and not again later; see the warnings below."]


def messages(warnings: list[Row]) -> list[str]:
    """Return what warnings say, each with its step."""
    return [f"{w.get('message', '')} (step {w.get('step')})" for w in warnings]


def _verdict(found: Outcome, standing: list[Row], caveats: list[str]) -> tuple[str, str]:
    low, high = finite(found.gain.get("ci_low")), finite(found.gain.get("ci_high"))
    rewards = _mean(found.reward_before), _mean(found.reward_after)
    risen = rewards[0] is not None and rewards[1] is not None and rewards[1] > rewards[0]
    fell = high is not None and high < 0
    if any(w.get("code") == "drift" for w in standing) or (fell and risen):
        return "alarm", "Alarm: the reward was hacked"
    if standing:
        return "alarm", "Alarm"
    if found.change is None:
        return "open", "No verdict yet"
    if low is None or high is None:
        return "open", "No interval, no verdict"
    if fell:
        return "bad", "Got worse"
    if low <= 0:
        return "flat", "No clear change"
    return ("mixed", "Improved, with losses") if _losses(found) else ("good", "Improved")


def _losses(found: Outcome) -> list[str]:
    losses = []
    (a, b), (c, d) = found.accuracy, found.diversity
    if a is not None and b is not None and b < a - ACCURACY_LOSS:
        losses.append(f"Held-out accuracy fell by {100 * (a - b):.1f} points.")
    if c and d is not None and d < DIVERSITY_KEPT * c:
        losses.append(f"Diversity fell to {percent(d / c, 0)} of the base model's.")
    return losses


def _caveats(found: Outcome, has_heldout: bool) -> list[str]:
    caveats = _losses(found)
    if not has_heldout:
        caveats.append(
            "No held-out reward was configured: the figures are the trained reward on held-out prompts, "
            "which cannot show that it is being gamed."
        )
    if found.change is not None and found.prompts is not None and found.prompts < FEW_PROMPTS:
        caveats.append(
            f"Only {count(found.prompts)} held-out prompts stand behind this: the interval is too narrow to rely on."
        )
    if found.change is not None and not found.paired:
        caveats.append(
            "There is no final evaluation yet: before and after are evaluations of different sizes, "
            "and the interval treats them as independent, which is cautious."
        )
    return caveats


def _sentence(found: Outcome) -> str:
    if found.change is None:
        return "There are not two held-out evaluations to compare yet, so nothing can be said about improvement."
    text = change_text(found.measure, found.before, found.after, found.gain)
    if found.paired and found.gain.get("n"):
        text += f", {count(found.gain['n'])} paired samples"
    text += ")"
    (a, b), (c, d) = found.accuracy, found.diversity
    if a is not None and b is not None:
        text += f", held-out accuracy went from {percent(a)} to {percent(b)}"
    if c is not None and d is not None:
        text += f", diversity {'went ' if a is None or b is None else ''}from {number(c)} to {number(d)}"
        text += f" ({percent(d / c, 0)} of the base)" if c else ""
    return text + "."


def change_text(measure: str, before: Row, after: Row, gain: Row, *, share: bool = False) -> str:
    """Return what became of a measure, up to what stands in brackets, which stay open.

    A change whose interval holds 0 neither rose nor fell. All is told to two digits of the interval's half-width.

    Args:
        before, after, gain: estimates; `gain` of the change.
        share: the measure is a share, told in percent.
    """
    scale, unit, points = (100, "\u00a0%", " points") if share else (1, "", "")
    ends = [scale * end for key in ("ci_low", "ci_high") if (end := finite(gain.get(key))) is not None]
    half, change = (ends[-1] - ends[0]) / 2 if len(ends) == 2 else 0.0, scale * gain["mean"]
    digits = min(6, max(0, 1 - math.floor(math.log10(half)))) if half > 0 else 1 if share else 3
    if len(ends) < 2:
        verb = "went"
    elif ends[0] <= 0 <= ends[1]:
        verb = "did not change measurably: it went"
    else:
        verb = "rose" if change > 0 else "fell"

    def level(found: Row) -> str:
        mean = _mean(found)
        return "–" if mean is None else f"{round(scale * mean, digits) + 0.0:,.{digits}f}{unit}".replace("-", "−")

    text = f"{measure} {verb} from {level(before)} to {level(after)} ({signed(change, digits)}{points}"
    interval = " to ".join(signed(end, digits) for end in ends)
    return f"{text}, 95\u00a0% CI {interval}{points}" if len(ends) == 2 else text


def cost_sentence(cost: Row) -> str:
    """Return what a run took, as far as it is known."""
    parts = [f"{brief(cost['feq'])} F_eq a sample"] if cost.get("feq") is not None else []
    parts += [f"{count(cost['feq_total'])} F_eq in all"] if cost.get("feq_total") is not None else []
    parts += [duration(cost["seconds"])] if cost.get("seconds") is not None else []
    parts += [f"{duration(cost['cpu_seconds'])} of processor"] if cost.get("cpu_seconds") is not None else []
    return f"Cost: {', '.join(parts)}." if parts else ""


def _accuracy(evaluation: Row) -> float | None:
    return finite(evaluation.get("heldout_accuracy", evaluation.get("accuracy")))


def _mean(value: Any) -> float | None:
    return finite(value.get("mean")) if isinstance(value, dict) else None


def _estimate(value: Any) -> Row:
    return value if isinstance(value, dict) else {}


def difference(before: Row, after: Row) -> Row:
    """Return the difference of two estimates as if independent: half-widths add in quadrature."""
    a, b = _mean(before), _mean(after)
    if a is None or b is None:
        return {}
    ends = [finite(e.get(k)) for e in (before, after) for k in ("ci_low", "ci_high")]
    if any(end is None for end in ends):
        return {"mean": b - a}
    low_a, high_a, low_b, high_b = (float(end) for end in ends if end is not None)
    down, up = ((b - low_b) ** 2 + (high_a - a) ** 2) ** 0.5, ((high_b - b) ** 2 + (a - low_a) ** 2) ** 0.5
    return {"mean": b - a, "ci_low": b - a - down, "ci_high": b - a + up}
