"""Tiny random pipelines of SDXL, FLUX and Qwen-Image, built from real components and saved as folders."""

from __future__ import annotations

import string
from pathlib import Path

import torch

from tiny import clip_tokenizer, wake


def _clip(tokenizer, kind, width: int = 16):
    from transformers import CLIPTextConfig

    return kind(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=16, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip


def t5_tokenizer(length: int = 16):
    """A T5 tokenizer over letters."""
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_letters, *string.digits]
    return T5Tokenizer([(piece, 0.0 if i < 3 else -2.0) for i, piece in enumerate(pieces)], extra_ids=0,
                       model_max_length=length)  # fmt: skip


def t5(tokenizer):
    """A T5 encoder of 32 values a token."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2))


def _image_vae(**options):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(8, 8), layers_per_block=1, latent_channels=4,
        norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16, **options,
    )  # fmt: skip


def sdxl(folder: Path, *, seed: int = 0, prediction: str = "epsilon", zeros: bool = True) -> Path:
    """Save a StableDiffusionXLPipeline that makes 8x8 latents and 16x16 images, with an Euler sampler as published."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    tokenizer = clip_tokenizer(folder.parent / (folder.name + "_tokenizer"), length=16)
    pipeline = StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32, attention_head_dim=(1, 2),
            norm_num_groups=4, use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=8, transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading",
            steps_offset=1, prediction_type=prediction,
        ),
        vae=_image_vae(scaling_factor=0.13),
        text_encoder=_clip(tokenizer, CLIPTextModel), tokenizer=tokenizer,
        text_encoder_2=_clip(tokenizer, CLIPTextModelWithProjection), tokenizer_2=tokenizer,
        force_zeros_for_empty_prompt=zeros, add_watermarker=False,
    )  # fmt: skip
    wake(pipeline.unet)
    pipeline.save_pretrained(folder)
    return folder


def flux(folder: Path, *, seed: int = 0, guidance_embeds: bool = True) -> Path:
    """Save a FluxPipeline that makes 4-channel latents of half an image's side; sides are multiples of 4 pixels."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = clip_tokenizer(folder.parent / (folder.name + "_tokenizer"), length=16)
    tokenizer_2 = t5_tokenizer()
    pipeline = FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
            guidance_embeds=guidance_embeds,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=4,
            max_image_seq_len=64,
        ),
        vae=_image_vae(use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.4, shift_factor=0.1),
        text_encoder=_clip(tokenizer, CLIPTextModel), tokenizer=tokenizer,
        text_encoder_2=t5(tokenizer_2), tokenizer_2=tokenizer_2,
    )  # fmt: skip
    wake(pipeline.transformer)
    pipeline.save_pretrained(folder)
    return folder


def qwen_image(folder: Path, *, seed: int = 0) -> Path:
    """Save a QwenImagePipeline that makes 4-channel latents of a quarter of an image's side; sides are multiples of 8.

    Its text encoder keeps the names and parts of Qwen2.5-VL; the pipeline's own template is what it reads.
    """
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from tokenizers import pre_tokenizers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    torch.manual_seed(seed)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={letter: i for i, letter in enumerate(letters)} | {"<|endoftext|>": 256}, merges=[]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    text = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            "bos_token_id": None, "eos_token_id": None,
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
            "fullatt_block_indexes": [0],
        },
    ))  # fmt: skip
    pipeline = QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=4, max_image_seq_len=64,
            shift_terminal=0.02,
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 1.1, 2.0],
        ),
        text_encoder=text, tokenizer=tokenizer,
    )  # fmt: skip
    wake(pipeline.transformer)
    pipeline.save_pretrained(folder)
    return folder
