"""Starts the page: checks what it was told, binds the port, says when it is ready, stops without losing an answer."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import ConfigError
from align.feedback.server.guard import Limits
from align.feedback.tasks import Task, describe_task, load_task, read_tokens
from align.stops import ending

_ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?")
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")


@dataclass(frozen=True)
class ServePlan:
    """Everything that serving needs, checked.

    Args:
        task: what is asked.
        store: the file that answers go to; a secret stands beside it in `store` + ".key".
        host, port: where to listen.
        tokens: annotator names by token, None on loopback without tokens.
        names: host names of this server.
        origins: origins of product pages.
        limits: sizes and rates.
    """

    task: Task
    store: Path
    host: str
    port: int
    tokens: dict[str, str] | None
    names: frozenset[str]
    origins: frozenset[str]
    limits: Limits = Limits()

    @property
    def key_file(self) -> Path:
        """Where the secret is."""
        return self.store.with_name(self.store.name + ".key")

    def describe(self) -> dict[str, Any]:
        """Return what would be served, as plain values."""
        return {
            **describe_task(self.task),
            "store": str(self.store),
            "address": f"{self.host}:{self.port}",
            "annotators": "anyone on this machine" if self.tokens is None else f"{len(self.tokens)} with tokens",
            "product_origins": sorted(self.origins),
        }


def plan(
    task: str | Path,
    store: str | Path = "feedback.db",
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    annotator_tokens: str | Path | None = None,
    public_names: Sequence[str] = (),
    product_origins: Sequence[str] = (),
) -> ServePlan:
    """Read and check everything; see `ServePlan`.

    Raises:
        ConfigError: a task, token file, host name or origin that is wrong, or a host other than loopback without
            annotator tokens.
        DataError: the task's data cannot be read.
    """
    if not 0 <= port <= 65_535:
        raise ConfigError("A port is a number up to 65535", where="--port", why=f"got {port}")
    if annotator_tokens is None and not _loopback(host):
        raise ConfigError(
            "A page that others can reach needs annotator tokens", where=f"--host {host}",
            why="without them anyone who finds the port could read the task and answer",
            do="Add --annotator-tokens FILE, or listen on 127.0.0.1",
        )  # fmt: skip
    names = [name.lower() for name in public_names]
    if wrong := next((name for name in names if not _NAME.fullmatch(name)), None):
        raise ConfigError(
            "A public name is a host name alone",
            where="--public-name",
            why=f"got {wrong!r}",
            do="Write e.g. feedback.example",
        )
    origins = [origin.lower().rstrip("/") for origin in product_origins]
    if wrong := next((origin for origin in origins if not _ORIGIN.fullmatch(origin)), None):
        raise ConfigError(
            "An origin is a scheme and a host",
            where="--product-origin",
            why=f"got {wrong!r}",
            do="Write e.g. https://app.example",
        )
    tokens = None if annotator_tokens is None else read_tokens(annotator_tokens)
    loaded = load_task(task)
    if not _is_address(host) and host != "localhost":
        names.append(host.lower())
    return ServePlan(loaded, Path(store), host, port, tokens, frozenset(names), frozenset(origins))


def serve(
    planned: ServePlan,
    ready: Callable[[dict[str, Any]], object] = lambda found: None,
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Serve until SIGINT, SIGTERM, SIGUSR1 or `stop`; `ready` is told the address once requests are answered.

    Returns what was done: units complete, answers of each annotator, gold answers given and right.

    Raises:
        ConfigError: the server packages are missing, or the port cannot be had.
        DataError: the store cannot be opened.
    """
    try:
        import uvicorn

        from align.feedback.server.app import create_app
    except ImportError as error:
        raise ConfigError(
            "Serving needs FastAPI and uvicorn", why=str(error), do="Run `pip install 'align[server]'`"
        ) from error
    from align.feedback.server.tokens import load_secret
    from align.feedback.store import Writer

    listening = _listen(planned.host, planned.port)
    port = listening.getsockname()[1]
    with contextlib.closing(listening), Writer(planned.store) as writer:
        secret = load_secret(planned.key_file)
        app = create_app(
            planned.task,
            writer,
            secret,
            tokens=planned.tokens,
            names=planned.names,
            origins=planned.origins,
            limits=planned.limits,
        )

        @contextlib.asynccontextmanager
        async def lifespan(_: object) -> AsyncIterator[None]:
            shown = f"[{planned.host}]" if ":" in planned.host else planned.host
            address = {"address": f"{planned.host}:{port}", "url": f"http://{shown}:{port}/", "pid": os.getpid()}
            ready({**planned.describe(), **address})
            yield

        app.router.lifespan_context = lifespan
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, proxy_headers=False, lifespan="on",
            timeout_keep_alive=30, timeout_graceful_shutdown=5, h11_max_incomplete_event_size=32_768, backlog=512,
        )  # fmt: skip
        server = uvicorn.Server(config)
        if stop is not None:
            threading.Thread(target=_end_after, args=(stop, server), daemon=True).start()
        with ending(server):
            server.run(sockets=[listening])
        return dict(app.state.page.summary())


def _end_after(stop: threading.Event, server: Any) -> None:
    stop.wait()
    server.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sends small answers at once (TCP_NODELAY) instead of after 40 ms.
    opened = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, port))
        opened.listen(512)
    except OSError as error:
        opened.close()
        raise ConfigError(
            "The address cannot be listened on", where=f"{host}:{port}", why=error.strerror or str(error),
            do="Choose another --port; 0 takes a free one",
        ) from error  # fmt: skip
    return opened


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
