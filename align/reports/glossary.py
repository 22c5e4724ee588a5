"""What each chart shows and what each number of metrics.jsonl is, in a sentence or three."""

from __future__ import annotations

from align.loops import LANGUAGE as LANGUAGE_LOOPS

LANGUAGE_TRAINERS = tuple(LANGUAGE_LOOPS)
"""Trainers of language models, whose runs have a page and a vocabulary of their own."""

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
    "Held-out rows told apart": (
        "Of rows that were never trained on, how often the implicit reward tells the liked image from the other: the "
        "share of pairs, or the chance for a thumb up against a thumb down, with 95 % intervals that take a prompt's "
        "rows together. The line is each update's own rows, before they are learnt from."
    ),
    "Errors gained on the reference": (
        "How much smaller the error on the rows' images became than the reference's. A little below 0 is usual; far "
        "below, all images became unlikely, the liked ones among them. z is KTO's reference point, cut off at 0."
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
    "Hack monitor": (
        "How often the frozen judge prefers a held-out sample to the one of the same prompt and noise before training; "
        "ties count half. The run stops where the whole interval is below 50 %, and that of the judge's mean change "
        "below 0, while the trained reward has risen."
    ),
    "Image meters": (
        "What a hacked reward usually bends, as multiples of the untrained model's: brightness, colour saturation, "
        "clipped pixels, contrast, sharpness, edges, border, distance between samples of a prompt. Nothing rewards "
        "them; a sudden turn is worth a look at the samples."
    ),
}

SPARSITY: dict[str, str] = {
    "sparsity/step": "Share of the weights whose bits one optimizer update left as they were, in the measured format.",
    "sparsity/window": "The same over the sparsity.every steps before that update; the first one has none before it.",
    "sparsity/cumulative": "The same since the beginning of training, against the model's files.",
    "sparsity/if_dense": "sparsity/cumulative had an update of that norm moved every weight of the tensors that moved.",
    "sparsity/norm": "Norm of the visible change since the beginning, as a share of the norm of the weights.",
    "sparsity/predicted_step": "What the learning rate alone predicts for sparsity/step, if every weight moves by it.",
    "sparsity/predicted_cancelling": "What all rates so far predict for sparsity/cumulative, where steps cancel.",
    "sparsity/predicted_agreeing": "The same where all steps of a weight have one sign.",
    "sparsity/seconds": "Seconds spent on these measures.",
}
"""Of every trainer with sparsity.every, in the steps that are due."""

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
    "window_start": "First solver step of the window that this step trained.",
    "optimality": "Mean of what NFT makes of advantages: 0 is bad, 1 good, .5 neither.",
    "moved": "Mean square by which the estimate of the clean sample has moved from the old policy's.",
    "group_weight": "Mean weight of a group in dgpo: .5 where nothing has moved since before training.",
    "old_policy_decay": "How much of itself the old policy kept after this step.",
    "correct": (
        "Of given images: share of the update's rows on their side, before they are learnt from; of pairs, those whose "
        "chosen image gained more. Ties count half."
    ),
    "margin": "Of given images: mean argument of the loss's sigmoid; beyond 10 or so a row teaches nothing more.",
    "matching_error": "Mean square error of what the model says at noised images, a latent entry.",
    "error_gain": "How much smaller that error became than the reference's: below 0 all images became less likely.",
    "z": "KTO's reference point of the update: the mean of error_gain, cut off at 0.",
    "share_up": "Share of thumbs up among the update's rows.",
    "epoch": "Passes over the training rows so far.",
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
    **SPARSITY,
}


LANGUAGE_CHARTS: dict[str, str] = {
    "Loss": "The rows of each update differ, so it wanders; judge by the held-out curves.",
    "Held-out pair accuracy": (
        "Share of held-out pairs whose thumbs-up answer gained more log-prob since before training than its "
        "thumbs-down answer did, with 95 % intervals. Before training every pair is a tie, which counts half."
    ),
    "AUC of the implicit reward": (
        "Chance that a thumbs-up answer has a higher log-ratio than a thumbs-down answer, of any two prompts. 0.5 is "
        "no better than chance. The line is each update's own rows, before they are learnt from; the points are "
        "held-out rows, with 95 % intervals that take a prompt's rows together."
    ),
    "Held-out rewards": (
        "Implicit reward, beta × (log-prob now − log-prob before training), of either class on held-out rows, and "
        "their difference. The margin can grow while both fall: then good answers became less likely too."
    ),
    "Rewards in training": "The same of the rows of each update, before they are learnt from.",
    "Log-ratio per token": (
        "How much more likely the held-out answers became, in nats a token, averaged over both classes: a "
        "rough sign of how far the model moved. It is no KL divergence, since the answers are not the model's own."
    ),
    "Reference point z0": (
        "What KTO compares each answer with: an estimate in nats of how far the policy moved from the model before "
        "training, from prompts with another prompt's answer. The mean is z0 before it is cut off at 0."
    ),
    "z0 at its floor": (
        "Share of the step's microbatches where z0 was 0. Early on that is usual; where it stays there, the "
        "reference point does nothing and KTO compares with the model before training alone."
    ),
    "Reward shift delta": (
        "Where BCO's classifier draws its line: the midpoint of the running mean rewards of the two classes, or as "
        "objective.delta says. It should lie between the class means."
    ),
    "Thumbs up in each update": (
        "Share of thumbs up among the rows of an update; the plan of an epoch holds it even. Microbatches of one class "
        "should not occur while there are rows of the other."
    ),
    "Distance to the model before training": (
        "KL divergence in nats an answer, up to evaluation.max_new_tokens: how much likelier the model finds its own "
        "answers to held-out prompts than the model before training does, with 95 % intervals. Held-out curves that "
        "stand still while this grows are a reason to stop. One draw a prompt: it is rough, and may fall below 0."
    ),
    "Constrained reward": (
        "What RLUF maximises: calibrated rewards averaged by weight, 0 where a judge fails or the bound is exceeded. "
        "The line is each step's completions, the points are held-out answers with 95 % intervals; the baseline alone "
        "would have 0.5 times its own share of passes."
    ),
    "Rewards of held-out answers": (
        "Each reward by itself, before transforms and weights, with 95 % intervals. Where one rises and another falls, "
        "the weights decide; `align pareto` sets several runs side by side."
    ),
    "Held-out answers that judges pass": "Share that each judge passes, with 95 % intervals.",
    "Valid completions": (
        "Share of each step's completions that pass every judge and the bound, share beyond the bound, and share of "
        "the prompts from which something is learnt."
    ),
    "Length of the model's answers": (
        "Tokens of its own answers to held-out prompts, at most evaluation.max_new_tokens. A steady rise is a usual "
        "sign that length is what is learnt."
    ),
    "Real tokens": "Share of the tokens in a batch that are no padding. Rows are batched by length to keep it high.",
    "Gradient norm": CHARTS["Gradient norm"],
    "Learning rate": "Learning rate of each update.",
    "Change of nats per token": (
        "The same less that of the model before training, row by row, with 95 % intervals that take a prompt's rows "
        "together: below 0 is better."
    ),
    "Held-out nats per token": (
        "Mean negative log-prob of a token of the held-out answers: lower is better. When it turns up "
        "while the loss still falls, the model is learning its rows by heart."
    ),
}

