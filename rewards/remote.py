"""A reward on another machine: the client of a reward server.

    from rewards import get_reward
    reward = get_reward("hpsv2.1", placement="remote", url="http://gpu-box:8765")

The client never invents a score. Whatever goes wrong on the way (no server, a slow one, a broken answer) leaves the
samples it concerns missing, with a message that names the server and the reason. One thing is refused altogether: a
server that scores with another reward than the one this client was built against, which would train on it silently.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import json
import math
import random
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from align.errors import ConfigError, DataError, RewardError
from align.registry import suggest
from align.types import Samples, Scores
from rewards.base import Reward
from rewards.roster import another_identity, card_of, choose, is_entry
from rewards.wire import ENCODINGS, Answer, gather_answers, pack_item, unpack_scores

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

CONNECT_S = 10.0  # a machine that takes longer to accept a connection is taken for absent
MOST_BACKOFF_S = 30.0


class RemoteReward:
    """A reward that a server computes: `names`, `card` and `identity()` are those of the server's reward.

    Requests of up to `batch_size` samples, `max_inflight` at once. A request is repeated only when no connection came
    about or it was lost, or on status 429 and 5xx, after a wait drawn from [0, min(backoff_s 2^attempt, 30)) on top of
    what the server asks for in Retry-After. A request that was not answered in time is not repeated: the server may be
    at work on it.

    Args:
        reward: name of the reward, as the server lists it.
        url: of the server, such as "http://127.0.0.1:8765".
        args: arguments the server must have built the reward with; others than these are not compared.
        timeout_s: for one request, from the connection to the last byte of the answer.
        deadline_s: for one call of `score`; what has no answer by then is missing.
        retries: how often a request is repeated.
        max_inflight: requests at once.
        batch_size: samples of one request.
        identity: hash the server's reward must have; None takes what the server has now.
        encoding: of pixels: "png" rounds them to 8 bits, "float32" sends them as they are, at several times the size.
        startup_s: how long to wait for a server that does not answer yet.
        backoff_s: first wait before a request is repeated.

    Raises:
        ConfigError: a URL that is none, an unknown reward or argument, or an argument the server has another value of.
        RewardError: no server answers, or its reward has another identity.
    """

    def __init__(
        self,
        reward: str,
        url: str,
        args: Mapping[str, Any] | None = None,
        timeout_s: float = 60.0,
        deadline_s: float = 300.0,
        retries: int = 3,
        max_inflight: int = 8,
        batch_size: int = 16,
        identity: str | None = None,
        encoding: str = "png",
        startup_s: float = 30.0,
        backoff_s: float = 0.5,
    ) -> None:
        if importlib.util.find_spec("httpx") is None:
            raise ConfigError("A remote reward needs httpx", do="pip install 'align[rewards]'")
        if encoding not in ENCODINGS:
            raise ConfigError(f"Unknown encoding {encoding!r} of a remote reward", do=suggest(str(encoding), ENCODINGS))
        numbers = {
            "timeout_s": timeout_s,
            "deadline_s": deadline_s,
            "max_inflight": max_inflight,
            "batch_size": batch_size,
        }
        for name, value in numbers.items():
            if not value > 0:
                raise ConfigError(f"{name} of a remote reward is above 0", where=f"{name} {value}")
        if retries < 0:
            raise ConfigError("retries of a remote reward is 0 or more", where=f"retries {retries}")
        self.url, self.shown_url = _checked_url(url)
        self.reward, self.encoding, self.batch_size = reward, encoding, int(batch_size)
        self.timeout_s, self.deadline_s, self.max_inflight = timeout_s, deadline_s, int(max_inflight)
        self.retries, self.backoff_s = retries, backoff_s
        self.unreachable = ""
        """Why the server could not be reached, since `healthy` last found it well; empty when it could."""
        entry = choose(_run(self._first_roster(startup_s)), reward, dict(args or {}), identity, self.shown_url)
        self._identity, self.names, self.card = entry["identity"], tuple(entry["names"]), card_of(entry)

    def identity(self) -> str:
        """Return the identity of the server's reward: that of the same reward on this machine."""
        return self._identity

    def score(self, samples: Samples) -> Scores:
        """Return `[B, K]` scores in the order of `samples`; what the server did not score is missing, with the reason.

        Raises:
            RewardError: the server scores with another reward by now.
        """
        return gather_answers(_run(self._score(samples)), self.names, len(samples))

    def healthy(self) -> bool:
        """Return whether the server answers; clears `unreachable` when it does.

        Raises:
            RewardError: it answers, and has another reward.
        """
        try:
            entries = _run(self._roster(min(self.timeout_s, CONNECT_S)))
        except _Unanswered as failure:
            self.unreachable = failure.reason
            return False
        try:
            choose(entries, self.reward, {}, self._identity, self.shown_url)
        except ConfigError as error:
            raise RewardError(
                "A reward server has come back with other rewards", where=self.shown_url, why=str(error).rstrip(".")
            ) from error
        self.unreachable = ""
        return True

    # --- requests -----------------------------------------------------------------------------------

    async def _score(self, samples: Samples) -> dict[int, Answer]:
        """Ask for all samples, in batches, within the deadline."""
        end, gate = time.monotonic() + self.deadline_s, asyncio.Semaphore(self.max_inflight)
        batches = [range(i, min(i + self.batch_size, len(samples))) for i in range(0, len(samples), self.batch_size)]
        async with self._client() as client:
            parts = await asyncio.gather(*(self._batch(client, gate, samples, rows, end) for rows in batches))
        return {i: answer for part in parts for i, answer in part.items()}

    async def _batch(
        self, client: httpx.AsyncClient, gate: asyncio.Semaphore, samples: Samples, rows: range, end: float
    ) -> dict[int, Answer]:
        """Ask for some samples: one answer a row, a missing one where something failed."""
        answers: dict[int, Answer] = {}
        try:
            async with asyncio.timeout(end - time.monotonic()), gate:
                items, answers = await asyncio.to_thread(self._pack, samples, rows)
                if items:
                    head = json.dumps({"reward": self.reward, "identity": self._identity})
                    body = head[:-1].encode() + b',"items":[' + b",".join(items.values()) + b"]}"
                    answers |= self._read(await self._ask(client, "/score", body, end=end), list(items))
        except TimeoutError:
            reason = self.unreachable = f"no answer within the {self.deadline_s:g} s of the whole call"
        except _Unanswered as failure:
            reason = failure.reason
            if failure.down:
                self.unreachable = reason
        except DataError as error:
            reason = str(error)
        else:
            return answers
        return {i: answers.get(i) or self._missing(reason) for i in rows}

    def _pack(self, samples: Samples, rows: range) -> tuple[dict[int, bytes], dict[int, Answer]]:
        """Return the items that can be sent, and an answer for each that cannot."""
        items, answers = {}, {}
        for i in rows:
            try:
                items[i] = pack_item(samples, i, self.encoding)
            except DataError as error:
                answers[i] = self._missing(str(error), sent=False)
        return items, answers

    def _missing(self, reason: str, *, sent: bool = True) -> Answer:
        place = f"{self.card.name} at {self.shown_url}" if sent else self.card.name
        return Answer((math.nan,) * len(self.names), f"{place}: {reason}")

    def _read(self, body: bytes, ids: list[int]) -> dict[int, Answer]:
        document = _parse(body)
        found = document.get("identity") if isinstance(document, dict) else None
        if isinstance(found, str) and found != self._identity:
            raise another_identity(self.shown_url, self.reward, self._identity, found)
        if found is None:
            raise DataError("The answer does not say which reward it is from")
        answers = unpack_scores(document, self.names, ids)
        place = f"{self.card.name} at {self.shown_url}: "
        return {i: dataclasses.replace(a, error=a.error and place + a.error) for i, a in answers.items()}

    async def _first_roster(self, startup_s: float) -> list[dict[str, Any]]:
        """Return what the server offers, waiting for one that is still starting."""
        end = time.monotonic() + startup_s
        attempt = 0
        while True:
            try:
                return await self._roster(max(0.1, min(self.timeout_s, CONNECT_S, end - time.monotonic())))
            except _Unanswered as failure:
                left = end - time.monotonic()
                if not failure.down or left <= 0:
                    raise RewardError(
                        "A reward server does not answer", where=self.shown_url, why=failure.reason,
                        do=f"Start it with `align rewards serve --reward {self.reward}`, or check the URL",
                    ) from failure  # fmt: skip
            await asyncio.sleep(min(self._backoff(attempt), left))
            attempt += 1

    async def _roster(self, timeout_s: float) -> list[dict[str, Any]]:
        async with self._client() as client:
            body = await self._ask(client, "/rewards", None, end=time.monotonic() + timeout_s, retries=0)
        try:
            document = _parse(body)
        except DataError as error:
            raise _Unanswered(str(error).rstrip("."), down=False) from error
        entries = document.get("rewards") if isinstance(document, dict) else None
        if not isinstance(entries, list) or not all(isinstance(e, dict) and is_entry(e) for e in entries):
            raise _Unanswered("its list of rewards cannot be read; it is no reward server", down=False)
        return entries

    async def _ask(
        self, client: httpx.AsyncClient, path: str, body: bytes | None, *, end: float, retries: int | None = None
    ) -> bytes:
        """Return the body of the server's answer to a request, repeated where that makes sense.

        Raises:
            _Unanswered: there is none.
            RewardError: the server says that it has another reward.
        """
        attempt, retries = 0, self.retries if retries is None else retries
        while True:
            try:
                return await self._once(client, path, body, min(self.timeout_s, end - time.monotonic()))
            except _Unanswered as failure:
                wait = self._backoff(attempt) + (failure.again or 0.0)
                attempt += 1
                if failure.again is None or attempt > retries or time.monotonic() + wait > end:
                    tries = f", {attempt} attempts" if attempt > 1 else ""
                    raise _Unanswered(failure.reason + tries, down=failure.down) from failure
            await asyncio.sleep(wait)

    async def _once(self, client: httpx.AsyncClient, path: str, body: bytes | None, limit: float) -> bytes:
        import httpx

        try:
            async with asyncio.timeout(limit):
                response = await client.request("GET" if body is None else "POST", path, content=body)
        except TimeoutError as error:
            raise _Unanswered(f"no answer within {limit:.3g} s", down=True) from error
        except httpx.TransportError as error:
            raise _Unanswered(str(error).strip() or type(error).__name__, down=True, again=0.0) from error
        except httpx.HTTPError as error:  # an answer that cannot be decoded
            raise _Unanswered(str(error), down=False) from error
        code = response.status_code
        if code == 200:
            return response.content
        reason = f"status {code}{_detail(response)}"
        if code == 409:
            raise RewardError("A reward server has another reward by now", where=self.shown_url, why=reason)
        if code == 429 or code >= 500:
            raise _Unanswered(reason, down=True, again=_retry_after(response.headers.get("retry-after")))
        raise _Unanswered(reason, down=code == 404)  # 404 is also what some proxies say of a server that is gone

    def _backoff(self, attempt: int) -> float:
        """A wait with full jitter: clients that failed together do not come back together."""
        return random.uniform(0, min(MOST_BACKOFF_S, self.backoff_s * 2**attempt))

    @cached_property
    def _tls(self) -> Any:
        import httpx

        return httpx.create_ssl_context()

    def _client(self) -> httpx.AsyncClient:
        """One a call: no socket outlives it, so a reward may be forked, copied and used from several threads."""
        import httpx

        return httpx.AsyncClient(
            base_url=self.url,
            verify=self._tls,
            headers={"content-type": "application/json"},
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=self.max_inflight),
        )


