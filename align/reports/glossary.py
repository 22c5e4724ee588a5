"""What each number of metrics.jsonl is, in one sentence."""

from __future__ import annotations

GLOSSARY: dict[str, str] = {
    "step": "Training step: one rollout, its rewards and its updates.",
    "seconds": "Wall-clock seconds since the step before was logged.",
    "cpu_seconds": "Processor seconds of this step, added over all threads.",
    "seconds_total": "Wall-clock seconds of the run so far, over all its sittings.",
    "cpu_seconds_total": "Processor seconds of the run so far, over all its sittings.",
    "samples": "Images sampled and scored in this step: prompts times group size.",
    "reward": "Mean over this step's samples of the weighted sum of the trained rewards.",
    "reward_ci_low": "Lower end of the 95 % interval of the reward, from a bootstrap that resamples whole prompts.",
    "reward_ci_high": "Upper end of that interval.",
    "valid_share": "Share of the samples that every reward could score; a failed score is missing, never 0.",
    "zero_std_groups": "Prompts whose samples all scored the same: they carry no signal in this step.",
    "invalid_members": "Samples left out of training because a score was missing.",
    "dropped_groups": "Prompts left out because too few of their samples had a score.",
    "loss": "The clipped objective; near 0 by construction, since advantages are centred, so it is no measure of success.",
    "grad_norm": "L2 norm of the gradient before clipping, averaged over the step's updates.",
    "lr": "Learning rate of the optimizer.",
    "first_ratio_error": "Largest |ratio − 1| before the first update: 0 means that replay reproduces the rollout exactly.",
    "ratio_mean": "Mean probability ratio new / old over the trained terms.",
    "ratio_min": "Smallest probability ratio of the step.",
    "ratio_max": "Largest probability ratio of the step.",
    "clip_share_low": "Share of the trained terms with a negative advantage and a ratio below the clip range: no gradient.",
    "clip_share_high": "Share of the trained terms with a positive advantage and a ratio above the clip range: no gradient.",
    "approx_kl": "Estimate of how far this step moved the model, (ratio − 1) − log ratio, averaged over the trained terms.",
    "updates": "Optimizer updates of this step.",
    "feq": "Cost of this step's training in denoiser forwards without guidance (F_eq).",
    "feq_total": "Cost of the run so far in F_eq.",
    "feq_per_sample": "Cost of one training sample in F_eq: rollout and training.",
    "diversity": "Pixel standard deviation between images of the same prompt, averaged: 0 is one image for each prompt.",
    "heldout": "Mean held-out reward of this step's evaluation.",
    "time/rollout": "Seconds spent sampling.",
    "time/decode": "Seconds spent decoding latents to pixels.",
    "time/reward": "Seconds spent scoring.",
    "time/train": "Seconds spent in replay, forward and backward.",
    "time/optimizer": "Seconds spent in gradient clipping and the optimizer.",
    "time/log": "Seconds spent evaluating, drawing and writing.",
    "peak_memory_mb": "Largest memory held so far, in MB: of the process, or of the GPU's allocator.",
}


def explain(key: str) -> str:
    """Return the sentence for a key of metrics.jsonl, empty when it is not one of ours."""
    if key.startswith("reward/") and key.endswith("/mean"):
        return "Mean of this reward component over the step's samples, before weights."
    if key.startswith("reward/") and key.endswith("/std"):
        return "Standard deviation of this component within a prompt's samples, averaged over prompts."
    return GLOSSARY.get(key, "")
