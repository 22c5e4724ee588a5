"""What an RLUF config will do before it does it: rewards that cannot be calibrated, bounds that mean little, advice."""

from __future__ import annotations

from collections.abc import Collection

from align.checks import Finding, looks_around, reward_identity, unknown_rewards
from align.rluf_config import RLUFConfig


def check_rluf(config: RLUFConfig, reward_names: Collection[str] | None) -> list[Finding]:
    """Return every finding on what RLUF adds to a language-model config.

    Args:
        config: what to check.
        reward_names: the registered rewards; an unknown name is then an error.
    """
    found = [*_rewards(config), *_monitor(config), *_objective(config)]
    if reward_names is not None:
        found += unknown_rewards(config, ("rewards", "heldout_rewards"), reward_names)
    return found


def _rewards(config: RLUFConfig) -> list[Finding]:
    found = []
    utilities = [name for name, reward in config.rewards.items() if reward.role == "utility"]
    if not any(config.rewards[name].weight > 0 for name in utilities):
        found.append(Finding(
            "error", "no_reward", "There is no reward with a weight above 0 to maximise",
            "Give one of them role: utility and a weight", "rewards",
        ))  # fmt: skip
    found += [
        Finding(
            "error", "negative_weight", f"The weight of {name} is below 0, and calibrated rewards lie between 0 and 1",
            "Turn the reward round with transform: [{affine: {scale: -1}}]", f"rewards.{name}.weight",
        )
        for name in utilities
        if config.rewards[name].weight < 0
    ]  # fmt: skip
    found += [
        Finding(
            "error", "group_transform", f"A transform of {name} looks at the other completions of a group",
            "The baseline is what rewards are compared with here: use affine, clip, platt, isotonic or a frozen zscore",
            f"rewards.{name}.transform",
        )
        for name, reward in config.rewards.items()
        if any(looks_around(spec) for spec in reward.transform)
    ]  # fmt: skip
    if len(utilities) == len(config.rewards):
        found.append(Finding(
            "warning", "no_judge", "No reward is a hard judge, so whatever raises the rewards is learnt",
            "Add rules such as no_farewell, no_solicitation and length_band with role: gate", "rewards",
        ))  # fmt: skip
    return found


def _monitor(config: RLUFConfig) -> list[Finding]:
    found, trained = [], {reward_identity(reward) for reward in config.rewards.values()}
    for name, reward in config.heldout_rewards.items():
        for wrong, code, message, do in (
            (reward.role == "gate", "heldout_gate", "has role: gate, and nothing to close", "Remove it"),
            (reward.weight <= 0, "heldout_weight", "has a weight that is not above 0", "Give it one, or remove it"),
            (any(map(looks_around, reward.transform)), "group_transform",
             "has a transform that looks at other answers, so that it cannot fall", "Use affine, or a frozen zscore"),
            (reward_identity(reward) in trained, "heldout_is_trained", "is one that is trained on", "Name another"),
        ):  # fmt: skip
            if wrong:
                where = f"heldout_rewards.{name}"
                found.append(Finding("error", code, f"The held-out reward {name} {message}", do, where))
    if config.monitor.action == "off":
        return found
    if not config.heldout_rewards:
        found.append(Finding(
            "note", "no_frozen_judge", "The hack monitor has no frozen judge: it reads phrases, habits, length",
            "Name one under heldout_rewards", "heldout_rewards",
        ))  # fmt: skip
    if config.evaluation.prompts < 20 or not config.evaluation.every:
        found.append(Finding(
            "warning", "monitor_blind", "The hack monitor needs evaluations while training, of 20 prompts or more",
            "Set evaluation.every, and evaluation.prompts: 20 or more", "evaluation",
        ))  # fmt: skip
    return found


def _objective(config: RLUFConfig) -> list[Finding]:
    found, objective, sampling = [], config.objective, config.sampling
    if objective.aggregation == "gdpo" and objective.loss != "crpg":
        found.append(Finding(
            "error", "gdpo_needs_crpg", f"gdpo makes advantages, and {objective.loss} learns from rewards themselves",
            "Set objective.loss: crpg, or objective.aggregation: weighted_mean", "objective.aggregation",
        ))  # fmt: skip
    if config.reference.mode == "precomputed":
        found.append(Finding(
            "error", "precomputed", "Completions are drawn while training, so nothing of them can be precomputed",
            "Set reference.mode: auto", "reference.mode",
        ))  # fmt: skip
    if objective.loss == "crpg" and (sampling.temperature != 1 or sampling.top_p != 1):
        found.append(Finding(
            "warning", "off_policy", "The policy gradient of crpg is that of completions at temperature 1, from all "
            "tokens", "Set sampling.temperature: 1 and sampling.top_p: 1", "sampling.temperature",
        ))  # fmt: skip
    if config.evaluation.temperature != sampling.temperature:
        found.append(Finding(
            "note", "evaluation_temperature", f"Held-out answers are drawn at temperature "
            f"{config.evaluation.temperature:g}, and training completions at {sampling.temperature:g}", "",
            "evaluation.temperature",
        ))  # fmt: skip
    if config.evaluation.prompts == 0:
        found.append(Finding(
            "warning", "nothing_judged", "Without held-out prompts to answer, rewards are seen on training prompts "
            "alone", "Set evaluation.prompts above 0", "evaluation.prompts",
        ))  # fmt: skip
    return found