def remote_rewards(rewards: Sequence[Reward]) -> list[RemoteReward]:
    """Return those of `rewards` that a server computes, also where another reward stands around one (as `inner`)."""
    found = []
    for reward in rewards:
        inner: Any = reward
        while inner is not None and not isinstance(inner, RemoteReward):
            inner = getattr(inner, "inner", None)
        if inner is not None:
            found.append(inner)
    return found


def wait_until_healthy(
    rewards: Sequence[Reward],
    stop: Callable[[], bool],
    log: Callable[[str], None],
    poll_s: float = 1.0,
    most_s: float = 60.0,
) -> bool:
    """Wait until the servers of all remote rewards answer. Returns whether to go on: False when `stop()` says not to.

    Servers are asked at once, then after poll_s, 2 poll_s, 4 poll_s, ... but every `most_s` at least. `stop` is
    asked every second.

    Raises:
        RewardError: a server has come back with another reward.
    """
    began, wait, waited = time.monotonic(), poll_s, False
    while down := [reward for reward in remote_rewards(rewards) if not reward.healthy()]:
        log(
            f"waiting for {', '.join(f'{r.card.name} at {r.shown_url} ({r.unreachable})' for r in down)}, "
            f"asking again in {min(wait, most_s):g} s"
        )
        waited, until = True, time.monotonic() + min(wait, most_s)
        while (left := until - time.monotonic()) > 0:
            if stop():
                return False
            time.sleep(min(1.0, left))
        wait *= 2
    if waited:
        log(f"all reward servers answer, after {time.monotonic() - began:.0f} s")
    return not stop()


