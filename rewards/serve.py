"""A server of rewards: what `align rewards serve` runs. The protocol is that of `rewards.wire`.

One process. Each reward scores one request at a time, behind a lock, so what it says does not depend on who else
asks: the scores are those of the same reward on this machine, to the last bit. There is no authentication here: listen
on 127.0.0.1, or put a proxy in front.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from align.config import RewardConfig
from align.errors import ConfigError, DataError
from align.registry import suggest
from align.stops import ending
from rewards.base import Reward, get_reward, require_arguments, score_safely
from rewards.remote import RemoteReward
from rewards.roster import entry_of
from rewards.wire import Answer, pack_answers, read_scores, unpack_items

MOST_WAITING = 32
LIMIT_MB = 256.0
GRACE_S = 30
"""What is being scored when the server is asked to stop has this long to end."""


@dataclass(frozen=True)
class Served:
    """A reward, the entry that describes it to clients, and the lock behind which it scores."""

    reward: Reward
    entry: Mapping[str, Any]
    lock: threading.Lock = field(default_factory=threading.Lock)


def build_served(asked: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Served]:
    """Build rewards by name and arguments, each once.

    Raises:
        ConfigError: no reward, an unknown one, or an unknown argument.
    """
    require_asked(asked)
    served: dict[tuple[str, str], Served] = {}
    for name, args in asked:
        reward = get_reward(name, **args)
        served.setdefault((name, reward.identity()), Served(reward, entry_of(name, args, reward)))
    return list(served.values())


def require_asked(asked: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Refuse what cannot be served, and build nothing.

    Raises:
        ConfigError: no reward, an unknown one, or an unknown argument.
    """
    if not asked:
        raise ConfigError("There is nothing to serve", do="Name a reward: align rewards serve --reward jpeg")
    for name, args in asked:
        require_arguments(name, args)


def asked_of(rewards: Sequence[RewardConfig]) -> list[tuple[str, dict[str, Any]]]:
    """Return names and arguments of rewards as a configuration names them, which may be one of training.

    Of a reward that it takes from a server, this is the server: what concerns the client is left out.
    """
    client = {"placement", *inspect.signature(RemoteReward).parameters} - {"args"}
    asked = []
    for reward in rewards:
        remote = reward.args.get("placement") == "remote"
        args = {key: value for key, value in reward.args.items() if not (remote and key in client)}
        asked.append((reward.name, args))
    return asked


class _Refused(Exception):
    """A request that gets no scores."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


def build_app(
    served: Sequence[Served],
    *,
    limit_mb: float = LIMIT_MB,
    most_waiting: int = MOST_WAITING,
    log: Callable[[str], None] = lambda line: None,
) -> FastAPI:
    """Return the server as an ASGI application.

    Args:
        served: the rewards.
        limit_mb: largest request.
        most_waiting: requests at once; more are answered with 429 and asked to come back.
        log: gets one line a request.
    """
    app = FastAPI(title="align rewards", docs_url=None, redoc_url=None, openapi_url=None)
    at_work = 0

    async def health(request: Request) -> Response:
        return _json({"status": "ok", "rewards": [s.entry["reward"] for s in served]})

    async def roster(request: Request) -> Response:
        return _json({"rewards": [s.entry for s in served]})

    async def score(request: Request) -> Response:
        nonlocal at_work
        at_work += 1
        try:
            if at_work > most_waiting:
                raise _Refused(429, f"{most_waiting} requests are waiting already", {"retry-after": "1"})
            body = await _read(request, int(limit_mb * 1e6))
            answer, line = await run_in_threadpool(answer_request, served, body)
        except _Refused as refused:
            log(f"{request.method} {request.url.path}: {refused.status}, {refused.detail}")
            return _json({"detail": refused.detail}, refused.status, refused.headers)
        finally:
            at_work -= 1
        log(line)
        return Response(answer, media_type="application/json")

    async def fail(request: Request, error: Exception) -> Response:
        """A defect of a reward: said to the client, and raised again by the framework for the server's own log."""
        detail = f"{type(error).__name__}: {error}"
        log(f"{request.method} {request.url.path}: 500, {detail}")
        return _json({"detail": detail}, 500, {"connection": "close"})  # which is what the framework does next

    app.add_route("/health", health, methods=["GET"])
    app.add_route("/rewards", roster, methods=["GET"])
    app.add_route("/score", score, methods=["POST"])
    app.add_exception_handler(Exception, fail)
    return app


def _json(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(document), status, headers, media_type="application/json")


