"""What listing reads: cards, and where the rewards are. Nothing heavy is imported here."""

from rewards.base import Entry, RewardCard

BRIGHTNESS = Entry(
    RewardCard("smile/brightness", "mean pixel times `gain`", "0 to gain", components=("brightness",), licence="MIT"),
    "align_smile.smile:Brightness",
)
VOWELS = Entry(
    RewardCard("smile/vowels", "share of vowels in the completion", "0 to 1", media="text", components=("vowels",)),
    "align_smile.smile:vowels",
)
