"""What a reward server offers: one entry a reward, made by the server and chosen from by the client."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from align.errors import ConfigError, RewardError
from align.registry import suggest
from rewards.base import Reward, RewardCard, find_factory


def entry_of(name: str, args: Mapping[str, Any], reward: Reward) -> dict[str, Any]:
    """Return the entry of a reward that was built as `get_reward(name, **args)`, defaults among its arguments."""
    bound = inspect.signature(find_factory(name)).bind_partial(**args)
    bound.apply_defaults()
    return {
        "reward": name,
        "args": _as_json(dict(bound.arguments)),
        "names": list(reward.names),
        "identity": reward.identity(),
        "card": _as_json(dataclasses.asdict(reward.card)),
    }


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def is_entry(entry: Any) -> bool:
    """Return whether what a server sent is an entry."""
    if not isinstance(entry, dict):
        return False
    names, card = entry.get("names"), entry.get("card")
    return (
        all(isinstance(entry.get(key), str) for key in ("reward", "identity"))
        and isinstance(entry.get("args"), dict)
        and isinstance(names, list)
        and bool(names)
        and all(isinstance(name, str) for name in names)
        and isinstance(card, dict)
        and all(isinstance(card.get(key), str) for key in ("name", "definition", "range"))
    )


def card_of(entry: Mapping[str, Any]) -> RewardCard:
    """Return the card of an entry. Its user needs no package and no weights, and gets no gradient."""
    texts = {field.name for field in dataclasses.fields(RewardCard) if field.type == "str"}
    given: Any = {key: value for key, value in entry["card"].items() if key in texts and isinstance(value, str)}
    return RewardCard(**given, components=tuple(entry["names"]))


def choose(
    entries: Sequence[Mapping[str, Any]], reward: str, args: Mapping[str, Any], identity: str | None, url: str
) -> Mapping[str, Any]:
    """Return the one entry that is meant.

    Args:
        args: arguments it must have been built with; others are not compared.
        identity: hash it must have, if any.

    Raises:
        ConfigError: no such reward, an argument it does not have or has another value of, or several that fit.
        RewardError: none has the identity.
    """
    named = [entry for entry in entries if entry["reward"] == reward]
    if not named:
        known = [entry["reward"] for entry in entries]
        raise ConfigError(f"The server does not serve the reward {reward!r}", where=url, do=suggest(reward, known))
    same = [entry for entry in named if identity in (None, entry["identity"])]
    if not same:
        raise another_identity(url, reward, str(identity), ", ".join(entry["identity"] for entry in named))
    for name, value in _as_json(dict(args)).items():
        has = [entry for entry in same if name in entry["args"]]
        if not has:
            known = [*(key for entry in same for key in entry["args"]), "url", "timeout_s", "deadline_s", "retries",
                     "max_inflight", "batch_size", "identity", "encoding", "startup_s", "backoff_s"]  # fmt: skip
            raise ConfigError(f"The reward {reward!r} has no argument {name!r}", where=url, do=suggest(name, known))
        same = [entry for entry in has if entry["args"][name] == value]
        if not same:
            raise ConfigError(
                f"The server has the reward {reward!r} with another {name}", where=url,
                why=f"{', '.join(repr(entry['args'][name]) for entry in has)} instead of {value!r}",
            )  # fmt: skip
    if len(same) > 1:
        raise ConfigError(
            f"The server has {len(same)} rewards {reward!r}", where=url, do="Give the args or the identity of one"
        )
    return same[0]


def another_identity(url: str, reward: str, expected: str, found: str) -> RewardError:
    """Return the error of a server whose reward is not the expected one."""
    return RewardError(
        f"The server scores {reward!r} with another reward than expected", where=url,
        why=f"its identity is {found}, not {expected}: other weights, arguments or definition",
        do="Serve the same weights again, or build the reward anew to go on with the others",
    )  # fmt: skip
