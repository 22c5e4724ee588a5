"""Scoring while the rollout goes on: parts of a batch are scored as they come, on other machines beside this one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from multiprocessing.pool import AsyncResult, ThreadPool
from types import TracebackType
from typing import Protocol

from align.errors import ConfigError
from align.types import Samples, Scores, stack_scores
from rewards.base import Reward, score_safely
from rewards.remote import remote_rewards


class ManyRewards(Protocol):
    """What a stream asks of a panel: its rewards, the seconds each may take, how their scores are put side by side."""

    rewards: list[Reward]
    limits: list[float]

    def joined(self, scored: Sequence[Scores]) -> Scores:
        """Return the scores of all rewards on the same samples as one."""


class ScoreStream:
    """The scores of a batch that is made in parts.

        with ScoreStream(panel) as stream:
            for part in parts:            # while part n + 1 is sampled,
                stream.submit(part)       # remote rewards score part n
            scores = stream.result()      # [B, K], in the order of submission

    A reward of another machine is asked from threads. A reward of this machine scores within `submit`: it would take
    the device from the rollout anyway, and what torch keeps a thread (the device, grad mode, autocast) is the caller's.

    Args:
        panel: the rewards.
        most_parts: parts that may be waiting for remote scores; `submit` waits for the oldest beyond that.

    Raises:
        ConfigError: fewer than one part.
    """

    def __init__(self, panel: ManyRewards, most_parts: int = 4) -> None:
        if most_parts < 1:
            raise ConfigError("A stream of scores holds one part or more", where=f"most_parts {most_parts}")
        self.panel, self.most_parts = panel, most_parts
        self._remote = [bool(remote_rewards([reward])) for reward in panel.rewards]
        threads = sum(self._remote) * most_parts
        self._pool = ThreadPool(threads) if threads else None  # its threads keep no process from ending
        self._parts: list[list[Scores | AsyncResult[Scores]]] = []
        self._pending: deque[list[AsyncResult[Scores]]] = deque()

    def submit(self, samples: Samples) -> None:
        """Have one more part scored. An error of a reward of this machine is raised here."""
        while len(self._pending) >= self.most_parts:
            for result in self._pending.popleft():
                result.wait()
        asked: dict[int, AsyncResult[Scores]] = {}
        for k, reward in enumerate(self.panel.rewards):
            if self._pool is not None and self._remote[k]:
                asked[k] = self._pool.apply_async(score_safely, (reward, samples))
        self._pending.append(list(asked.values()))
        self._parts.append([
            asked[k] if k in asked else score_safely(reward, samples, self.panel.limits[k])
            for k, reward in enumerate(self.panel.rewards)
        ])  # fmt: skip

    def result(self) -> Scores:
        """Wait for all parts and return their scores, in the order they were submitted.

        Raises:
            ConfigError: no part was submitted.
            AlignError: what a remote reward raised.
        """
        if not self._parts:
            raise ConfigError("No part was submitted to a stream of scores")
        done = [
            self.panel.joined([entry.get() if isinstance(entry, AsyncResult) else entry for entry in part])
            for part in self._parts
        ]
        self._parts.clear()
        return stack_scores(done)

    def __enter__(self) -> ScoreStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.terminate()  # what is still asked for is nobody's
