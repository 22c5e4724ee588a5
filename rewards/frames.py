"""A reward of images on the frames of videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from align.errors import ConfigError
from align.types import Samples, Scores
from rewards.base import REWARDS, RewardCard, get_reward, identity_of
from rewards.media import require_media


class Frames:
    """The mean score of `count` frames of a video, evenly spread from the first to the last.

    A video one of whose frames cannot be scored is missing. DanceGRPO's released Wan script scores the first frame,
    which is `count` 1. How a video moves is not seen: a still one may score best.

    Args:
        reward: the registered name of a reward of images.
        args: its arguments.
        count: how many frames are scored; all of a shorter video.

    Raises:
        ConfigError: a reward that does not score images, or no frame.
    """

    def __init__(self, reward: str, args: Mapping[str, Any] | None = None, count: int = 4) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError("Frames are scored by a whole number of 1 or more", where=f"count {count!r}")
        self.card: RewardCard = REWARDS.get("frames").card
        self.inner, self.count = get_reward(reward, **(args or {})), count
        media = self.inner.card.media
        if media not in ("image", "any"):
            raise ConfigError(
                f"The reward {reward!r} scores {media}s", where="frames", why="frames are scored as images",
                do="Name it by itself" if media == "video" else "Name a reward of images",
            )  # fmt: skip
        self.names = self.inner.names

    def identity(self) -> str:
        """Return a hash over the other reward and the number of frames."""
        return identity_of(self.card, {"inner": self.inner.identity(), "count": self.count})

    def score(self, samples: Samples) -> Scores:
        """Return the means, `[B, K]`."""
        require_media(samples, "video", self.card.name)
        parts = [video.spread(self.count) for video in samples.videos]
        owner = [i for i, part in enumerate(parts) for _ in part]
        frames = [frame for part in parts for frame in part]
        same = len({frame.shape for frame in frames}) == 1
        scored = self.inner.score(
            Samples(
                prompts=[samples.prompts[i] for i in owner],
                images=torch.stack(frames) if same else frames,
                metadata=[samples.metadata[i] for i in owner] if samples.metadata else (),
            )
        )
        rows = np.split(np.arange(len(owner)), np.cumsum([len(part) for part in parts])[:-1])
        values = np.stack([scored.values[own].mean(0) for own in rows])  # NaN where a frame is missing
        errors = [next((scored.errors[j] for j in own if scored.errors[j]), "") for own in rows]
        return Scores(values, np.isfinite(values), self.names, tuple(errors))
