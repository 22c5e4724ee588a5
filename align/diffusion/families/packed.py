"""What pipelines share that pack 2 x 2 latents into a token: FLUX.1 and Qwen-Image."""

from __future__ import annotations

import numpy as np

from align.diffusion.families import Size, TextToImage, image_latent_shape, resolution_mu
from align.diffusion.schedules import Schedule, flow_match_schedule


class PackedTextToImage(TextToImage):
    """A family whose transformer reads tokens of 2 x 2 latents."""

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Return `(C, H / f, W / f)` with f the VAE's factor, before the packing of 2 x 2 latents into a token.

        Raises:
            ModelError: a size the VAE and the packing cannot take.
        """
        pipe = self.pipeline
        return image_latent_shape(
            self.denoiser.config.in_channels // 4, size, default=pipe.default_sample_size,
            factor=pipe.vae_scale_factor, patch=2,
        )  # fmt: skip

    def schedule(self, solver_steps: int, shift: float | None, latent_shape: tuple[int, ...]) -> Schedule:
        """Return the pipeline's schedule, 1 to 1 / S, shifted with resolution; or DanceGRPO's at an explicit shift."""
        scheduler, tokens = self.pipeline.scheduler, (latent_shape[1] // 2) * (latent_shape[2] // 2)
        return flow_match_schedule(
            scheduler, solver_steps, shift=shift, mu=resolution_mu(scheduler, tokens),
            sigmas=np.linspace(1.0, 1 / solver_steps, solver_steps),
        )  # fmt: skip
