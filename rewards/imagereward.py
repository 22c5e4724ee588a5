"""ImageReward v1.0: BLIP's text encoder attends to the image, and an affine head reads its first token."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.errors import ModelError
from align.hub import locate
from align.types import Samples, Scores
from align.weights import load_into, load_tensors, weights_sha256, without_storage
from rewards.base import REWARDS, RewardCard, identity_of
from rewards.media import clip_pixels, require_media, score_samples, stacked
from rewards.placement import Placement
from rewards.tokens import load_tokenizer, tokenizer_sha256, tokenizer_source

MEAN, STD = 0.16717362830052426, 1.0333394966054072
LENGTH = 35
STRUCTURE = "b483298b77da9ee322e5b54d925cbce2019d169d5b4c4b48789138fa629baa7c"
UNUSED = (
    "text.embeddings.position_ids",
    *(f"blip.{name}_proj.{kind}" for name in ("vision", "text") for kind in ("weight", "bias")),
)
VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
}  # fmt: skip
TEXT = {
    "vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 512, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
}  # fmt: skip
_RENAMES = (
    (r"^blip\.visual_encoder\.", "vision."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head."),
    (r"^vision\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^vision\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^vision\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^vision\.norm\.", "vision.post_layernorm."),
    (r"^vision\.blocks\.(\d+)\.norm", r"vision.encoder.layers.\1.layer_norm"),
    (r"^vision\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"^vision\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^vision\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
)


def rename(key: str) -> str:
    """Return the name in `Network` of a tensor of the published file."""
    for pattern, name in _RENAMES:
        key = re.sub(pattern, name, key)
    return key


class Network(nn.Module):
    """`r = (head(h_0) - mean) / std`, h the text encoder's last states attending to the image, head affine.

    Args:
        vision, text: settings of the two encoders; the published ones by default.
    """

    def __init__(self, vision: Mapping[str, Any] = VISION, text: Mapping[str, Any] = TEXT) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        cross = {"encoder_hidden_size": vision["hidden_size"], "is_decoder": True}  # the layers of cross-attention
        self.vision = BlipVisionModel(BlipVisionConfig(**vision))
        self.text = BlipTextModel(BlipTextConfig(**text, **cross), add_pooling_layer=False)
        widths = (text["hidden_size"], 1024, 128, 64, 16, 1)
        linear = [nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
        # The published head has dropout, and no activation, after each of its first three maps.
        gap = nn.Identity()
        self.head = nn.Sequential(linear[0], gap, linear[1], gap, linear[2], gap, linear[3], linear[4])

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the rewards `[B]` of normalised pixels `[B, 3, size, size]` and tokens `[B, T]`."""
        image = self.vision(pixels).last_hidden_state
        # is_decoder=False: BLIP's text encoder sees the whole prompt, not only what precedes a token.
        states = self.text(ids, attention_mask=mask, encoder_hidden_states=image, is_decoder=False).last_hidden_state
        return (self.head(states[:, 0])[:, 0] - MEAN) / STD


class ImageReward:
    """How much people like an image for its prompt, about standard normal over prompts.

    The pixels are scaled to 224 on the shorter side and cropped, the prompt is cut at 35 tokens (extra `truncated`).
    The text encoder attends to the image, so that of a prompt only its tokens can be kept.

    Args:
        path: `ImageReward.pt` or a folder that holds it; from the hub when None. A `med_config.json` beside it may
            hold other sizes: those of the text encoder, and under "vision" those of the image encoder.
        tokenizer: a folder or hub repository; by default beside the weights, else bert-base-uncased.
        placement, dtype, batch_size: see `rewards.placement`.

    Raises:
        ModelError: weights or a tokenizer that are absent or foreign.

    Source: ImageReward (arXiv 2304.05977), its released code.
    """

    names = ("imagereward",)

    def __init__(
        self,
        path: str | None = None,
        tokenizer: str | None = None,
        placement: str = "resident",
        dtype: str = "fp32",
        batch_size: int | None = None,
    ) -> None:
        self.card: RewardCard = REWARDS.get("imagereward").card
        self.placement = Placement(placement, dtype, batch_size)
        self.file = locate(self.card.weights[0], path)
        with without_storage():
            network = Network(*_sizes(self.file.parent / "med_config.json"))
        # Copied: the tensors of a file are a view of it, and would change with it.
        state = {rename(key): value.to(torch.float32, copy=True) for key, value in load_tensors(self.file).items()}
        load_into(network, state, str(self.file), unused=UNUSED)
        self.network = self.placement.settle(network)
        self.size = network.vision.config.image_size
        self.tokenizer = load_tokenizer(
            tokenizer_source(tokenizer, self.file.parent, "bert-base-uncased"), "BertTokenizer"
        )
        self._tokenizer_sha256 = tokenizer_sha256(self.tokenizer)
        self.encode = functools.lru_cache(maxsize=4096)(self._encode)

    def identity(self) -> str:
        """Return a hash over the weights, the tokenizer and the precision."""
        about = {"weights": weights_sha256(self.file), "tokenizer": self._tokenizer_sha256}
        return identity_of(self.card, {**about, "dtype": self.placement.dtype, "size": self.size, "length": LENGTH})

    def score(self, samples: Samples) -> Scores:
        """Return the rewards, `[B, 1]`; the extra `truncated` says whether a prompt was cut."""
        require_media(samples, "image", self.card.name)
        return score_samples(samples, self.names, self._forward, self.placement, (self.network,))

    def differentiable(self, images: Tensor | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """Return the rewards `[B, 1]` of images of one size in [0, 1], with a gradient to their pixels."""
        self.placement.require_graph(self.card.name)
        with self.placement.active(self.network):
            return self._forward(Samples(prompts=prompts, images=images))[0]

    def _forward(self, samples: Samples) -> tuple[Tensor, dict[str, list[bool]]]:
        device = self.placement.device
        ids, lengths, truncated = zip(*(self.encode(prompt) for prompt in samples.prompts), strict=True)
        mask = (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).long()
        pixels = clip_pixels(stacked(samples.images, device), self.size)
        rewards = self.network(pixels, torch.stack(ids).to(device), mask.to(device))
        return rewards[:, None], {"truncated": list(truncated)}

    def _encode(self, prompt: str) -> tuple[Tensor, int, bool]:
        found = self.tokenizer(prompt, verbose=False)["input_ids"]
        kept = found if len(found) <= LENGTH else [*found[: LENGTH - 1], found[-1]]  # the end token stays
        padding = [self.tokenizer.pad_token_id] * (LENGTH - len(kept))
        return torch.tensor(kept + padding), len(kept), len(found) > LENGTH


def _sizes(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the sizes of both encoders: those a file gives, else the published ones."""
    if not file.is_file():
        return VISION, TEXT
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        vision = {**VISION, **{key: found["vision"][key] for key in VISION if key in found.get("vision", {})}}
        return vision, {key: found.get(key, value) for key, value in TEXT.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ModelError("The sizes of BLIP cannot be read", where=str(file), why=str(error)) from error
