"""The endpoint to which a product's own pages post thumbs, reactions, comments and exposures, with single-use tokens.

    POST /exposure  {"token": ..., "item"?: {...}}
    POST /feedback  {"token": ..., "thumb"?: true, "reactions"?: ["love"], "comment"?: "...", "latency_ms"?: 900,
                     "retract"?: ["thumb", "sad", "comment"], "item"?: {...}}

`item` is {"prompt", "response", "input"?, "media"?}, needed once where the store does not hold the item yet; it must
hash to the id that the token was minted for. `retract` takes back what the same user said of the item in the same
session: a tombstone each, as undo on the annotation page leaves. A token is good for one post to each of the two. That
it was used is seen in the store itself: the first event of a post has an id made of the token's name.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from align.errors import DataError
from align.feedback.events import FeedbackEvent, Item, content_id
from align.feedback.server.tokens import ProductToken, read_token
from align.feedback.store import Writer

LONGEST_COMMENT = 20_000
MOST_NAMES = 8


class ProductEndpoint:
    """The two routes, and the tokens that are being used this moment."""

    def __init__(self, writer: Writer, key: bytes) -> None:
        self._writer, self._key = writer, key
        self._busy: set[str] = set()

    async def feedback(self, request: Request) -> Response:
        """Store what a user said."""
        return await self._post(request, "feedback", _answers)

    async def exposure(self, request: Request) -> Response:
        """Store that an item was shown to a user, with the means to answer."""
        return await self._post(request, "exposure", _exposures)

    async def preflight(self) -> Response:
        """Answer a browser that asks before it posts; the guard adds the headers for listed origins."""
        return Response(status_code=204)

    async def _post(self, request: Request, use: str, make: Any) -> Response:
        now = time.time_ns() // 1_000_000
        try:
            said = _object(await request.body())
            token = read_token(self._key, _typed(said, "token", str, ""), now)
        except DataError as problem:
            return _refuse(401 if "token" in problem.what else 400, problem)
        name = content_id("token", token.nonce, use)
        if name in self._busy or self._writer.store.get(name) is not None:
            return _refuse(409, DataError("This token was used"))
        self._busy.add(name)
        try:
            items = [_item(said["item"], token)] if said.get("item") is not None else []
            if not items and not self._writer.store.items([token.item]):
                raise DataError("The item is not known yet", do="Post it as `item`")
            events = make(said, token, name, now)
            await asyncio.wrap_future(self._writer.submit(items, events, timeout=0))
        except DataError as problem:
            return _refuse(503 if "keep up" in problem.what else 400, problem)
        finally:
            self._busy.discard(name)
        return JSONResponse({"stored": len(events)})


def _answers(said: Mapping[str, Any], token: ProductToken, name: str, now: int) -> list[FeedbackEvent]:
    thumb, comment = _typed(said, "thumb", bool, None), _typed(said, "comment", str, "").strip()
    reactions, retract = _names(said, "reactions", "A reaction"), _names(said, "retract", "What is taken back")
    latency = _typed(said, "latency_ms", int, None)
    if latency is not None and not 0 <= latency < 10**10:
        raise DataError("latency_ms is a time in milliseconds")
    if len(comment) > LONGEST_COMMENT:
        raise DataError("This is too long", why=f"at most {LONGEST_COMMENT:,} characters")
    parts: dict[tuple[str, str], Any] = {} if thumb is None else {_part("thumb"): thumb}
    parts |= {("reaction", reaction): reaction for reaction in reactions}
    parts |= {_part("comment"): comment} if comment else {}
    taken_back = [_part(name) for name in retract]
    if both := [key for kind, key in taken_back if (kind, key) in parts]:
        raise DataError(f"{both[0]} is said and taken back at once")
    if not parts and not taken_back:
        raise DataError("Nothing was said", do="Give thumb, reactions, comment or retract")
    if refused := next((kind for kind, _ in (*parts, *taken_back) if kind not in token.allow), None):
        raise DataError(f"This may not be used for {refused}")
    told = [(kind, key, {"value": value, "latency_ms": latency}) for (kind, key), value in parts.items()]
    told += [(kind, key, {"tombstone": True}) for kind, key in taken_back]
    return [
        FeedbackEvent(kind, (token.item,), key=key, ts=now, id=name if i == 0 else "", **what, **_common(token))
        for i, (kind, key, what) in enumerate(told)
    ]


def _names(said: Mapping[str, Any], field: str, what: str) -> list[str]:
    names = _typed(said, field, list, [])
    if len(names) > MOST_NAMES:
        raise DataError("This is too long", why=f"at most {MOST_NAMES} names in {field}")
    if not all(isinstance(n, str) and n.isascii() and n.isidentifier() and n == n.lower() for n in names):
        raise DataError(f"{what} is a name in lower case")
    return list(dict.fromkeys(names))


def _part(name: str) -> tuple[str, str]:
    """Return the kind and the key of the answer that is posted under a name."""
    return {"thumb": "binary", "comment": "text"}.get(name, "reaction"), name


def _exposures(said: Mapping[str, Any], token: ProductToken, name: str, now: int) -> list[FeedbackEvent]:
    if "exposure" not in token.allow:
        raise DataError("This may not be used for exposure")
    return [FeedbackEvent("exposure", (token.item,), key="shown", ts=now, id=name, **_common(token))]


def _common(token: ProductToken) -> dict[str, Any]:
    return {
        "annotator": token.user, "source": "user", "exposure": "shown" if "exposure" in token.allow else "unknown",
        "policy": token.policy, "propensity": token.propensity, "position": token.position, "session": token.session,
    }  # fmt: skip


def _item(given: Any, token: ProductToken) -> Item:
    if not isinstance(given, dict) or not set(given) <= {"prompt", "response", "input", "media"}:
        raise DataError("An item is prompt, response, input and media")
    if not all(isinstance(given.get(name), (str, list)) and given[name] for name in ("prompt", "response")):
        raise DataError("An item needs a prompt and a response")
    made = Item(given["prompt"], given["response"], str(given.get("input") or ""), str(given.get("media") or "text"))
    if made.id != token.item:
        raise DataError("This is another item than the one it was minted for")
    return made


def _object(body: bytes) -> dict[str, Any]:
    try:
        said = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DataError("The body is not JSON", why=str(error)) from error
    if not isinstance(said, dict):
        raise DataError("The body is not an object")
    return said


def _typed(said: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = said.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise DataError(f"{name} is no {kind.__name__}")
    return value


def _refuse(status: int, problem: DataError) -> Response:
    return JSONResponse({"error": str(problem)}, status)
