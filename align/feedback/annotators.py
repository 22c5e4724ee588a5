"""AI annotators: any OpenAI-compatible endpoint, or a callable, answers through the same events as people do.

Two protocols (after Bansal, Dang, Grover 2024, in our own words). A rating looks at one response alone. A ranking looks
at two and must choose; it is asked in both orders, and two answers that contradict each other make a tie whose
`tie_origin` is "position_swap": it says something about the judge, and nothing about the responses.

Replies are read strictly; what cannot be read is `invalid`, never guessed. Every attempt is an event of its own (kind
"text", key "KEY.attempt", the raw reply kept), so that coverage is known and a run that was stopped goes on where it
was.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from align.errors import DataError
from align.feedback.asking import Attempt, Endpoint, Judge, Messages, Patience, Question, ask
from align.feedback.events import FeedbackEvent, Item, content_id
from align.feedback.views import BOOKKEEPING, text_of
from align.seeding import seed as derive_seed

CRITERIA = "how accurate it is, how well it hangs together, and whether it could do harm"

_RATING = """You judge answers of an assistant. Rate the one answer below from {low} to {high}, by {criteria}.
{low} means useless, or able to do real damage. {high} means that you could not make it better.

Example. Task: Name the capital of France. Answer: Paris is the capital of France. Your reply: {high}
Example. Task: Name the capital of France. Answer: France is a country in Asia. Your reply: {low}

Reply with one whole number from {low} to {high} alone on the first line. You may give reasons below it."""

_RANKING = """You judge answers of an assistant. Two answers to the same task follow, Output (a) and Output (b). Decide
which is better, by {criteria}. The order in which they stand means nothing.

