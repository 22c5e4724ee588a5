"""What was shown to whom, and what they said about it: the two values everything in this room is made of.

An `Item` is content: a prompt with a response, or with an image or video file. Its id is a hash of the content, so
the same content has one id wherever it comes from. A `FeedbackEvent` is one thing one annotator said at one moment
about one or several items, or that they were merely shown them. Events are never changed: a later event supersedes an
earlier one of the same `identifier`, and a tombstone takes it back.

| kind       | items | value                                                                                        |
|------------|-------|----------------------------------------------------------------------------------------------|
| `exposure` | 1..k  | None: shown. Without exposures neither a rate nor a correction for silence can be computed    |
| `binary`   | 1     | True or False (thumb up or down). Silence is an exposure without this event, never False       |
| `reaction` | 1     | a normalised name, such as "love"                                                            |
| `ordinal`  | 1     | a whole number within `scale`                                                                |
| `pairwise` | 2     | "a", "b", "tie" or "both_bad": a is the first of `items`, which stand in the order shown      |
| `ranking`  | 2..k  | one rank an item, 1 the best, equal ranks are ties                                           |
| `text`     | 1..k  | a reason or a correction                                                                     |
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.errors import DataError
from align.registry import suggest

KINDS = ("exposure", "binary", "reaction", "ordinal", "pairwise", "ranking", "text")
SOURCES = ("user", "human", "ai", "code")
PAIRWISE = ("a", "b", "tie", "both_bad")
TIE_ORIGINS = ("", "judged", "position_swap")
MEDIA = ("text", "chat", "image", "video")

Chat = Sequence[Mapping[str, str]]


def content_id(*parts: Any) -> str:
    """Return 24 hex digits over a tuple of texts, chats or numbers. Texts are compared in Unicode's NFC form."""

    def plain(part: Any) -> Any:
        if isinstance(part, str):
            return unicodedata.normalize("NFC", part)
        if isinstance(part, Mapping):
            return {str(key): plain(value) for key, value in part.items()}
        return [plain(value) for value in part] if isinstance(part, (list, tuple)) else part

    text = json.dumps([plain(part) for part in parts], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:24]


@dataclass(frozen=True)
class Item:
    """One output of a model, with what it was asked for.

    Args:
        prompt: a text, or a chat as a list of {"role": ..., "content": ...} turns.
        response: a text; for media, the file's path relative to the task, or its sha256.
        input: what the prompt works on, where a data set keeps it apart; "" is none.
        media: what `response` is: "text", "chat", "image" or "video".
        metadata: anything else worth keeping: model, length, seed.
    """

    prompt: str | Chat
    response: str | Chat
    input: str = ""
    media: str = "text"
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.media not in MEDIA:
            raise DataError(f"Unknown media {self.media!r} of an item", do=suggest(str(self.media), MEDIA))

    @property
    def id(self) -> str:
        """Hash of prompt, input, response and media; metadata does not enter."""
        return content_id(self.prompt, self.input, self.response, self.media)

    @property
    def prompt_id(self) -> str:
        """Hash of prompt and input: what items must share to be compared."""
        return content_id(self.prompt, self.input)


