"""What alignment costs on the architectures people train, with random weights: beside diffusers and the released loop.

    python scripts/bench_families.py --json FILE [--families stable_diffusion sd3 flux] [--shape small] [--rounds 3]

Shapes: `real` is Stable Diffusion 1.5 at 512 px, SD3-medium at 1024 and FLUX.1-dev at 720 in bf16, and needs a GPU;
`small` takes minutes on a CPU, `tiny` seconds. Nothing is downloaded: prompts are random rows of the published size.

rollout_vs_pipeline     a diffusers call on the same module / our rollout, log-probs and storage included   (>= .95)
rollout_vs_plain        the same call without adapters and autocast / our rollout                         (reported)
trained_step_feq        a trained row in no-gradient forwards of it: LoRA <= 2.3, checkpointed <= 3.2, full reported
non_model_overhead      what an iteration spends outside denoiser and VAE, as a share                       (<= .15)
official_loop_ratio     our iteration / one sample and one step at a time, checkpointed, as the released code   (<= .5)
official_loop_plain_ratio   the same loop without checkpointing                                           (reported)
peak_memory_gb          by arm on a GPU; of the process on a CPU

Arms alternate within each round; the medians of the rounds' ratios are reported. Times are CUDA events on a GPU and CPU
time of the process otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from bench_step import Bench
from measuring import cost, over_rounds
from torch import Tensor

from align.config import LoraConfig
from align.diffusion.families import FAMILIES, Family, Size
from align.diffusion.policy import Policy, add_lora, store_frozen
from align.diffusion.rollout import decode, initial_noise, replay, tiles
from align.memory import available_bytes
from align.run import describe_machine, peak_memory_mb
from align.seeding import generator, permutation
from align.types import Samples

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SHAPES = ("tiny", "small", "real")
FULL_BYTES = 10  # of a fully trained weight in one step: float32, its bf16 copy, and its gradient


@dataclass(frozen=True)
class Shape:
    """One family at one size.

    Args:
        pipeline: its diffusers class.
        denoiser, vae: configurations of these two, as published for `real`.
        rows: of one encoded prompt, by name: their shape.
        side: pixels.
        prompts, group, steps: of an iteration.
        sampler: more of the rollout's configuration.
    """

    pipeline: str
    denoiser: dict[str, Any]
    vae: dict[str, Any]
    rows: dict[str, tuple[int, ...]]
    side: int
    prompts: int
    group: int
    steps: int
    sampler: dict[str, Any] = field(default_factory=dict)


def vae_config(widths: tuple[int, ...], channels: int, layers: int, quant: bool, **scale: float) -> dict[str, Any]:
    """Return the configuration of an image VAE."""
    return {
        "block_out_channels": widths, "latent_channels": channels, "layers_per_block": layers,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "norm_num_groups": min(32, widths[0]), "use_quant_conv": quant, "use_post_quant_conv": quant, **scale,
    }  # fmt: skip


def stable_diffusion(shape: str) -> Shape:
    """Stable Diffusion 1.5: a UNet of 860 M weights."""
    real, tiny = shape == "real", shape == "tiny"
    widths = (320, 640, 1280, 1280) if real else (16, 32) if tiny else (48, 96)
    text, levels = 768 if real else 32 if tiny else 128, len(widths)
    return Shape(
        "StableDiffusionPipeline",
        {
            "sample_size": 64 if real else 8 if tiny else 16, "in_channels": 4, "out_channels": 4,
            "block_out_channels": widths, "layers_per_block": 2 if real else 1, "cross_attention_dim": text,
            "attention_head_dim": 8 if real else 4, "norm_num_groups": 32 if real else 8,
            "down_block_types": ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        },
        vae_config((128, 256, 512, 512) if real else (8, 8), 4, 2 if real else 1, True, scaling_factor=0.18215),
        {"encoder_hidden_states": (77, text)},
        512 if real else 16 if tiny else 32, *_iteration(shape, (2, 8, 10)), {"kernel": "ddim", "eta": 1.0},
    )  # fmt: skip


def sd3(shape: str) -> Shape:
    """SD3-medium: an MMDiT of 2.0 B weights."""
    real, tiny = shape == "real", shape == "tiny"
    heads, head, layers = (24, 64, 24) if real else (2, 16, 2) if tiny else (4, 64, 4)
    text, pooled = (4096, 2048) if real else (64, 32)
    return Shape(
        "StableDiffusion3Pipeline",
        {
            "sample_size": 128 if real else 8 if tiny else 16, "patch_size": 2, "in_channels": 16, "out_channels": 16,
            "num_layers": layers, "attention_head_dim": head, "num_attention_heads": heads,
            "joint_attention_dim": text, "caption_projection_dim": heads * head, "pooled_projection_dim": pooled,
            "pos_embed_max_size": 192 if real else 16,
        },
        vae_config((128, 256, 512, 512) if real else (8, 8), 16, 2 if real else 1, False, scaling_factor=1.5305,
                   shift_factor=0.0609),
        {"encoder_hidden_states": (333 if real else 32, text), "pooled_projections": (pooled,)},
        1024 if real else 16 if tiny else 32, *_iteration(shape, (2, 4, 10)),
    )  # fmt: skip


def flux(shape: str) -> Shape:
    """FLUX.1-dev: double- and single-stream blocks, 11.9 B weights."""
    real, tiny = shape == "real", shape == "tiny"
    heads, head, double, single = (24, 128, 19, 38) if real else (2, 16, 1, 2) if tiny else (4, 64, 1, 3)
    text, pooled = (4096, 768) if real else (64, 32)
    return Shape(
        "FluxPipeline",
        {
            "patch_size": 1, "in_channels": 64, "num_layers": double, "num_single_layers": single,
            "attention_head_dim": head, "num_attention_heads": heads, "joint_attention_dim": text,
            "pooled_projection_dim": pooled, "guidance_embeds": True,
            "axes_dims_rope": (16, 56, 56) if real else (4, 6, 6) if tiny else (16, 24, 24),
        },
        vae_config((128, 256, 512, 512) if real else (8, 8), 16, 2 if real else 1, False, scaling_factor=0.3611,
                   shift_factor=0.1159),
        {"encoder_hidden_states": (512 if real else 32, text), "pooled_projections": (pooled,)},
        720 if real else 16 if tiny else 32, *_iteration(shape, (2, 2, 8)),
    )  # fmt: skip


def _iteration(shape: str, real: tuple[int, int, int]) -> tuple[int, int, int]:
    """Prompts, members of each, and solver steps."""
    return real if shape == "real" else (2, 2, 4) if shape == "tiny" else (2, 4, 6)


FAMILY = {"stable_diffusion": stable_diffusion, "sd3": sd3, "flux": flux}


def build(shape: Shape) -> Any:
    """Return the pipeline with random float32 weights on the device, without encoders."""
    import diffusers

    if shape.pipeline == "StableDiffusionPipeline":
        component, kind = "unet", diffusers.UNet2DConditionModel
        absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        scheduler = diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        )  # fmt: skip
    elif shape.pipeline == "StableDiffusion3Pipeline":
        component, kind = "transformer", diffusers.SD3Transformer2DModel
        absent = dict.fromkeys(("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"))
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    else:
        component, kind = "transformer", diffusers.FluxTransformer2DModel
        absent = dict.fromkeys(("text_encoder_2", "tokenizer_2"))
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
            max_image_seq_len=4096,
        )  # fmt: skip
    with torch.device(DEVICE):
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(in_channels=3, out_channels=3, **shape.vae)
        modules = {component: kind(**shape.denoiser), "vae": vae}
    pipeline = getattr(diffusers, shape.pipeline)(
        scheduler=scheduler, text_encoder=None, tokenizer=None, **modules, **absent
    )
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False).eval()
    return pipeline


def family_of(shape: Shape, pipeline: Any) -> Family:
    """Return the family of a pipeline; its prompts are random rows that depend on the text alone."""
    family = FAMILIES.get(shape.pipeline)(pipeline)

    def encode(prompts: list[str], size: Size) -> dict[str, Tensor]:
        return {
            name: torch.stack([torch.randn(rows, generator=generator(p, name)) for p in prompts]).to(DEVICE)
            for name, rows in shape.rows.items()
        }

    family.encode = encode
    return family


def brightness(samples: Samples) -> list[float]:
    """A reward that costs nothing: the mean pixel."""
    return samples.images.mean((1, 2, 3)).tolist()


def plain_call(shape: Shape, policy: Policy, dtype: torch.dtype, prompts: list[str], made: str = "pt") -> None:
    """Make images, or latents, with a plain call of the pipeline, prompts encoded beforehand."""
    rows = policy.encodings.stack(prompts)
    told = {"prompt_embeds": rows["encoder_hidden_states"].to(dtype)}
    if "pooled_projections" in rows:
        told["pooled_prompt_embeds"] = rows["pooled_projections"].to(dtype)
    policy.family.pipeline(
        **told, num_inference_steps=shape.steps, guidance_scale=policy.embedded_guidance or 1.0,
        height=shape.side, width=shape.side, output_type=made,
    )  # fmt: skip


def convert(pipeline: Any, dtype: torch.dtype) -> None:
    """Convert all weights of a pipeline in place."""
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            torch.nn.Module.to(component, dtype)


class FamilyBench(Bench):
    """`bench_step`'s iteration of the trainer, and the other ways, on a policy of the shape's."""

    def __init__(self, shape: Shape, policy: Policy, folder: str) -> None:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("".join(f"prompt {i}\n" for i in range(2 * shape.prompts)), encoding="utf-8")
        config = {
            "name": "bench", "model": {"path": "digits", "dtype": policy.dtype},
            "rewards": [{"name": "bench_families:brightness"}],
            "prompts": {"path": str(prompts), "heldout_fraction": 0.5}, "optimizer": {"lr": 1e-6},
            "prompts_per_step": shape.prompts, "group_size": shape.group, "updates_per_step": 1,
            "sampler": {"solver_steps": shape.steps, "height": shape.side, "width": shape.side, **shape.sampler},
        }  # fmt: skip
        self.shape = shape
        with mock.patch("trainers.online.load_policy", return_value=policy):
            super().__init__(config, folder + "/run")
        self.scheduler = policy.family.pipeline.scheduler
        self.batches = self.trainer._batches(self.run)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The precision that the policy computes in."""
        return torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=self.policy.dtype == "bf16")

    def inputs(self, rows: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return latents, timesteps and conditioning of a forward."""
        conditioning = self.policy.encodings.stack((self.flat * rows)[:rows])
        if self.policy.embedded_guidance is not None:
            conditioning["guidance"] = torch.full((rows,), self.policy.embedded_guidance, device=DEVICE)
        times = torch.full((rows,), 500.0, device=DEVICE)
        return torch.randn(rows, *self.policy.latent_shape, device=DEVICE), times, conditioning

    def bare_model(self) -> None:
        """The denoiser calls of an iteration, and nothing else: same count, shapes, precision and gradients."""
        rollout, tile = self.batches
        predict, samples = self.policy.family.predict, len(self.flat)
        with torch.no_grad():
            for rows in _parts(samples, rollout):
                inputs = self.inputs(rows)
                for _ in range(self.shape.steps):
                    with self.autocast():
                        predict(*inputs)
        for rows in _parts(samples * self.count, tile):
            inputs = self.inputs(rows)
            with self.autocast():
                output = predict(*inputs)
            output.float().mean().backward()
        self.run.engine.optimizer.zero_grad()

    def decoding(self) -> None:
        """The VAE calls of an iteration."""
        decode(self.policy, torch.randn(len(self.flat), *self.policy.latent_shape, device=DEVICE))

    def pipeline_call(self) -> None:
        """A diffusers call on the module that is trained, in the same precision, prompts encoded beforehand."""
        with self.autocast():
            for rows in _parts(len(self.flat), self.batches[0]):
                plain_call(self.shape, self.policy, torch.float32, self.flat[:rows], "latent")
        self.decoding()  # in float32, as our rollouts are decoded

    # The released loop

    def step_density(self, x: Tensor, output: Tensor, i: int) -> tuple[Tensor, float]:
        """Return mean and std of solver step i: DDIM's with eta, or the flow's SDE."""
        eta, (now, after) = self.config.sampler.eta, self.levels[i]
        if self.shape.pipeline != "StableDiffusionPipeline":
            score = -(x - (1 - now) * (x - now * output)) / now**2
            delta = now - after
            return x - delta * output + 0.5 * eta**2 * delta * score, eta * math.sqrt(delta)
        std = eta * math.sqrt((1 - after) / (1 - now) * (1 - now / after))
        x0 = (x - math.sqrt(1 - now) * output) / math.sqrt(now)
        return math.sqrt(after) * x0 + math.sqrt(max(0.0, 1 - after - std**2)) * output, std

    def visit(self) -> Tensor:
        """Set the scheduler's steps; return its timesteps, and keep the level before and after each: sigma, or abar."""
        scheduler, steps = self.scheduler, self.shape.steps
        if self.shape.pipeline == "FluxPipeline":
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=1.0, device=DEVICE)
        else:
            scheduler.set_timesteps(steps, device=DEVICE)
        if self.shape.pipeline == "StableDiffusionPipeline":
            left = [*scheduler.alphas_cumprod.tolist(), float(scheduler.final_alpha_cumprod)]
            stride, times = scheduler.config.num_train_timesteps // steps, scheduler.timesteps.tolist()
            self.levels = [(left[t], left[max(t - stride, -1)]) for t in times]
        else:
            sigmas = scheduler.sigmas.tolist()
            self.levels = list(zip(sigmas, sigmas[1:], strict=False))
        return scheduler.timesteps.float()

    def official_loop(self, samples: int) -> None:
        """An iteration on some of the samples as the released code goes about it: each sample alone, each step alone.

        Sample: every solver step of one latent after another, keeping latents and log-densities; decode it; score it.
        Train: for every sample, its own random steps one by one: forward, ratio, clipped loss, backward. The
        gradient is accumulated over all of them, clipped, and stepped once.
        """
        steps, kept, rewards, times = self.shape.steps, [], [], self.visit()
        noise = initial_noise(self.policy.latent_shape, range(samples), self.shape.group, "group", 0, 1).to(DEVICE)
        for prompt, x in zip(self.flat[:samples], noise.split(1), strict=True):
            path, logps = [x], []
            with torch.no_grad():
                for i in range(steps):
                    mean, std = self.step_density(x, self.policy.velocity(x, times[i : i + 1], [prompt]), i)
                    x = mean + std * torch.randn_like(x) if i < steps - 1 else mean
                    path.append(x)
                    logps.append(_log_density(x, mean, std))
            rewards.append(float(decode(self.policy, x).mean()))
            kept.append((prompt, path, logps))
        values = torch.tensor(rewards).reshape(-1, min(samples, self.shape.group))
        advantages = ((values - values.mean(1, keepdim=True)) / (values.std(1, keepdim=True) + 1e-8)).flatten()
        clip = self.config.objective.clip_range
        for row, (prompt, path, logps) in enumerate(kept):
            for i in permutation(steps - 1, 0, row)[: self.count]:
                output = self.policy.velocity(path[i], times[i : i + 1], [prompt])
                logp = _log_density(path[i + 1], *self.step_density(path[i], output, i))
                ratio, gain = (logp - logps[i]).exp(), float(advantages[row].clamp(-5, 5))
                loss = torch.maximum(-gain * ratio, -gain * ratio.clamp(1 - clip, 1 + clip))
                (loss.sum() / (samples * self.count)).backward()
        torch.nn.utils.clip_grad_norm_(list(self.run.parameters.values()), 1.0)
        self.run.engine.optimizer.step()
        self.run.engine.optimizer.zero_grad()


