"""What the families of videos have in common: their sizes, their first frames, and pixels out of a video VAE."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from align.diffusion.families import Size, TextToImage
from align.errors import DataError, ModelError
from align.images import read_first_frame
from align.types import ImagePrompt, Prompt

if TYPE_CHECKING:
    from PIL.Image import Image


class TextToVideo(TextToImage):
    """Videos from text, as latents `[C, F, H, W]`."""

    component = "transformer"
    native: Size
    """What the pipeline makes by itself."""

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """Return `(C, (F - 1) / t + 1, H / s, W / s)` with the VAE's factors t and s; what `size` lacks is `native`.

        Raises:
            ModelError: sides that are no multiples of s times the patch, or frames that are not 1 more than one of t.
        """
        pipe, config = self.pipeline, self.pipeline.transformer.config
        patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[-1]
        temporal, spatial = pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial
        height, width, frames = (getattr(size, n) or getattr(self.native, n) for n in ("height", "width", "frames"))
        multiple = spatial * patch
        if height % multiple or width % multiple:
            nearest = "x".join(str(max(1, round(side / multiple)) * multiple) for side in (height, width))
            raise ModelError(
                f"This model cannot make videos of {height}x{width} pixels", where="sampler.height, sampler.width",
                why=f"height and width must be multiples of {multiple}", do=f"Try {nearest}",
            )  # fmt: skip
        if (frames - 1) % temporal:
            raise ModelError(
                f"This model cannot make videos of {frames} frames", where="sampler.frames",
                why=f"their number must be 1 more than a multiple of {temporal}",
                do=f"Set sampler.frames to {round((frames - 1) / temporal) * temporal + 1}",
            )  # fmt: skip
        return (config.out_channels, (frames - 1) // temporal + 1, height // spatial, width // spatial)


def first_frames(prompts: list[Prompt], height: int, width: int) -> list[Image]:
    """Return the images that B videos of these proportions start from, each in its own size.

    Raises:
        DataError: a prompt without an image, or an image that cannot be used.
    """
    bare = [prompt for prompt in prompts if not isinstance(prompt, ImagePrompt)]
    if bare:
        raise DataError(
            "A prompt has no first frame", where=str(bare[0])[:80], do="Name the column of images: prompts.image_column"
        )
    return [read_first_frame(prompt.image, height, width) for prompt in prompts]


def trimmed(rows: Tensor, lengths: Tensor) -> list[Tensor]:
    """Return each of B rows `[L, D]` at its own length, without the padding that a pipeline adds."""
    return [row[: int(length)] for row, length in zip(rows, lengths, strict=True)]


def to_frames(decoded: Tensor) -> Tensor:
    """Return what a video VAE decoded, `[B, C, F, H, W]` in [-1, 1], as frames in [0, 1], `[B, F, C, H, W]`."""
    return (decoded.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)


def require_channels(pipeline: object, wanted: int, name: str, other: str) -> None:
    """Refuse a denoiser that reads another number of channels than its family gives it.

    Raises:
        ModelError: naming both numbers, and the family that the folder may be of.
    """
    found = pipeline.transformer.config.in_channels
    if found != wanted:
        raise ModelError(
            f"This folder is not of the family {name}", where="transformer/config.json",
            why=f"its transformer reads {found} channels and {name} gives it {wanted}", do=f"It may be one of {other}",
        )  # fmt: skip
