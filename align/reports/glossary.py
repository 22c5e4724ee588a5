"""What each chart shows and what each number of metrics.jsonl is, in a sentence or three."""

from __future__ import annotations

CHARTS: dict[str, str] = {
    "Reward in training": (
        "What is optimised: the weighted sum of the trained rewards. The line is each step's samples, taken "
        "with noise on training prompts, with a 95 % interval; the points are held-out prompts, sampled "
        "without noise."
    ),
    "Held-out reward": (
        "What is believed: a reward that is never trained on, on prompts never trained on, with 95 % "
        "intervals. When the reward in training rises and this falls, the reward is being gamed."
    ),
    "Trained rewards, one by one": "Mean of each component over the step's samples, before weights.",
    "Held-out rewards, one by one": "Mean of each held-out component at every evaluation, with 95 % intervals.",
    "Held-out accuracy": (
        "Share of the evaluation samples that the held-out classifier reads as what the prompt asked for."
    ),
    "First ratio error": (
        "Largest |new / old probability − 1| before the first update of each step. It must be 0 up to "
        "rounding: anything else means that training looks at other samples than were drawn. The tolerance "
        "grows where a step has little noise."
    ),
    "Clipped terms": (
        "Share of the trained terms whose ratio left the clip range, so that they no longer push: low where a"
        " sample was made less likely, high where more."
    ),
    "Distance moved in a step": (
        "Approximate KL divergence between the model before and after the step's updates, per trained term, "
        "in the units of the log-probability."
    ),
    "Gradient norm": "L2 norm of the gradient before clipping. A slow drift is normal; spikes are not.",
    "Diversity": (
        "Pixel standard deviation between images of one prompt. A fall towards 0 means that the model makes "
        "one image a prompt."
    ),
    "Image meters": (
        "What a hacked reward usually bends, as multiples of the untrained model's: colour saturation, clipped pixels, "
        "contrast, sharpness, edges, border. Nothing rewards them; a sudden turn is worth a look at the samples."
    ),
}

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
    "gated": "Samples whose gate was closed: their reward is the floor, whatever their utilities say.",
    "unselected": "Samples that best-of-N left out of training.",
    "dropped_groups": "Prompts left out because too few of their samples had a score.",
    "loss": (
        "The clipped objective; near 0 by construction, since advantages are centred, so it is no measure of success."
    ),
    "grad_norm": "L2 norm of the gradient before clipping, averaged over the step's updates.",
    "lr": "Learning rate of the optimizer.",
    "first_ratio_error": (
        "Largest |ratio − 1| before the first update: 0 means that replay reproduces the rollout exactly."
    ),
    "ratio_mean": "Mean probability ratio new / old over the trained terms.",
    "ratio_min": "Smallest probability ratio of the step.",
    "ratio_max": "Largest probability ratio of the step.",
    "clip_share_low": (
        "Share of the trained terms with a negative advantage and a ratio below the clip range: no gradient."
    ),
    "clip_share_high": (
        "Share of the trained terms with a positive advantage and a ratio above the clip range: no gradient."
    ),
    "approx_kl": (
        "Estimate of how far this step moved the model, (ratio − 1) − log ratio, averaged over the trained terms."
    ),
    "clip_low": "How far ratios may fall in this step before they are clipped.",
    "clip_high": "How far ratios may rise in this step before they are clipped.",
    "clip_nats": "The upper clip bound as a change of the whole latent's log-probability, in nats.",
    "kl_reference": (
        "Distance to the model before training that kl_weight holds down: of the model's output, or of the "
        "sampling step, a latent entry."
    ),
    "updates": "Optimizer updates of this step; fewer than configured when all their samples had an advantage of 0.",
    "feq": "Cost of this step's training in denoiser forwards without guidance (F_eq).",
    "feq_total": "Cost of the run so far in F_eq.",
    "feq_per_sample": "Cost of one training sample in F_eq: rollout and training.",
    "diversity": (
        "Pixel standard deviation between images of the same prompt, averaged: 0 is one image for each prompt."
    ),
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
    if key.startswith("reward/") and key.endswith("/fail_frac"):
        return "Share of the step's samples for which this component is missing."
    return GLOSSARY.get(key, "")