def _log_density(x: Tensor, mean: Tensor, std: float) -> Tensor:
    std = max(std, 1e-6)
    return (-((x - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


def _parts(count: int, size: int) -> Iterator[int]:
    while count > 0:
        yield min(count, size)
        count -= size


@contextlib.contextmanager
def checkpointed(policy: Policy) -> Iterator[None]:
    """Recompute activations within the block."""
    policy.family.denoiser.enable_gradient_checkpointing()
    try:
        yield
    finally:
        policy.family.denoiser.disable_gradient_checkpointing()


def trained_row(policy: Policy, rows: int, rounds: int, shape: Shape) -> tuple[float | None, float | None]:
    """Return a trained step of `rows` rows in forwards without gradient of the same rows, and the peak memory.

    None for both where it does not fit.
    """
    from align.diffusion.kernels import step_table
    from align.diffusion.rollout import sample

    kind, eta = shape.sampler.get("kernel", "dance_sde"), shape.sampler.get("eta", 0.3)
    table = step_table(kind, eta, policy.family.schedule(2, None, policy.latent_shape))
    rollout = sample(policy, [f"prompt {i}" for i in range(rows)], group_size=1, table=table, key=(0,))
    tile = next(tiles(rollout, range(rows), [table.stochastic_steps[:1]] * rows, torch.ones(rows), rows))
    times = table.timestep[tile.step].to(DEVICE, torch.float32)
    parameters = list(policy.trainable().values())

    def forward() -> None:
        with torch.no_grad():
            policy.velocity(tile.x, times, tile.prompts)

    def step() -> None:
        replay(policy, tile, table).logp.mean().backward()
        for p in parameters:
            p.grad = None

    reset_peak()
    ratios = []
    try:
        for _ in range(max(3, rounds) + 1):  # the first warms up
            f = cost(forward)
            ratios.append(cost(step) / f)
    except torch.OutOfMemoryError:
        return None, None
    finally:
        for p in parameters:
            p.grad = None
    return statistics.median(ratios[1:]), peak_gb()


def reset_peak() -> None:
    """Forget the peak memory so far, where the device can."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()


def tidy() -> None:
    """Give back what the stage before left behind."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def peak_gb() -> float | None:
    """Return the peak of the GPU's memory since `reset_peak`; None on a CPU, which keeps one peak for all."""
    return peak_memory_mb() / 1000 if GPU else None


def measure(name: str, shape_name: str, rounds: int, official: int) -> dict[str, Any]:
    """Measure one family."""
    shape, said = FAMILY[name](shape_name), time.perf_counter()

    def say(what: str) -> None:
        sys.stderr.write(f"{time.perf_counter() - said:7.1f} s  {name}: {what}\n")

    say("building")
    pipeline = build(shape)
    family, dtype = family_of(shape, pipeline), "bf16" if shape_name == "real" else "fp32"
    size, samples = Size(shape.side, shape.side), shape.prompts * shape.group
    weights = sum(p.numel() for p in family.denoiser.parameters())
    say(f"{weights / 1e6:,.1f} M weights; a plain call")
    plain_policy, half = Policy(family, size=size, dtype=dtype), torch.bfloat16 if dtype == "bf16" else torch.float32
    flat, plain = [f"prompt {i // shape.group}" for i in range(samples)], []
    convert(pipeline, half)
    plain_call(shape, plain_policy, half, flat)
    for _ in range(rounds):
        plain.append(cost(lambda: plain_call(shape, plain_policy, half, flat)))
    convert(pipeline, torch.float32)

    feq: dict[str, float | None] = {"full": None}
    peaks: dict[str, float | None] = {}
    rows = {"real": 2, "small": 8, "tiny": 4}[shape_name]
    if not GPU or weights * FULL_BYTES < 0.8 * available_bytes(torch.device(DEVICE)) + 4 * weights:
        say("a trained row, all weights")
        family.denoiser.requires_grad_(True)
        feq["full"], peaks["train_full"] = trained_row(Policy(family, size=size, dtype=dtype), rows, rounds, shape)
        family.denoiser.requires_grad_(False)
    add_lora(family, LoraConfig(rank=16, alpha=32.0), 0)
    if dtype == "bf16":
        store_frozen(family)
    policy = Policy(family, size=size, dtype=dtype)
    tidy()
    say("a trained row, adapters")
    fits = rows if name != "flux" or not GPU else 1
    feq["lora"], peaks["train_lora"] = trained_row(policy, fits, rounds, shape)
    with checkpointed(policy):
        feq["lora_checkpointed"], peaks["train_lora_checkpointed"] = trained_row(policy, rows, rounds, shape)
    tidy()

    with tempfile.TemporaryDirectory() as folder:
        bench = FamilyBench(shape, policy, folder)
        few = min(samples, max(1, samples // official))
        always = feq["lora"] is None  # a single row only fits when it is checkpointed
        released = functools.partial(bench.official_loop, few)
        arms: dict[str, Callable[[], object]] = {
            "ours": bench.ours, "bare_model": bench.bare_model, "decode": bench.decoding, "rollout": bench.rollout,
            "pipeline": bench.pipeline_call, "official_plain": released, "official": released,
        }  # fmt: skip
        if always:
            del arms["official_plain"]
        seen: list[dict[str, float]] = []
        for turn in range(rounds + 1):  # the first warms up
            say(f"round {turn} of {rounds}" if turn else "warming up")
            row = {}
            for arm, work in arms.items():
                reset_peak()
                with checkpointed(policy) if always or arm == "official" else contextlib.nullcontext():
                    row[arm] = cost(work) * (samples / few if arm.startswith("official") else 1)
                peaks[arm] = peak_gb()
            seen += [row] if turn else []
        tile = {"rollout": bench.batches[0], "train": bench.batches[1]}

    median = {arm: statistics.median(row[arm] for row in seen) for arm in arms}
    plainly = {"official_loop_plain_ratio": None}
    if not always:
        plainly = over_rounds("official_loop_plain_ratio", [row["ours"] / row["official_plain"] for row in seen])
    return {
        "weights": weights, "side": shape.side, "samples": samples, "solver_steps": shape.steps,
        "trained_steps": bench.count, "rows_at_once": tile, "dtype": dtype,
        "checkpointed": always,
        **over_rounds("rollout_vs_pipeline", [row["pipeline"] / row["rollout"] for row in seen]),
        "rollout_vs_plain": statistics.median(plain) / median["rollout"],
        "trained_step_feq": feq,
        **over_rounds("non_model_overhead", [1 - (row["bare_model"] + row["decode"]) / row["ours"] for row in seen]),
        **over_rounds("official_loop_ratio", [row["ours"] / row["official"] for row in seen]),
        **plainly,
        "official_samples_run": few,
        "peak_memory_gb": {k: v for k, v in peaks.items() if v is not None} or {"process": peak_memory_mb() / 1000},
        "seconds": {**median, "plain": statistics.median(plain)},
        "spread": {arm: [min(row[arm] for row in seen), max(row[arm] for row in seen)] for arm in arms},
    }  # fmt: skip


BARS = {
    "rollout_vs_pipeline": ">= .95", "rollout_vs_plain": "reported", "trained_step_feq.lora": "<= 2.3",
    "trained_step_feq.lora_checkpointed": "<= 3.2", "trained_step_feq.full": "reported",
    "non_model_overhead": "<= .15", "official_loop_ratio": "<= .5", "official_loop_plain_ratio": "reported",
}  # fmt: skip


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the figures as one Markdown table."""

    def shown(figures: dict[str, Any], key: str) -> str:
        first, _, second = key.partition(".")
        value = figures[first][second] if second else figures[first]
        return "does not fit" if value is None else f"{value:.3f}"

    lines = [f"| figure | {' | '.join(found)} | bar |", f"|---|{'---|' * len(found)}---|"]
    lines += [f"| `{key}` | {' | '.join(shown(f, key) for f in found.values())} | {bar} |" for key, bar in BARS.items()]
    peaks = [max(f["peak_memory_gb"].values()) for f in found.values()]
    lines.append(f"| `peak_memory_gb`, largest | {' | '.join(f'{peak:.1f}' for peak in peaks)} | reported |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the families and write the JSON, after each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, help="file to write the figures to")
    parser.add_argument("--families", nargs="+", choices=FAMILY, default=list(FAMILY), help="which to measure")
    parser.add_argument("--shape", choices=SHAPES, default="real" if GPU else "small", help="how large they are")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of alternating arms; medians are reported")
    parser.add_argument(
        "--official-share", type=int, default=2, help="the step-by-step loop runs on 1/N of the samples, times N"
    )
    args = parser.parse_args()
    if args.shape == "real" and not GPU:
        parser.error("--shape real needs a GPU; small is made for a CPU")
    found = {}
    for name in args.families:
        found[name] = measure(name, args.shape, args.rounds, args.official_share)
        tidy()
        result = {"shape": args.shape, "rounds": args.rounds, "families": found, **describe_machine()}
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(found))


if __name__ == "__main__":
    main()
