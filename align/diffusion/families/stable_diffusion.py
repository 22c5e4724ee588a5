"""Stable Diffusion 1.x and 2.x (UNet, variance-preserving diffusion), epsilon and v prediction; and the digits UNet.

Rollouts visit the levels of DDIM, whatever sampler the folder names: its noise schedule, timestep spacing
and prediction type are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from align.diffusion.families import (
    Conditioning,
    Size,
    TextToImage,
    device_of,
    from_pixels,
    image_latent_shape,
    to_pixels,
)
from align.diffusion.schedules import Schedule, ddim_schedule
from align.errors import ModelError

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel


class StableDiffusion(TextToImage):
    """Adapter of `diffusers.StableDiffusionPipeline`."""

    name = "stable_diffusion"
    component = "unet"
    lora_targets = (
        "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
        "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
        "ff.net.0.proj", "ff.net.2",
    )  # fmt: skip

    def __init__(self, pipeline: StableDiffusionPipeline) -> None:
        self.pipeline = pipeline

    @property
    def denoiser(self) -> UNet2DConditionModel:
        """The UNet."""
        return self.pipeline.unet

    @torch.no_grad()
    def encode(self, prompts: list[str], size: Size) -> Conditioning:
        """Encode B prompts with the CLIP text encoder."""
        embeds, _ = self.pipeline.encode_prompt(
            prompts, device=device_of(self.denoiser), num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeds}

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Return `(C, H / f, W / f)` with f the VAE's factor.

        Raises:
            ModelError: a size the VAE cannot take.
        """
        config = self.denoiser.config
        return image_latent_shape(
            config.in_channels, size, default=config.sample_size, factor=self.pipeline.vae_scale_factor,
            patch=1,
        )  # fmt: skip

    def schedule(self, solver_steps: int, shift: float | None, latent_shape: tuple[int, ...]) -> Schedule:
        """Return the levels DDIM visits on the folder's own noise schedule.

        Raises:
            ModelError: a time shift, which only flows have.
        """
        from diffusers import DDIMScheduler

        if shift is not None:
            raise ModelError("A diffusion model has no time shift", do="Set sampler.shift: null")
        # A folder saved with another sampler does not say whether to clip; Stable Diffusion never does.
        config = {"clip_sample": False, **self.pipeline.scheduler.config}
        return ddim_schedule(DDIMScheduler.from_config(config), solver_steps)

    def predict(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the UNet's output: noise, or v, as the schedule says."""
        return self.denoiser(x, timestep, return_dict=False, **conditioning)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images in [0, 1], `[B, C, H, W]`."""
        return to_pixels(self.pipeline.vae, latents)

    @torch.no_grad()
    def to_latents(self, pixels: Tensor) -> Tensor:
        """Return the latents of images in [0, 1], `[B, C, H, W]`."""
        return from_pixels(self.pipeline.vae, pixels)
