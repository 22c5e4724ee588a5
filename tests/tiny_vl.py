"""Tiny random BLIP and Qwen2-VL checkpoints in the layouts of the published files, saved to disk and loaded for real."""

from __future__ import annotations

import json
from pathlib import Path

import torch

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}  # fmt: skip
TEXT = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 40}  # fmt: skip
WORDS = ["a", "red", "cat", "sea", "##s", "on", "the", "moon", "blue", "dog"]


def blip_shapes(vision: dict, text: dict) -> dict[str, tuple[int, ...]]:
    """Key and shape of every tensor of an ImageReward file, written down from BLIP's own source layout."""
    v, t = vision["hidden_size"], text["hidden_size"]
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    shapes = {
        "cls_token": (1, 1, v), "pos_embed": (1, tokens, v),
        "patch_embed.proj.weight": (v, 3, vision["patch_size"], vision["patch_size"]), "patch_embed.proj.bias": (v,),
        "norm.weight": (v,), "norm.bias": (v,),
    }  # fmt: skip
    for n in range(vision["num_hidden_layers"]):
        for name, out, width in (
            ("attn.qkv", 3 * v, v), ("attn.proj", v, v),
            ("mlp.fc1", vision["intermediate_size"], v), ("mlp.fc2", v, vision["intermediate_size"]),
        ):  # fmt: skip
            shapes |= {f"blocks.{n}.{name}.weight": (out, width), f"blocks.{n}.{name}.bias": (out,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{n}.{name}.weight": (v,), f"blocks.{n}.{name}.bias": (v,)}
    found = {f"blip.visual_encoder.{key}": shape for key, shape in shapes.items()}
    shapes = {
        "embeddings.position_ids": (1, text["max_position_embeddings"]),
        "embeddings.word_embeddings.weight": (text["vocab_size"], t),
        "embeddings.position_embeddings.weight": (text["max_position_embeddings"], t),
        "embeddings.LayerNorm.weight": (t,), "embeddings.LayerNorm.bias": (t,),
    }  # fmt: skip
    for n in range(text["num_hidden_layers"]):
        for block, width in (("attention", t), ("crossattention", v)):
            for name, columns in (("self.query", t), ("self.key", width), ("self.value", width), ("output.dense", t)):
                key = f"encoder.layer.{n}.{block}.{name}"
                shapes |= {f"{key}.weight": (t, columns), f"{key}.bias": (t,)}
            key = f"encoder.layer.{n}.{block}.output.LayerNorm"
            shapes |= {f"{key}.weight": (t,), f"{key}.bias": (t,)}
        key, inner = f"encoder.layer.{n}", text["intermediate_size"]
        shapes |= {f"{key}.intermediate.dense.weight": (inner, t), f"{key}.intermediate.dense.bias": (inner,)}
        shapes |= {f"{key}.output.dense.weight": (t, inner), f"{key}.output.dense.bias": (t,)}
        shapes |= {f"{key}.output.LayerNorm.weight": (t,), f"{key}.output.LayerNorm.bias": (t,)}
    found |= {f"blip.text_encoder.{key}": shape for key, shape in shapes.items()}
    found |= {"blip.vision_proj.weight": (256, v), "blip.vision_proj.bias": (256,)}
    found |= {"blip.text_proj.weight": (256, t), "blip.text_proj.bias": (256,)}
    widths = (t, 1024, 128, 64, 16, 1)
    for at, width, out in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        found |= {f"mlp.layers.{at}.weight": (out, width), f"mlp.layers.{at}.bias": (out,)}
    return found


def imagereward(folder: Path, *, seed: int = 0) -> Path:
    """Save a random ImageReward.pt with its med_config.json and a WordPiece vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in blip_shapes(VISION, TEXT).items():
        if key.endswith("position_ids"):
            state[key] = torch.arange(shape[1])[None]
        elif "orm" in key and key.endswith("weight"):
            state[key] = 1 + 0.2 * torch.randn(shape, generator=generator)
        else:
            state[key] = torch.randn(shape, generator=generator) * (0.5 if len(shape) == 1 else shape[-1] ** -0.5)
    torch.save(state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps({**TEXT, "vision": VISION, "encoder_width": 768}))
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    return folder


CHAT = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{% for part in turn.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OWN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
IMAGE_TEMPLATE = "Rate it. Prompt: {text_prompt}\nRating: <|Reward|>\nEND\n"
VIDEO_TEMPLATE = "Rate.\nLooks <|VQ_reward|>\nMoves <|MQ_reward|>\nPrompt: {text_prompt}\nFits <|TA_reward|>\nEND\n"


def qwen_tokenizer(folder: Path):
    """Save a byte-level tokenizer, 256 bytes and Qwen2-VL's own tokens, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>", chat_template=CHAT)
    tokenizer.add_tokens(OWN_TOKENS, special_tokens=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def qwen_config(tokens: int):
    """A Qwen2-VL of 28-pixel tokens, with tiny widths."""
    from transformers import Qwen2VLConfig

    return Qwen2VLConfig(
        text_config={
            "vocab_size": tokens, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            "bos_token_id": None, "eos_token_id": None,
        },
        vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2},
        image_token_id=256 + 5, video_token_id=256 + 6, vision_start_token_id=256 + 3, vision_end_token_id=256 + 4,
    )  # fmt: skip


def qwen(specials: list[str], head: torch.nn.Module, folder: Path, *, seed: int = 0):
    """Save config.json and a tokenizer; return a random Qwen2-VL with `rm_head`, and its tokenizer with `specials`."""
    from transformers import Qwen2VLForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = qwen_tokenizer(folder)
    tokenizer.add_tokens(specials, special_tokens=True)
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(qwen_config(len(tokenizer))).eval()
    model.rm_head = head.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
        for name, buffer in model.named_buffers():
            if "inv_freq" in name:
                buffer.copy_(buffer.bfloat16())
    model.config.save_pretrained(folder)
    return model, tokenizer


def old_names(state: dict) -> dict:
    """Names as transformers 4.45 had them, cut after whatever wraps the model."""
    return {
        key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value.detach().clone().contiguous()
        for key, value in state.items()
    }  # fmt: skip


LLAVA_CHAT = (
    "{% for turn in messages %}{{ turn.role }}: {% for part in turn.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<image>{% endif %}{% endfor %}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def qwen_chat(folder: Path, *, newer: bool = False, seed: int = 0) -> Path:
    """Save a random Qwen2-VL, or Qwen2.5-VL, that answers in words, with its processor: 4 to 16 tokens an image."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )  # fmt: skip

    tokenizer = qwen_tokenizer(folder)
    tokenizer.eos_token = "<|im_end|>"
    torch.manual_seed(seed)
    config = qwen_config(len(tokenizer))
    if newer:
        vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32, "fullatt_block_indexes": [1]}  # fmt: skip
        config = Qwen2_5_VLConfig(**{**config.to_dict(), "vision_config": vision, "model_type": "qwen2_5_vl"})
    model = (Qwen2_5_VLForConditionalGeneration if newer else Qwen2VLForConditionalGeneration)(config)
    model.save_pretrained(folder)
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 16 * 28 * 28}
    (Qwen2_5_VLProcessor if newer else Qwen2VLProcessor)(
        Qwen2VLImageProcessor(size=size), tokenizer, Qwen2VLVideoProcessor(size=size), chat_template=CHAT
    ).save_pretrained(folder)
    return folder


def llava_chat(folder: Path, *, seed: int = 0) -> Path:
    """Save a random LLaVA that answers in words, with its processor: 16 tokens an image of any size."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )  # fmt: skip

    tokenizer = qwen_tokenizer(folder)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_id=token)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), tokenizer,
        patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=LLAVA_CHAT,
    ).save_pretrained(folder)  # fmt: skip
    return folder
