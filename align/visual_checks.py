"""Checks of the online visual trainers' configs: combinations that cannot train, and advice."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from align.checks import (
    Finding,
    errors_first,
    heldout_gates,
    judged,
    looks_around,
    mask_findings,
    model_folder,
    reward_identity,
    unknown_rewards,
)
from align.errors import AlignError
from align.ledger import clip_nats, evaluation_ledger, feq_ledger, trained_step_count
from align.published import BUILTIN, is_builtin, latent_dim, training_memory

if TYPE_CHECKING:
    from align.config import DanceGRPOConfig, VisualConfig
    from align.forward_config import ForwardConfig


def check_visual_config(
    config: VisualConfig, *, reward_names: Collection[str] | None = None, files: bool = False
) -> list[Finding]:
    """Return every finding on `config`, errors first.

    Args:
        config: what to check.
        reward_names: the registered rewards; an unknown name is then an error.
        files: also read the prompt files and look for the model folder.
    """
    own = _forward(config) if config.trainer == "forward" else _reverse(config)
    found = [*own, *_sampling(config), *_training(config), *_rewards(config), *_evaluation(config)]
    found += mask_findings(config, files=files)
    if reward_names is not None:
        found += unknown_rewards(config, ("rewards", "heldout_rewards"), reward_names)
    if files:
        found += _files(config)
    return errors_first(found)


def _reverse(config: DanceGRPOConfig) -> list[Finding]:
    """Findings on training the sampler's own steps."""
    sampler, found = config.sampler, []
    if sampler.kernel == "ode" or sampler.eta == 0:
        what = "The ode kernel" if sampler.kernel == "ode" else f"The {sampler.kernel} kernel with eta 0"
        found.append(Finding(
            "error", "no_density", f"{what} has standard deviation 0, so its samples have no log-prob to train on",
            "Use e.g. kernel: dance_sde with eta: 0.3; evaluation uses the ODE in any case",
            "sampler.kernel" if sampler.kernel == "ode" else "sampler.eta",
        ))  # fmt: skip
    window = config.trained_steps.window
    count = window or trained_step_count(sampler.solver_steps, config.trained_steps.fraction, config.trained_steps.rule)
    room = sampler.solver_steps - 1 - config.trained_steps.first
    if window is not None and window > room:
        found.append(Finding(
            "error", "window",
            f"A window of {window} steps from step {config.trained_steps.first} does not fit {sampler.solver_steps} "
            "solver steps, the last of which is never trained",
            "Lower trained_steps.window or trained_steps.first, or raise sampler.solver_steps", "trained_steps.window",
        ))  # fmt: skip
    if window is None and (sampler.steps_after_window is not None or sampler.plain_solver != "euler"):
        key = "sampler.steps_after_window" if sampler.steps_after_window is not None else "sampler.plain_solver"
        found.append(Finding(
            "error", "no_window", f"{key} is about the steps beside a window, and every step is stochastic",
            "Set trained_steps.window, e.g. 4, or leave it out", key,
        ))  # fmt: skip
    if config.objective.loss != "clip" and config.objective.logprob_reduction == "sum":
        found.append(Finding(
            "error", "reduction", f"The loss {config.objective.loss} is defined on means over latent entries",
            "Set objective.logprob_reduction: mean", "objective.logprob_reduction",
        ))  # fmt: skip
    if config.objective.loss == "dppo" and config.objective.clip_share_target is not None:
        found.append(Finding(
            "error", "dppo_clip", "The loss dppo has no clip range to adapt",
            "Set objective.clip_share_target to null, and objective.dppo_threshold", "objective.clip_share_target",
        ))  # fmt: skip
    if count == 0:
        short = sampler.solver_steps < 2
        found.append(Finding(
            "error", "empty_subset",
            f"No solver step is trained: fraction {config.trained_steps.fraction:g} of {sampler.solver_steps} steps by "
            f"the {config.trained_steps.rule} rule is none, the last step never being trained",
            "Raise sampler.solver_steps to 2 or more" if short else "Raise trained_steps.fraction",
            "sampler.solver_steps" if short else "trained_steps.fraction",
        ))  # fmt: skip
    return found


