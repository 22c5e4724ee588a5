"""Every image family against diffusers' own pipeline: rollout, replay, adapters, reference, training, bad input."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tiny
import tiny_images
from align import guards
from align.config import LoraConfig, ModelConfig
from align.diffusion.families import Size
from align.diffusion.kernels import step_table
from align.diffusion.policy import Policy, add_lora, load_family
from align.diffusion.rollout import decode, initial_noise, replay, sample, solve, tiles
from align.errors import ModelError
from align.reports.training import write_report
from trainers.dance_grpo import DanceGRPO

PROMPTS = ["a red cat", "two dogs"]
STEPS = 4


def packed(pipeline, noise):
    return pipeline._pack_latents(noise, *noise.shape)


def call_unet(pipeline, noise, scale):
    from diffusers import DDIMScheduler

    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    return {"latents": noise, "guidance_scale": scale}


def call_sd3(pipeline, noise, scale):
    return {"latents": noise, "guidance_scale": scale}


def call_flux(pipeline, noise, scale):
    cfg = {} if scale == 1 else {"true_cfg_scale": scale, "negative_prompt": [""] * len(noise)}
    return {"latents": packed(pipeline, noise), "max_sequence_length": 16, **cfg}


def call_qwen(pipeline, noise, scale):
    cfg = {} if scale == 1 else {"true_cfg_scale": scale, "negative_prompt": [" "] * len(noise)}
    return {"latents": packed(pipeline, noise), **cfg}


@dataclass(frozen=True)
class Case:
    """A tiny family: how it is built, and how its pipeline is called on given noise."""

    build: Callable[[Path], Path]
    call: Callable[..., dict]
    size: Size = Size(16, 16)
    kernel: tuple[str, float] = ("dance_sde", 0.3)


CASES = {
    "sd": Case(tiny.stable_diffusion, call_unet, kernel=("ddim", 1.0)),
    "sdxl": Case(tiny_images.sdxl, call_unet, kernel=("ddim", 1.0)),
    "sdxl_v": Case(
        lambda p: tiny_images.sdxl(p, prediction="v_prediction", zeros=False), call_unet, kernel=("ddim", 1.0)
    ),
    "sd3": Case(tiny.sd3, call_sd3),
    "sd35": Case(
        lambda p: tiny.sd3(p, shifted=True, dual_attention_layers=(0, 1), qk_norm="rms_norm"), call_sd3, Size(16, 12)
    ),
    "flux": Case(tiny_images.flux, call_flux, Size(16, 12)),
    "flux_schnell": Case(lambda p: tiny_images.flux(p, guidance_embeds=False), call_flux, Size(12, 16)),
    "qwen": Case(tiny_images.qwen_image, call_qwen, Size(16, 24)),
}
MAIN = ["sd", "sdxl", "sd35", "flux", "qwen"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("families"), {}

    def folder(name):
        if name not in made:
            made[name] = CASES[name].build(root / name)
        return made[name]

    return folder


def load(folders, name, scale=1.0, **options):
    guidance = {} if scale == 1 else {"guidance": "both_branches", "guidance_scale": scale}
    folder = folders(name)
    return Policy.load(folder, ModelConfig(path=str(folder), **options), seed=0, size=CASES[name].size, **guidance)


def table_for(name, policy, steps=STEPS, ode=False):
    kind, eta = ("ode", 0.0) if ode else CASES[name].kernel
    return step_table(kind, eta, policy.family.schedule(steps, None, policy.latent_shape))


def roll(name, policy, batch=None):
    return sample(policy, PROMPTS, group_size=2, table=table_for(name, policy), key=(0, 1), batch=batch)


def all_tiles(rollout, size):
    steps = [rollout.table.stochastic_steps] * len(rollout)
    return tiles(rollout, range(len(rollout)), steps, torch.linspace(-1, 1, len(rollout)).double(), size)


def errors(policy, rollout, size):
    return [(replay(policy, t, rollout.table).logp - t.logp).abs().max().item() for t in all_tiles(rollout, size)]


def theirs(name, family, noise, scale):
    case, pipeline = CASES[name], family.pipeline
    return pipeline(
        PROMPTS, height=case.size.height, width=case.size.width, num_inference_steps=STEPS, output_type="pt",
        **case.call(pipeline, noise, scale),
    ).images  # fmt: skip


def ours(name, policy, noise):
    return decode(policy, solve(policy, noise, PROMPTS, table_for(name, policy, ode=True)).x0)


@pytest.mark.parametrize("name", CASES)
def test_ode_rollout_equals_the_pipeline(folders, name):
    plain = load(folders, name)
    noise = initial_noise(plain.latent_shape, range(2), 1, "none", 5)
    made = {}
    for scale in (1.0, 6.0):
        policy = plain.with_guidance(scale)
        made[scale] = ours(name, policy, noise)
    for scale, mine in made.items():  # last, since a call may change the pipeline's scheduler
        expected = theirs(name, plain.family, noise, scale)
        assert mine.shape == expected.shape == (2, 3, *(CASES[name].size.height, CASES[name].size.width))
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=0)
        assert expected.std() > 0.02
    assert (made[1.0] - made[6.0]).abs().max() > 1e-4, "guidance takes part"


@pytest.mark.parametrize("name", CASES)
def test_timesteps_are_the_pipelines_and_shifts_are_dance_grpos(folders, name):
    family = load_family(folders(name))
    shape = family.latent_shape(CASES[name].size)
    schedule = family.schedule(7, None, shape)
    if schedule.prediction != "velocity":
        return
    family.pipeline(
        PROMPTS, height=CASES[name].size.height, width=CASES[name].size.width, num_inference_steps=7, output_type="pt",
        **CASES[name].call(family.pipeline, torch.zeros(2, *shape), 1.0),
    )  # fmt: skip
    assert torch.equal(schedule.timestep, family.pipeline.scheduler.timesteps)
    assert torch.equal(schedule.sigma.float(), family.pipeline.scheduler.sigmas)
    shifted = family.schedule(4, 3.0, shape)
    assert shifted.sigma.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert shifted.timestep.tolist() == pytest.approx([1000, 900, 750, 500])


def test_the_embedded_guidance_reaches_the_model(folders):
    policy = load(folders, "flux")
    assert policy.embedded_guidance == 3.5 and load(folders, "flux_schnell").embedded_guidance is None
    noise = initial_noise(policy.latent_shape, range(2), 1, "none", 5)
    default = ours("flux", policy, noise)
    policy.embedded_guidance = 1.0
    told = ours("flux", policy, noise)
    expected = policy.family.pipeline(
        PROMPTS, height=16, width=12, num_inference_steps=STEPS, guidance_scale=1.0, output_type="pt",
        **call_flux(policy.family.pipeline, noise, 1),
    ).images  # fmt: skip
    torch.testing.assert_close(told, expected, atol=1e-5, rtol=0)
    assert (told - default).abs().max() > 1e-4
    with pytest.raises(ModelError, match="told no guidance scale"):
        Policy(load_family(folders("flux_schnell")), embedded_guidance=3.5, size=Size(16, 16))


@pytest.mark.parametrize("name", MAIN)
def test_t7_the_first_ratio_is_one(folders, name):
    for scale in (1.0, 3.0):
        policy = load(folders, name, scale)
        rollout = roll(name, policy)
        assert errors(policy, rollout, len(rollout)) == [0.0] * len(rollout.table.stochastic_steps)
        for size in (3, 100):
            for tile in all_tiles(rollout, size):
                logp = replay(policy, tile, rollout.table).logp
                found = guards.first_ratio_errors(logp, tile.logp, rollout.table.std[tile.step])
                guards.require_first_ratio(*found, 1e-6, name)


@pytest.mark.parametrize("name", MAIN)
def test_t7_in_bf16_the_first_ratio_is_within_its_bound(folders, name):
    policy = load(folders, name, 3.0, dtype="bf16")
    rollout = roll(name, policy)
    assert rollout.x.dtype == torch.float32
    assert max(errors(policy, rollout, len(rollout))) == 0.0
    for tile in all_tiles(rollout, 3):
        logp = replay(policy, tile, rollout.table).logp
        found = guards.first_ratio_errors(logp, tile.logp, rollout.table.std[tile.step])
        guards.require_first_ratio(*found, guards.FIRST_RATIO_TOLERANCE["bf16"], name)


@pytest.mark.parametrize(("name", "count"), [("sd35", 12), ("flux", 8), ("qwen", 8)])
def test_in_bf16_queries_and_keys_stay_so_through_their_norms(folders, name, count):
    """Torch's fused RMSNorm needs input and weight of one type; a norm that reads float32 keeps its own in float32."""
    policy = load(folders, name, dtype="bf16")
    seen = []
    for place, module in policy.family.denoiser.named_modules():
        if type(module).__name__ == "RMSNorm":
            module.register_forward_hook(
                lambda module, inputs, output, place=place: seen.append(
                    (place.rsplit(".", 1)[-1], {inputs[0].dtype, module.weight.dtype, output.dtype})
                )
            )
    policy.velocity(torch.zeros(1, *policy.latent_shape), torch.tensor([500.0]), PROMPTS[:1])
    of_attention = [types for place, types in seen if place.startswith("norm_")]
    assert of_attention == [{torch.bfloat16}] * count
    assert [types for place, types in seen if place == "txt_norm"] == [{torch.float32}] * (name == "qwen")


