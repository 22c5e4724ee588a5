"""Stable Diffusion 3 and 3.5 (MMDiT, rectified flow), and the embedded digits model, which is one."""

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
    resolution_mu,
    to_pixels,
)
from align.diffusion.schedules import Schedule, flow_match_schedule

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline


class SD3(TextToImage):
    """Adapter of `diffusers.StableDiffusion3Pipeline`."""

    name = "sd3"
    component = "transformer"
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")

    def __init__(self, pipeline: StableDiffusion3Pipeline) -> None:
        self.pipeline = pipeline

    @property
    def denoiser(self) -> SD3Transformer2DModel:
        """The MMDiT."""
        return self.pipeline.transformer

    @property
    def idle_layers(self) -> frozenset[str]:
        """The last block discards what its text tokens attend to, so their query projection is idle."""
        return frozenset({f"transformer_blocks.{len(self.denoiser.transformer_blocks) - 1}.attn.add_q_proj"})

    @torch.no_grad()
    def encode(self, prompts: list[str], size: Size) -> Conditioning:
        """Encode B prompts with both CLIP towers and T5 (zeros where the folder has none).

        T5 reads the pipeline's 256 tokens, or what its tokenizer was made for if that is less.
        """
        t5 = self.pipeline.tokenizer_3
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, device=device_of(self.denoiser), do_classifier_free_guidance=False,
            max_sequence_length=256 if t5 is None else min(256, t5.model_max_length),
        )  # fmt: skip
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Return `(C, H / f, W / f)` with f the VAE's factor.

        Raises:
            ModelError: a size the VAE and the patch embedding cannot take.
        """
        pipe = self.pipeline
        return image_latent_shape(
            self.denoiser.config.in_channels, size, default=pipe.default_sample_size,
            factor=pipe.vae_scale_factor, patch=pipe.patch_size,
        )  # fmt: skip

    def schedule(self, solver_steps: int, shift: float | None, latent_shape: tuple[int, ...]) -> Schedule:
        """Return the pipeline's schedule, or DanceGRPO's at an explicit shift."""
        scheduler, mu = self.pipeline.scheduler, None
        if shift is None and scheduler.config.get("use_dynamic_shifting"):
            tokens = (latent_shape[1] // self.pipeline.patch_size) * (latent_shape[2] // self.pipeline.patch_size)
            mu = resolution_mu(scheduler, tokens)
        return flow_match_schedule(scheduler, solver_steps, shift=shift, mu=mu)

    def predict(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the MMDiT's velocity."""
        return self.denoiser(hidden_states=x, timestep=timestep, return_dict=False, **conditioning)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images in [0, 1], `[B, C, H, W]`."""
        return to_pixels(self.pipeline.vae, latents)

    @torch.no_grad()
    def to_latents(self, pixels: Tensor) -> Tensor:
        """Return the latents of images in [0, 1], `[B, C, H, W]`."""
        return from_pixels(self.pipeline.vae, pixels)
