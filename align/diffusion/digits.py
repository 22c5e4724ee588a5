"""The embedded default: a small rectified-flow text-to-image model of handwritten digits, as a real SD3 folder.

Everything is an ordinary diffusers or transformers component with few weights: an AutoencoderKL trained
on the generator split, two CLIP text encoders and a T5 encoder that are random and frozen (their
outputs tell the prompts apart, which is all the transformer needs), and an SD3Transformer2DModel
trained with the rectified-flow loss

    || v(x_t, t, prompt) - (noise - x0) ||^2,   x_t = (1 - t) x0 + t noise,   t ~ sigmoid(N(0, 1))

It is loaded and run through `families/sd3.py` like any other SD3:

    StableDiffusion3Pipeline.from_pretrained(build_digits())("a handwritten seven", max_sequence_length=6)
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from align.diffusion.digits_data import (
    SIZE,
    WEIGHTS,
    WORDS,
    build_once,
    cache_directory,
    content_key,
    digit_prompts,
    ink_bands,
    load_judge,
    load_split,
    parse_prompt,
    prompt_for,
)
from align.diffusion.policy import quiet_loading
from align.errors import ConfigError, ModelError
from align.registry import suggest

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusion3Pipeline
    from tqdm import tqdm

TOKENS = 6  # "a bold handwritten seven" with its begin and end marks


@dataclass(frozen=True)
class DigitsRecipe:
    """How a digits model is built.

    Args:
        width, layers: of the transformer.
        vae_steps, flow_steps: optimizer steps of the two trainings.
        accept: refuse the model unless it passes `acceptance`.
    """

    width: int = 64
    layers: int = 3
    heads: int = 4
    vae_steps: int = 200
    flow_steps: int = 1600
    batch: int = 64
    vae_lr: float = 3e-3
    flow_lr: float = 2e-3
    prompt_drop: float = 0.1
    accept: bool = True
    seed: int = 0


RECIPES = {
    "default": DigitsRecipe(),
    "smoke": DigitsRecipe(width=32, layers=2, vae_steps=40, flow_steps=120, accept=False),
    "random": DigitsRecipe(width=32, layers=2, vae_steps=0, flow_steps=0, accept=False),
}


def build_digits(recipe: str = "default", *, progress: bool = True) -> Path:
    """Return the folder of the digits model of a recipe, built on first use and cached by content.

    "default" takes about two CPU-minutes, "smoke" a few seconds, "random" has untrained weights.

    Raises:
        ConfigError: an unknown recipe.
        ModelError: the trained model did not pass its acceptance, with the figures.
    """
    if recipe not in RECIPES:
        raise ConfigError(f"Unknown digits recipe {recipe!r}", do=suggest(recipe, RECIPES))
    config = RECIPES[recipe]
    folder = cache_directory() / f"digits-{recipe}-{content_key(asdict(config))}"
    return build_once(folder, lambda place: _build(config, place, progress))


def _build(config: DigitsRecipe, folder: Path, progress: bool) -> None:
    """Build and train a pipeline into `folder`, on one thread, so that weights do not depend on the number of cores."""
    from tqdm import tqdm

    began, threads = time.process_time(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            pipeline = _components(config, folder)
            total = config.vae_steps + config.flow_steps
            quiet = {"disable": not (progress and total), "mininterval": 0.2 if sys.stderr.isatty() else 10.0}
            with tqdm(total=total, desc="pretraining digits (once, then cached)", unit="step", **quiet) as bar:
                error = _train_vae(pipeline.vae, config, bar)
                _train_flow(pipeline, config, bar)
            card = {"recipe": asdict(config), "autoencoder_rmse": error, **(_card(pipeline) if config.accept else {})}
    finally:
        torch.set_num_threads(threads)
    card["cpu_seconds"] = round(time.process_time() - began, 1)
    if card.get("refused"):
        raise ModelError("The digits model did not pass its acceptance", why="; ".join(card["refused"]))
    with quiet_loading():
        pipeline.save_pretrained(folder)
    (folder / "card.json").write_text(json.dumps(card, indent=1), encoding="utf-8")


def _components(config: DigitsRecipe, folder: Path) -> StableDiffusion3Pipeline:
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    clip_tokenizer, t5_tokenizer = _clip_tokenizer(folder), _t5_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(clip_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS, projection_dim=32, bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id, pad_token_id=clip_tokenizer.pad_token_id,
    )  # fmt: skip
    encoders = [CLIPTextModelWithProjection(text) for _ in range(2)]
    with torch.no_grad():
        for encoder in encoders:  # CLIP's own initialisation is so small that all prompts would look alike
            encoder.text_model.embeddings.token_embedding.weight.normal_()
            encoder.text_model.embeddings.position_embedding.weight.normal_(std=0.5)
            encoder.text_projection.weight.normal_(std=32**-0.5)
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer), d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=2, dropout_rate=0.0
        )
    )
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=SIZE // 2, patch_size=2, in_channels=4, out_channels=4, num_layers=config.layers,
            attention_head_dim=config.width // config.heads, num_attention_heads=config.heads, joint_attention_dim=64,
            caption_projection_dim=config.width, pooled_projection_dim=64, pos_embed_max_size=SIZE // 2,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=AutoencoderKL(
            in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
            sample_size=SIZE, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
            scaling_factor=1.0, shift_factor=0.0,
        ),
        text_encoder=encoders[0].eval(), tokenizer=clip_tokenizer,
        text_encoder_2=encoders[1].eval(), tokenizer_2=copy.deepcopy(clip_tokenizer),
        text_encoder_3=t5.eval(), tokenizer_3=t5_tokenizer,
    )  # fmt: skip


_VOCABULARY = ("a", "handwritten", "bold", "thin", *WORDS)


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


def _pixels(images: Tensor) -> Tensor:
    return images.repeat(1, 3, 1, 1) * 2 - 1


def _train_vae(vae: AutoencoderKL, config: DigitsRecipe, bar: tqdm) -> float:
    """Train the autoencoder, set its latents to zero mean and unit std, and return its RMSE on unseen digits."""
    images = load_split("generator").images
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.vae_lr)
    for step in range(config.vae_steps):
        rate = min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / config.vae_steps))
        optimizer.param_groups[0]["lr"] = config.vae_lr * rate
        x = _pixels(images[torch.randint(len(images), (config.batch,))])
        posterior = vae.encode(x).latent_dist
        loss = F.mse_loss(vae.decode(posterior.sample()).sample, x) + 4e-7 * posterior.kl().mean()
        _descend(loss, optimizer)
        bar.update()
    vae.requires_grad_(False).eval()
    latents = _encode(vae, images)
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
    unseen = load_split("evaluator").images
    error = vae.decode(vae.encode(_pixels(unseen)).latent_dist.mode()).sample - _pixels(unseen)
    return float((error / 2).square().mean().sqrt())


def _encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    return torch.cat([vae.encode(_pixels(part)).latent_dist.mode() for part in images.split(128)])


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


def _prompt_embeddings(pipeline: StableDiffusion3Pipeline, prompts: list[str]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
    return embeds, pooled


def _train_flow(pipeline: StableDiffusion3Pipeline, config: DigitsRecipe, bar: tqdm) -> None:
    """Train the transformer on captioned latents and leave the average of its weights in the pipeline."""
    split, vae, model = load_split("generator"), pipeline.vae, pipeline.transformer
    latents = (_encode(vae, split.images) - vae.config.shift_factor) * vae.config.scaling_factor
    prompts = [*digit_prompts(), ""]
    embeds, pooled = _prompt_embeddings(pipeline, prompts)
    bands = ink_bands("generator")
    weighted = torch.tensor([
        prompts.index(prompt_for(digit, _band(bands, digit, ink)))
        for digit, ink in zip(split.labels.tolist(), split.ink.tolist(), strict=True)
    ])  # fmt: skip
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.flow_lr, weight_decay=1e-3)
    for step in range(config.flow_steps):
        done = step / config.flow_steps
        optimizer.param_groups[0]["lr"] = config.flow_lr * min(1.0, (step + 1) / 50) * min(1.0, (1 - done) / 0.4 + 0.02)
        rows = torch.randint(len(latents), (config.batch,))
        caption = torch.where(torch.rand(config.batch) < 0.5, split.labels[rows], weighted[rows])
        caption = torch.where(torch.rand(config.batch) < config.prompt_drop, len(prompts) - 1, caption)
        t, noise = torch.sigmoid(torch.randn(config.batch)), torch.randn(config.batch, *latents.shape[1:])
        mix = t[:, None, None, None]
        velocity = model(
            hidden_states=(1 - mix) * latents[rows] + mix * noise, timestep=t * 1000,
            encoder_hidden_states=embeds[caption], pooled_projections=pooled[caption], return_dict=False,
        )[0]  # fmt: skip
        _descend(F.mse_loss(velocity, noise - latents[rows]), optimizer)
        decay = min(0.998, (step + 1) / (step + 21))
        with torch.no_grad():
            for name, p in model.named_parameters():
                average[name].lerp_(p, 1 - decay)
        bar.update()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(average[name])
    model.requires_grad_(False).eval()


def _band(bands: dict[tuple[int, str], tuple[float, float]], digit: int, ink: float) -> str:
    if ink <= bands[digit, "thin"][1]:
        return "thin"
    return "bold" if ink >= bands[digit, "bold"][0] else "plain"


def _sample(pipeline: StableDiffusion3Pipeline, prompts: list[str], guidance: float, seed: int) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    draw, images = torch.Generator().manual_seed(seed), []
    for start in range(0, len(prompts), 250):
        images.append(
            pipeline(
                prompts[start : start + 250],
                num_inference_steps=20,
                guidance_scale=guidance,
                generator=draw,
                max_sequence_length=TOKENS,
                output_type="pt",
            ).images
        )
    return torch.cat(images).mean(1, keepdim=True)


def _class_variance(images: Tensor, labels: Tensor) -> float:
    return float(torch.stack([images[labels == d].var(0).mean() for d in range(10)]).mean())


def _card(pipeline: StableDiffusion3Pipeline) -> dict[str, Any]:
    """Measure 1,000 samples against the held-out judge and the real images, without and with guidance.

    Accepted when, without guidance, the judge reads .80 to .97 of them as asked (there is something left
    to learn), and pixel std and within-class variance are at least .85 of the real images'.
    """
    real, judge = load_split("evaluator"), load_judge("evaluator")
    prompts = (digit_prompts() * 34)[:1000]
    asked = torch.tensor([parse_prompt(p)[0] for p in prompts])
    weights_asked = [parse_prompt(p)[1] for p in prompts]
    measured = {}
    for guidance in (1.0, 1.5):
        images = _sample(pipeline, prompts, guidance, seed=1)
        measured[f"guidance_{guidance}"] = {
            "accuracy": float((judge(images).argmax(1) == asked).float().mean()),
            "pixel_std_ratio": float(images.std() / real.images.std()),
            "class_variance_ratio": _class_variance(images, asked) / _class_variance(real.images, real.labels),
            "ink": {w: float(images[torch.tensor([p == w for p in weights_asked])].mean()) for w in WEIGHTS},
        }  # fmt: skip
    plain = measured["guidance_1.0"]
    refused = []
    if not 0.80 <= plain["accuracy"] <= 0.97:
        refused.append(f"accuracy {plain['accuracy']:.3f} is outside .80 to .97")
    refused += [
        f"{n} {plain[n]:.3f} is below .85" for n in ("pixel_std_ratio", "class_variance_ratio") if plain[n] < 0.85
    ]
    weights = {
        n: sum(p.numel() for p in m.parameters()) for n, m in pipeline.components.items() if hasattr(m, "parameters")
    }
    return {"samples": 1000, "refused": refused, "weights": weights, **measured}
