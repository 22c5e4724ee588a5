"""Asking a judge many questions: bounded concurrency, retries with backoff, a deadline, and nothing trusted.

The other side of an endpoint may be slow, drip, answer with an error page, send without end, or not be there. Each
attempt ends within its time and is handed on, whatever became of it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.errors import AlignError, ConfigError
from align.seeding import seed as derive_seed

Messages = list[dict[str, str]]
Judge = Callable[[Messages], str]
LARGEST_REPLY = 1_000_000
FATAL = (401, 403, 404)


@dataclass(frozen=True)
class Question:
    """One thing asked of a judge: items in the order shown, the messages that ask it, and how a reply is read.

    `read` maps a reply to a value, or to None where it is no answer.
    """

    kind: str
    items: tuple[str, ...]
    messages: Messages
    scale: tuple[int, int] = (1, 7)
    read: Callable[[str], Any] = str


@dataclass(frozen=True)
class Attempt:
    """One attempt at a question: "valid" with its value, "invalid" (a reply that cannot be read) or "failed"."""

    question: Question
    number: int
    status: str
    value: Any = None
    reply: str = ""
    why: str = ""
    latency_ms: int = 0


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible chat endpoint.

    Args:
        url: its base, such as http://127.0.0.1:8000/v1.
        key: sent as a bearer token where there is one.
        timeout: seconds for one request, however slowly it drips.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    temperature: float = 0.0
    max_tokens: int = 256
    timeout: float = 60.0


@dataclass(frozen=True)
class Patience:
    """How hard to try.

    Args:
        concurrency: questions asked at once.
        tries: attempts a question.
        backoff: seconds before the second attempt, doubled for each further one, with jitter.
        longest_wait: most seconds between two attempts, whatever the server asks for.
        deadline: seconds for everything; 0 is none.
    """

    concurrency: int = 8
    tries: int = 4
    backoff: float = 0.5
    longest_wait: float = 30.0
    deadline: float = 0.0


class _Failed(Exception):
    """A request that brought no reply: whether to try again, and after how many seconds the server asked to."""

    def __init__(self, why: str, *, again: bool = True, after: float = 0.0) -> None:
        super().__init__(why)
        self.why, self.again, self.after = why, again, after


def ask(
    questions: Sequence[Question],
    judge: Endpoint | Judge,
    record: Callable[[Attempt], None],
    *,
    patience: Patience | None = None,
) -> Counter[str]:
    """Ask every question until it has a valid answer, its tries are used up or the deadline has passed.

    Args:
        judge: an endpoint, or a function from messages to a reply.
        record: called with every attempt, one at a time, in the order in which they ended.

    Returns:
        counts: valid, invalid, failed (questions by how they ended), not_asked, attempts.

    Raises:
        ConfigError: the endpoint refuses the key or does not know the path or model (401, 403, 404), or its address is
            no URL.
    """
    patience = patience or Patience()
    return asyncio.run(_ask(list(questions), judge, record, patience))


async def _ask(
    questions: list[Question], judge: Endpoint | Judge, record: Callable[[Attempt], None], patience: Patience
) -> Counter[str]:
    ends = time.monotonic() + patience.deadline if patience.deadline > 0 else float("inf")
    counts: Counter[str] = Counter(valid=0, invalid=0, failed=0, not_asked=0, attempts=0)
    waiting = iter(questions)

    async def worker(complete: Callable[[Messages], Awaitable[str]]) -> None:
        for question in waiting:
            status = await _until_valid(question, complete, record, patience, ends, counts)
            counts[status] += 1

    async def work(complete: Callable[[Messages], Awaitable[str]]) -> None:
        tasks = [asyncio.create_task(worker(complete)) for _ in range(max(1, patience.concurrency))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    if isinstance(judge, Endpoint):
        try:
            import httpx
        except ImportError as error:
            raise ConfigError("Asking an endpoint needs httpx", do="Run `pip install httpx`") from error
        limits = httpx.Limits(max_connections=patience.concurrency)
        async with httpx.AsyncClient(limits=limits, timeout=judge.timeout, trust_env=False) as client:
            await work(lambda messages: _complete(client, judge, messages))
    else:

        async def call(messages: Messages) -> str:
            try:
                reply = await asyncio.to_thread(judge, messages)
            except (AlignError, OSError, RuntimeError, ValueError) as error:
                raise _Failed(f"{type(error).__name__}: {error}") from error
            return reply if isinstance(reply, str) else str(reply)

        await work(call)
    return counts


async def _until_valid(
    question: Question, complete: Callable[[Messages], Awaitable[str]], record: Callable[[Attempt], None],
    patience: Patience, ends: float, counts: Counter[str],
) -> str:  # fmt: skip
    status = "not_asked"
    for number in range(1, patience.tries + 1):
        left = ends - time.monotonic()
        if left <= 0:
            break
        began, after, again = time.monotonic(), 0.0, True
        try:
            reply = await asyncio.wait_for(complete(question.messages), None if left == float("inf") else left)
            value = question.read(reply)
            status = "invalid" if value is None else "valid"
            attempt = Attempt(question, number, status, value, reply)
        except _Failed as failure:
            status, after, again = "failed", failure.after, failure.again
            attempt = Attempt(question, number, status, why=failure.why)
        except TimeoutError:
            status, again = "failed", False
            attempt = Attempt(question, number, status, why="the deadline passed")
        latency = round(1000 * (time.monotonic() - began))
        counts["attempts"] += 1
        record(Attempt(question, number, status, attempt.value, attempt.reply, attempt.why, latency))
        if status == "valid" or not again or number == patience.tries:
            break
        jitter = 0.5 + derive_seed("backoff", number, *question.items) / 2**63
        wait = max(after, patience.backoff * 2 ** (number - 1) * jitter) if status == "failed" else 0.0
        await asyncio.sleep(max(0.0, min(wait, patience.longest_wait, ends - time.monotonic())))
    return status


async def _complete(client: Any, endpoint: Endpoint, messages: Messages) -> str:
    import httpx

    body = {
        "model": endpoint.model, "messages": messages, "temperature": endpoint.temperature,
        "max_tokens": endpoint.max_tokens,
    }  # fmt: skip
    headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    url = endpoint.url.rstrip("/") + "/chat/completions"
    try:
        async with asyncio.timeout(endpoint.timeout), client.stream("POST", url, json=body, headers=headers) as answer:
            parts, size = [], 0
            async for part in answer.aiter_bytes():
                parts.append(part)
                size += len(part)
                if size > LARGEST_REPLY:
                    raise _Failed(f"the reply is longer than {LARGEST_REPLY:,} bytes", again=False)
            status, raw, retry_after = answer.status_code, b"".join(parts), answer.headers.get("retry-after", "")
    except TimeoutError as error:
        raise _Failed(f"no whole reply within {endpoint.timeout:g} s") from error
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise ConfigError("The endpoint is no address", where=endpoint.url, why=str(error)) from error
    except httpx.HTTPError as error:
        raise _Failed(f"{type(error).__name__}: {error}") from error
    if status in FATAL:
        raise ConfigError(
            "The endpoint refuses to answer", where=url, why=f"status {status}: {_shown(raw)}",
            do="Check the address, the model's name and the key",
        )  # fmt: skip
    if status != 200:
        after = float(retry_after) if retry_after.isdecimal() and len(retry_after) < 7 else 0.0
        raise _Failed(f"status {status}: {_shown(raw)}", again=status == 429 or status >= 500, after=after)
    return _content(raw)


def _shown(raw: bytes) -> str:
    return raw[:200].decode("utf-8", errors="replace")


def _content(raw: bytes) -> str:
    try:
        content = json.loads(raw)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise _Failed(f"the reply is no chat completion: {_shown(raw)}") from error
    if not isinstance(content, str):
        raise _Failed("the reply has no text")
    return content
