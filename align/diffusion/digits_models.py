"""The untrained digits pipelines: ordinary diffusers and transformers components with few weights.

The text encoders are random and frozen: all a denoiser needs of them is that prompts are told apart.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from align.diffusion.digits_data import SIZE, WORDS

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTokenizer

TOKENS = 6  # "a bold handwritten seven" with its begin and end marks
TEXT_WIDTH = 32
_VOCABULARY = ("a", "handwritten", "bold", "thin", *WORDS)


def digits_sd3(folder: Path, *, width: int, layers: int, heads: int = 4) -> StableDiffusion3Pipeline:
    """Return an untrained StableDiffusion3Pipeline: a rectified flow with a small MMDiT.

    Args:
        folder: an existing folder for the tokenizer's files while it is made.
        width, layers, heads: of the transformer.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    tokenizer, t5_tokenizer = _clip_tokenizer(folder), _t5_tokenizer()
    encoders = [_spread(CLIPTextModelWithProjection(_text_config(tokenizer))) for _ in range(2)]
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer), d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=2, dropout_rate=0.0
        )
    )
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=SIZE // 2, patch_size=2, in_channels=4, out_channels=4, num_layers=layers,
            attention_head_dim=width // heads, num_attention_heads=heads, joint_attention_dim=64,
            caption_projection_dim=width, pooled_projection_dim=64, pos_embed_max_size=SIZE // 2,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=_autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0),
        text_encoder=encoders[0], tokenizer=tokenizer,
        text_encoder_2=encoders[1], tokenizer_2=copy.deepcopy(tokenizer),
        text_encoder_3=t5.eval(), tokenizer_3=t5_tokenizer,
    )  # fmt: skip


def digits_sd(folder: Path, *, width: int, prediction: str) -> StableDiffusionPipeline:
    """Return an untrained StableDiffusionPipeline: diffusion with a small UNet.

    Args:
        folder: an existing folder for the tokenizer's files while it is made.
        width: channels of the UNet.
        prediction: "epsilon" or "v_prediction".
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    tokenizer = _clip_tokenizer(folder)
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            sample_size=SIZE // 2, in_channels=4, out_channels=4, block_out_channels=(width, width),
            layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4, norm_num_groups=8,
        ),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
            set_alpha_to_one=False, steps_offset=1, prediction_type=prediction,
        ),
        vae=_autoencoder(),
        text_encoder=_spread(CLIPTextModel(_text_config(tokenizer))), tokenizer=tokenizer,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _autoencoder(**options: Any) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
        sample_size=SIZE, mid_block_add_attention=False, scaling_factor=1.0, **options,
    )  # fmt: skip


def _text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=TOKENS, projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def _spread(encoder: Any) -> Any:
    """Draw a CLIP encoder's weights wide: its own initialisation is so small that all prompts would look alike."""
    with torch.no_grad():
        embeddings = encoder.get_input_embeddings().weight.normal_()
        for name, parameter in encoder.named_parameters():
            if name.endswith("position_embedding.weight"):
                parameter.normal_(std=0.5)
            elif name.endswith("text_projection.weight"):
                parameter.normal_(std=embeddings.shape[1] ** -0.5)
    return encoder.eval()


def _clip_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer whose merges make one token of each word of the prompts, and letters of any other."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens, merges = [*letters, *(f"{c}</w>" for c in letters)], []
    for word in _VOCABULARY:
        left = word[0]
        for i, letter in enumerate(word[1:], start=1):
            right = letter + ("</w>" if i == len(word) - 1 else "")
            if f"{left} {right}" not in merges:
                merges.append(f"{left} {right}")
                tokens.append(left + right)
            left += right
    vocabulary = {token: i for i, token in enumerate([*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()
    return tokenizer


def _t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{w}", -2.0) for w in _VOCABULARY if len(w) > 1)]
    pieces += [("▁a", -2.0), ("▁", -10.0), *((chr(c), -10.0) for c in range(ord("a"), ord("z") + 1))]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)
