"""Given images in the place of samples, so that supervised training and training by rewards share one loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from align.diffusion.digits_data import cache_directory
from align.diffusion.kernels import StepTable
from align.diffusion.latents import Latents, pixel_size
from align.diffusion.policy import Policy
from align.diffusion.rollout import Rollout, as_samples
from align.errors import ConfigError
from align.image_feedback import fitted, load_image_feedback
from align.images import ImageFile
from align.launch import World
from align.offline_checks import BUILTIN_ROWS
from align.seeding import permutation
from align.types import Samples
from trainers.offline_rows import digits_rows


def liked_images(path: str, model: str) -> dict[str, list[ImageFile]]:
    """Return the images of a file of rows that have a thumb up or were chosen, by prompt.

    Raises:
        DataError: see `load_image_feedback`.
    """
    rows = load_image_feedback(digits_rows(path, model) if path in BUILTIN_ROWS else path)
    found: dict[str, list[ImageFile]] = {}
    for row in rows.for_loss("kto", both=False).rows:
        if row.label:
            found.setdefault(row.prompt, []).extend(row.images)
    return found


class GivenImages:
    """Images by prompt, dealt out like the members of a group.

    Args:
        images: those of each prompt.

    Raises:
        ConfigError: a prompt that is to be trained on and has no image.
    """

    def __init__(self, images: Mapping[str, Sequence[ImageFile]], prompts: Sequence[str], source: str) -> None:
        self.images = images
        bare = [prompt for prompt in prompts if not images.get(prompt)]
        if bare:
            raise ConfigError(
                "A prompt has no image to learn from", where=f"objective.images, {source}",
                why=f"{len(bare)} of {len(prompts)} have none, the first of them {bare[0]!r}",
                do="Give rows with a thumb up of every training prompt, or train on prompts that have one",
            )  # fmt: skip
        self.prompts = list(dict.fromkeys(prompts))

    def encode(self, policy: Policy, world: World) -> None:
        """Encode every image once, before the first step."""
        self.latents = Latents(policy, cache_directory())
        wanted = [image for prompt in self.prompts for image in self.images[prompt]]
        self.latents.add([(image.digest, partial(fitted, image)) for image in wanted], world)

    def rollout(
        self, policy: Policy, prompts: Sequence[str], group_size: int, table: StepTable, key: tuple[int | str, ...],
        world: World, deliver: Callable[[Samples], object] | None,
    ) -> Rollout:  # fmt: skip
        """Return G images for each prompt as if they had been sampled: which ones is a function of `key` and prompt.

        A prompt with fewer images than G gives some of them again.
        """
        rows = world.share(len(prompts) * group_size)
        flat = [prompts[r // group_size] for r in rows]
        orders = {p: permutation(len(self.images[p]), *key, p, "given") for p in set(flat)}
        chosen = [self.images[p][orders[p][r % group_size % len(orders[p])]] for p, r in zip(flat, rows, strict=True)]
        pixels = np.stack([fitted(image, *pixel_size(policy)) for image in chosen])
        samples = as_samples(policy, torch.from_numpy(pixels), flat)
        if deliver is not None:
            deliver(samples)
        return Rollout(
            prompts=tuple(flat), rows=rows, key=key, group_size=group_size, table=table,
            x=self.latents.stack([image.digest for image in chosen])[:, None], logp=torch.empty(len(flat), 0),
            mean=None, samples=samples, decode_seconds=0.0,
        )  # fmt: skip