@dataclass(frozen=True)
class FeedbackEvent:
    """One thing one annotator said, at one moment, about one or several items; see the module's table.

    Args:
        kind, value: as the table says.
        items: ids of the items, in the order in which they were shown.
        key: which signal or dimension: "helpfulness", "love", "thumb".
        annotator: pseudonymous id of who said it.
        source: "user" of a product, "human" annotator, "ai" judge, or "code".
        scale: (lowest, highest) of an ordinal value.
        identifier: what makes this the same answer when it is given again; events of one identifier supersede
            one another. "" stands for (annotator, key, kind, items in any order, session).
        tombstone: takes the current event of this identifier back.
        exposure: "shown" where it is known that the items were shown with the means to answer; else "unknown",
            and the event does not enter rates.
        tie_origin: of a pairwise tie: "judged" as one, or "position_swap", the two orders contradicting each other.
        policy: version of the model that made the items.
        propensity: probability with which this version was shown, where it was drawn.
        position: place of the item among those shown, from 0.
        latency_ms: time between showing and answering.
        session: conversation or sitting.
        reply: an AI annotator's raw reply, or a person's comment.
        ts: when it was said, in milliseconds since 1970; 0 where that is not known, and nobody makes it up.
        id: names this very event, so that a retry is known as one; "" lets the store give it. Events that come out of
            a store have one.
    """

    kind: str
    items: tuple[str, ...]
    value: Any = None
    key: str = "quality"
    annotator: str = ""
    source: str = "human"
    scale: tuple[int, int] | None = None
    identifier: str = ""
    tombstone: bool = False
    exposure: str = "unknown"
    tie_origin: str = ""
    policy: str = ""
    propensity: float | None = None
    position: int | None = None
    latency_ms: int | None = None
    session: str = ""
    reply: str = ""
    ts: int = 0
    id: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "items", tuple(self.items))
        if not self.identifier:
            places = sorted(self.items) if self.kind in ("pairwise", "ranking") else self.items
            made = content_id(self.annotator, self.key, self.kind, places, self.session)
            object.__setattr__(self, "identifier", made)
        if problem := self._problem():
            raise DataError("This is no feedback event", where=f"{self.kind}, {self.key}", why=problem)

    def _problem(self) -> str:
        named = (
            ("kind", self.kind, KINDS),
            ("source", self.source, SOURCES),
            ("exposure", self.exposure, ("shown", "unknown")),
            ("tie_origin", self.tie_origin, TIE_ORIGINS),
        )
        for name, value, known in named:
            if value not in known:
                return f"{name} is {value!r}. {suggest(str(value), known)}"
        count, value = len(self.items), self.value
        if not count or len(set(self.items)) != count or not all(isinstance(i, str) and i for i in self.items):
            return f"items must be distinct ids, got {self.items!r}"
        if self.kind in ("binary", "reaction", "ordinal") and count != 1:
            return f"{self.kind} is about one item, got {count}"
        if self.propensity is not None and not 0 < self.propensity <= 1:
            return f"propensity is a probability above 0, got {self.propensity!r}"
        if self.ts < 0:
            return f"ts is milliseconds since 1970, got {self.ts!r}"
        if self.tombstone:
            return "" if value is None else "a tombstone has no value"
        if self.kind == "exposure":
            return "" if value is None else "an exposure has no value"
        if self.kind == "binary":
            return "" if isinstance(value, bool) else f"binary is true or false, got {value!r}; silence is an exposure"
        if self.kind in ("reaction", "text"):
            return "" if isinstance(value, str) and value.strip() else f"{self.kind} is a text, got {value!r}"
        if self.kind == "ordinal":
            whole = isinstance(value, int) and not isinstance(value, bool)
            if self.scale is None or not self.scale[0] < self.scale[1]:
                return "an ordinal needs its scale (lowest, highest)"
            inside = whole and self.scale[0] <= value <= self.scale[1]
            return "" if inside else f"ordinal is a whole number within {self.scale[0]}..{self.scale[1]}, got {value!r}"
        if self.kind == "pairwise":
            if count != 2:
                return f"pairwise is about two items, got {count}"
            if value not in PAIRWISE:
                return f"pairwise is one of {', '.join(PAIRWISE)}, got {value!r}"
            return "" if value == "tie" or not self.tie_origin else "only a tie has a tie_origin"
        ranks = list(value) if isinstance(value, (list, tuple)) else []
        if count < 2 or len(ranks) != count or not all(isinstance(r, int) and not isinstance(r, bool) for r in ranks):
            return f"ranking is one whole rank an item, of two items or more, got {value!r} for {count}"
        return "" if min(ranks) == 1 and max(ranks) <= count else f"ranks run from 1, the best, to {count}, got {ranks}"
