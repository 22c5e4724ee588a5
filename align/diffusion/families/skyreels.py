"""SkyReels V1 image-to-video, which DanceGRPO trained: HunyuanVideo with the first frame's latents beside the noise.

Its guidance is classifier-free, and the denoiser is told a scale of 1 besides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from align.diffusion.families import Conditioning, Size, device_of
from align.diffusion.families.hunyuan_video import HunyuanVideo
from align.diffusion.families.videos import first_frames, require_channels
from align.types import Prompt

if TYPE_CHECKING:
    from diffusers import HunyuanSkyreelsImageToVideoPipeline


class SkyReels(HunyuanVideo):
    """Adapter of `diffusers.HunyuanSkyreelsImageToVideoPipeline`.

    The pipeline draws a first frame's latents from the VAE's posterior. Here that draw has a fixed seed, 0, so that a
    prompt means the same whenever it is encoded.
    """

    name = "skyreels"
    takes_image = True
    encoders = ("text_encoder", "text_encoder_2", "vae")
    native = Size(544, 960, 97)
    guidance = 1.0
    pipeline: HunyuanSkyreelsImageToVideoPipeline

    def _require_inputs(self) -> None:
        require_channels(self.pipeline, 2 * self.pipeline.vae.config.latent_channels, self.name, "HunyuanVideoPipeline")

    @torch.no_grad()
    def encode(self, prompts: list[Prompt], size: Size) -> Conditioning:
        """Encode B prompts and their first frames, which become `first` `[B, C, 1, H, W]`."""
        pipe, device, (channels, _, *sides) = self.pipeline, device_of(self.denoiser), self.latent_shape(size)
        height, width = (side * pipe.vae_scale_factor_spatial for side in sides)
        drawn = []
        for image in first_frames(prompts, height, width):
            pixels = pipe.video_processor.preprocess(image, height=height, width=width).to(device, pipe.vae.dtype)
            _, first = pipe.prepare_latents(
                pixels, 1, channels, height, width, 1, torch.float32, device,
                torch.Generator().manual_seed(0), torch.empty(0),
            )  # fmt: skip
            drawn.append(first)
        return {**super().encode(prompts, size), "first": torch.cat(drawn)}

    def predict(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the DiT's velocity at the latents beside those of the first frame, which later frames lack."""
        told = dict(conditioning)
        first = F.pad(told.pop("first"), (0, 0, 0, 0, 0, x.shape[2] - 1))
        return super().predict(torch.cat([x, first], 1), timestep, told)
