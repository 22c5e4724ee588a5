"""CLIP scores: six definitions that share a name elsewhere, each under its own here."""

from __future__ import annotations

from rewards.towers import ClipReward, Recipe

_L14 = "ViT-L-14-quickgelu"
_PROCESSOR = {"crop": "floor"}  # what transformers' image processor makes of an image


class Hessel(ClipReward):
    """CLIPScore, `2.5 max(cos, 0)` with "A photo depicts " before the prompt (Hessel et al., arXiv 2104.08718)."""

    recipe = Recipe(
        "clip/hessel", "ViT-B-32-quickgelu", quick_gelu=True, prefix="A photo depicts ",
        value=lambda cosine, _: 2.5 * cosine.clamp(min=0),
    )  # fmt: skip


class TorchMetrics(ClipReward):
    """`max(100 cos, 0)` a sample, where torchmetrics' CLIPScore clamps the mean of a batch; a long prompt keeps its end
    token, which torchmetrics cuts off."""

    recipe = Recipe(
        "clip/torchmetrics", _L14, quick_gelu=True, pixels=_PROCESSOR,
        value=lambda cosine, _: (100 * cosine).clamp(min=0),
    )  # fmt: skip


class Cosine(ClipReward):
    """`cos`, as CLIP itself sees an image: bicubic on the shorter side, centre crop (arXiv 2103.00020)."""

    recipe = Recipe("clip/cosine", _L14, quick_gelu=True)


class FlowGRPO(ClipReward):
    """`cos` of images resized bilinearly as floats, as the released code of Flow-GRPO and DiffusionNFT does."""

    recipe = Recipe("clip/flow_grpo", _L14, quick_gelu=True, pixels={"resample": "bilinear", "eight_bit": False})


class UniRL(ClipReward):
    """`100 cos / 30`, the scale of UniRL's released code."""

    recipe = Recipe(
        "clip/unirl", _L14, quick_gelu=True, pixels=_PROCESSOR, value=lambda cosine, _: 100 * cosine / 30
    )  # fmt: skip


class DFN5B(ClipReward):
    """`cos` of Apple's DFN5B towers at 378 pixels, images squashed to a square as open_clip lists these weights."""

    recipe = Recipe("clip/dfn5b", "ViT-H-14-378-quickgelu", quick_gelu=True, pixels={"fit": "squash"})
