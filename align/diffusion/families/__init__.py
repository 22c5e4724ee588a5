"""One adapter per model family: what differs between them, and nothing else.

A family wraps a loaded diffusers pipeline and answers six questions. Everything else, from noise and
guidance to training and checkpoints, is shared. To add one, write a class like `sd3.SD3` and name its
pipeline class in `FAMILIES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from align.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from align.diffusion.schedules import Schedule

Conditioning = dict[str, "Tensor"]
"""What the denoiser is conditioned on, by name, batch first."""


class Family(Protocol):
    """What the shared code asks of a model family."""

    name: str
    lora_targets: tuple[str, ...]

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
        """Return the velocity at latents `x` `[B, ...]` and timesteps `[B]`."""

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels in [0, 1], `[B, C, H, W]` or `[B, F, C, H, W]`."""


FAMILIES: Registry[type[Family]] = Registry(
    "model family",
    group="align.families",
    entries={"StableDiffusion3Pipeline": "align.diffusion.families.sd3:SD3"},
)
"""Diffusers pipeline class name, as in `model_index.json`, to the family that runs it."""