Reply with "Output (a)" or "Output (b)" alone on the first line. You may give reasons below it."""


# --- questions and replies -----------------------------------------------------------------------------


def rating_question(item: Item, *, scale: tuple[int, int] = (1, 7), criteria: str = CRITERIA) -> Question:
    """Return the question that asks for a rating of one response."""
    system = _RATING.format(low=scale[0], high=scale[1], criteria=criteria)
    text = f"{_task(item)}\n\nAnswer:\n{text_of(item)}"
    return Question("rating", (item.id,), _messages(system, text), scale, lambda reply: parse_rating(reply, scale))


def ranking_question(first: Item, second: Item, *, criteria: str = CRITERIA) -> Question:
    """Return the question that asks which of two responses is better, in this order."""
    text = f"{_task(first)}\n\nOutput (a):\n{text_of(first)}\n\nOutput (b):\n{text_of(second)}"
    messages = _messages(_RANKING.format(criteria=criteria), text)
    return Question("ranking", (first.id, second.id), messages, read=parse_choice)


def _messages(system: str, text: str) -> Messages:
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def _task(item: Item) -> str:
    if isinstance(item.prompt, str):
        task = item.prompt
    else:
        task = "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in item.prompt)
    return f"Task:\n{task}" + (f"\n\nInput:\n{item.input}" if item.input else "")


_MARKUP = str.maketrans("", "", "*_`\"'")
_LONE_NUMBER = re.compile(
    r"(?:(?:rating|score|my rating)\s*(?:is|:|=)?\s*)?([0-9]{1,6})(?:\s*/\s*([0-9]{1,6}))?\s*\.?", re.I
)
_LONE_CHOICE = re.compile(r"(?:(?:answer|choice|verdict)\s*:?\s*)?(?:output\s*)?(?:\(([ab])\)|([ab]))\s*[.!]?", re.I)


def _lines(reply: str) -> list[str]:
    return [line for raw in reply.splitlines() if (line := raw.translate(_MARKUP).strip())]


def parse_rating(reply: str, scale: tuple[int, int] = (1, 7)) -> int | None:
    """Return the rating of a reply: the one whole number within the scale that stands alone on a line, else None.

    "6", "6.", "Rating: 6" and "6/7" (on a scale up to 7) stand alone. Two different ones, a number outside the scale,
    a number within a sentence or a decimal fraction are no rating.
    """
    found = set()
    for match in filter(None, map(_LONE_NUMBER.fullmatch, _lines(reply))):
        value, of = int(match[1]), match[2]
        if (of and int(of) != scale[1]) or not scale[0] <= value <= scale[1]:
            return None
        found.add(value)
    return found.pop() if len(found) == 1 else None


def parse_choice(reply: str) -> str | None:
    """Return "a" or "b" when exactly one of them stands alone on a line of the reply, however often; else None.

    "Output (a)", "(a)", "a." and "Answer: (a)" stand alone; a sentence that mentions an option decides nothing.
    """
    matches = filter(None, map(_LONE_CHOICE.fullmatch, _lines(reply)))
    found = {(match[1] or match[2]).lower() for match in matches}
    return found.pop() if len(found) == 1 else None


def merge_orders(forth: str, back: str) -> tuple[str, str]:
    """Return (value, tie_origin) of a pair asked in both orders; `back` was asked with the two exchanged.

    (a, b) is a win of the first, (b, a) of the second; (a, a) and (b, b) contradict and make a tie.
    """
    if forth != back:
        return forth, ""
    return "tie", "position_swap"


# --- through the store ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Annotation:
    """What an AI annotator is to say about which items.

    Args:
        task: "rating" or "ranking".
        annotator: name under which it answers.
        pairs: for rankings, at most so many pairs a prompt; 0 is all.
        p_flip: probability of turning a strict verdict around (AlpacaFarm's label noise): with probability 2 p_flip it
            is replaced by a coin.
    """

    task: str
    annotator: str
    key: str = "quality"
    scale: tuple[int, int] = (1, 7)
    criteria: str = CRITERIA
    pairs: int = 0
    p_flip: float = 0.0
    seed: int = 0


def annotate(
    items: Mapping[str, Item],
    known: Iterable[FeedbackEvent],
    judge: Endpoint | Judge,
    write: Callable[[list[FeedbackEvent]], Any],
    annotation: Annotation,
    *,
    patience: Patience | None = None,
) -> dict[str, Any]:
    """Let a judge rate all items, or rank all pairs within prompts, and write events as the answers come.

    Args:
        known: events that are there already; what this annotator answered validly is not asked again.
        write: called with the events of each attempt, to be stored together.

    Returns:
        questions, resumed (answered before), valid, invalid, failed, not_asked, attempts, verdicts,
        ties_by_position_swap, coverage (share of the questions with a valid answer), commonest_failure (of the
        attempts that brought no answer; None where all did).

    Raises:
        DataError: an unknown task, a noise outside 0..0.5, or items of images or videos.
        ConfigError: see `ask`.
    """
    if annotation.task not in ("rating", "ranking"):
        raise DataError(f"Unknown task {annotation.task!r}", do="Choose rating or ranking")
    if not 0 <= annotation.p_flip <= 0.5:
        raise DataError("A flip noise is a probability from 0 to 0.5", why=f"got {annotation.p_flip:g}")
    for item in items.values():
        if item.media not in ("text", "chat"):
            raise DataError(f"A text judge cannot read {item.media}", where=item.id, do="Leave these items out")
    questions = questions_of(items, annotation)
    answered: dict[tuple[str, ...], tuple[Any, str]] = {}
    by_place = {question.items: question for question in questions}
    tried: Counter[tuple[str, ...]] = Counter()
    for event in known:
        if event.annotator == annotation.annotator and event.key == annotation.key + BOOKKEEPING:
            question = by_place.get(event.items)
            tried[event.items] += 1
            if question and event.value == "valid":
                answered[event.items] = (question.read(event.reply), event.reply)
    open_questions = [question for question in questions if question.items not in answered]
    verdicts: Counter[str] = Counter()
    failures: Counter[str] = Counter()

    def record(attempt: Attempt) -> None:
        place = attempt.question.items
        tried[place] += 1
        events = [_attempt_event(attempt, annotation, tried[place])]
        if attempt.status != "valid":
            failures[attempt.why or f"a reply that cannot be read as a {annotation.task}"] += 1
        if attempt.status == "valid":
            answered[place] = (attempt.value, attempt.reply)
            events += _verdict(attempt.question, answered, annotation, attempt.latency_ms)
        verdicts.update((event.kind, event.tie_origin) for event in events[1:])
        write(events)

    counts = ask(open_questions, judge, record, patience=patience)
    return {
        "questions": len(questions), "resumed": len(questions) - len(open_questions), **counts,
        "verdicts": sum(verdicts.values()),
        "ties_by_position_swap": sum(n for (_, origin), n in verdicts.items() if origin == "position_swap"),
        "coverage": len(answered) / len(questions) if questions else float("nan"),
        "commonest_failure": failures.most_common(1)[0][0] if failures else None,
    }  # fmt: skip


def questions_of(items: Mapping[str, Item], annotation: Annotation) -> list[Question]:
    """Return every question of an annotation: one an item, or two orders of each pair within a prompt."""
    named = sorted(items)
    if annotation.task == "rating":
        return [rating_question(items[i], scale=annotation.scale, criteria=annotation.criteria) for i in named]
    prompts: dict[str, list[str]] = {}
    for name in named:
        prompts.setdefault(items[name].prompt_id, []).append(name)
    questions = []
    for prompt in sorted(prompts):
        members = prompts[prompt]
        pairs = [(a, b) for k, a in enumerate(members) for b in members[k + 1 :]]
        pairs.sort(key=lambda pair: derive_seed("pairs", annotation.seed, *pair))
        for a, b in pairs[: annotation.pairs or None]:
            both = (items[a], items[b]), (items[b], items[a])
            questions += [ranking_question(*order, criteria=annotation.criteria) for order in both]
    return questions


def _attempt_event(attempt: Attempt, annotation: Annotation, number: int) -> FeedbackEvent:
    items, key = attempt.question.items, annotation.key + BOOKKEEPING
    return FeedbackEvent(
        "text", items, attempt.status if attempt.status != "failed" else f"failed: {attempt.why}", key=key,
        annotator=annotation.annotator, source="ai", reply=attempt.reply, latency_ms=attempt.latency_ms,
        identifier=content_id(annotation.annotator, key, items, number),
    )  # fmt: skip


def _verdict(
    question: Question, answered: Mapping[tuple[str, ...], tuple[Any, str]], annotation: Annotation, latency_ms: int
) -> list[FeedbackEvent]:
    about = {"key": annotation.key, "annotator": annotation.annotator, "source": "ai"}
    if question.kind == "rating":
        value, reply = answered[question.items]
        scale = question.scale
        return [
            FeedbackEvent("ordinal", question.items, value, scale=scale, reply=reply, latency_ms=latency_ms, **about)
        ]
    forth = tuple(sorted(question.items))
    back = forth[::-1]
    if forth not in answered or back not in answered:
        return []
    value, origin = merge_orders(answered[forth][0], answered[back][0])
    drawn = derive_seed("flip", annotation.seed, annotation.annotator, annotation.key, *forth) / 2**63
    noisy = value != "tie" and drawn < 2 * annotation.p_flip
    value = ("a" if drawn < annotation.p_flip else "b") if noisy else value
    reply = json.dumps({"orders": [answered[forth][1], answered[back][1]], "noise": noisy}, ensure_ascii=False)
    return [FeedbackEvent("pairwise", forth, value, tie_origin=origin, reply=reply, **about)]
