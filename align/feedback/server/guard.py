"""What every request passes before the application sees it: host, origin, size, rate; and the headers of every answer.

| attack                         | what stops it                                                                      |
|--------------------------------|------------------------------------------------------------------------------------|
| DNS rebinding                  | `Host` must be loopback, a bare IP address, or a name that was given               |
| cross-site requests            | a POST needs an `Origin` equal to its own host; cookies are SameSite=Strict        |
| script in a prompt or response | everything is escaped, and the CSP runs scripts of this server's files alone       |
| framing, sniffing              | frame-ancestors 'none', nosniff                                                    |
| floods                         | a body is read up to a limit, and each annotator or address has a token bucket     |
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", CSP.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    # "no-referrer" would make browsers send `Origin: null` with forms, which is refused below.
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
)
PRODUCT_PATHS = ("/feedback", "/exposure")


@dataclass(frozen=True)
class Limits:
    """How much one client may ask for.

    Args:
        body: bytes of one request.
        rate, burst: requests a second that one annotator may keep up, and at once before that counts.
        address_rate, address_burst: the same for all requests of an address that come from no annotator; many people
            may share an address.
        entries_a_minute: attempts of one address to enter.
    """

    body: int = 256 * 1024
    rate: float = 20.0
    burst: int = 60
    address_rate: float = 50.0
    address_burst: int = 300
    entries_a_minute: int = 120


class Buckets:
    """Token buckets by client: `burst` requests at once, refilled at `rate` a second."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._levels: dict[str, tuple[float, float]] = {}

    def take(self, client: str) -> bool:
        """Take one request's token; False when there is none."""
        now = self._clock()
        level, at = self._levels.get(client, (float(self._burst), now))
        level = min(float(self._burst), level + (now - at) * self._rate)
        if len(self._levels) > 20_000:
            # A bucket that is full again is as good as none.
            refill = self._burst / self._rate
            self._levels = {name: entry for name, entry in self._levels.items() if now - entry[1] < refill}
        self._levels[client] = (level - 1 if level >= 1 else level, now)
        return level >= 1


def host_allowed(host: str, names: frozenset[str]) -> bool:
    """Whether a `Host` header is this server: a loopback name, an IP address, or one of `names`, with any port.

    A page of another site can make its own name resolve to this machine, but the browser still sends that name; an
    address cannot be made to resolve to another one.
    """
    name = host.strip().lower()
    if name.startswith("["):
        name, bracket, port = name[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            return False
        port = port.removeprefix(":")
    else:
        name, _, port = name.partition(":")
    if port and not (port.isascii() and port.isdecimal()):
        return False
    if name == "localhost" or name in names:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def origin_allowed(headers: dict[bytes, bytes], host: str) -> bool:
    """Whether a request that changes something comes from a page of this very server."""
    origin = headers.get(b"origin")
    if origin is not None:
        return origin.decode("latin-1").lower() in (f"http://{host.lower()}", f"https://{host.lower()}")
    return headers.get(b"sec-fetch-site", b"") == b"same-origin"


class Guard:
    """An ASGI middleware that refuses by the table above.

    Args:
        app: what it protects.
        names: host names that are this server, beside loopback and addresses.
        origins: origins of product pages, which may post to the product endpoint.
        limits: sizes and rates.
        who: the annotator of a request's cookie header, "" for none.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        *,
        names: frozenset[str],
        origins: frozenset[str],
        limits: Limits,
        who: Callable[[bytes], str],
    ) -> None:
        self._app, self._names, self._origins, self._limits, self._who = app, names, origins, limits, who
        self._annotators = Buckets(limits.rate, limits.burst)
        self._addresses = Buckets(limits.address_rate, limits.address_burst)
        self._entries = Buckets(limits.entries_a_minute / 60, limits.entries_a_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        product = scope["path"] in PRODUCT_PATHS
        cross = self._cross_origin(headers) if product else ()

        async def answer(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                extra = [*HEADERS, *cross]
                if b"cache-control" not in given:
                    extra.append((b"cache-control", b"no-store"))
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        status, text = self._refusal(scope, headers, product, bool(cross))
        if status:
            await _say(answer, status, text)
            return
        body = await self._body(receive) if scope["method"] not in ("GET", "HEAD", "OPTIONS") else b""
        if body is None:
            await _say(answer, 413, f"A request may have {self._limits.body:,} bytes.")
            return
        sent = False

        async def replay() -> MutableMapping[str, Any]:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, answer)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes], product: bool, cross: bool) -> tuple[int, str]:
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        host = hosts[0].decode("latin-1") if len(hosts) == 1 else ""
        if not host_allowed(host, self._names):
            return 421, "This server does not go by that name."
        client = (scope.get("client") or ("", 0))[0]
        annotator = self._who(headers.get(b"cookie", b""))
        if not (self._annotators.take(annotator) if annotator else self._addresses.take(client)):
            return 429, "Too many requests; wait a moment."
        if scope["method"] in ("GET", "HEAD"):
            return 0, ""
        # A server that posts to the product endpoint sends no Origin; a page sends one, which must be listed.
        if product and (cross or b"origin" not in headers):
            return 0, ""
        if not origin_allowed(headers, host):
            return 403, "This request comes from another site."
        if scope["path"] == "/enter" and not self._entries.take(client):
            return 429, "Too many attempts; wait a minute."
        return 0, ""

    def _cross_origin(self, headers: dict[bytes, bytes]) -> tuple[tuple[bytes, bytes], ...]:
        origin = headers.get(b"origin", b"")
        if origin.decode("latin-1").lower() not in self._origins:
            return ()
        return (
            (b"access-control-allow-origin", origin),
            (b"vary", b"Origin"),
            (b"access-control-allow-methods", b"POST"),
            (b"access-control-allow-headers", b"content-type"),
            (b"access-control-max-age", b"600"),
        )

    async def _body(self, receive: Receive) -> bytes | None:
        """Return the body, or None as soon as it exceeds the limit, or when the client left in the middle of it."""
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > self._limits.body:
                return None
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)


async def _say(send: Send, status: int, text: str) -> None:
    raw = text.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(raw)).encode())]
    if status == 413:
        headers.append((b"connection", b"close"))
    if status == 429:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": raw})
