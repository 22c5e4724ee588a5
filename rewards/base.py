"""The Reward protocol, the registry, and scoring that never lies about a failure."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from align.errors import AlignError, ConfigError, RewardError
from align.registry import Registry, suggest
from align.types import Samples, Scores
from align.weights import Weights


@dataclass(frozen=True)
class RewardCard:
    """What a reward is, readable without loading it.

    Args:
        name: as registered.
        definition: exactly what number it is.
        range: of its values, as an interval with units.
        media: what it scores: "image", "video", "text" or "any".
        components: the K names of its scores; empty where they depend on its arguments.
        direction: "higher" when more is better, "none" when it is not a quality.
        differentiable: whether gradients reach the pixels, through `differentiable(images, prompts)`.
        licence: of its weights and data.
        size: of its weights.
        needs: packages beyond the core, by import name.
        weights: the published files it loads.
        source: paper or repository of the definition.
    """

    name: str
    definition: str
    range: str
    media: str = "image"
    components: tuple[str, ...] = ()
    direction: str = "higher"
    differentiable: bool = False
    licence: str = "Apache-2.0"
    size: str = "none"
    needs: tuple[str, ...] = ()
    weights: tuple[Weights, ...] = ()
    source: str = ""


class Reward(Protocol):
    """Scores B samples with K components."""

    names: tuple[str, ...]
    card: RewardCard

    def score(self, samples: Samples) -> Scores:
        """Return `[B, K]` scores; what cannot be scored is missing, with the reason."""

    def identity(self) -> str:
        """Return a hash of everything the scores depend on: weights, preprocessing, dtype, arguments."""


@dataclass(frozen=True)
class Entry:
    """A registered reward: its card, and where its class is imported from when it is asked for."""

    card: RewardCard
    home: str | Callable[..., Reward]

    def load(self) -> Callable[..., Reward]:
        """Import and return the factory."""
        missing_packages = [need for need in self.card.needs if importlib.util.find_spec(need) is None]
        if missing_packages:
            raise ConfigError(
                f"The reward {self.card.name!r} needs {', '.join(missing_packages)}",
                do="pip install 'align[rewards]'",
            )
        return Registry("reward", entries={self.card.name: self.home}).get(self.card.name)


REWARDS: Registry[Entry] = Registry("reward", group="align.rewards")


def register(card: RewardCard, home: str | Callable[..., Reward] | None = None) -> Any:
    """Register a reward under `card.name`; without a `home`, a decorator of its class.

    Packages of their own name an `Entry` in the entry-point group "align.rewards".
    """
    if home is not None:
        REWARDS.register(card.name, Entry(card, home))
        return home

    def decorate(factory: Callable[..., Reward]) -> Callable[..., Reward]:
        REWARDS.register(card.name, Entry(card, factory))
        return factory

    return decorate


def get_reward(name: str, **args: Any) -> Reward:
    """Build the reward `name`: a registered one, or "package.module:Class" of your own.

    `placement="remote"` with `url` asks a reward server for it in place of building it here.

    Raises:
        ConfigError: an unknown reward or argument, each with the closest known one.
    """
    if args.get("placement") == "remote":
        from rewards.remote import RemoteReward

        client = {k: args[k] for k in inspect.signature(RemoteReward).parameters if k in args and k != "args"}
        inner = {k: v for k, v in args.items() if k not in client and k != "placement"}
        return RemoteReward(**{**client, "reward": name, "args": inner})
    if ":" in name and name not in REWARDS:
        factory = Registry("reward", entries={name: name}).get(name)
    else:
        factory = REWARDS.get(name).load()
    accepted = inspect.signature(factory).parameters
    for argument in args:
        if argument not in accepted:
            raise ConfigError(f"The reward {name!r} has no argument {argument!r}", do=suggest(argument, accepted))
    return factory(**args)


def list_rewards() -> list[RewardCard]:
    """Return the cards of all rewards, by name, importing none of them."""
    return [REWARDS.get(name).card for name in REWARDS]


def identity_of(card: RewardCard, arguments: Mapping[str, Any], weights: Mapping[str, Any] | None = None) -> str:
    """Return 16 hex digits over a reward's name, definition, arguments and weights (tensors by name)."""
    digest = hashlib.sha256(json.dumps([card.name, card.definition, dict(arguments)], sort_keys=True).encode())
    for key, tensor in sorted((weights or {}).items()):
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(tensor.detach().cpu().float().numpy()).tobytes())
    return digest.hexdigest()[:16]


def missing(names: tuple[str, ...], reasons: list[str]) -> Scores:
    """Return scores that are all missing, one reason a sample."""
    shape = (len(reasons), len(names))
    return Scores(np.full(shape, np.nan), np.zeros(shape, bool), names, tuple(reasons))


def score_safely(reward: Reward, samples: Samples) -> Scores:
    """Score samples; where the batch as a whole fails, each sample by itself, so one cannot spoil the others.

    A sample that fails is missing with its message. A defect in the reward's own code, seen as an
    exception that is neither `AlignError`, `ValueError`, `RuntimeError` nor `OSError`, is raised.

    Raises:
        RewardError: scores of the wrong number or components.
    """
    try:
        scores = reward.score(samples)
    except (AlignError, ValueError, RuntimeError, OSError) as error:
        if len(samples) == 1:
            return missing(reward.names, [f"{reward.card.name}: {error}"])
        parts = [score_safely(reward, samples.select([i])) for i in range(len(samples))]
        return Scores(
            np.concatenate([p.values for p in parts]),
            np.concatenate([p.valid for p in parts]),
            reward.names,
            tuple(e for p in parts for e in p.errors),
        )
    if len(scores) != len(samples) or scores.names != reward.names:
        raise RewardError(
            f"The reward {reward.card.name!r} returned other scores than it announced",
            why=f"{len(scores)} scores of {scores.names} for {len(samples)} samples of {reward.names}",
        )
    return scores