def _forward(config: ForwardConfig) -> list[Finding]:
    """Findings on training on noised samples."""
    found, objective, sampler = [], config.objective, config.sampler
    if sampler.guidance != "off":
        found.append(Finding(
            "error", "forward_guidance", "An objective on noised samples trains what the model says of a prompt itself",
            "Set sampler.guidance: off; evaluation may use a guidance_scale of its own", "sampler.guidance",
        ))  # fmt: skip
    if (sampler.kernel == "ode" or sampler.eta == 0) and sampler.initial_noise != "none":
        found.append(Finding(
            "error", "one_sample", "From one initial noise the ODE makes one sample: a group would have no differences",
            "Set sampler.initial_noise: none", "sampler.initial_noise",
        ))  # fmt: skip
    if sampler.steps_after_window is not None:
        found.append(Finding(
            "error", "no_window", "There is no window that solver steps could come after",
            "Leave out sampler.steps_after_window, and lower sampler.solver_steps", "sampler.steps_after_window",
        ))  # fmt: skip
    if objective.loss == "dgpo" and config.updates_per_step > 1:
        found.append(Finding(
            "error", "dgpo_updates", "The loss dgpo weighs whole groups by the policy as it is, so it takes one update",
            "Set updates_per_step: 1, and lower prompts_per_step for more updates", "updates_per_step",
        ))  # fmt: skip
    if (objective.loss == "supervised") != (objective.images is not None):
        found.append(Finding(
            "error", "images", "The loss supervised learns from objective.images, and no other loss reads it",
            "Set both, or neither", "objective.images",
        ))  # fmt: skip
    if objective.nft_feedback == "label" and config.combine.mode not in ("weighted_sum", "min", "gate"):
        found.append(Finding(
            "note", "labels", "Labels are summed by weight as they are, without group statistics", "",
            "objective.nft_feedback",
        ))  # fmt: skip
    return found


def _sampling(config: VisualConfig) -> list[Finding]:
    sampler, found = config.sampler, []
    if sampler.guidance == "off" and sampler.guidance_scale != 1:
        found.append(Finding(
            "error", "guidance_unused", f"guidance_scale is {sampler.guidance_scale:g} while guidance is off",
            "Set guidance: both_branches or uncond_detached, or guidance_scale: 1", "sampler.guidance_scale",
        ))  # fmt: skip
    if sampler.guidance != "off" and sampler.guidance_scale == 1:
        found.append(Finding(
            "warning", "guidance_idle", "Guidance at scale 1 costs twice the forwards and changes nothing",
            "Set guidance: off", "sampler.guidance",
        ))  # fmt: skip
    if sampler.guidance != "off" and config.updates_per_step > 1:
        found.append(Finding(
            "warning", "guidance_updates", f"With guidance, {config.updates_per_step} updates a rollout are unstable",
            "Set updates_per_step: 1", "updates_per_step",
        ))  # fmt: skip
    if sampler.kernel == "dance_sde" and sampler.eta > 0.3:
        found.append(Finding(
            "warning", "eta_high", f"eta {sampler.eta:g} above 0.3 on dance_sde can leave noise in the rollouts",
            "Lower eta, or use cps or dance_precise", "sampler.eta",
        ))  # fmt: skip
    if sampler.kernel == "cps" and sampler.eta >= 1:
        found.append(Finding(
            "warning", "eta_high", f"eta {sampler.eta:g} on cps turns its noise by a right angle or more; 0.8 is usual",
            "Set eta below 1", "sampler.eta",
        ))  # fmt: skip
    return found


