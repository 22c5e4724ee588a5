"""The cards of the rewards that ship, so that they can be listed without importing what they need."""

from __future__ import annotations

from rewards.base import RewardCard, register

_DIGITS = {"licence": "CC BY 4.0 (UCI digits)", "needs": ("torch", "scikit-learn")}

BUILT_IN: tuple[tuple[RewardCard, str], ...] = (
    (
        RewardCard(
            "digits/legibility",
            "log-probability of the prompted digit under a classifier trained on its own split, not below -8",
            "-8 to 0 nats",
            size="43 k weights",
            **_DIGITS,
        ),
        "rewards.digits:Legibility",
    ),
    (
        RewardCard(
            "digits/ink_band",
            "minus the distance of the mean ink to the prompt's band (thin, bold: outer thirds of the digit's ink; "
            "plain: its central 94 %), in standard deviations of the digit's ink; 0 inside the band, not below -4",
            "-4 to 0 standard deviations",
            **_DIGITS,
        ),
        "rewards.digits:InkBand",
    ),
    (
        RewardCard(
            "digits/raw_ink",
            "mean ink of the image, whatever was asked for: made to be hacked, and used to show what that looks like",
            "0 to 1",
            direction="none",
            needs=("torch",),
        ),
        "rewards.digits:RawInk",
    ),
    (
        RewardCard(
            "threshold",
            "1 where another reward (argument `reward`, with `args`) scores above `at`, else 0; missing where it is",
            "0 or 1",
            media="any",
        ),
        "rewards.thumbs:Threshold",
    ),
)
"""Card and home of every reward that ships."""

for _card, _home in BUILT_IN:
    register(_card, _home)
