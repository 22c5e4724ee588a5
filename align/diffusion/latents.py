"""Latents of given images: encoded once by the autoencoder, and kept.

They are the mean of the autoencoder's posterior, never a draw from it, so an image has one latent. They are kept in
memory up to a limit, and in files named by the image's bytes, the autoencoder's weights and the size, so that another
run does not encode them again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from align.diffusion.policy import Policy
from align.errors import DataError, ModelError
from align.launch import World

if TYPE_CHECKING:
    import numpy as np

FITTING = 1
"""To be raised where an image would become other pixels, so that latents kept before are not taken."""

Pixels = Callable[[int, int], "np.ndarray"]
"""Makes the pixels `[3, height, width]` in [0, 1] of an image."""


def pixel_size(policy: Policy) -> tuple[int, int]:
    """Return height and width of what the policy makes."""
    pipeline = policy.family.pipeline
    factor = getattr(pipeline, "vae_scale_factor", None) or pipeline.vae_scale_factor_spatial
    return policy.latent_shape[-2] * factor, policy.latent_shape[-1] * factor


def autoencoder_key(policy: Policy) -> str:
    """Return 16 hex digits over the autoencoder's configuration and weights."""
    vae = policy.family.pipeline.vae
    config = {name: value for name, value in sorted(vae.config.items()) if not name.startswith("_")}
    digest = hashlib.blake2b(repr(config).encode(), digest_size=8)
    for name, value in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Latents:
    """Clean latents by the hash of their image.

    Args:
        policy: whose autoencoder encodes, at its size.
        root: folder of the files; a folder in it is made for this autoencoder and size.
        limit: bytes kept in memory.
    """

    def __init__(self, policy: Policy, root: Path, limit: int = 1 << 30) -> None:
        self.policy, self.limit = policy, limit
        self.height, self.width = pixel_size(policy)
        self.folder = root / f"latents-{FITTING}-{autoencoder_key(policy)}-{self.height}x{self.width}"
        self._kept: dict[str, Tensor] = {}
        self._bytes = 0

    def add(self, images: Iterable[tuple[str, Pixels]], world: World = World(), batch: int = 16) -> int:
        """Encode the images that are not on disk; each process takes its share. Every process must call it.

        Args:
            images: hash and pixels of each.

        Returns:
            how many were encoded, over all processes.

        Raises:
            DataError: an image that cannot be decoded, or is far from the model's size, on every process.
        """
        wanted = dict(images)
        new = world.gather([key for key in wanted if not self._file(key).is_file()])[0]  # one list, before any is made
        own = [new[i] for i in world.share(len(new))]
        failure: DataError | None = None
        try:
            for start in range(0, len(own), batch):
                self._encode({key: wanted[key] for key in own[start : start + batch]})
        except DataError as error:
            failure = error
        found = next((error for error in world.gather(failure) if error is not None), None)
        if found is not None:
            raise found
        return len(new)

    def stack(self, keys: Sequence[str]) -> Tensor:
        """Return the latents of N images, `[N, ...]`, float32, on the policy's device."""
        return torch.stack([self._get(key) for key in keys]).to(self.policy.device)

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _encode(self, part: dict[str, Pixels]) -> None:
        from safetensors.torch import save_file

        pixels = torch.stack([torch.from_numpy(make(self.height, self.width).copy()) for make in part.values()])
        latents = self.policy.to_latents(pixels).cpu()
        if latents.shape[1:] != self.policy.latent_shape:
            raise ModelError(
                "The autoencoder's latents are not the denoiser's",
                why=f"{tuple(latents.shape[1:])}, expected {self.policy.latent_shape}",
            )
        for key, latent in zip(part, latents, strict=True):
            if not bool(latent.isfinite().all()):
                raise DataError("The autoencoder made a latent that is not finite", where=f"image {key}")
            path = self._file(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            save_file({"latent": latent.contiguous()}, partial)
            partial.replace(path)

    def _get(self, key: str) -> Tensor:
        if key in self._kept:
            return self._kept[key]
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            latent = load_file(self._file(key))["latent"]
        except (OSError, SafetensorError, KeyError) as error:
            raise DataError(
                "A kept latent cannot be read", where=str(self._file(key)), why=str(error),
                do="Remove that folder and start again; images are then encoded anew",
            ) from error  # fmt: skip
        if self._bytes + latent.nbytes <= self.limit:
            self._kept[key], self._bytes = latent, self._bytes + latent.nbytes
        return latent
