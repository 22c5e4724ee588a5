"""What a cell says: texts, chats, labels, ratings, preferences, ranks, reactions and times, read strictly.

Each function returns the value, or `MISSING` where there is none (null, an empty cell, a NaN), or raises `ValueError`
with one sentence that says what it expected. Nothing is guessed: "nan" in a prompt is the word, in a rating an error.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

MISSING: Any = type("Missing", (), {"__repr__": lambda self: "MISSING", "__bool__": lambda self: False})()

_YES = {"true", "1", "yes", "up", "thumbs_up", "thumbsup", "good", "like", "liked", "positive", "desirable"}
_NO = {"false", "0", "-1", "no", "down", "thumbs_down", "thumbsdown", "bad", "dislike", "disliked", "negative"}
_NO |= {"undesirable"}

_PREFERENCES = {
    "a": "a (a) 1 first left model_a response_a output_(a) a>b",
    "b": "b (b) 2 second right model_b response_b output_(b) b>a",
    "tie": "tie equal 0 1.5 same both draw a=b both_good bothgood",
    "both_bad": "both_bad bothbad tie_(bothbad) neither",
}
_PREFERENCE = {word: value for value, words in _PREFERENCES.items() for word in words.split()}

_REACTIONS = {
    "love": "❤ ♥ 😍 🥰 💖 💕 🩷 🧡 💛 💚 💙 💜 heart red_heart love loved",
    "like": "👍 +1 thumbsup thumbs_up like liked",
    "dislike": "👎 -1 thumbsdown thumbs_down dislike disliked",
    "laugh": "😂 🤣 😄 😆 joy laugh laughing haha",
    "wow": "😮 😯 😲 wow surprised open_mouth",
    "sad": "😢 😭 😞 sad cry",
    "angry": "😡 😠 🤬 angry rage",
}
_REACTION = {word: value for value, words in _REACTIONS.items() for word in words.split()}


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: null, NaN, or a text of spaces alone."""
    if value is None or value is MISSING:
        return True
    return (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and not value.strip())