LANGUAGE: dict[str, str] = {
    "step": "Training step: one optimizer update.",
    "lr": "Learning rate of the update.",
    "grad_norm": "L2 norm of the update's gradient before clipping.",
    "rewards/up": "Mean implicit reward of thumbs-up answers: beta × (log-prob now − log-prob before training).",
    "rewards/down": "Mean implicit reward of thumbs-down answers.",
    "rewards/margin": "rewards/up − rewards/down: how far the model tells the classes apart.",
    "auc": (
        "Chance that a thumbs-up answer has a higher log-ratio than a thumbs-down answer, ties counting half; 0.5 is "
        "chance."
    ),
    "auc_ci_low": "Lower end of the 95 % interval of the AUC, which takes all rows of a prompt together.",
    "auc_ci_high": "Upper end of that interval.",
    "log_ratio/up": "Mean log-prob now − log-prob before training of whole thumbs-up answers, in nats.",
    "log_ratio/down": "The same of thumbs-down answers.",
    "share_up": "Share of thumbs up among the rows.",
    "logp": "Mean log-prob of a whole answer under the model, in nats.",
    "one_class_share": "Share of the update's microbatches whose rows are all thumbs up or all thumbs down.",
    "z0": "Reference point that the step's losses used, in nats: never below 0, averaged over microbatches.",
    "z0_mean": "Mean log-ratio of mismatched answers, which is z0 before it is cut off at 0.",
    "z0_at_zero": "Share of the step's microbatches in which z0 was 0.",
    "delta": "Reward shift that the step's losses used.",
    "delta/mean_up": "Running mean of the implicit reward of thumbs up, after the step.",
    "delta/mean_down": "Running mean of the implicit reward of thumbs down, after the step.",
    "epoch": "Passes over the training rows so far.",
    "real_token_share": "Share of the batch's tokens that are no padding.",
    "seconds": GLOSSARY["seconds"],
    "cpu_seconds": GLOSSARY["cpu_seconds"],
    "seconds_total": GLOSSARY["seconds_total"],
    "cpu_seconds_total": GLOSSARY["cpu_seconds_total"],
    "peak_memory_mb": GLOSSARY["peak_memory_mb"],
    **SPARSITY,
    "n": "Held-out rows measured.",
    "pair_accuracy": (
        "Share of held-out pairs whose thumbs-up answer has the higher log-ratio, ties counting half, with its 95 % "
        "interval."
    ),
    "log_ratio_per_token": "Mean over held-out rows of the log-ratio divided by the answer's tokens, in nats.",
    "answer_tokens": "Mean tokens of the model's own answers to evaluation.prompts held-out prompts.",
    "answers_ended": "Share of those answers that came to an end within evaluation.max_new_tokens.",
    "kl": (
        "KL divergence from the model before training, in nats an answer: mean log-ratio of those answers, with its "
        "95 % interval; measured at temperature 1."
    ),
    "nats_per_token": "Mean negative log-prob of a token of the held-out answers; lower is better.",
    "nats_change": "nats_per_token − that before training, on the same rows, with a 95 % interval by prompts.",
    "perplexity": "exp(nats_per_token): among how many equally likely tokens the model chooses, so to say.",
    "reward/NAME": "Mean of this reward over the answers, before transforms and weights.",
    "gain/NAME": "The same less that of the model before training's answers to the same prompts, answer by answer.",
    "win/NAME": "Share of the answers whose reward is above that of the model before training, ties counting half.",
    "calibrated/NAME": "Mean of sigmoid(reward − reward of the baseline), after transforms; 0.5 is the baseline's own.",
    "judge/NAME": "Share of the answers that this judge passes; one without an answer of the judge does not pass.",
    "heldout/NAME": "Mean of this frozen judge over answers to held-out prompts; nothing is trained on it.",
    "monitor": "What the hack monitor saw: the trained reward's rise in standard errors, and signals that tripped.",
    "judge/all": "Share of the answers that every judge passes.",
    "judge_errors": "How often a judge gave no answer, which counts as violated.",
    "missing_rewards": "Completions of which a reward is missing; they are left out, and never count as 0.",
    "constrained": (
        "Mean of the constrained reward R: the calibrated rewards averaged by weight, 0 where a judge fails or the "
        "log-ratio is above objective.kl_max."
    ),
    "valid": "Share of the completions that pass every judge and the bound on the log-ratio.",
    "valid_prompts": "Share of the prompts with at least one valid completion.",
    "kl_exceeded": "Share of the completions whose log-ratio is above objective.kl_max.",
    "learnt_prompts": "Share of the prompts from which something is learnt; the others are skipped.",
    "learnt_baseline": "Share of the prompts of which crraft learns the baseline, for want of a valid completion.",
}
"""Of the language-model trainers: metrics.jsonl, and from `n` on evaluation.jsonl."""

