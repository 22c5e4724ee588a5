"""The Reward protocol, the registry, and scoring that never lies about a failure."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from align.errors import AlignError, ConfigError, RewardError
from align.hub import Weights
from align.registry import Registry, suggest
from align.stops import Overdue, cut, time_limit
from align.types import Samples, Scores

if TYPE_CHECKING:
    from torch import Tensor


HUNG_AFTER = 600.0
"""Seconds that a reward may take for a batch where no configuration says so."""


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
        licence: of its weights and data, and of the code where it has none.
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
    licence: str = "unstated"
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


ScoreFunction = Callable[..., "Scores | Tensor | np.ndarray | Sequence[float | None]"]
"""A plain function of `samples`, and arguments with defaults: one value a sample, None where there is none."""


class FunctionReward:
    """A plain function as a reward: `function(samples, **arguments)` gives one value a sample, or K.

    What is None, NaN or infinite is missing. A function whose code changes is another reward: its source text is
    part of the identity.

    Args:
        card: what it is; its components name the K values, by default one named after the card.
        function: `(samples, **arguments) -> Scores | Tensor [B] or [B, K] | list of float or None`.
        arguments: the function's other arguments.
        code: the function whose text identifies the reward, when that is another one.
    """

    def __init__(
        self,
        card: RewardCard,
        function: ScoreFunction,
        arguments: Mapping[str, Any] | None = None,
        code: Callable[..., Any] | None = None,
    ) -> None:
        self.card, self.function, self.arguments = card, function, dict(arguments or {})
        self.code, self.names = code or function, card.components or (card.name,)

    def identity(self) -> str:
        """Return a hash over the card, the arguments and the function's text."""
        return identity_of(self.card, {"arguments": self.arguments, "code": _text_of(self.code)})

    def score(self, samples: Samples) -> Scores:
        """Return the function's values, `[B, K]`.

        Raises:
            RewardError: values that are no numbers, or not K a sample.
        """
        found = self.function(samples, **self.arguments)
        if isinstance(found, Scores):
            return found
        if hasattr(found, "detach"):
            found = found.detach().double().cpu().numpy()
        try:
            values = np.array(found, dtype=np.float64)  # None becomes NaN
            values = values.reshape(len(values), len(self.names))
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"The reward function {self.card.name!r} gave no table of numbers", why=str(error),
                do=f"Return one number or None a sample, for each of {', '.join(self.names)}",
            ) from error  # fmt: skip
        valid = np.isfinite(values)
        errors = tuple("" if row.all() else f"{self.card.name}: the function gave no number" for row in valid)
        return Scores(values, valid, self.names, errors)


def _text_of(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # typed at a prompt, or no Python
        code = getattr(function, "__code__", None)
        return repr(function) if code is None else f"{code.co_code.hex()} {code.co_consts} {code.co_names}"


def _factory(card: RewardCard, home: Callable[..., Any]) -> Callable[..., Reward]:
    """Return what builds the reward: `home` itself, or what wraps it when it is a function of `samples`."""
    if not inspect.isfunction(home):
        return home
    signature = inspect.signature(home)
    parameters = list(signature.parameters.values())
    if not parameters or parameters[0].name != "samples":
        return home

    def build(**arguments: Any) -> Reward:
        return FunctionReward(card, home, arguments)

    build.__signature__ = signature.replace(parameters=parameters[1:])
    return build


@dataclass(frozen=True)
class Entry:
    """A registered reward: its card, and where its class or function is imported from when it is asked for.

    A package of its own names one in the entry-point group "align.rewards", under the card's name, in a module that
    imports nothing heavy: listing reads the card alone.

    Args:
        card: what it is.
        home: "package.module:name" of a class, or of a function of `samples`; or the thing itself.
    """

    card: RewardCard
    home: str | Callable[..., Any]

    def load(self) -> Callable[..., Reward]:
        """Import what is registered and return what builds the reward.

        Raises:
            ConfigError: a package that it needs is missing, or it cannot be imported.
        """
        missing_packages = [need for need in self.card.needs if importlib.util.find_spec(need) is None]
        if missing_packages:
            raise ConfigError(
                f"The reward {self.card.name!r} needs {', '.join(missing_packages)}",
                do="pip install 'align[rewards]'",
            )
        registry: Registry[Any] = Registry("reward")
        registry.register(self.card.name, self.home)
        return _factory(self.card, registry.get(self.card.name))


REWARDS: Registry[Entry] = Registry("reward", group="align.rewards")


def register(card: RewardCard, home: str | Callable[..., Any] | None = None) -> Any:
    """Register a reward under `card.name`; without a `home`, a decorator of a class or a function.

    A class builds the reward. A function whose first parameter is `samples` is the reward: its other parameters
    are the reward's arguments, and it returns `Scores`, a tensor or a list of numbers and None (`FunctionReward`).
    Packages of their own name an `Entry` in the entry-point group "align.rewards".
    """
    if home is not None:
        REWARDS.register(card.name, Entry(card, home))
        return home

    def decorate(factory: Callable[..., Any]) -> Callable[..., Any]:
        REWARDS.register(card.name, Entry(card, factory))
        if inspect.isfunction(factory):
            factory.card = card  # for who names it "package.module:function"
        return factory

    return decorate


def get_reward(name: str, **args: Any) -> Reward:
    """Build the reward `name`: a registered one, or "package.module:name" of a class or function of your own.

    `placement="remote"` with `url` asks a reward server for it in place of building it here.

    Raises:
        ConfigError: an unknown reward or argument, each with the closest known one; a missing argument.
    """
    if args.get("placement") == "remote":
        from rewards.remote import RemoteReward

        if not args.get("url"):
            raise ConfigError(f"The remote reward {name!r} needs its server", do="Give url: http://HOST:PORT")
        client = {k: args[k] for k in inspect.signature(RemoteReward).parameters if k in args and k != "args"}
        inner = {k: v for k, v in args.items() if k not in client and k != "placement"}
        return RemoteReward(**{**client, "reward": name, "args": inner})
    return require_arguments(name, args)(**args)


def require_arguments(name: str, args: Mapping[str, Any]) -> Callable[..., Reward]:
    """Return what builds the reward `name`, if it takes these arguments; builds nothing.

    Raises:
        ConfigError: an unknown reward or argument, each with the closest known one; a missing argument.
    """
    factory = find_factory(name)
    accepted = inspect.signature(factory).parameters
    for argument in args:
        if argument not in accepted:
            raise ConfigError(f"The reward {name!r} has no argument {argument!r}", do=suggest(argument, accepted))
    needed = [
        a.name
        for a in accepted.values()
        if a.default is a.empty and a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY)
    ]
    if lacking := [argument for argument in needed if argument not in args]:
        given = ", ".join(f"{argument}: ..." for argument in lacking)
        raise ConfigError(
            f"The reward {name!r} needs {' and '.join(lacking)}",
            do=f"Give args: {{{given}}} beside its name in a config (--config FILE, where --reward named it)",
        )  # fmt: skip
    return factory


