"""FLUX.1 (MMDiT with single-stream blocks, rectified flow); the guidance scale is an input of FLUX.1-dev."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from align.diffusion.families import Conditioning, Size, device_of, from_pixels, to_pixels
from align.diffusion.families.packed import PackedTextToImage

if TYPE_CHECKING:
    from diffusers import FluxPipeline, FluxTransformer2DModel


class Flux(PackedTextToImage):
    """Adapter of `diffusers.FluxPipeline`."""

    name = "flux"
    component = "transformer"
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
        "single_transformer_blocks.*.proj_mlp", "single_transformer_blocks.*.proj_out",
    )  # fmt: skip
    encoders = ("text_encoder", "text_encoder_2")

    def __init__(self, pipeline: FluxPipeline) -> None:
        self.pipeline = pipeline

    @property
    def embedded_guidance(self) -> float | None:
        """3.5, the pipeline's own; None for FLUX.1-schnell, which is told none."""
        return 3.5 if self.denoiser.config.guidance_embeds else None

    @property
    def denoiser(self) -> FluxTransformer2DModel:
        """The transformer."""
        return self.pipeline.transformer

    @torch.no_grad()
    def encode(self, prompts: list[str], size: Size) -> Conditioning:
        """Encode B prompts with CLIP and T5.

        T5 reads the pipeline's 512 tokens, or what its tokenizer was made for if that is less. There is no mask:
        the transformer attends to the padding, so it is kept.
        """
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, device=device_of(self.denoiser),
            max_sequence_length=min(512, self.pipeline.tokenizer_2.model_max_length),
        )  # fmt: skip
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def predict(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the transformer's velocity."""
        pipe, (batch, channels, height, width) = self.pipeline, x.shape
        velocity = self.denoiser(
            hidden_states=pipe._pack_latents(x, batch, channels, height, width),
            timestep=timestep / 1000,
            img_ids=pipe._prepare_latent_image_ids(batch, height // 2, width // 2, x.device, x.dtype),
            txt_ids=x.new_zeros(conditioning["encoder_hidden_states"].shape[1], 3),
            return_dict=False,
            **conditioning,
        )[0]
        return pipe._unpack_latents(velocity, height, width, 1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images in [0, 1], `[B, C, H, W]`."""
        return to_pixels(self.pipeline.vae, latents)

    @torch.no_grad()
    def to_latents(self, pixels: Tensor) -> Tensor:
        """Return the latents of images in [0, 1], `[B, C, H, W]`."""
        return from_pixels(self.pipeline.vae, pixels)
