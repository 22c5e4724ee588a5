"""What `--dry-run` resolves, and `align check` says: configuration, data, rewards, and where a model is.

No weights are loaded, and nothing is fetched.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import ConfigError
from align.loops import VISUAL
from align.output import give, table

if TYPE_CHECKING:
    from align.checks import Finding
    from align.config import RewardConfig


def config_findings(config: Any) -> list[Finding]:
    """Return all findings on a configuration: its values, files, rewards, length of rows and family."""
    from align.checks import check_config

    findings = check_config(config, reward_names=_names(), files=True)
    missing = {finding.code for finding in findings} & {"data", "model", "model_not_here"}
    local = config.language and config.data.path != "toy" and not missing
    if local and find_spec("transformers"):
        from trainers.data_check import length_findings

        findings += length_findings(config)
    if config.trainer in VISUAL and "model" not in missing:
        from align.diffusion.checks import family_findings

        given = config.trainer == "offline" or (config.trainer == "forward" and config.objective.images is not None)
        findings += family_findings(config.model, images=given)
    return [*_reward_findings(config), *findings]


def require_ready(config: Any) -> list[Finding]:
    """Return the warnings and notes on a configuration that could start now.

    Raises:
        ConfigError: the first error found.
    """
    from align.checks import require_valid

    return require_valid(config, config_findings(config))


def would(options: argparse.Namespace, config: Any, again: Sequence[str], out: Path, what: str, **how: bool) -> int:
    """Check all that a run needs: configuration, data, rewards, engine, launch, folder. Say what it would do.

    Gives what `align check` says of the configuration, with what of its data is learnt from, and: `out`, the run
    folder; `command`, what trains, in several processes with a launcher.

    Args:
        again: the verb and its arguments, for that command.
        what: it would do.
        how: `overwrite` and `fork`, see `align.run.require_directory`.
    """
    from align.checks import describe_config
    from align.commands.check import config_text
    from align.commands.engines import launched, require_engine
    from align.launch import shown
    from align.run import require_directory

    found = describe_config(config, require_ready(config))
    settings = require_engine(options, config)
    require_directory(out, config, **how)
    data, rows = learnt_from(config)
    command = shown(*launched(options, again, settings))
    text = [config_text(found), *([table(rows)] if rows else []), f"would {what}"]
    text += [f"by {command}"] if options.launch else []
    return give(options, {**found, **data, "out": str(out), "command": command}, "\n".join(text))


def learnt_from(config: Any) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return what of its data a fit or a comparison of protocols takes, and the same as people read it."""
    if config.trainer == "fit":
        from align.commands.fit import plan_fit

        return plan_fit(config)
    if config.trainer == "peering":
        from align.commands.peering import plan_peering

        return plan_peering(config)
    return {}, []


def require_rewards(rewards: Iterable[str | RewardConfig], made: str | None = None) -> None:
    """Refuse rewards that nobody knows, or whose arguments are not theirs; build none.

    Args:
        made: what the model that they score makes, where there is one: "text", "image", "video"; empty where nothing
            tells which of the latter two.

    Raises:
        ConfigError: the first of them.
    """
    from align.config import RewardConfig

    for reward in rewards:
        for check in _checks(RewardConfig(name=reward) if isinstance(reward, str) else reward, made).values():
            check()


def _checks(reward: RewardConfig, made: str | None) -> dict[str, Callable[[], object]]:
    """What can be wrong with a reward that is named, by key: each raises a ConfigError. Nothing is built or fetched."""
    from rewards.base import require_arguments
    from rewards.compose import build_transforms

    remote = reward.args.get("placement") == "remote"
    return {
        "name": lambda: None if made is None else _require_media(reward, made),
        "args": lambda: None if remote else require_arguments(reward.name, reward.args),
        "transform": lambda: build_transforms(reward.transform, reward.name),
    }


def require_source(source: str) -> None:
    """Refuse a model of images that is neither a pipeline folder, a built-in one, nor a name on the hub.

    Runs, checkpoints and language models were looked at when they were found.

    Raises:
        CheckpointError: a run without a checkpoint.
        ConfigError: no such model of images.
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
    """What is wrong with a config's rewards: what they score, arguments, transforms; none is built."""
    from align.checks import Finding, named_rewards

    found, names, made = [], _names(), _made(config)
    for part in ("rewards", "heldout_rewards"):
        for i, reward in named_rewards(getattr(config, part, ())):
            checks = _checks(reward, made)
            if reward.name not in names and ":" not in reward.name:  # which `check_config` says
                checks = {"transform": checks["transform"]}
            for key, check in checks.items():
                try:
                    check()
                except ConfigError as error:
                    found.append(Finding("error", key, str(error).removesuffix("."), "", f"{part}.{i}.{key}"))
                    if key == "name":
                        break  # nothing is known of its arguments
    return found


def _made(config: Any) -> str:
    """What a config's model makes: "text", "image" or "video"; empty where nothing tells."""
    from align.published import makes

    if config.language:
        return "text"
    if config.trainer not in VISUAL:
        return ""
    return "image" if config.trainer == "offline" else makes(config.model) or ""


def _require_media(reward: RewardConfig, made: str) -> None:
    """Refuse a reward that is not at its place, or scores something else than the model makes."""
    from rewards.base import require_makes
    from rewards.scoring import media_of

    inner = reward.args.get("args")
    if any(isinstance(args, Mapping) and args.get("placement") == "remote" for args in (reward.args, inner)):
        return  # its server knows it
    media = media_of(reward)
    if made or media == "text":
        require_makes(reward.name, media, made or "image", "the model")
