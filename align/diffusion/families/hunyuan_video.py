"""HunyuanVideo, text-to-video (dual- and single-stream DiT with Llama and CLIP, rectified flow, distilled guidance)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from align.diffusion.families import Conditioning, Size, device_of
from align.diffusion.families.videos import TextToVideo, require_channels, to_frames, trimmed
from align.diffusion.schedules import Schedule, flow_match_schedule, flow_schedule
from align.types import Prompt, text_of

if TYPE_CHECKING:
    from diffusers import (
        HunyuanSkyreelsImageToVideoPipeline,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )


class HunyuanVideo(TextToVideo):
    """Adapter of `diffusers.HunyuanVideoPipeline`."""

    name = "hunyuan_video"
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
        "single_transformer_blocks.*.proj_mlp", "single_transformer_blocks.*.proj_out",
    )  # fmt: skip
    encoders = ("text_encoder", "text_encoder_2")
    native = Size(720, 1280, 129)
    fps = 24.0
    guidance = 6.0
    """The pipeline's own embedded guidance."""

    def __init__(self, pipeline: HunyuanVideoPipeline | HunyuanSkyreelsImageToVideoPipeline) -> None:
        self.pipeline = pipeline
        self._require_inputs()

    def _require_inputs(self) -> None:
        channels = self.pipeline.vae.config.latent_channels
        require_channels(self.pipeline, channels, self.name, "HunyuanSkyreelsImageToVideoPipeline")

    @property
    def denoiser(self) -> HunyuanVideoTransformer3DModel:
        """The DiT."""
        return self.pipeline.transformer

    @property
    def embedded_guidance(self) -> float | None:
        """The pipeline's scale, where the denoiser was distilled to be told one."""
        return self.guidance if self.denoiser.config.guidance_embeds else None

    @torch.no_grad()
    def encode(self, prompts: list[Prompt], size: Size) -> Conditioning:
        """Encode B prompts with Llama, each kept at its own length, and with CLIP; with the pipeline's template."""
        embeds, pooled, mask = self.pipeline.encode_prompt(
            [text_of(prompt) for prompt in prompts], device=device_of(self.denoiser)
        )
        return {
            "encoder_hidden_states": trimmed(embeds, mask.sum(1)),
            "encoder_attention_mask": trimmed(mask, mask.sum(1)),
            "pooled_projections": pooled,
        }

    def schedule(self, solver_steps: int, shift: float | None, latent_shape: tuple[int, ...]) -> Schedule:
        """Return the pipeline's schedule, or the levels at an explicit shift."""
        scheduler = self.pipeline.scheduler
        if shift is not None:
            return flow_match_schedule(scheduler, solver_steps, shift=shift)
        scheduler.set_timesteps(sigmas=np.linspace(1, 0, solver_steps + 1)[:-1], device="cpu")
        return flow_schedule(scheduler.sigmas, scheduler.timesteps)

    def predict(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the DiT's velocity; it is told 1000 times the guidance."""
        told = dict(conditioning)
        if "guidance" in told:
            told["guidance"] = told["guidance"] * 1000.0
        return self.denoiser(hidden_states=x, timestep=timestep, return_dict=False, **told)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return videos in [0, 1], `[B, F, C, H, W]`."""
        vae = self.pipeline.vae
        return to_frames(vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0])

    @torch.no_grad()
    def to_latents(self, pixels: Tensor) -> Tensor:
        """Return the latents of images in [0, 1], `[B, C, H, W]`, as videos of one frame."""
        vae = self.pipeline.vae
        found = vae.encode((2 * pixels - 1)[:, :, None].to(vae.dtype)).latent_dist.mode()
        return found.float() * vae.config.scaling_factor