def gradients(policy, rollout, size=100):
    for tile in all_tiles(rollout, size):
        (-(tile.advantage * replay(policy, tile, rollout.table).logp).mean() * tile.share).backward()
    found = {n: p.grad for n, p in policy.trainable().items()}
    for p in policy.trainable().values():
        p.grad = None
    return found


@pytest.mark.parametrize("name", MAIN)
def test_a_step_moves_every_adapter_and_nothing_else(folders, name):
    policy = load(folders, name, lora=LoraConfig(rank=2, alpha=4.0))
    before = {n: p.detach().clone() for n, p in policy.family.denoiser.named_parameters()}
    rollout = roll(name, policy)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-2, weight_decay=0.0)
    for _ in range(2):  # B starts at 0, so A gets its first gradient after B has moved
        for parameter, gradient in gradients(policy, rollout).items():
            policy.trainable()[parameter].grad = gradient
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, p in policy.family.denoiser.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(policy.trainable())
    assert moved and all("lora" in n for n in moved)
    # The reference is the model as it was: adapters off, the base weights untouched.
    noise = initial_noise(policy.latent_shape, range(2), 1, "none", 5)
    with policy.reference():
        reference = ours(name, policy, noise)
    assert (ours(name, policy, noise) - reference).abs().max() > 1e-3
    base = theirs(name, load_family(folders(name)), noise, 1.0)
    torch.testing.assert_close(reference, base, atol=1e-5, rtol=0)


