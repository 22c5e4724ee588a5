"""What `--dry-run` resolves, and `align check` says: configuration, data, rewards, and where a model is.

No weights are loaded, and nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from align.errors import ConfigError

if TYPE_CHECKING:
    from align.checks import Finding
    from align.config import RewardConfig


def config_findings(config: Any) -> list[Finding]:
    """Return all findings on a configuration: its values, files, rewards and the length of its rows."""
    from align.checks import check_config

    findings = check_config(config, reward_names=_names(), files=True)
    missing = {finding.code for finding in findings} & {"data", "model", "model_not_here"}
    local = config.language and config.data.path != "toy" and not missing
    if local and find_spec("transformers"):
        from trainers.data_check import length_findings

        findings += length_findings(config)
    return [*_reward_findings(config), *findings]


def require_ready(config: Any) -> list[Finding]:
    """Return the warnings and notes on a configuration that could start now.

    Raises:
        ConfigError: the first error found.
    """
    from align.checks import require_valid

    return require_valid(config, config_findings(config))


def require_rewards(rewards: Iterable[str | RewardConfig]) -> None:
    """Refuse rewards that nobody knows, or whose arguments are not theirs; build none.

    Raises:
        ConfigError: the first of them.
    """
    from align.config import RewardConfig

    for reward in rewards:
        checks = _checks(RewardConfig(name=reward) if isinstance(reward, str) else reward)
        for check in (checks["args"], checks["transform"]):
            check()


def _checks(reward: RewardConfig) -> dict[str, Callable[[], object]]:
    """What can be wrong with a reward that is named, by key: each raises a ConfigError. Nothing is built or fetched."""
    from rewards.base import require_arguments
    from rewards.compose import build_transforms

    remote = reward.args.get("placement") == "remote"
    return {
        "transform": lambda: build_transforms(reward.transform, reward.name),
        "args": lambda: None if remote else require_arguments(reward.name, reward.args),
    }


def require_source(source: str) -> None:
    """Refuse a model that is not here and is no name on the hub either.

    Raises:
        ConfigError: it is neither a run, a checkpoint, a recipe nor a model.
    """
    from align.checks import model_folder
    from trainers import find_source

    found = find_source(source)
    if found.language or found.run is not None:
        return
    for finding in model_folder(found.name):
        if finding.level == "error":
            raise ConfigError("There is no such model", where=source, why=finding.message, do=finding.do)


def _names() -> list[str]:
    from rewards import list_rewards

    return [card.name for card in list_rewards()]


def _reward_findings(config: Any) -> list[Finding]:
    """What is wrong with the arguments and transforms of a config's rewards, without building one."""
    from align.checks import Finding, named_rewards

    found, names = [], _names()
    for part in ("rewards", "heldout_rewards"):
        for i, reward in named_rewards(getattr(config, part, ())):
            checks = _checks(reward)
            if reward.name not in names:  # which `check_config` says
                del checks["args"]
            for key, check in checks.items():
                try:
                    check()
                except ConfigError as error:
                    found.append(Finding("error", key, str(error).removesuffix("."), "", f"{part}.{i}.{key}"))
    return found
