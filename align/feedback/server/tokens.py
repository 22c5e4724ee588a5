"""Secrets, pseudonyms, and signed values that a browser may hold: sessions, tickets of screens, tokens of products.

One secret of 32 random bytes stands in a file beside the store; every use derives its own key from it:
`key = HMAC-SHA256(secret, purpose)`. A signed value is `base64url(json) "." base64url(HMAC-SHA256(key, json))`:
anyone can read it, nobody without the key can make or change one.

A product's back end needs this module alone, and no web framework:

    secret = load_secret("feedback.db.key")
    token = mint_token(secret, Item(prompt, response), user="u-1017", policy="v7")
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import ConfigError, DataError
from align.feedback.events import Item

ALLOWED = ("exposure", "binary", "reaction", "text")


def load_secret(path: str | Path) -> bytes:
    """Return the secret in the file at `path`, drawn and written (readable by its owner alone) where there is none.

    Raises:
        ConfigError: the file cannot be read or written, or holds something else.
    """
    path = Path(path)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError("A secret cannot be written", where=str(path), why=error.strerror or "") from error
    else:
        with os.fdopen(descriptor, "w", encoding="ascii") as opened:
            opened.write(secrets.token_hex(32) + "\n")
            opened.flush()
            os.fsync(opened.fileno())
    try:
        found = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except (OSError, ValueError) as error:
        raise ConfigError("A secret cannot be read", where=str(path), why=str(error)) from error
    if len(found) != 32:
        raise ConfigError(
            "A secret is 64 hex digits",
            where=str(path),
            why=f"it holds {len(found)} bytes",
            do="Remove the file to draw a new one; tokens made with the old one end",
        )
    return found


def derive(secret: bytes, purpose: str) -> bytes:
    """Return the key of one purpose: HMAC-SHA256(secret, purpose)."""
    return hmac.new(secret, purpose.encode(), hashlib.sha256).digest()


def pseudonym(secret: bytes, name: str, group: str = "annotator") -> str:
    """Return the id under which a person is stored: 16 hex digits of a keyed hash of the name as it stands.

    Args:
        secret: see `load_secret`; without it nobody can tell whose pseudonym it is.
        name: of an annotator, or any id of a user.
        group: "annotator" or "user"; the same name is another person in the other group.
    """
    key = derive(secret, f"pseudonym of {group}")
    return f"{group[0]}-" + hmac.new(key, name.encode(errors="surrogatepass"), hashlib.sha256).hexdigest()[:16]


def sign(key: bytes, payload: Mapping[str, Any]) -> str:
    """Return `payload` as a signed text."""
    body = json.dumps(payload, separators=(",", ":"), sort_keys=True).encode()
    return f"{_encode(body)}.{_encode(hmac.new(key, body, hashlib.sha256).digest())}"


def unsign(key: bytes, text: str) -> dict[str, Any] | None:
    """Return the payload of a signed text, or None when it was not signed with `key` or was changed."""
    body, dot, mark = text.partition(".")
    if not dot or not text.isascii() or len(text) > 4096:
        return None
    try:
        raw, given = _decode(body), _decode(mark)
    except ValueError:
        return None
    # Compared as texts too: base64 has several spellings of some bytes, and a token must have one.
    whole = hmac.compare_digest(hmac.new(key, raw, hashlib.sha256).digest(), given)
    if not whole or body != _encode(raw) or mark != _encode(given):
        return None
    payload = json.loads(raw)
    return payload if isinstance(payload, dict) else None


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def _decode(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


@dataclass(frozen=True)
class ProductToken:
    """What a token allows: one exposure and one answer, about one item, by one user, until it expires.

    Args:
        nonce: names the token.
        item: id of the item.
        user: pseudonym of the user.
        allow: kinds of events that may be posted.
        session, policy, propensity, position: stored with the events.
        expires_ms: end of its life, milliseconds since 1970.
    """

    nonce: str
    item: str
    user: str
    allow: tuple[str, ...]
    session: str
    policy: str
    propensity: float | None
    position: int | None
    expires_ms: int


def mint_token(
    secret: bytes,
    item: Item | str,
    *,
    user: str,
    allow: tuple[str, ...] = ALLOWED,
    session: str = "",
    policy: str = "",
    propensity: float | None = None,
    position: int | None = None,
    expires_s: float = 86_400,
) -> str:
    """Return a single-use token for a product's page: it lets one user say one thing about one item.

    Args:
        secret: see `load_secret`.
        item: what was shown, or its id.
        user: any id of the user; only its pseudonym leaves this function.
        allow: which of exposure, binary, reaction and text the page may post.
        session, policy, propensity, position: as in `FeedbackEvent`.
        expires_s: for how many seconds the token is good.

    Raises:
        ConfigError: an unknown kind, a propensity that is no probability, or a life that is not positive.
    """
    if not allow or not set(allow) <= set(ALLOWED):
        raise ConfigError("A token allows kinds of events", why=f"got {allow!r}", do=f"Choose of {', '.join(ALLOWED)}")
    if propensity is not None and not 0 < propensity <= 1:
        raise ConfigError("A propensity is a probability above 0", why=f"got {propensity!r}")
    if not expires_s > 0:
        raise ConfigError("A token lives for a positive time", why=f"got {expires_s!r} seconds")
    payload = {
        "n": secrets.token_hex(12), "i": item if isinstance(item, str) else item.id,
        "u": pseudonym(secret, user, "user"), "a": list(allow), "s": session, "p": policy, "q": propensity,
        "o": position, "e": int((time.time() + expires_s) * 1000),
    }  # fmt: skip
    return sign(derive(secret, "product"), payload)


def read_token(key: bytes, text: str, now_ms: int) -> ProductToken:
    """Return what a token allows; `key` is `derive(secret, "product")`.

    Raises:
        DataError: it was not minted with this secret, was changed, or has expired.
    """
    payload = unsign(key, text)
    if payload is None:
        raise DataError("This token is not valid", why="it was not minted for this store, or it was changed")
    token = ProductToken(
        payload["n"], payload["i"], payload["u"], tuple(payload["a"]), payload["s"], payload["p"], payload["q"],
        payload["o"], payload["e"],
    )  # fmt: skip
    if now_ms > token.expires_ms:
        raise DataError("This token has expired", do="Ask for a new one")
    return token
