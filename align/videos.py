"""Videos as files that players open, and as strips of frames that a page shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from align.errors import DataError, first_line

if TYPE_CHECKING:
    import torch

    from align.types import Samples, Video

STRIP_FRAMES, STRIP_WIDTH = 4, 640


def save_video(path: str | Path, video: Video) -> None:
    """Write an MP4 (H.264, yuv420p) at the video's own frame rate, replacing the file as a whole.

    An odd side loses its last row or column, which the format cannot hold.

    Raises:
        DataError: imageio-ffmpeg is not installed, or the encoder refuses the frames.
    """
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise DataError("Writing videos needs imageio-ffmpeg", do="Run `pip install 'align[diffusion]'`") from error
    target = Path(path)
    temporary = target.with_name(target.stem + ".writing" + target.suffix)
    frames = _levels(video.frames)[:, : video.frames.shape[2] // 2 * 2, : video.frames.shape[3] // 2 * 2]
    height, width = frames.shape[1:3]
    temporary.unlink(missing_ok=True)  # the encoder of a killed process may still be writing into that file
    writer = imageio_ffmpeg.write_frames(
        str(temporary), (width, height), fps=video.fps, codec="libx264", pix_fmt_out="yuv420p", macro_block_size=2,
        output_params=["-crf", "16", "-movflags", "+faststart"],
    )  # fmt: skip
    try:
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        temporary.replace(target)
    except OSError as error:
        raise DataError("A video cannot be written", where=str(target), why=first_line(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def still_images(samples: Samples, frames: int = STRIP_FRAMES) -> torch.Tensor:
    """Return what a contact sheet shows, `[B, C, H, W]`: images, or strips of frames evenly spread over each video."""
    import torch

    if samples.videos is None:
        return samples.images
    return torch.stack([torch.cat(list(video.spread(frames)), dim=-1) for video in samples.videos])


def _levels(frames: torch.Tensor) -> np.ndarray:
    """Return `[F, C, H, W]` in [0, 1] as bytes `[F, H, W, 3]`."""
    array = frames.detach().float().cpu().numpy()
    levels = (np.nan_to_num(array).clip(0, 1) * 255).round().astype(np.uint8)
    return np.broadcast_to(levels, (len(levels), 3, *levels.shape[2:])).transpose(0, 2, 3, 1)
