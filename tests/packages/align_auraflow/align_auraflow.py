"""AuraFlow (MMDiT with single-stream blocks, rectified flow), as a package of someone else adds it."""

from __future__ import annotations

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
from align.diffusion.schedules import Schedule, flow_match_schedule


class AuraFlow(TextToImage):
    """Adapter of `diffusers.AuraFlowPipeline`."""

    name = "auraflow"
    component = "transformer"
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "ff.linear_1", "ff.linear_2", "ff.out_projection",
        "ff_context.linear_1", "ff_context.linear_2", "ff_context.out_projection",
    )  # fmt: skip

    def __init__(self, pipeline) -> None:
        self.pipeline = pipeline

    @property
    def denoiser(self):
        return self.pipeline.transformer

    @torch.no_grad()
    def encode(self, prompts: list[str], size: Size) -> Conditioning:
        """Encode with T5: 256 tokens, zeros beyond the prompt, which the transformer attends to."""
        rows, *_ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=device_of(self.denoiser)
        )
        return {"encoder_hidden_states": rows}

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        config = self.denoiser.config
        return image_latent_shape(
            config.in_channels, size, default=config.sample_size, factor=self.pipeline.vae_scale_factor,
            patch=config.patch_size,
        )  # fmt: skip

    def schedule(self, solver_steps: int, shift: float | None, latent_shape: tuple[int, ...]) -> Schedule:
        return flow_match_schedule(self.pipeline.scheduler, solver_steps, shift=shift)

    def predict(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return self.denoiser(x, timestep=timestep / 1000, return_dict=False, **conditioning)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return to_pixels(self.pipeline.vae, latents)

    @torch.no_grad()
    def to_latents(self, pixels: Tensor) -> Tensor:
        return from_pixels(self.pipeline.vae, pixels)
