"""One adapter per model family: what differs between them, and nothing else.

A family wraps a loaded diffusers pipeline and answers six questions. Everything else, from noise and
guidance to training and checkpoints, is shared. To add one, write a class like `sd3.SD3` and name its
pipeline class in `FAMILIES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from align.errors import ModelError
from align.registry import Registry

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline
    from torch import Tensor, nn

    from align.diffusion.schedules import Schedule

Conditioning = dict[str, "Tensor"]
"""What the denoiser is conditioned on, by name, batch first."""


class Family(Protocol):
    """What the shared code asks of a model family."""

    name: str
    component: str
    """Name of the denoiser among the pipeline's components."""
    lora_targets: tuple[str, ...]
    pipeline: DiffusionPipeline

    @property
    def denoiser(self) -> nn.Module:
        """The module whose weights are trained."""

    @property
    def idle_layers(self) -> frozenset[str]:
        """Layers whose output reaches nothing, and which an adapter would never move."""

    def encode(self, prompts: list[str]) -> Conditioning:
        """Encode B prompts with the pipeline's own text encoders."""

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        """Return the shape of one latent, the pipeline's default size where None."""

    def schedule(self, solver_steps: int, shift: float | None, latent_shape: tuple[int, ...]) -> Schedule:
        """Return the levels and timesteps of S solver steps."""

    def predict(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return what the schedule says the model predicts, at latents `x` `[B, ...]` and timesteps `[B]`."""

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels in [0, 1], `[B, C, H, W]` or `[B, F, C, H, W]`."""


FAMILIES: Registry[type[Family]] = Registry(
    "model family",
    group="align.families",
    entries={
        "StableDiffusion3Pipeline": "align.diffusion.families.sd3:SD3",
        "StableDiffusionPipeline": "align.diffusion.families.stable_diffusion:StableDiffusion",
    },
)
"""Diffusers pipeline class name, as in `model_index.json`, to the family that runs it."""


def image_latent_shape(
    channels: int, size: tuple[int | None, int | None], *, default: int, factor: int, patch: int
) -> tuple[int, int, int]:
    """Return `(C, H / factor, W / factor)`; a side that is None is `default` latents long.

    Raises:
        ModelError: a side that is no multiple of `factor * patch`.
    """
    height, width = (side or default * factor for side in size)
    multiple = factor * patch
    if height % multiple or width % multiple:
        nearest = "x".join(str(max(1, round(side / multiple)) * multiple) for side in (height, width))
        raise ModelError(
            f"This model cannot make {height}x{width} images",
            why=f"height and width must be multiples of {multiple}",
            do=f"Try {nearest}",
        )
    return (channels, height // factor, width // factor)


def to_pixels(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Decode the latents of an image VAE to pixels in [0, 1]."""
    latents = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    images = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    return (images.float() / 2 + 0.5).clamp(0, 1)