# --- answers ----------------------------------------------------------------------------------------


class _Unanswered(Exception):
    """A request that has no usable answer.

    Args:
        down: whether it is for want of a server, rather than something about this request.
        again: how many seconds the server wants to be left alone before it is asked again; None: do not ask again.
    """

    def __init__(self, reason: str, *, down: bool, again: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.down, self.again = reason, down, again


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, in a thread of its own where an event loop runs already (a notebook's)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def _checked_url(url: str) -> tuple[str, str]:
    """Return the server's base URL, and how messages call it: without password."""
    parts = urlsplit(str(url))
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("The URL of a reward server cannot be used", where=str(url), do="Give http://HOST:PORT")
    base = parts._replace(path=parts.path.rstrip("/").removesuffix("/score"), query="", fragment="")
    return base.geturl(), base._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DataError("The answer is not JSON", why=f"{error}"[:100]) from error


def _detail(response: httpx.Response) -> str:
    """What an answer other than 200 says of itself, as ": sentence"."""
    try:
        detail = json.loads(response.content)["detail"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return ""
    return f": {detail}"[:300].rstrip(".") if isinstance(detail, str) else ""


def _retry_after(text: str | None) -> float:
    """Seconds that a Retry-After header asks for, 0 where it asks for nothing."""
    if not text:
        return 0.0
    if text.isascii() and text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0
