"""LoRA weights under the names of ComfyUI's own models, in the layout that kohya's scripts write.

Not opened in ComfyUI. Layers are named as in the checkpoints that the authors of each model published, with the prefix
`lora_unet_` and underscores for dots. Where such a layer is several of diffusers' layers side by side, such as
`qkv` of `to_q`, `to_k` and `to_v`, their adapters become one that says the same:

    A = [A_1; A_2; ...],   B = blockdiag(B_1, B_2, ...),   alpha = alpha_1 + alpha_2 + ...

with rows of zeros in B for a layer that has no adapter. The rank is the sum of theirs, so alpha / rank stays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from align.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

NOT_OPENED = "Not opened in ComfyUI: names and shapes were checked, the file was not"

_MLP = {"0": "net.0.proj", "2": "net.2"}


def _fused(native: str, block: str, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    return {native: tuple(f"{block}.{name}" for name in names)}


def _two_streams(double: str, single: str) -> dict[str, tuple[str, ...]]:
    """Blocks of FLUX.1 and HunyuanVideo: image and text side by side, then one stream of both."""
    block = f"{double}.{{}}"
    names = {
        **_fused("double_blocks.{}.img_attn.qkv", f"{block}.attn", ("to_q", "to_k", "to_v")),
        **_fused("double_blocks.{}.txt_attn.qkv", f"{block}.attn", ("add_q_proj", "add_k_proj", "add_v_proj")),
        "double_blocks.{}.img_attn.proj": (f"{block}.attn.to_out.0",),
        "double_blocks.{}.txt_attn.proj": (f"{block}.attn.to_add_out",),
        **_fused("single_blocks.{}.linear1", f"{single}.{{}}", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
        "single_blocks.{}.linear2": (f"{single}.{{}}.proj_out",),
    }
    for native, ours in _MLP.items():
        names[f"double_blocks.{{}}.img_mlp.{native}"] = (f"{block}.ff.{ours}",)
        names[f"double_blocks.{{}}.txt_mlp.{native}"] = (f"{block}.ff_context.{ours}",)
    return names


def _sd3() -> dict[str, tuple[str, ...]]:
    block, joint = "transformer_blocks.{}", "joint_blocks.{}"
    return {
        **_fused(f"{joint}.x_block.attn.qkv", f"{block}.attn", ("to_q", "to_k", "to_v")),
        **_fused(f"{joint}.x_block.attn2.qkv", f"{block}.attn2", ("to_q", "to_k", "to_v")),
        **_fused(f"{joint}.context_block.attn.qkv", f"{block}.attn", ("add_q_proj", "add_k_proj", "add_v_proj")),
        f"{joint}.x_block.attn.proj": (f"{block}.attn.to_out.0",),
        f"{joint}.x_block.attn2.proj": (f"{block}.attn2.to_out.0",),
        f"{joint}.context_block.attn.proj": (f"{block}.attn.to_add_out",),
        f"{joint}.x_block.mlp.fc1": (f"{block}.ff.net.0.proj",),
        f"{joint}.x_block.mlp.fc2": (f"{block}.ff.net.2",),
        f"{joint}.context_block.mlp.fc1": (f"{block}.ff_context.net.0.proj",),
        f"{joint}.context_block.mlp.fc2": (f"{block}.ff_context.net.2",),
    }


def _hunyuan_video() -> dict[str, tuple[str, ...]]:
    block = "context_embedder.token_refiner.refiner_blocks.{}"
    native = "txt_in.individual_token_refiner.blocks.{}"
    return {
        **_two_streams("transformer_blocks", "single_transformer_blocks"),
        **_fused(f"{native}.self_attn.qkv", f"{block}.attn", ("to_q", "to_k", "to_v")),
        f"{native}.self_attn.proj": (f"{block}.attn.to_out.0",),
        **{f"{native}.mlp.{theirs}": (f"{block}.ff.{ours}",) for theirs, ours in _MLP.items()},
    }


def _wan() -> dict[str, tuple[str, ...]]:
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    image = {"k_img": "add_k_proj", "v_img": "add_v_proj"}
    return {
        **{f"blocks.{{}}.self_attn.{theirs}": (f"blocks.{{}}.attn1.{ours}",) for theirs, ours in names.items()},
        **{f"blocks.{{}}.cross_attn.{t}": (f"blocks.{{}}.attn2.{o}",) for t, o in (names | image).items()},
        **{f"blocks.{{}}.ffn.{theirs}": (f"blocks.{{}}.ffn.{ours}",) for theirs, ours in _MLP.items()},
    }


KEY_MAPS: dict[str, dict[str, tuple[str, ...]] | None] = {
    "stable_diffusion": None,
    "sdxl": None,
    "sd3": _sd3(),
    "flux": _two_streams("transformer_blocks", "single_transformer_blocks"),
    "qwen_image": None,
    "wan": _wan(),
    "wan_image_to_video": _wan(),
    "hunyuan_video": _hunyuan_video(),
    "skyreels": _hunyuan_video(),
}
"""Family to native layer -> diffusers' layers, in order, `{}` the number of a block.