def require_makes(name: str, media: str, made: str, maker: str) -> None:
    """Refuse a reward that does not score what a model makes, before it makes any.

    Args:
        name: of the reward.
        media: what it scores, see `RewardCard`.
        made: "image", "video" or "text".
        maker: the model, for the message.

    Raises:
        ConfigError: it scores something else.
    """
    if media not in ("any", made):
        frames = made == "video" and media == "image"
        raise ConfigError(
            f"The reward {name!r} scores {media}s", why=f"{maker} makes {made}s",
            do=f"Score frames: name: frames, args: {{reward: {name}}}" if frames else f"Name a reward of {made}s",
        )  # fmt: skip


def _entry(name: str) -> Entry:
    entry = REWARDS.get(name)
    if not isinstance(entry, Entry) or entry.card.name != name:
        why = f"its card says {entry.card.name!r}" if isinstance(entry, Entry) else f"it is a {type(entry).__name__}"
        raise ConfigError(
            f"The package that adds the reward {name!r} does so wrongly", why=why,
            do="Its entry point of the group align.rewards names a rewards.base.Entry whose card has that name",
        )  # fmt: skip
    return entry


def find_factory(name: str) -> Callable[..., Reward]:
    """Return what builds the reward `name`, imported if need be.

    Raises:
        ConfigError: an unknown reward, or one whose packages are not installed.
    """
    return _factory(*_placed(name)) if _is_place(name) else _entry(name).load()


def card_of(name: str) -> RewardCard:
    """Return the card of the reward `name`; of the two kinds, "package.module:name" alone is imported for it.

    Raises:
        ConfigError: an unknown reward, or a place where there is none.
    """
    return _placed(name)[0] if _is_place(name) else _entry(name).card


def _is_place(name: str) -> bool:
    return ":" in name and name not in REWARDS


def _placed(name: str) -> tuple[RewardCard, Any]:
    found: Any = Registry("reward", entries={name: name}).get(name)
    about = (inspect.getdoc(found) or "a reward without a description").splitlines()[0]
    unregistered = RewardCard(name, about, "unstated", "any", (name.rpartition(":")[2],))
    return getattr(found, "card", unregistered), found


def list_rewards() -> list[RewardCard]:
    """Return the cards of all rewards, by name, importing none of them.

    A package whose entry cannot be read does not spoil the list: its card says what is wrong.
    """
    cards = []
    for name in REWARDS:
        try:
            cards.append(_entry(name).card)
        except ConfigError as error:
            cards.append(
                RewardCard(name, f"cannot be used: {error}", "none", "any", direction="none", licence="unknown")
            )
    return cards


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


def score_safely(reward: Reward, samples: Samples, seconds: float = HUNG_AFTER) -> Scores:
    """Score samples; where the batch as a whole fails, each sample by itself, so one cannot spoil the others.

    A sample that fails is missing with its message. A reward that takes longer than `seconds` is interrupted, and all
    its samples are missing; a remote one has a deadline of its own, and other threads than the main one have none. A
    defect in the reward's own code, seen as an exception that is neither `AlignError`, `ValueError`, `RuntimeError` nor
    `OSError`, is raised.

    Raises:
        RewardError: scores of the wrong number or components, or whatever the reward raises as one: it is about
            the reward and not about a sample, such as a server that scores with another reward by now.
    """
    try:
        with time_limit(None if hasattr(reward, "deadline_s") else seconds), cut():
            scores = reward.score(samples)
    except RewardError:
        raise
    except Overdue as error:
        batch = f"a batch of {len(samples)}, the first {samples.prompts[0][:80]!r}"
        return missing(reward.names, [f"{reward.card.name}: {error}, {batch}"] * len(samples))
    except (AlignError, ValueError, RuntimeError, OSError) as error:
        if len(samples) == 1:
            return missing(reward.names, [f"{reward.card.name}: {error}"])
        parts = [score_safely(reward, samples.select([i]), seconds) for i in range(len(samples))]
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
