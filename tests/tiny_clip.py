"""Tiny random CLIPs in open_clip's layout, saved to disk and loaded for real."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch
from PIL import Image

from align.types import Samples

SIDE = 32
GELU, QUICK = "tiny-clip", "tiny-clip-quickgelu"


def register(folder: Path) -> None:
    """Make the two tiny architectures known to open_clip: the same but for their activation."""
    for name, quick in ((GELU, False), (QUICK, True)):
        config = {
            "embed_dim": 16, "quick_gelu": quick,
            "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
        }  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def build(architecture: str, seed: int = 0) -> torch.nn.Module:
    """A random model whose every weight matters: biases and gains are not 0 and 1."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(**open_clip.get_model_config(architecture)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save(model: torch.nn.Module, path: Path, *, half: bool = False, nested: bool = True) -> Path:
    """Save as published files are: a torch archive, nested under "state_dict", perhaps in half precision."""
    state = {key: value.half() if half else value.clone() for key, value in model.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state} if nested else state, path)
    return path


def images(count: int, height: int = SIDE, width: int = SIDE, seed: int = 0) -> torch.Tensor:
    """Smooth random images with 8-bit pixels, `[B, 3, h, w]` in [0, 1]."""
    noise = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round() / 255


def pil(image: torch.Tensor) -> Image.Image:
    """The same image as PIL holds it."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def samples(prompts: list[str], pixels: torch.Tensor | list[torch.Tensor]) -> Samples:
    """Samples of images."""
    return Samples(prompts=prompts, images=pixels)