None where ComfyUI knows the layers under diffusers' own names.
"""


def native_layers(layers: Sequence[str], family: str) -> dict[str, tuple[str, ...]]:
    """Return the native layers that hold `layers`, each with all of diffusers' layers in it, in order.

    Raises:
        ModelError: a family without a key map, or a layer that is not in it.
    """
    if family not in KEY_MAPS:
        raise ModelError(
            f"There is no ComfyUI layout of the family {family}", do="Export it with --to diffusers-lora or --to peft"
        )
    known, found = KEY_MAPS[family], {}
    for layer in layers:
        if known is None:
            found[layer] = (layer,)
            continue
        numbers = re.findall(r"\.(\d+)\.", layer)
        place = next(
            ((native, parts) for native, parts in known.items() for p in parts if _filled(p, numbers) == layer), None
        )
        if place is None:
            raise ModelError(
                "A layer has no name in ComfyUI's layout", where=layer,
                why="it is none of the family's own LoRA targets",
                do="Export it with --to diffusers-lora or --to peft",
            )  # fmt: skip
        found[_filled(place[0], numbers)] = tuple(_filled(part, numbers) for part in place[1])
    return found


def _filled(template: str, numbers: Sequence[str]) -> str:
    return template.replace("{}", numbers[0]) if numbers else template


def to_comfyui(
    pairs: Mapping[str, tuple[Tensor, Tensor]], alpha: float, family: str, widths: Mapping[str, int]
) -> dict[str, Tensor]:
    """Return the tensors of a LoRA file: `lora_down.weight`, `lora_up.weight` and `alpha` of every native layer.

    Args:
        pairs: A `[r, in]` and B `[out, r]` by layer.
        alpha: of each of them.
        widths: outputs of every linear layer of the denoiser, by name.

    Raises:
        ModelError: see `native_layers`.
    """
    import torch

    tensors = {}
    for native, parts in native_layers(list(pairs), family).items():
        here = [part for part in parts if part in pairs]
        ranks = [len(pairs[part][0]) for part in here]
        up = torch.zeros(sum(widths[part] for part in parts), sum(ranks), dtype=pairs[here[0]][1].dtype)
        row, column = 0, 0
        for part in parts:
            if part in pairs:
                b = pairs[part][1]
                up[row : row + len(b), column : column + b.shape[1]] = b
                column += b.shape[1]
            row += widths[part]
        name = f"lora_unet_{native.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = torch.cat([pairs[part][0] for part in here])
        tensors[f"{name}.lora_up.weight"] = up
        tensors[f"{name}.alpha"] = torch.tensor(alpha * len(here), dtype=torch.float32)
    return tensors