async def _read(request: Request, limit: int) -> bytes:
    """Return the body of a request, refused as soon as it is known to be too large."""
    declared = request.headers.get("content-length", "0")
    body, size = bytearray(), int(declared) if declared.isdecimal() else 0
    try:
        if size <= limit:
            async for chunk in request.stream():
                body += chunk
                if (size := len(body)) > limit:
                    break
    except ClientDisconnect as gone:
        raise _Refused(400, "the client went away") from gone
    if size > limit:
        raise _Refused(413, f"the request is larger than {limit / 1e6:g} MB; send fewer samples at once")
    return bytes(body)


def answer_request(served: Sequence[Served], body: bytes) -> tuple[bytes, str]:
    """Score what a request asks for: the JSON of the answer, and a line for the log.

    An item that cannot be read is missing, and spoils no other.
    """
    began = time.perf_counter()
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _Refused(422, f"the request is not JSON: {error}"[:200]) from error
    if not isinstance(document, dict) or not isinstance(document.get("items"), list) or not document["items"]:
        raise _Refused(422, "a request is an object with reward, and items as a list that is not empty")
    one, items = _find(served, document), document["items"]
    ids = [item.get("id", place) if isinstance(item, dict) else place for place, item in enumerate(items)]
    try:
        samples, places, wrong = unpack_items(items)
    except DataError as error:
        raise _Refused(422, str(error).rstrip(".")) from error
    names, name = one.reward.names, one.entry["reward"]
    answers = {i: Answer((float("nan"),) * len(names), message) for i, message in enumerate(wrong)}
    if samples is not None:
        with one.lock:
            scores = score_safely(one.reward, samples)
        answers |= dict(zip(places, read_scores(scores), strict=True))
    ms = (time.perf_counter() - began) * 1000
    lost = sum(not all(answer.valid) for answer in answers.values())
    about = {"names": list(names), "ids": ids, "identity": one.entry["identity"], "ms": round(ms, 3)}
    text = json.dumps({**about, **pack_answers(list(answers.values()))}, allow_nan=False)
    return text.encode(), f"{name}: {len(items)} samples, {lost} missing, {ms:.0f} ms"


def _find(served: Sequence[Served], document: Mapping[str, Any]) -> Served:
    name, identity = document.get("reward"), document.get("identity")
    named = [s for s in served if s.entry["reward"] == name]
    if not named:
        raise _Refused(404, f"no reward {name!r} here. {suggest(str(name), [s.entry['reward'] for s in served])}")
    same = [s for s in named if identity in (None, s.entry["identity"])]
    if not same:
        found = ", ".join(s.entry["identity"] for s in named)
        raise _Refused(409, f"the identity of {name!r} is {found} here, not {identity}")
    if len(same) > 1:
        raise _Refused(422, f"there are {len(same)} rewards {name!r} here: give the identity of one")
    return same[0]


# --- running ----------------------------------------------------------------------------------------


def serve(
    asked: Sequence[tuple[str, Mapping[str, Any]]],
    host: str = "127.0.0.1",
    port: int = 8765,
    *,
    limit_mb: float = LIMIT_MB,
    ready: Callable[[dict[str, Any]], None] = lambda where: None,
    log: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve rewards until SIGTERM, SIGINT or SIGUSR1; requests under way are answered first.

    Args:
        asked: names and arguments of the rewards.
        port: 0 takes one that is free.
        ready: called with the URL and the roster once requests are taken.

    Raises:
        ConfigError: an address that cannot be used, or rewards that cannot be built.
    """
    with contextlib.closing(_bind(host, port)) as listener:
        served = build_served(asked)
        listener.listen(128)
        ready({"url": _url(listener), "rewards": [s.entry["reward"] for s in served]})
        server = _server(build_app(served, limit_mb=limit_mb, log=log))
        with ending(server):
            server.run(sockets=[listener])


@contextlib.contextmanager
def serving(
    asked: Sequence[tuple[str, Mapping[str, Any]]], host: str = "127.0.0.1", port: int = 0, **app: Any
) -> Iterator[str]:
    """Serve rewards from a thread of this process, and yield the URL; for notebooks and tests.

    Args:
        asked: names and arguments of the rewards.
        app: options of `build_app`.
    """
    served = build_served(asked)
    with contextlib.closing(_bind(host, port)) as listener:
        listener.listen(128)
        server = _server(build_app(served, **app))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield _url(listener)
        finally:
            server.should_exit = True
            thread.join()


def _server(app: FastAPI) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            app, http="h11", ws="none", lifespan="off", log_level="warning", access_log=False,
            timeout_graceful_shutdown=GRACE_S,
        )
    )  # fmt: skip


def _bind(host: str, port: int) -> socket.socket:
    """Return a socket that has the address and does not take connections yet."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(
            "The address of the server cannot be used", where=f"{host}, port {port}",
            why=getattr(error, "strerror", None) or str(error), do="Give another --port, or 0 for one that is free",
        ) from error  # fmt: skip
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
