"""Qwen-Image (double-stream MMDiT, rectified flow): prompts of any length, guidance that keeps each token's norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from align.diffusion.families import Conditioning, Size, device_of
from align.diffusion.families.packed import PackedTextToImage

if TYPE_CHECKING:
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel


class QwenImage(PackedTextToImage):
    """Adapter of `diffusers.QwenImagePipeline`."""

    name = "qwen_image"
    component = "transformer"
    unconditional = " "
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
    )  # fmt: skip

    def __init__(self, pipeline: QwenImagePipeline) -> None:
        self.pipeline = pipeline

    @property
    def denoiser(self) -> QwenImageTransformer2DModel:
        """The transformer."""
        return self.pipeline.transformer

    @property
    def idle_layers(self) -> frozenset[str]:
        """The last block discards its text tokens, and so whatever only they go through."""
        last = f"transformer_blocks.{len(self.denoiser.transformer_blocks) - 1}"
        idle = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
        return frozenset(f"{last}.{name}" for name in idle)

    @torch.no_grad()
    def encode(self, prompts: list[str], size: Size) -> Conditioning:
        """Encode B prompts with Qwen2.5-VL's language model; the mask says where each ends."""
        embeds, mask = self.pipeline.encode_prompt(prompts, device=device_of(self.denoiser))
        if mask is None:  # no row is shorter than another
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask}

    def predict(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the transformer's velocity; text beyond the longest prompt at hand is left out."""
        text, mask = (conditioning[name] for name in ("encoder_hidden_states", "encoder_hidden_states_mask"))
        longest = int(mask.sum(1).max())
        text, mask = text[:, :longest], mask[:, :longest]
        height, width = x.shape[2:]
        velocity = self.denoiser(
            hidden_states=self._packed(x),
            timestep=timestep / 1000,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=None if bool(mask.all()) else mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(x),
            return_dict=False,
        )[0]
        return self._unpacked(velocity, height, width)

    def guide(self, uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
        """Return `g |cond| / |g|` with `g = uncond + scale (cond - uncond)`, norms taken over each token."""
        without, prompted = self._packed(uncond), self._packed(cond)
        mixed = without + scale * (prompted - without)
        mixed = mixed * (prompted.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))
        return self._unpacked(mixed, *cond.shape[2:])

    def _packed(self, x: Tensor) -> Tensor:
        return self.pipeline._pack_latents(x, *x.shape)

    def _unpacked(self, tokens: Tensor, height: int, width: int) -> Tensor:
        return self.pipeline._unpack_latents(tokens, height, width, 1)[:, :, 0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images in [0, 1], `[B, C, H, W]`: the one frame of a video VAE."""
        vae, (mean, std) = self.pipeline.vae, self._scale(latents)
        images = vae.decode((latents[:, :, None] * std + mean).to(vae.dtype), return_dict=False)[0][:, :, 0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def to_latents(self, pixels: Tensor) -> Tensor:
        """Return the latents of images in [0, 1], `[B, C, H, W]`."""
        vae, (mean, std) = self.pipeline.vae, self._scale(pixels)
        found = vae.encode((2 * pixels - 1)[:, :, None].to(vae.dtype)).latent_dist.mode().float()
        return ((found - mean) / std)[:, :, 0]

    def _scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipeline.vae.config
        mean, std = (like.new_tensor(config[n]).view(1, -1, 1, 1, 1) for n in ("latents_mean", "latents_std"))
        return mean, std