def text(value: Any) -> str:
    """Return a text as it stands. A number or truth value that a parser made of one is written as JSON writes it.

    Raises:
        ValueError: a list or an object, or half of a character.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if not isinstance(value, str):
        raise ValueError("expected a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("expected Unicode, and found half of a character") from None
    return value


def text_or_chat(value: Any) -> str | list[dict[str, str]]:
    """Return a text, or a chat as a list of turns with `role` and `content`.

    Raises:
        ValueError: neither of the two.
    """
    if not isinstance(value, (list, tuple)):
        return text(value)
    turns = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping):
            raise ValueError(f"expected turns with role and content, and turn {number} has none")
        known = {key: part for key, part in turn.items() if part is not None}
        if {"role", "content"} - set(known):
            raise ValueError(f"expected turns with role and content, and turn {number} lacks one")
        for part in known.values():
            if not isinstance(part, str):
                raise ValueError(f"expected texts in a chat, and turn {number} holds something else")
            text(part)
        turns.append({str(key): part for key, part in known.items()})
    if not turns:
        raise ValueError("expected at least one turn in a chat")
    return turns


def _word(value: Any) -> str:
    return "_".join(unicodedata.normalize("NFKC", value).strip().casefold().split())


def whole(value: Any) -> int:
    """Return a whole number: 6, "6", 6.0 and "6.0" are the same; 6.5, true and "six" are refused.

    Raises:
        ValueError: anything else.
    """
    if is_missing(value):
        return MISSING
    number = number_of(value)
    if number != int(number):
        raise ValueError("expected a whole number")
    return int(number)


def number_of(value: Any) -> float:
    """Return a finite number.

    Raises:
        ValueError: anything else.
    """
    plain = isinstance(value, str) and set(value.strip()) <= set("0123456789+-.eE")
    try:
        number = float(value if plain or not isinstance(value, (str, bool)) else "x")
    except (TypeError, ValueError, OverflowError):
        raise ValueError("expected a number") from None
    if not math.isfinite(number) or abs(number) > 2**53:
        raise ValueError("expected a number of ordinary size")
    return number


def binary(value: Any) -> bool:
    """Return a label: true/false, 1/0, 1/-1, up/down, yes/no, good/bad.

    Raises:
        ValueError: anything else.
    """
    if is_missing(value):
        return MISSING
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        value = repr(whole(value))
    word = _word(text(value)).removesuffix(".0")
    if word not in _YES | _NO:
        raise ValueError("expected true or false, 1 or 0, 1 or -1, up or down")
    return word in _YES


def preference(value: Any) -> str:
    """Return "a", "b", "tie" or "both_bad"; reads (a)/(b)/equal, 1/2/0, left/right/tie, model_a/model_b as well.

    Raises:
        ValueError: anything else; a reply that only mentions an option is none.
    """
    if is_missing(value):
        return MISSING
    if isinstance(value, bool):
        raise ValueError("expected a, b, tie or both_bad")
    if isinstance(value, (int, float)):
        value = repr(value)
    word = _word(text(value))
    found = _PREFERENCE.get(word) or _PREFERENCE.get(word.removesuffix(".0"))
    if found is None:
        raise ValueError("expected a, b, tie or both_bad (or (a), (b), equal; or 1, 2, 0)")
    return found


def reaction(value: Any) -> str:
    """Return a reaction's name. Variation selectors and skin tones do not make another one, nor do spellings.

    Raises:
        ValueError: not a text.
    """
    if is_missing(value):
        return MISSING
    if not isinstance(value, str):
        raise ValueError("expected the name of a reaction, or an emoji")
    plain = "".join(c for c in text(value) if c not in "\ufe0e\ufe0f" and not 0x1F3FB <= ord(c) <= 0x1F3FF)
    word = _word(plain).strip(":")
    if not word:
        raise ValueError("expected the name of a reaction, or an emoji")
    return _REACTION.get(word, word)


def ranks(values: Sequence[Any], *, best_is_high: bool = False) -> list[int | None]:
    """Return one rank a response, 1 the best: 1 + the number of responses that stand strictly before it.

    Whole ranks that are valid as they are stay so; shared ranks such as 1.5, 1.5 become 1, 1. A response without a rank
    has None, and the others are ranked among themselves.

    Raises:
        ValueError: a value that is no number, one rank alone, or ranks that start below 1.
    """
    numbers = {place: number_of(value) for place, value in enumerate(values) if not is_missing(value)}
    if len(numbers) == 1:
        raise ValueError("expected ranks of two responses or more")
    if best_is_high:
        numbers = {place: -number for place, number in numbers.items()}
    elif min(numbers.values(), default=1) < 1:
        raise ValueError("expected ranks from 1, the best")
    given = list(numbers.values())
    stay = not best_is_high and all(n == int(n) for n in given) and min(given, default=1) == 1
    if stay and max(given, default=1) <= len(given):
        found = {place: int(number) for place, number in numbers.items()}
    else:
        found = {place: 1 + sum(other < number for other in given) for place, number in numbers.items()}
    return [found.get(place) for place in range(len(values))]


def milliseconds(value: Any) -> int:
    """Return a time in milliseconds since 1970, out of that, of seconds, of a date and time, or of ISO 8601 text.

    Text without a zone is UTC. Raises `ValueError` for anything else, and for times outside 1971 to 2200.
    """
    if is_missing(value):
        return MISSING
    if isinstance(value, str):
        try:
            value = number_of(value)
        except ValueError:
            try:
                value = datetime.fromisoformat(value.strip())
            except ValueError:
                raise ValueError("expected a time: ISO 8601, or seconds or milliseconds since 1970") from None
    if isinstance(value, datetime):
        found = round((value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp() * 1000)
    else:
        number = number_of(value)
        found = round(number if number >= 1e11 else number * 1000)
    if not 31_536_000_000 <= found <= 7_258_118_400_000:
        raise ValueError("expected a time between 1971 and 2200")
    return found