ADAPTED = {  # written down from the papers' architectures: what a block multiplies with, its norms and embeddings aside
    "sd": {"attn1": 4, "attn2": 4, "ff": 2},
    "sdxl": {"attn1": 4, "attn2": 4, "ff": 2},
    "sd35": {"attn": 8, "attn2": 4, "ff": 2, "ff_context": 2},
    "flux": {"attn": 8, "ff": 2, "ff_context": 2, "proj_mlp": 1, "proj_out": 1},
    "qwen": {"attn": 8, "img_mlp": 2, "txt_mlp": 2},
}


@pytest.mark.parametrize("name", MAIN)
def test_adapters_cover_attention_mlp_and_added_projections(folders, name):
    policy = load(folders, name)
    adapted = {n.split(".lora_")[0] for n in policy.trainable()}
    places = [re.match(r"(.*transformer_blocks\.\d+)\.(\w+)", layer).groups() for layer in adapted]
    seen = {part: max(Counter(places)[place] for place in places if place[1] == part) for _, part in places}
    assert seen == ADAPTED[name]
    assert not adapted & policy.family.idle_layers


@pytest.mark.parametrize("name", MAIN)
def test_full_training_reaches_every_weight_and_checkpointing_changes_nothing(folders, name):
    plain = load(folders, name, train="full")
    rollout = roll(name, plain)
    expected = gradients(plain, rollout)
    idle = {n for n, g in expected.items() if g is None or not g.any()}
    last = len(getattr(plain.family.denoiser, "transformer_blocks", ())) - 1
    assert all(f"transformer_blocks.{last}." in n for n in idle), (
        idle
    )  # the last block's text branch, where it is dropped
    assert len(idle) < 0.2 * len(expected)
    checkpointed = load(folders, name, train="full", gradient_checkpointing=True)
    for parameter, gradient in gradients(checkpointed, rollout).items():
        if gradient is not None:
            torch.testing.assert_close(gradient, expected[parameter], atol=1e-6, rtol=1e-4)


def test_prompts_of_any_length_do_not_touch_one_another(folders):
    """Qwen-Image: a prompt's velocity is the same alone and beside a longer one, and rows hold no padding to 1,024."""
    policy = load(folders, "qwen")
    x = initial_noise(policy.latent_shape, range(2), 1, "none", 5)
    times = torch.tensor([700.0, 700.0])
    long, short = "two dogs on a long road by the sea", "a cat"
    both = policy.velocity(x, times, [long, short])
    alone = load(folders, "qwen").velocity(x[1:], times[1:], [short])
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=0)
    rows = policy.encodings.stack([long, short])
    lengths = rows["encoder_hidden_states_mask"].sum(1).tolist()
    assert lengths[0] - lengths[1] == len(long) - len(short)
    assert rows["encoder_hidden_states"].shape[1] == lengths[0]


