"""Human Preference Score v2: the cosine of a CLIP ViT-H/14 that was fitted to people's choices (arXiv 2306.09341).

Its images are scaled by their longer side and padded with black, not cropped: on a wide image that is another input
altogether. Its cosine is not multiplied by the logit scale. Scores compare images of one prompt only.
"""

from __future__ import annotations

from rewards.towers import ClipReward, Recipe

_PADDED = {"fit": "longest"}


class HPSv2(ClipReward):
    """`cos` of HPS v2.0, the default of the vendor's `score()`."""

    recipe = Recipe("hpsv2", "ViT-H-14", quick_gelu=False, pixels=_PADDED)


class HPSv21(ClipReward):
    """`cos` of HPS v2.1, the default of the vendor's `evaluate()`."""

    recipe = Recipe("hpsv2.1", "ViT-H-14", quick_gelu=False, pixels=_PADDED)
