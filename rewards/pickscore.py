"""PickScore v1: the logit of a CLIP ViT-H/14 that was fitted to Pick-a-Pic's choices (arXiv 2305.01569)."""

from __future__ import annotations

from rewards.towers import ClipReward, Recipe


class PickScore(ClipReward):
    """`exp(logit_scale) cos`, about `100 cos`; its softmax over images of one prompt is the share of people who would
    choose each."""

    recipe = Recipe(
        "pickscore", "ViT-H-14", quick_gelu=False, pixels={"crop": "floor"},
        value=lambda cosine, logit_scale: logit_scale.exp() * cosine,
    )  # fmt: skip
