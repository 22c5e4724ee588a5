"""Rewards for TRL's trainers, and TRL's reward functions as rewards. TRL itself is not imported.

TRL calls `f(prompts, completions, completion_ids, **dataset columns)` and takes a number or None a sample. It adds up
several functions with None counted as nothing: of rewards that may be missing, hand it one panel rather than several.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from align.errors import ConfigError
from align.registry import suggest
from align.types import Samples, Scores
from rewards.base import FunctionReward, Reward, RewardCard, score_safely
from rewards.chats import Turn, as_turns, read_turns, require_texts, split_turns
from rewards.panel import Panel

TRLFunction = Callable[..., "Sequence[float | None] | Awaitable[Sequence[float | None]]"]
_NO_COLUMNS = ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments")


def as_trl_reward_func(
    reward: Reward | Panel, weights: Mapping[str, float] | None = None, *, name: str | None = None
) -> Callable[..., list[float | None]]:
    """Return a TRL reward function: `sum_k w_k r_k` of a reward's or a panel's components, None where one is missing.

    Prompts and completions may be text or chats; the dataset's columns become the samples' metadata. The share of
    missing scores, and the mean of each of several components, go to TRL's metrics.

    Args:
        reward: a reward, or a panel, which has its weights already.
        weights: weight of every component by name; needed for a reward of several components.
        name: what TRL logs it under, the card's name or the components' by default.

    Raises:
        ConfigError: several components without weights, weights of a panel, or of unknown components.
    """
    panel = reward if isinstance(reward, Panel) else None
    names = reward.names
    if panel is not None and weights is not None:
        raise ConfigError("A panel has weights of its own", do="Give them to the panel")
    if panel is None and weights is None and len(names) > 1:
        raise ConfigError(
            "A TRL reward function gives one number, and this reward has several components",
            why=", ".join(names), do=f"Give weights, such as {{{names[0]!r}: 1.0}}; one left out counts nothing",
        )  # fmt: skip
    for key in weights or {}:
        if key not in names:
            raise ConfigError(f"The reward has no component {key!r}", do=suggest(key, names))
    used = [i for i, key in enumerate(names) if weights is None or weights.get(key)]
    w = np.array([1.0 if weights is None else weights[names[i]] for i in used])
    label = name or (reward.card.name if not isinstance(reward, Panel) else "+".join(names))

    def reward_func(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        samples = _samples(prompts, completions, columns)
        if panel is not None:
            scores = panel.score(samples)
            total = panel.total(scores)
        else:
            scores = score_safely(reward, samples)
            total = scores.values[:, used] @ w
        _log(columns, label, scores, total)
        return [float(value) if math.isfinite(value) else None for value in total]

    reward_func.__name__ = reward_func.__qualname__ = label
    return reward_func


def _samples(prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]) -> Samples:
    texts: list[str | list[Turn]] = []
    asked: list[str] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        before = [] if isinstance(prompt, str) else read_turns(prompt)
        answer = completion if isinstance(completion, str) else read_turns(completion)
        if before and isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        texts.append([*before, *answer] if before else answer)
        asked.append(prompt if not before else next((t["content"] for t in before[::-1] if t["role"] == "user"), ""))
    kept = {
        key: value for key, value in columns.items()
        if key not in _NO_COLUMNS and isinstance(value, (list, tuple)) and len(value) == len(prompts)
    }  # fmt: skip
    rows = [{key: value[i] for key, value in kept.items()} for i in range(len(prompts))] if kept else ()
    return Samples(prompts=asked, texts=texts, metadata=rows)


def _log(columns: Mapping[str, Any], label: str, scores: Scores, total: np.ndarray) -> None:
    metric = columns.get("log_metric")
    if metric is None:
        return
    metric(f"rewards/{label}/missing", float(np.mean(~np.isfinite(total))))
    for key in scores.names if len(scores.names) > 1 else ():
        valid = scores.column(key)[np.isfinite(scores.column(key))]
        if len(valid):
            metric(f"rewards/{label}/{key}", float(valid.mean()))


def from_trl_reward_func(
    function: TRLFunction, name: str, *, definition: str = "", range: str = "by the function"
) -> Reward:
    """Return a TRL reward function, sync or async, as a reward; None is missing.

    A sample's chat is handed over as TRL does: its prompt's turns and its completion's turns. Metadata become the
    dataset's columns, None where a sample lacks one. What a function logs per sample is an extra.

    Args:
        function: `f(prompts, completions, **columns) -> list of float or None`.
        name: of the reward and of its component.
        definition, range: for its card; the function's first line of documentation by default.

    Raises:
        ConfigError: no function, or one that needs token ids.
    """
    if not callable(function):
        raise ConfigError("A TRL reward function is callable", why=f"got {type(function).__name__}",
                          do="A model's folder is the reward text/reward_model")  # fmt: skip
    accepted = inspect.signature(function).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    if "completion_ids" in accepted and accepted["completion_ids"].default is inspect.Parameter.empty:
        raise ConfigError(f"The TRL reward function {name!r} needs token ids", why="samples hold texts")
    about = (inspect.getdoc(function) or "a TRL reward function").splitlines()[0]
    card = RewardCard(name, definition or about, range, "text", (name,), licence="by the function")

    def score(samples: Samples) -> Scores:
        extras: dict[str, Any] = {}
        columns = {key: [row.get(key) for row in samples.metadata] for row in samples.metadata for key in row}
        given: dict[str, Any] = {
            **columns, **_conversations(samples, name), "trainer_state": None,
            "log_extra": lambda column, values: extras.__setitem__(column, list(values)),
            "log_metric": lambda metric, value: None,
        }  # fmt: skip
        found = function(**{key: value for key, value in given.items() if open_ended or key in accepted})
        if inspect.isawaitable(found):
            with ThreadPoolExecutor(1) as thread:  # a notebook's thread has a running loop already
                found = thread.submit(asyncio.run, _awaited(found)).result()
        values = np.array(found, dtype=np.float64).reshape(-1, 1)
        valid = np.isfinite(values)
        errors = tuple("" if row.all() else f"{name}: the function gave no number" for row in valid)
        return Scores(values, valid, (name,), errors, extras)

    code = function if inspect.isroutine(function) else type(function)
    return FunctionReward(card, score, code=code)


async def _awaited(found: Awaitable[Any]) -> Any:
    return await found


def _conversations(samples: Samples, name: str) -> dict[str, list[Any]]:
    """Return TRL's prompts and completions: all texts, or all chats.

    Raises:
        DataError: a broken chat.
    """
    texts = require_texts(samples, name)
    if all(isinstance(text, str) for text in texts):
        return {"prompts": list(samples.prompts), "completions": list(texts)}
    pairs = [split_turns(as_turns(prompt, text)) for prompt, text in zip(samples.prompts, texts, strict=True)]
    return {"prompts": [prompt for prompt, _ in pairs], "completions": [answer for _, answer in pairs]}
