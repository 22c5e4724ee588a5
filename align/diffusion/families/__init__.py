"""One adapter per model family: what differs between them, and nothing else.

A family wraps a loaded diffusers pipeline and answers the questions of `Family`. Everything else, from noise and
guidance to training and checkpoints, is shared. To add one, write a class like `sd3.SD3` and name its
pipeline class in `FAMILIES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from align.errors import ModelError
from align.registry import Registry, suggest
from align.textfiles import read_json

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
    from torch import Tensor, nn

    from align.diffusion.schedules import Schedule
    from align.types import Prompt

Conditioning = dict[str, "Tensor"]
"""What the denoiser is conditioned on, by name, batch first."""


@dataclass(frozen=True)
class Size:
    """What to make: pixels a side, frames, and frames a second. None is the family's own; images have no frames."""

    height: int | None = None
    width: int | None = None
    frames: int | None = None
    fps: float | None = None


class Family(Protocol):
    """What the shared code asks of a model family."""

    name: str
    component: str
    """Name of the denoiser among the pipeline's components."""
    lora_targets: tuple[str, ...]
    pipeline: DiffusionPipeline
    unconditional: str
    """The text of the branch without a prompt, as the pipeline has it."""
    takes_image: bool
    """Whether every prompt comes with a first frame."""
    fps: float | None
    """Frames a second of what it makes; None makes images."""

    @property
    def embedded_guidance(self) -> float | None:
        """The pipeline's own value of the guidance scale that the denoiser is told; None where it is told none."""

    @property
    def denoiser(self) -> nn.Module:
        """The module whose weights are trained."""

    @property
    def idle_layers(self) -> frozenset[str]:
        """Layers whose output reaches nothing, and which an adapter would never move."""

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the components that `encode` runs, for them to be elsewhere meanwhile."""

    def encode(self, prompts: list[Prompt], size: Size) -> Conditioning:
        """Encode B prompts with the pipeline's own encoders: their text, and their first frame at `size`.

        A value is a list of B tensors where the prompts' own differ in length.
        """

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Return the shape of one latent, `[C, H, W]` or `[C, F, H, W]`."""

    def schedule(self, solver_steps: int, shift: float | None, latent_shape: tuple[int, ...]) -> Schedule:
        """Return the levels and timesteps of S solver steps."""

    def predict(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return what the schedule says the model predicts, at latents `x` `[B, ...]` and timesteps `[B]`.

        `conditioning` is of `encode`; with `embedded_guidance`, it holds "guidance" `[B]` too.
        """

    def guide(self, uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
        """Put the two branches of classifier-free guidance together, as the pipeline does."""

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels in [0, 1], `[B, C, H, W]` or `[B, F, C, H, W]`."""

    def to_latents(self, pixels: Tensor) -> Tensor:
        """Return the latents that `decode` makes of pixels in [0, 1], `[B, C, H, W]` in and `[B, ...]` out.

        The mean of the autoencoder's posterior, scaled as the denoiser has it; learning from given images needs it. A
        model of videos takes an image for a video of one frame.
        """


FAMILIES: Registry[type[Family]] = Registry(
    "model family",
    group="align.families",
    entries={
        "FluxPipeline": "align.diffusion.families.flux:Flux",
        "HunyuanSkyreelsImageToVideoPipeline": "align.diffusion.families.skyreels:SkyReels",
        "HunyuanVideoPipeline": "align.diffusion.families.hunyuan_video:HunyuanVideo",
        "QwenImagePipeline": "align.diffusion.families.qwen_image:QwenImage",
        "StableDiffusion3Pipeline": "align.diffusion.families.sd3:SD3",
        "StableDiffusionPipeline": "align.diffusion.families.stable_diffusion:StableDiffusion",
        "StableDiffusionXLPipeline": "align.diffusion.families.sdxl:StableDiffusionXL",
        "WanImageToVideoPipeline": "align.diffusion.families.wan:WanImageToVideo",
        "WanPipeline": "align.diffusion.families.wan:Wan",
    },
)
"""Diffusers pipeline class name, as in `model_index.json`, to the family that runs it."""


def read_index(folder: Path, family: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return the class of a pipeline folder, a key of `FAMILIES`, and what its `model_index.json` lists.

    Args:
        family: a pipeline class name that overrides the one in `model_index.json`.

    Raises:
        ModelError: not a pipeline folder, or a pipeline of no known family.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(
            "This is not a diffusers pipeline folder",
            where=str(folder),
            why="it has no model_index.json" if folder.is_dir() else "there is no such folder",
            do="Give a folder written by save_pretrained, or 'digits' for the embedded model",
        )
    try:
        listed = read_json(index, ModelError)
        own = listed["_class_name"]
        if not isinstance(own, str):
            raise TypeError(f"its class is {own!r}, and code of a folder is never run")
        name = family or own
    except (KeyError, TypeError) as error:
        raise ModelError("A pipeline's model_index.json cannot be read", where=str(index), why=str(error)) from error
    if name not in FAMILIES:
        raise ModelError(
            f"No model family runs {name!r}", where=str(index),
            why="neither align nor an installed package, by the entry-point group align.families, has one of that name",
            do=suggest(name, FAMILIES),
        )  # fmt: skip
    return name, listed


def require_encoding(family: Family | type[Family]) -> None:
    """Refuse a family that makes no latents of given images.

    Raises:
        ModelError: it has no `to_latents`.
    """
    if not hasattr(family, "to_latents"):
        raise ModelError(
            f"The model family {family.name!r} cannot learn from given images",
            why="its class has no method to_latents",
            do="Add it: what `decode` makes pixels of, in the other direction",
        )


def device_of(module: nn.Module) -> torch.device:
    """Return where a module's weights are."""
    return next(module.parameters()).device


class TextToImage:
    """What most families of images from text have in common: no first frame, no frames, plain guidance."""

    unconditional = ""
    takes_image = False
    fps: float | None = None
    embedded_guidance: float | None = None
    idle_layers: frozenset[str] = frozenset()
    encoders: tuple[str, ...] = ("text_encoder",)

    @staticmethod
    def guide(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
        """Return `uncond + scale (cond - uncond)`."""
        return uncond + scale * (cond - uncond)


def image_latent_shape(channels: int, size: Size, *, default: int, factor: int, patch: int) -> tuple[int, int, int]:
    """Return `(C, H / factor, W / factor)`; a side that is None is `default` latents long.

    Raises:
        ModelError: a side that is no multiple of `factor * patch`, or frames.
    """
    if size.frames is not None:
        raise ModelError("This model makes images", why=f"sampler.frames is {size.frames}", do="Set it to null")
    height, width = (side or default * factor for side in (size.height, size.width))
    multiple = factor * patch
    if height % multiple or width % multiple:
        nearest = "x".join(str(max(1, round(side / multiple)) * multiple) for side in (height, width))
        raise ModelError(
            f"This model cannot make {height}x{width} images",
            where="sampler.height, sampler.width",
            why=f"height and width must be multiples of {multiple}",
            do=f"Try {nearest}",
        )
    return (channels, height // factor, width // factor)


def resolution_mu(scheduler: FlowMatchEulerDiscreteScheduler, tokens: int) -> float:
    """Return the mu of a schedule that shifts with resolution: linear in the number of image tokens."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    return calculate_shift(tokens, *(scheduler.config.get(name, value) for name, value in defaults.items()))


def to_pixels(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Decode the latents of an image VAE to pixels in [0, 1]."""
    latents = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    images = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    return (images.float() / 2 + 0.5).clamp(0, 1)


def from_pixels(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Encode pixels in [0, 1] with an image VAE: `(mean of the posterior - shift) scale`, what `to_pixels` undoes."""
    mean = vae.encode((2 * pixels - 1).to(vae.dtype)).latent_dist.mode()
    return (mean.float() - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor
