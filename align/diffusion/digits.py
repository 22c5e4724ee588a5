"""The embedded default: small text-to-image models of handwritten digits, as real diffusers folders.

`build_digits()` is a StableDiffusion3Pipeline, a rectified flow trained with

    || v(x_t, t, prompt) - (noise - x0) ||^2,   x_t = (1 - t) x0 + t noise,   t ~ sigmoid(N(0, .75^2))

`build_digits("sd")` is a StableDiffusionPipeline, a variance-preserving diffusion trained with

    || eps(x_t, t, prompt) - noise ||^2,   x_t = alpha_t x0 + sigma_t noise,   t ~ U{0, ..., 999}

and `build_digits("sd-v")` the same with `alpha_t noise - sigma_t x0` in place of the noise. Only the
autoencoder and the denoiser are trained, on the generator split. They are loaded and run through
`families/` like any other folder.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from align.diffusion.digits_data import (
    WEIGHTS,
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
from align.diffusion.digits_models import TOKENS, digits_sd, digits_sd3
from align.diffusion.families import FAMILIES, Family, Size
from align.diffusion.policy import quiet_loading
from align.errors import ConfigError, ModelError
from align.registry import suggest

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from tqdm import tqdm


@dataclass(frozen=True)
class DigitsRecipe:
    """How a digits model is built.

    Args:
        kind: "sd3" (rectified flow), or diffusion that predicts "epsilon" or "v_prediction".
        width, layers: of the denoiser; a UNet has no layers.
        vae_steps, flow_steps: optimizer steps of the autoencoder and of the denoiser.
        accept: refuse the model unless it passes `acceptance`.
    """

    kind: Literal["sd3", "epsilon", "v_prediction"] = "sd3"
    width: int = 64
    layers: int = 3
    vae_steps: int = 300
    vae_batch: int = 16
    vae_lr: float = 3e-3
    flow_steps: int = 2600
    flow_batch: int = 32
    flow_lr: float = 2e-3
    prompt_drop: float = 0.1
    accept: bool = True
    seed: int = 0


RECIPES = {
    "default": DigitsRecipe(),
    "smoke": DigitsRecipe(width=32, layers=2, vae_steps=120, flow_steps=240, accept=False),
    "random": DigitsRecipe(width=32, layers=2, vae_steps=0, flow_steps=0, accept=False),
    "sd": DigitsRecipe(kind="epsilon", width=32, flow_steps=1300),
    "sd-v": DigitsRecipe(kind="v_prediction", width=32, flow_steps=1300),
    "sd-random": DigitsRecipe(kind="epsilon", width=16, vae_steps=0, flow_steps=0, accept=False),
}


def build_digits(recipe: str = "default", *, progress: bool = True) -> Path:
    """Return the folder of the digits model of a recipe, built on first use and cached by content.

    "default", "sd" and "sd-v" take about two CPU-minutes, "smoke" some seconds; "random" and "sd-random"
    have untrained weights.

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
            pipeline = (
                digits_sd3(folder, width=config.width, layers=config.layers)
                if config.kind == "sd3"
                else digits_sd(folder, width=config.width, prediction=config.kind)
            )
            family = FAMILIES.get(type(pipeline).__name__)(pipeline)
            total = config.vae_steps + config.flow_steps
            quiet = {"disable": not (progress and total), "mininterval": 0.2 if sys.stderr.isatty() else 10.0}
            with tqdm(total=total, desc="pretraining digits (once, then cached)", unit="step", **quiet) as bar:
                error = _train_vae(pipeline.vae, config, bar)
                _train_denoiser(family, config, bar)
            card = {"recipe": asdict(config), "autoencoder_rmse": error, **(_card(family) if config.accept else {})}
    finally:
        torch.set_num_threads(threads)
    card["cpu_seconds"] = round(time.process_time() - began, 1)
    if card.get("refused"):
        raise ModelError("The digits model did not pass its acceptance", why="; ".join(card["refused"]))
    with quiet_loading():
        pipeline.save_pretrained(folder)
    (folder / "card.json").write_text(json.dumps(card, indent=1), encoding="utf-8")


def _pixels(images: Tensor) -> Tensor:
    return images.repeat(1, 3, 1, 1) * 2 - 1