def test_qwen_guidance_keeps_the_norm_of_each_token(folders):
    family = load(folders, "qwen").family
    uncond, cond = torch.randn(2, 2, 4, 4, 6, generator=torch.Generator().manual_seed(0)).unbind(0)
    guided = family.guide(uncond, cond, 4.0)
    norm = lambda v: v.square().reshape(2, 4, 2, 2, 3, 2).sum((1, 3, 5)).sqrt()  # noqa: E731
    torch.testing.assert_close(norm(guided), norm(cond))
    mixed = uncond + 4.0 * (cond - uncond)
    scale = (norm(cond) / norm(mixed)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(guided, mixed * scale[:, None])


def test_sdxl_tells_its_unet_the_size_and_forces_zeros(folders):
    forced, written = (load(folders, name).family for name in ("sdxl", "sdxl_v"))
    rows = forced.encode(["", "a cat"], Size(16, 24))
    assert rows["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]] * 2
    assert not rows["encoder_hidden_states"][0].any() and not rows["text_embeds"][0].any()
    assert rows["encoder_hidden_states"][1].any() and rows["text_embeds"][1].any()
    assert written.encode([""], Size())["encoder_hidden_states"].any()


CONFIG = {
    "steps": 2, "prompts_per_step": 2, "group_size": 2, "updates_per_step": 1,
    "sampler": {"solver_steps": 3}, "trained_steps": {"fraction": 0.6},
    "rewards": [{"name": "jpeg", "args": {"direction": "compressible"}}],
    "optimizer": {"lr": 1e-2},
    "evaluation": {"every": 0, "samples": 4, "final_samples": 4, "solver_steps": 3},
    "checkpoint": {"every": 1, "keep": 1}, "tracking": {"samples_every": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "qwen" else pytest.mark.slow) for n in MAIN])
def test_two_steps_with_adapters_and_one_of_all_weights(folders, name, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\ntwo dogs\nblue seven\na bold cat\n")
    kernel, eta = CASES[name].kernel
    size = {"height": CASES[name].size.height, "width": CASES[name].size.width}
    for train, steps in (("lora", 2), ("full", 1)):
        out = tmp_path / train
        config = {
            **CONFIG, "name": name, "steps": steps,
            "model": {"path": str(folders(name)), "train": train, "lora": {"rank": 2, "alpha": 4}},
            "prompts": {"path": str(prompts), "heldout_fraction": 0.5},
            "sampler": {**CONFIG["sampler"], "kernel": kernel, "eta": eta, **size},
        }  # fmt: skip
        result = DanceGRPO(config, out=out).train()
        assert result.status == "complete"
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        assert all(row["first_ratio_error"] <= 1e-5 and row["grad_norm"] > 0 for row in rows)
        assert json.loads((out / "summary.json").read_text())
        assert write_report(out).stat().st_size > 1000
        assert list((out / "samples").iterdir())


@pytest.mark.parametrize(
    ("name", "multiple", "asked", "works"),
    [
        ("sdxl", 2, (7, 2), "8x2"), ("sd3", 4, (13, 4), "12x4"), ("flux", 4, (8, 1), "8x4"),
        ("qwen", 8, (31, 25), "32x24"),
    ],
)  # fmt: skip
def test_bad_sizes_name_what_works(folders, name, multiple, asked, works):
    family = load_family(folders(name))
    with pytest.raises(ModelError, match=f"multiples of {multiple}") as error:
        family.latent_shape(Size(*asked))
    assert f"Try {works}" in str(error.value)
    with pytest.raises(ModelError, match="makes images"):
        family.latent_shape(Size(16, 16, frames=5))


def test_a_folder_of_another_family_and_a_missing_component_are_named(folders, tmp_path):
    broken = tmp_path / "flux"
    shutil.copytree(folders("flux"), broken)
    with pytest.raises(ModelError, match="QwenImagePipeline"):
        load_family(broken, "QwenImagePipeline")
    with pytest.raises(ModelError, match="Did you mean 'FluxPipeline'"):
        load_family(broken, "FluxPipelin")
    shutil.rmtree(broken / "text_encoder_2")
    with pytest.raises(ModelError, match="text_encoder_2"):
        load_family(broken)


def test_a_denoiser_without_adapters_is_named():
    from diffusers import PixArtTransformer2DModel

    family = SimpleNamespace(denoiser=PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, cross_attention_dim=16, sample_size=8,
        caption_channels=8,
    ))  # fmt: skip
    with pytest.raises(ModelError, match=r"PixArtTransformer2DModel(.|\n)*model.train: full"):
        add_lora(family, LoraConfig(), 0)


def test_sdxl_of_the_edm_formulation_is_refused(folders):
    from diffusers import EDMEulerScheduler

    family = load_family(folders("sdxl"))
    family.pipeline.scheduler = EDMEulerScheduler()
    with pytest.raises(ModelError, match="EDM"):
        family.schedule(4, None, (4, 8, 8))