def _training(config: VisualConfig) -> list[Finding]:
    found, samples = [], config.prompts_per_step * config.group_size
    if config.group_size < 2:
        found.append(Finding(
            "error", "group_size", "A group of 1 sample has nothing to be compared with: every advantage would be 0",
            "Set group_size to 2 or more; 8 to 24 is usual", "group_size",
        ))  # fmt: skip
    if samples % config.updates_per_step:
        divisors = [n for n in range(config.updates_per_step, 0, -1) if samples % n == 0]
        found.append(Finding(
            "error", "uneven_updates",
            f"The {samples} samples of a step ({config.prompts_per_step} prompts x {config.group_size}) do not divide "
            f"into {config.updates_per_step} equal updates",
            f"Set updates_per_step: {divisors[0]}, or change prompts_per_step or group_size", "updates_per_step",
        ))  # fmt: skip
    best_of, group = config.advantage.best_of, config.group_size
    if best_of is not None and best_of > group:
        found.append(Finding(
            "error", "best_of", f"best_of {best_of} of a group of {group} is more than there is",
            f"Set advantage.best_of to {group} or less, or raise group_size", "advantage.best_of",
        ))  # fmt: skip
    if config.advantage.recentre and best_of is None:
        found.append(Finding(
            "note", "recentre", "advantage.recentre changes nothing without advantage.best_of", "", "advantage.recentre"
        ))  # fmt: skip
    if config.objective.kl_weight and config.model.train == "full":
        found.append(Finding(
            "note", "reference_copy", "kl_weight on full fine-tuning keeps a frozen copy of the denoiser in memory", "",
            "objective.kl_weight",
        ))  # fmt: skip
    if config.prompts_per_step < 16 and not is_builtin(config.model.path):
        found.append(Finding(
            "warning", "few_prompts", f"{config.prompts_per_step} prompts a step make noisy updates",
            "Use 32 prompts or more; 16 is the least that worked", "prompts_per_step",
        ))  # fmt: skip
    lr, full = config.optimizer.lr, config.model.train == "full"
    if full and lr < 5e-6:
        found.append(Finding(
            "warning", "lr_low", f"lr {lr:g} is too low to move a full fine-tune; 1e-6 is known to fail",
            "Set optimizer.lr between 5e-6 and 2e-5", "optimizer.lr",
        ))  # fmt: skip
    bound = advantage_bound(config.group_size, config.advantage.ddof)
    if config.advantage.scope == "group" and config.advantage.clip is not None and config.group_size > 1:
        weight = sum(abs(reward.weight) for reward in config.rewards)
        if config.advantage.clip >= bound * weight:
            found.append(Finding(
                "note", "advantage_clip",
                f"advantage.clip {config.advantage.clip:g} never binds: a group of {config.group_size} bounds the "
                f"advantage by {bound * weight:.3g}", "", "advantage.clip",
            ))  # fmt: skip
    if config.updates_per_step > 1 and config.trainer == "dance_grpo":
        found.append(Finding(
            "note", "off_policy",
            f"Ratios are exactly 1 in the first of {config.updates_per_step} updates of a rollout; the later ones are "
            "off-policy by design", "", "updates_per_step",
        ))  # fmt: skip
    return found


def advantage_bound(group_size: int, ddof: int) -> float:
    """Return the largest |advantage| of G members: `sqrt(G - 1)` for ddof 0, `(G - 1) / sqrt(G)` for ddof 1."""
    return math.sqrt(group_size - 1) if ddof == 0 else (group_size - 1) / math.sqrt(group_size)


def _rewards(config: VisualConfig) -> list[Finding]:
    found = []
    if all(reward.weight == 0 for reward in config.rewards):
        found.append(Finding(
            "error", "zero_weights", "Every reward has weight 0, so nothing would be trained",
            "Give at least one reward a weight", "rewards.0.weight",
        ))  # fmt: skip
    if len(config.rewards) == 1 and not config.heldout_rewards:
        found.append(Finding(
            "warning", "single_reward", f"The single reward {config.rewards[0].name!r} will be exploited, unseen",
            "Add a second reward, heldout_rewards to see it happen, and optimizer.ema_decay against it",
            "heldout_rewards",
        ))  # fmt: skip
    elif not config.heldout_rewards and config.monitor.action != "off":
        found.append(Finding(
            "note", "no_judge", "The hack monitor has no judge and cannot see a hacked reward",
            "Add heldout_rewards that nothing is trained on", "heldout_rewards",
        ))  # fmt: skip
    identities = {reward_identity(reward) for reward in config.rewards}
    for i, reward in enumerate(config.heldout_rewards):
        if reward_identity(reward) in identities:
            found.append(Finding(
                "error", "heldout_is_trained", f"The held-out reward {reward.name!r} is also trained on",
                "Give it other args (such as split: evaluator), or remove it", f"heldout_rewards.{i}.name",
            ))  # fmt: skip
    found += heldout_gates(config)
    relative = [(i, r) for i, r in enumerate(config.rewards) if r.weight and any(map(looks_around, r.transform))]
    hidden = len(relative) == sum(bool(reward.weight) for reward in config.rewards)
    found += [
        Finding(
            "warning" if hidden else "note", "relative_reward",
            f"A transform of {reward.name!r} looks at the other samples, so its held-out mean cannot rise",
            "The receipt and the hack monitor see it move with a frozen zscore: [{zscore: {mean: 0.2, std: 0.1}}]",
            f"rewards.{i}.transform",
        )
        for i, reward in relative
    ]  # fmt: skip
    gates = [reward.name for reward in config.rewards if reward.role == "gate"]
    if (config.combine.mode == "gate") != (0 < len(gates) < len(config.rewards)):
        found.append(Finding(
            "error", "gate",
            f"combine.mode is {config.combine.mode} and {len(gates)} of {len(config.rewards)} rewards have role: gate",
            "Mode gate needs a gate and a utility; without it, give no reward role: gate", "combine.mode",
        ))  # fmt: skip
    if config.combine.gate_floor is not None and config.combine.mode != "gate":
        found.append(Finding(
            "note", "gate_floor", "combine.gate_floor changes nothing without combine.mode: gate", "",
            "combine.gate_floor",
        ))  # fmt: skip
    if len(identities) < len(config.rewards):
        found.append(Finding(
            "error", "reward_twice", "The same reward is listed twice with the same args",
            "Keep one of them, and set its weight", "rewards.0.name",
        ))  # fmt: skip
    return found


