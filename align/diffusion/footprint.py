"""What denoisers take for a row: counted on their architectures, which are known here for published models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config import ModelConfig
from align.footprint import Footprint, adapt, by_depth, count
from align.published import PUBLISHED, published

if TYPE_CHECKING:
    from torch import Tensor, nn

_SD3 = {
    "sample_size": 128, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64, "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
}  # fmt: skip
_HUNYUAN = {"in_channels": 16, "out_channels": 16, "num_layers": 20, "num_single_layers": 40, "guidance_embeds": True}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "CompVis/stable-diffusion-v1-4": ("UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768}),
    "stabilityai/stable-diffusion-xl-base-1.0": ("UNet2DConditionModel", {
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }),
    "stabilityai/stable-diffusion-3-medium-diffusers": ("SD3Transformer2DModel", {
        **_SD3, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192,
    }),
    "stabilityai/stable-diffusion-3.5-medium": ("SD3Transformer2DModel", {
        **_SD3, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
        "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13)),
    }),
    "stabilityai/stable-diffusion-3.5-large": ("SD3Transformer2DModel", {
        **_SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    }),
    "black-forest-labs/FLUX.1-dev": ("FluxTransformer2DModel", {
        "num_layers": 19, "num_single_layers": 38, "guidance_embeds": True,
    }),
    "black-forest-labs/FLUX.1-schnell": ("FluxTransformer2DModel", {"num_layers": 19, "num_single_layers": 38}),
    "Qwen/Qwen-Image": ("QwenImageTransformer2DModel", {"num_layers": 60}),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ("WanTransformer3DModel", {
        "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30,
    }),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": ("WanTransformer3DModel", {"num_layers": 40}),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": ("WanTransformer3DModel", {
        "in_channels": 36, "num_layers": 40, "image_dim": 1280, "added_kv_proj_dim": 5120,
    }),
    "hunyuanvideo-community/HunyuanVideo": ("HunyuanVideoTransformer3DModel", _HUNYUAN),
    "Skywork/SkyReels-V1-Hunyuan-I2V": ("HunyuanVideoTransformer3DModel", {**_HUNYUAN, "in_channels": 32}),
}  # fmt: skip
"""The denoisers of published models: diffusers' class, and what of its configuration is not the class's default."""

ENCODERS = {
    "StableDiffusionPipeline": 0.12e9, "StableDiffusionXLPipeline": 0.82e9, "StableDiffusion3Pipeline": 5.6e9,
    "FluxPipeline": 4.9e9, "QwenImagePipeline": 8.3e9, "WanPipeline": 5.7e9, "WanImageToVideoPipeline": 6.3e9,
    "HunyuanVideoPipeline": 8.2e9, "HunyuanSkyreelsImageToVideoPipeline": 8.2e9,
}  # fmt: skip
"""Weights of the encoders of published pipelines, to two digits."""

_DEPTHS = ("num_layers", "num_single_layers")
_TEXT = {"SD3Transformer2DModel": 333, "FluxTransformer2DModel": 512, "WanTransformer3DModel": 512}
_PROMPT = 128
"""Tokens of a prompt where a family keeps each at its own length: an assumption."""


def architecture(model: ModelConfig) -> tuple[str, dict[str, Any]] | None:
    """Return diffusers' class of a denoiser and its configuration: of a folder, or as published; None where unknown."""
    known = published(model)
    if known is None:
        for part in ("transformer", "unet"):
            try:
                found = json.loads((Path(model.path) / part / "config.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            return found["_class_name"], {k: v for k, v in found.items() if not k.startswith("_")}
        return None
    name = next((hub for hub, one in PUBLISHED.items() if one is known and hub in ARCHITECTURES), None)
    name = name or next((hub for hub in ARCHITECTURES if PUBLISHED[hub] == known), None)
    return None if name is None else ARCHITECTURES[name]


def build(kind: str, options: Mapping[str, Any]) -> nn.Module:
    """Build a denoiser where tensors have no storage."""
    import diffusers

    return getattr(diffusers, kind)(**options)


def blocks(kind: str, options: Mapping[str, Any]) -> tuple[int, int]:
    """Return the weights of a denoiser's largest block and those outside of all, as FSDP2 gathers them; 0 where its
    class is not known here."""
    import torch

    from align.sharding import blocks_of

    try:
        with torch.device("meta"):
            model = build(kind, {**options, **{name: 1 for name in _DEPTHS if options.get(name)}})
    except AttributeError:  # of another's package
        return 0, 0
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks_of(model)]
    return max(sizes, default=0), sum(p.numel() for p in model.parameters()) - sum(sizes)


def denoiser_footprint(
    kind: str, options: Mapping[str, Any], latent: tuple[int, ...], *, half: bool, rank: int | None,
    targets: tuple[str, ...], checkpointing: bool, branches: int = 1,
) -> Footprint:  # fmt: skip
    """Return what a row of a latent takes.

    Args:
        kind, options: of `architecture`.
        latent: shape of one latent, `[C, H, W]` or `[C, F, H, W]`.
        half: products in bfloat16.
        rank: of the adapters that train on `targets`, endings of layers' names; None trains all weights.
        checkpointing: recompute activations.
        branches: forwards of a row in one batch: 2 with guidance in both.
    """

    def of(depths: Mapping[str, int]) -> Footprint:
        def made() -> tuple[nn.Module, Callable[[], Tensor]]:
            model = build(kind, {**options, **depths})
            if checkpointing:
                model.enable_gradient_checkpointing()
            if rank is None:
                model.requires_grad_(True)
            else:
                adapt(
                    model,
                    lambda name: any(fnmatchcase(f".{name}", f"*.{end}") for end in targets),
                    rank=rank,
                    half=half,
                )
            told = _inputs(kind, model.config, latent, branches)
            return model, lambda: model(**told, return_dict=False)[0]

        return count(made, half=half, recomputed=checkpointing)

    return by_depth(of, {name: int(options[name]) for name in _DEPTHS if options.get(name)})


def _inputs(kind: str, config: Any, latent: tuple[int, ...], rows: int) -> dict[str, Any]:
    """Return a denoiser's inputs: empty tensors of the shapes that its family gives it."""
    import torch

    channels, *sides = latent
    timestep, empty = torch.empty(rows), torch.empty
    text = _TEXT.get(kind, _PROMPT)
    if kind == "UNet2DConditionModel":
        added = {"text_embeds": empty(rows, 1280), "time_ids": empty(rows, 6)}
        return {
            "sample": empty(rows, channels, *sides), "timestep": timestep,
            "encoder_hidden_states": empty(rows, 77, config.cross_attention_dim),
            **({"added_cond_kwargs": added} if config.addition_embed_type == "text_time" else {}),
        }  # fmt: skip
    if kind == "SD3Transformer2DModel":
        return {
            "hidden_states": empty(rows, channels, *sides), "timestep": timestep,
            "encoder_hidden_states": empty(rows, text, config.joint_attention_dim),
            "pooled_projections": empty(rows, config.pooled_projection_dim),
        }  # fmt: skip
    if kind in ("FluxTransformer2DModel", "QwenImageTransformer2DModel"):
        tokens = math.prod(side // 2 for side in sides)
        packed = {
            "hidden_states": empty(rows, tokens, 4 * channels), "timestep": timestep,
            "encoder_hidden_states": empty(rows, text, config.joint_attention_dim),
        }  # fmt: skip
        if kind == "QwenImageTransformer2DModel":
            return {**packed, "img_shapes": [[(1, *(side // 2 for side in sides))]] * rows}
        guided = {"guidance": empty(rows)} if config.guidance_embeds else {}
        return {
            **packed, **guided, "pooled_projections": empty(rows, config.pooled_projection_dim),
            "img_ids": empty(tokens, 3), "txt_ids": empty(text, 3),
        }  # fmt: skip
    video = {"hidden_states": empty(rows, config.in_channels, *sides), "timestep": timestep}
    if kind == "WanTransformer3DModel":
        image = {"encoder_hidden_states_image": empty(rows, 257, config.image_dim)} if config.image_dim else {}
        return {**video, **image, "encoder_hidden_states": empty(rows, text, config.text_dim)}
    return {
        **video, "encoder_hidden_states": empty(rows, text, config.text_embed_dim),
        "encoder_attention_mask": torch.ones(rows, text), "guidance": empty(rows),
        "pooled_projections": empty(rows, config.pooled_projection_dim),
    }  # fmt: skip
