"""Stable Diffusion XL (UNet, variance-preserving diffusion): Stable Diffusion with two text encoders and a size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from align.diffusion.families import Conditioning, Size, device_of
from align.diffusion.families.stable_diffusion import StableDiffusion
from align.diffusion.schedules import Schedule
from align.errors import ModelError

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline


class StableDiffusionXL(StableDiffusion):
    """Adapter of `diffusers.StableDiffusionXLPipeline`, without its watermark."""

    name = "sdxl"
    encoders = ("text_encoder", "text_encoder_2")
    pipeline: StableDiffusionXLPipeline

    @torch.no_grad()
    def encode(self, prompts: list[str], size: Size) -> Conditioning:
        """Encode B prompts with both CLIP towers, and the size the UNet is told: original, crop and target.

        The branch without a prompt is zeros where the folder asks for it, as `force_zeros_for_empty_prompt` does.
        """
        pipe, device = self.pipeline, device_of(self.denoiser)
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        if pipe.config.force_zeros_for_empty_prompt:
            written = torch.tensor([prompt != self.unconditional for prompt in prompts], device=device)
            embeds, pooled = embeds * written[:, None, None], pooled * written[:, None]
        sides = tuple(side * pipe.vae_scale_factor for side in self.latent_shape(size)[1:])
        told = torch.tensor([(*sides, 0, 0, *sides)], dtype=torch.float32, device=device)
        return {
            "encoder_hidden_states": embeds,
            "text_embeds": pooled,
            "time_ids": told.expand(len(prompts), -1),
        }

    def schedule(self, solver_steps: int, shift: float | None, latent_shape: tuple[int, ...]) -> Schedule:
        """Return the levels DDIM visits on the folder's own noise schedule.

        Raises:
            ModelError: a time shift, or a model of the EDM formulation, which has other levels.
        """
        if "sigma_data" in self.pipeline.scheduler.config:
            raise ModelError(
                "A model of the EDM formulation cannot be trained here", where=type(self.pipeline.scheduler).__name__
            )
        return super().schedule(solver_steps, shift, latent_shape)

    def predict(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the UNet's output: noise, or v, as the schedule says."""
        added = {name: conditioning[name] for name in ("text_embeds", "time_ids")}
        text = conditioning["encoder_hidden_states"]
        return self.denoiser(
            x, timestep, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False
        )[0]  # fmt: skip