def _evaluation(config: VisualConfig) -> list[Finding]:
    found = []
    if config.prompts.heldout_path is None and config.prompts.heldout_fraction == 0:
        found.append(Finding(
            "warning", "no_heldout_prompts", "No prompt is held out, so evaluation repeats the training prompts",
            "Set prompts.heldout_fraction: 0.2, or prompts.heldout_path", "prompts.heldout_fraction",
        ))  # fmt: skip
    if config.sampler.shift is not None:
        found.append(Finding(
            "warning", "shift_mismatch",
            f"Rollouts and evaluation use shift {config.sampler.shift:g}, a plain pipeline call its own schedule",
            "Set sampler.shift: null unless the two agree, or deploy at this shift", "sampler.shift",
        ))  # fmt: skip
    if config.evaluation.solver_steps != config.sampler.solver_steps:
        found.append(Finding(
            "note", "steps_mismatch",
            f"Training samples in {config.sampler.solver_steps} steps and evaluation in "
            f"{config.evaluation.solver_steps}: judge by what will be deployed", "", "evaluation.solver_steps",
        ))  # fmt: skip
    if config.evaluation.guidance_scale != config.sampler.guidance_scale:
        found.append(Finding(
            "note", "guidance_mismatch",
            f"Training runs at guidance scale {config.sampler.guidance_scale:g} and evaluation at "
            f"{config.evaluation.guidance_scale:g}", "", "evaluation.guidance_scale",
        ))  # fmt: skip
    return found


def _files(config: VisualConfig) -> list[Finding]:
    from align.prompts import load_prompts

    found, prompts = [], config.prompts
    for key, path in (("prompts.path", prompts.path), ("prompts.heldout_path", prompts.heldout_path)):
        if path is None or path in BUILTIN:
            continue
        try:
            loaded = load_prompts(path, prompt_column=prompts.prompt_column, image_column=prompts.image_column)
        except AlignError as error:
            found.append(Finding("error", "prompts", str(error).removesuffix("."), "", key))
            continue
        if loaded.duplicates:
            found.append(Finding(
                "warning", "duplicate_prompts", f"{loaded.duplicates} of {len(loaded)} prompts repeat an earlier one",
                "Remove them, unless their images or metadata differ", key,
            ))  # fmt: skip
    return [*found, *model_folder(config.model.path)]


def describe_visual_config(config: VisualConfig, findings: list[Finding]) -> dict[str, Any]:
    """Return what `align check` says of a config: its name, sizes, ledger, memory, clip range and findings."""
    dim = latent_dim(config)
    return {
        "kind": "config",
        "name": config.name,
        "trainer": config.trainer,
        "steps": config.steps,
        "ledger": feq_ledger(config),
        "evaluation": evaluation_ledger(config),
        "latent_dim": dim,
        "memory_gb": {n: round(held / 1e9, 1) for n in (1, 8) if (held := training_memory(config, n)) is not None},
        **_clip(config, dim),
        **judged(findings),
    }


def _clip(config: Any, dim: int | None) -> dict[str, Any]:
    if config.trainer != "dance_grpo" or config.objective.loss == "dppo":
        return {}
    return {
        "clip_range": config.objective.clip_range,
        "clip_nats": None if dim is None else clip_nats(config, dim),
        "logprob_reduction": config.objective.logprob_reduction,
    }
