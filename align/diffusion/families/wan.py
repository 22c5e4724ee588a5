"""Wan 2.1, text-to-video and image-to-video (DiT with UMT5, rectified flow).

Wan is published with a UniPC sampler. Its levels are those of the flow at the folder's `flow_shift`, which rollouts
visit with steps of their own. A folder with a flow-matching Euler sampler is taken as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from align.diffusion.families import Conditioning, Size, device_of
from align.diffusion.families.videos import (
    TextToVideo,
    first_frames,
    require_channels,
    to_frames,
    trimmed,
)
from align.diffusion.schedules import Schedule, flow_match_schedule
from align.errors import ModelError
from align.types import Prompt, text_of

if TYPE_CHECKING:
    from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel

TOKENS = 512  # the text that the denoiser attends to, padding included


class Wan(TextToVideo):
    """Adapter of `diffusers.WanPipeline`.

    Raises:
        ModelError: a folder of Wan 2.2, which has two denoisers or a timestep of its own for the first frame.
    """

    name = "wan"
    lora_targets = (
        "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
        "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "attn2.add_k_proj", "attn2.add_v_proj",
        "ffn.net.0.proj", "ffn.net.2",
    )  # fmt: skip
    native = Size(480, 832, 81)
    fps = 16.0

    def __init__(self, pipeline: WanPipeline | WanImageToVideoPipeline) -> None:
        self.pipeline = pipeline
        if pipeline.transformer_2 is not None or pipeline.config.expand_timesteps or pipeline.transformer is None:
            raise ModelError(
                "Only Wan 2.1 is run, which has one denoiser", where="model_index.json",
                why="this folder is laid out as Wan 2.2", do="Give a folder of Wan 2.1",
            )  # fmt: skip
        self._require_inputs()

    def _require_inputs(self) -> None:
        require_channels(self.pipeline, self.pipeline.vae.config.z_dim, self.name, "WanImageToVideoPipeline")

    @property
    def denoiser(self) -> WanTransformer3DModel:
        """The DiT."""
        return self.pipeline.transformer

    @torch.no_grad()
    def encode(self, prompts: list[Prompt], size: Size) -> Conditioning:
        """Encode B prompts with UMT5, each kept at its own length."""
        embeds, _ = self.pipeline.encode_prompt(
            [text_of(prompt) for prompt in prompts], do_classifier_free_guidance=False, max_sequence_length=TOKENS,
            device=device_of(self.denoiser),
        )  # fmt: skip
        used = embeds.any(-1) * torch.arange(1, TOKENS + 1, device=embeds.device)  # the pipeline pads with zeros
        return {"encoder_hidden_states": trimmed(embeds, used.amax(1))}

    def schedule(self, solver_steps: int, shift: float | None, latent_shape: tuple[int, ...]) -> Schedule:
        """Return the pipeline's schedule, or the levels at a shift: an explicit one, or a UniPC folder's own.

        Raises:
            ModelError: a sampler that is none of a flow.
        """
        config = self.pipeline.scheduler.config
        if shift is None and config._class_name != "FlowMatchEulerDiscreteScheduler":
            if not config.get("use_flow_sigmas"):
                raise ModelError(
                    "The folder's sampler is none of a flow", where="scheduler/scheduler_config.json",
                    why=f"{config._class_name} without use_flow_sigmas", do="Set sampler.shift to the model's own",
                )  # fmt: skip
            shift = config.flow_shift
        return flow_match_schedule(self.pipeline.scheduler, solver_steps, shift=shift)

    def predict(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the DiT's velocity."""
        text = conditioning["encoder_hidden_states"]
        text = F.pad(text, (0, 0, 0, TOKENS - text.shape[1]))
        return self.denoiser(x, timestep, text, conditioning.get("image"), return_dict=False)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return videos in [0, 1], `[B, F, C, H, W]`."""
        vae, (mean, std) = self.pipeline.vae, self._scale(latents)
        return to_frames(vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0])

    @torch.no_grad()
    def to_latents(self, pixels: Tensor) -> Tensor:
        """Return the latents of images in [0, 1], `[B, C, H, W]`, as videos of one frame."""
        vae, (mean, std) = self.pipeline.vae, self._scale(pixels)
        return (vae.encode((2 * pixels - 1)[:, :, None].to(vae.dtype)).latent_dist.mode().float() - mean) / std

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipeline.vae.config
        mean, std = (like.new_tensor(config[n]).view(-1, 1, 1, 1) for n in ("latents_mean", "latents_std"))
        return mean, std


class WanImageToVideo(Wan):
    """Adapter of `diffusers.WanImageToVideoPipeline`: each prompt brings the first frame of its video.

    The denoiser reads the noisy latents beside a mask of the known frames and the first frame as the VAE encodes it,
    and attends to a CLIP encoder's view of it.
    """

    name = "wan_image_to_video"
    takes_image = True
    encoders = ("text_encoder", "image_encoder", "vae")

    def _require_inputs(self) -> None:
        pipe = self.pipeline
        require_channels(pipe, 2 * pipe.vae.config.z_dim + pipe.vae_scale_factor_temporal, self.name, "WanPipeline")
        if pipe.image_encoder is None or pipe.image_processor is None:
            raise ModelError("The image encoder is missing", where="model_index.json", do="Give a folder of Wan 2.1")

    @torch.no_grad()
    def encode(self, prompts: list[Prompt], size: Size) -> Conditioning:
        """Encode B prompts and their first frames, which become `condition` `[B, 4 + C, F, H, W]` and `image`."""
        pipe, device, (channels, frames, *sides) = self.pipeline, device_of(self.denoiser), self.latent_shape(size)
        height, width = (side * pipe.vae_scale_factor_spatial for side in sides)
        number = (frames - 1) * pipe.vae_scale_factor_temporal + 1
        images, conditions = first_frames(prompts, height, width), []
        for image in images:  # one by one, as the pipeline does
            pixels = pipe.video_processor.preprocess(image, height=height, width=width).to(device)
            _, condition = pipe.prepare_latents(
                pixels, 1, channels, height, width, number, torch.float32, device, latents=torch.empty(0)
            )
            conditions.append(condition[0])
        seen = torch.cat([pipe.encode_image(image, device) for image in images])
        return {**super().encode(prompts, size), "condition": torch.stack(conditions), "image": seen}

    def predict(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the DiT's velocity at the latents beside the first frame."""
        return super().predict(torch.cat([x, conditioning["condition"]], 1), timestep, conditioning)
