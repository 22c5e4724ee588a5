"""What a training sample costs in passes of the denoiser, which of its solver steps train, and clip ranges in nats."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from align.errors import ConfigError

if TYPE_CHECKING:
    from align.config import DanceGRPOConfig, VisualConfig


def trained_step_count(solver_steps: int, fraction: float, rule: str) -> int:
    """Return how many of T solver steps are trained: `ceil(f T)` (paper) or `floor(f (T - 1))` (repo).

    Never more than T - 1, since the last transition is never trained. Rounding of `f T` in binary is
    forgiven: 0.6 of 5 steps is 3, not 4.

    Source: DanceGRPO (arXiv 2505.07818), and its released code; e.g. f = 0.6, T = 16: 10 against 9.

    Raises:
        ConfigError: an unknown rule.
    """
    if rule == "paper":
        count = math.ceil(round(fraction * solver_steps, 9))
    elif rule == "repo":
        count = math.floor(round(fraction * (solver_steps - 1), 9))
    else:
        raise ConfigError(f"Unknown rule {rule!r} for the trained steps", do="Choose paper or repo")
    return max(0, min(count, solver_steps - 1))


def feq_ledger(config: VisualConfig, k: float | None = None, solver_steps: int | None = None) -> dict[str, float | int]:
    """Return the cost of one training sample in denoiser forwards without guidance (F_eq).

    `F_eq = c T + s W (b k + n)`, with T solver steps, W trained rows of a sample (solver steps, or draws of noise),
    and s the share of the samples that best-of-N trains on; c = 2 with guidance, else 1. A trained row has b branches
    with gradient (2 for both_branches), each worth k = 3 for full fine-tuning, 2 for LoRA, and 1 more with gradient
    checkpointing; and n forwards without gradient: one of a detached branch, c of the reference with a KL term, c of an
    old policy that is not the current one, and 2 c of a pass that weighs whole groups (dgpo).

    Args:
        config: of an online visual trainer.
        k: cost of a branch; derived when None.
        solver_steps: T of a rollout at hand; that of the first training step when None.

    Returns:
        feq_per_sample, rollout_forwards, train_forwards (forward evaluations of the denoiser in each
        phase, per sample; the second with gradient), free_forwards (without), trained_steps, solver_steps,
        updates_per_step, samples_per_step, k, c.
    """
    guidance = config.sampler.guidance
    c, branches = (1 if guidance == "off" else 2), (2 if guidance == "both_branches" else 1)
    share = min(config.advantage.best_of or config.group_size, config.group_size) / config.group_size
    steps, trained, free = _trained_rows(config)
    steps = solver_steps or steps
    if k is None:
        k = (3 if config.model.train == "full" else 2) + int(config.model.gradient_checkpointing)
    without = (c - branches) + c * (free + (1 if config.objective.kl_weight else 0))
    return {
        "feq_per_sample": c * steps + share * trained * (branches * k + without),
        "rollout_forwards": c * steps,
        "train_forwards": share * trained * branches,
        "free_forwards": share * trained * without,
        "trained_steps": trained,
        "solver_steps": steps,
        "updates_per_step": config.updates_per_step,
        "samples_per_step": config.prompts_per_step * config.group_size,
        "k": k,
        "c": c,
    }


def _trained_rows(config: Any) -> tuple[int, int, int]:
    """Return solver steps, trained rows of a sample, and forwards of a row without gradient beside the reference."""
    steps = config.sampler.solver_steps
    if config.trainer == "forward":
        objective = config.objective
        if objective.loss == "supervised":
            return 0, objective.draws, 0
        lagging = objective.loss != "dgpo" and (objective.old_policy != "step" or config.updates_per_step > 1)
        return steps, objective.draws, int(lagging) + (2 if objective.loss == "dgpo" else 0)
    window = config.trained_steps.window
    trained = window or trained_step_count(steps, config.trained_steps.fraction, config.trained_steps.rule)
    if window is not None and config.sampler.steps_after_window is not None:
        end = config.trained_steps.first + window  # a window that moves on leaves fewer steps to save
        steps = end + math.ceil(round(config.sampler.steps_after_window * (steps - end), 9))
    return steps, trained, 0


def evaluation_ledger(config: VisualConfig) -> dict[str, float | int]:
    """Return what a run's evaluations cost beside its training: before, after, and every `evaluation.every` steps.

    `F_eq = samples x solver steps`, twice with classifier-free guidance.

    Returns:
        final_samples, of each of the two; between, how many lie between them, of `samples` each; feq_per_sample, feq.
    """
    evaluation = config.evaluation
    between = max(0, config.steps - 1) // evaluation.every if evaluation.every else 0
    each = evaluation.solver_steps * (1 if evaluation.guidance_scale == 1 else 2)
    return {
        "final_samples": evaluation.final_samples, "between": between, "samples": evaluation.samples,
        "feq_per_sample": each, "feq": each * (2 * evaluation.final_samples + between * evaluation.samples),
    }  # fmt: skip


def clip_nats(config: DanceGRPOConfig, latent_dim: int) -> float | None:
    """Return `objective.clip_range` in nats of the whole latent: times `latent_dim` for a ratio of mean log-probs.

    None for the other losses: the ratio of guard is multiplied by each step's std, and dppo clips none.
    """
    objective = config.objective
    if objective.loss != "clip":
        return None
    of_mean = objective.logprob_reduction == "mean" and objective.clip_unit == "ratio"
    return objective.clip_range * (latent_dim if of_mean else 1)