def _train_vae(vae: AutoencoderKL, config: DigitsRecipe, bar: tqdm) -> float:
    """Train the autoencoder, set its latents to unit std (and SD3's to zero mean); return its RMSE on unseen digits."""
    images = load_split("generator").images
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.vae_lr, foreach=True)
    for step in range(config.vae_steps):
        rate = min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / config.vae_steps))
        optimizer.param_groups[0]["lr"] = config.vae_lr * rate
        x = _pixels(images[torch.randint(len(images), (config.vae_batch,))])
        posterior = vae.encode(x).latent_dist
        loss = F.mse_loss(vae.decode(posterior.sample()).sample, x) + 4e-7 * posterior.kl().mean()
        _descend(loss, optimizer)
        bar.update()
    vae.requires_grad_(False).eval()
    latents = _encode(vae, images)
    centred = vae.config.shift_factor is not None  # Stable Diffusion's VAE has a scale only
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    if centred:
        vae.register_to_config(shift_factor=float(latents.mean()))
    unseen = load_split("evaluator").images
    error = vae.decode(vae.encode(_pixels(unseen)).latent_dist.mode()).sample - _pixels(unseen)
    return float((error / 2).square().mean().sqrt())


def _encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    return torch.cat([vae.encode(_pixels(part)).latent_dist.mode() for part in images.split(128)])


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0, foreach=True)
    optimizer.step()


def _noised(family: Family, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw noise levels for a batch; return the noised latents, what the model is told, and what it should say."""
    noise, scheduler = torch.randn_like(x0), family.pipeline.scheduler
    if hasattr(scheduler, "alphas_cumprod"):
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x0),))
        target = noise if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(x0, noise, t)
        return scheduler.add_noise(x0, noise, t), t, target
    t = torch.sigmoid(0.75 * torch.randn(len(x0)))  # wider spreads leave less variety within a class
    mix = t[:, None, None, None]
    return (1 - mix) * x0 + mix * noise, t * scheduler.config.num_train_timesteps, noise - x0


def _train_denoiser(family: Family, config: DigitsRecipe, bar: tqdm) -> None:
    """Train the denoiser on captioned latents and leave the average of its weights in the pipeline."""
    split, vae, model = load_split("generator"), family.pipeline.vae, family.denoiser
    latents = (_encode(vae, split.images) - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    prompts = [*digit_prompts(), ""]
    encoded, bands = family.encode(prompts, Size()), ink_bands("generator")
    weighted = torch.tensor([
        prompts.index(prompt_for(digit, _band(bands, digit, ink)))
        for digit, ink in zip(split.labels.tolist(), split.ink.tolist(), strict=True)
    ])  # fmt: skip
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.flow_lr, weight_decay=1e-3, foreach=True)
    for step in range(config.flow_steps):
        done = step / config.flow_steps
        optimizer.param_groups[0]["lr"] = config.flow_lr * min(1.0, (step + 1) / 50) * min(1.0, (1 - done) / 0.4 + 0.02)
        rows = torch.randint(len(latents), (config.flow_batch,))
        caption = torch.where(torch.rand(len(rows)) < 0.5, split.labels[rows], weighted[rows])
        caption = torch.where(torch.rand(len(rows)) < config.prompt_drop, len(prompts) - 1, caption)
        x, timestep, target = _noised(family, latents[rows])
        predicted = family.predict(x, timestep, {name: value[caption] for name, value in encoded.items()})
        _descend(F.mse_loss(predicted, target), optimizer)
        decay = min(0.998, (step + 1) / (step + 21))
        get_ema_multi_avg_fn(decay)(average, parameters, step)
        bar.update()
    with torch.no_grad():
        for p, mean in zip(parameters, average, strict=True):
            p.copy_(mean)
    model.requires_grad_(False).eval()


def _band(bands: dict[tuple[int, str], tuple[float, float]], digit: int, ink: float) -> str:
    if ink <= bands[digit, "thin"][1]:
        return "thin"
    return "bold" if ink >= bands[digit, "bold"][0] else "plain"


def _sample(family: Family, prompts: list[str], guidance: float, seed: int) -> Tensor:
    """Sample with the plain pipeline: 20 steps of the folder's own sampler."""
    pipeline, draw, images = family.pipeline, torch.Generator().manual_seed(seed), []
    pipeline.set_progress_bar_config(disable=True)
    options = {"max_sequence_length": TOKENS} if hasattr(pipeline, "tokenizer_3") else {}
    for start in range(0, len(prompts), 250):
        images.append(
            pipeline(
                prompts[start : start + 250],
                num_inference_steps=20,
                guidance_scale=guidance,
                generator=draw,
                output_type="pt",
                **options,
            ).images
        )
    return torch.cat(images).mean(1, keepdim=True)


def _class_variance(images: Tensor, labels: Tensor) -> float:
    return float(torch.stack([images[labels == d].var(0).mean() for d in range(10)]).mean())


def _card(family: Family) -> dict[str, Any]:
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
        images = _sample(family, prompts, guidance, seed=1)
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
        n: sum(p.numel() for p in m.parameters())
        for n, m in family.pipeline.components.items()
        if hasattr(m, "parameters")
    }
    return {"samples": 1000, "refused": refused, "weights": weights, **measured}