BY_TRAINER: dict[tuple[str, str], str] = {
    ("kto", "loss"): (
        "KTO: mean of w (1 − sigmoid(±(reward − beta z0))), w the class's weight, + for thumbs up and − for down; near "
        "half the weight before training."
    ),
    ("bco", "loss"): (
        "BCO: −log sigmoid(±(reward − delta)), + for thumbs up and − for down; log 2 = 0.693 before training, twice "
        "that where the means of the two classes are added (objective.balance class_mean)."
    ),
    ("dpo", "loss"): (
        "DPO: mean over pairs of −log sigmoid(reward of the chosen − of the rejected); log 2 = 0.693 before training."
    ),
    ("offline", "loss"): (
        "Diffusion-KTO: mean of w (1 − U(± beta × (error_gain − z))); Diffusion-DPO: −log sigmoid of half beta times "
        "the difference of the two images' error_gain, log 2 = 0.693 before training."
    ),
    ("offline", "step"): "Training step: one optimizer update.",
    ("offline", "samples"): "Images learnt from in this step.",
    ("offline", "first_ratio_error"): (
        "In step 1, beta times the largest difference of the errors of model and reference before any update, which "
        "must be rounding; 0 in later steps."
    ),
    ("rluf", "loss"): (
        "RLUF: mean over prompts of −A log pi (crpg), of −R log pi of the best valid completion (crraft), or of the "
        "constrained DPO loss (codpo). What crpg falls to says nothing: look at constrained."
    ),
    ("rluf", "kl"): (
        "Mean log-ratio of the model's own answers to the model before training, in nats an answer: of the step's "
        "completions, and with a 95 % interval of held-out answers."
    ),
    ("rluf", "n"): "Held-out prompts answered.",
    ("rluf", "answer_tokens"): "Mean tokens of the model's own answers: of the step's completions, and held out.",
    ("rluf", "answers_ended"): "Share of these answers that came to an end before the longest one allowed.",
    ("sft", "loss"): "Mean negative log-prob of a completion token, in nats; prompts are not learnt.",
    (
        "kto",
        "accuracy",
    ): "Share of the rows on their side of z0: up with a log-ratio above it, down below.",
    ("bco", "accuracy"): "Share of the rows on their side of the shift: up with a reward above delta, down below.",
    ("dpo", "accuracy"): "Share of the pairs whose chosen answer has the higher reward.",
}
"""Where a name means something else under each trainer."""


_WRITERS = {
    **dict.fromkeys(
        ("reward/", "gain/", "win/", "calibrated/", "judge", "missing_rewards", "constrained", "valid", "kl_exceeded",
         "learnt", "heldout/", "monitor"), ("rluf",),
    ),
    "logp": ("kto", "bco", "dpo", "sft"), "kl": ("kto", "bco", "dpo", "rluf"),
    "z0": ("kto",), "delta": ("bco",), "nats": ("sft",), "perplexity": ("sft",),
    **dict.fromkeys(
        ("rewards", "auc", "log_ratio", "share_up", "one_class_share", "pair_accuracy", "accuracy"),
        ("kto", "bco", "dpo"),
    ),
}  # fmt: skip


def writers(key: str) -> tuple[str, ...]:
    """Return the language-model trainers that write a key."""
    return next((names for start, names in _WRITERS.items() if key.startswith(start)), LANGUAGE_TRAINERS)


def explain(key: str, trainer: str = "") -> str:
    """Return the sentence for a key of metrics.jsonl or evaluation.jsonl, empty when it is not one of ours.

    Args:
        trainer: the loop that wrote it; without one, or with a visual one, the visual loop's sentence.
    """
    if trainer in LANGUAGE_TRAINERS:
        return BY_TRAINER.get((trainer, key)) or LANGUAGE.get(key) or LANGUAGE.get(f"{key.partition('/')[0]}/NAME", "")
    if key.startswith("reward/") and key.endswith("/mean"):
        return "Mean of this reward component over the step's samples, before weights."
    if key.startswith("reward/") and key.endswith("/std"):
        return "Standard deviation of this component within a prompt's samples, averaged over prompts."
    if key.startswith("reward/") and key.endswith("/fail_frac"):
        return "Share of the step's samples for which this component is missing."
    return BY_TRAINER.get((trainer, key)) or GLOSSARY.get(key, "")
