"""Tiny random-weight pipelines of videos, built from real components and saved as folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tiny import clip_tokenizer

WORDS = ["a", "photo", "of", "red", "blue", "cat", "dog", "two", "dogs", "running", "slowly", "seven"]


def word_tokenizer(length: int):
    """A tokenizer over words and marks, as transformers saves and loads it; what it does not know is [UNK]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = ["[PAD]", "[UNK]", "[BOS]", *WORDS]
    built = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]", model_max_length=length,
        padding_side="right",
    )  # fmt: skip


def _save(pipeline, folder: Path) -> Path:
    # Zero-initialised layers would make every velocity 0, or hide the first frame, and with that mistakes.
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    pipeline.save_pretrained(folder)
    return folder


def wan(folder: Path, *, image: bool = False, unipc: bool = False, seed: int = 0, **changed) -> Path:
    """Save a Wan 2.1 pipeline of about 30 k weights; 32x32 pixels and 5 frames are latents of 2x4x4."""
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        UniPCMultistepScheduler,
        WanImageToVideoPipeline,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    tokenizer = word_tokenizer(512)
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, pad_token_id=0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=4, projection_dim=4, num_hidden_layers=2, num_attention_heads=2, image_size=32, intermediate_size=16,
        patch_size=16,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    parts = {
        "transformer": WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, out_channels=16, text_dim=16,
            in_channels=36 if image else 16, freq_dim=64, ffn_dim=32, num_layers=2, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=32, **({"image_dim": 4, "added_kv_proj_dim": 24} if image else {}),
        ),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        if unipc
        else FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": vae, "text_encoder": UMT5EncoderModel(text), "tokenizer": tokenizer,
    }  # fmt: skip
    if image:
        parts |= {
            "image_encoder": CLIPVisionModel(vision),
            "image_processor": CLIPImageProcessor(crop_size={"height": 32, "width": 32}, size={"shortest_edge": 32}),
        }
    return _save((WanImageToVideoPipeline if image else WanPipeline)(**{**parts, **changed}), folder)


def hunyuan(folder: Path, *, image: bool = False, seed: int = 0) -> Path:
    """Save a HunyuanVideo pipeline, or SkyReels', of about 60 k weights; 32x32 pixels and 5 frames are 2x4x4 latents."""
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanSkyreelsImageToVideoPipeline,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    torch.manual_seed(seed)
    tokenizer = word_tokenizer(512)
    tokenizer_2 = clip_tokenizer(folder.parent / (folder.name + "_tokenizer"), length=77)
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer_2), hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=tokenizer_2.bos_token_id, eos_token_id=tokenizer_2.eos_token_id,
        pad_token_id=tokenizer_2.pad_token_id,
    )  # fmt: skip
    llama = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    latents = 4
    pipeline = (HunyuanSkyreelsImageToVideoPipeline if image else HunyuanVideoPipeline)(
        transformer=HunyuanVideoTransformer3DModel(
            in_channels=2 * latents if image else latents, out_channels=latents, num_attention_heads=2,
            attention_head_dim=10, num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=2, patch_size_t=1,
            guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=AutoencoderKLHunyuanVideo(
            in_channels=3, out_channels=3, latent_channels=latents, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            act_fn="silu", norm_num_groups=4, scaling_factor=0.476986, spatial_compression_ratio=8,
            temporal_compression_ratio=4, mid_block_add_attention=True,
        ),
        text_encoder=LlamaModel(llama), tokenizer=tokenizer, text_encoder_2=CLIPTextModel(clip), tokenizer_2=tokenizer_2,
    )  # fmt: skip
    return _save(pipeline, folder)


def picture(path: Path, width: int = 32, height: int = 32, seed: int = 0) -> Path:
    """Write an image that is smooth, coloured and its own for every seed."""
    from PIL import Image

    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


def redness(samples):
    """Red minus green in the last frame, less than in the first: something that only a video has."""
    change = [video.frames[-1] - video.frames[0] for video in samples.videos]
    return [float((frame[0] - frame[1]).mean()) for frame in change]
