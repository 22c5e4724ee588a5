"""The Stable Diffusion family against diffusers' own pipeline, guidance modes and the reference model."""

from __future__ import annotations

import pytest
import torch

import tiny
from align import guards
from align.config import ModelConfig
from align.diffusion.families import Size
from align.diffusion.kernels import step_table
from align.diffusion.policy import Policy
from align.diffusion.rollout import (
    decode,
    initial_noise,
    reference_output,
    replay,
    sample,
    solve,
    tiles,
)
from align.errors import KernelError, ModelError

PROMPTS = ["a red cat", "two blue dog"]


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def folder(request, tmp_path_factory):
    return tiny.stable_diffusion(tmp_path_factory.mktemp("models") / "sd", prediction=request.param)


def load(folder, train="lora", **guidance):
    return Policy.load(folder, ModelConfig(path=str(folder), train=train), seed=0, **guidance)


def table_for(policy, kind="ddim", eta=1.0, steps=5):
    return step_table(kind, eta, policy.family.schedule(steps, None, policy.latent_shape))


def roll(policy, table, **options):
    shape = policy.latent_shape
    return sample(policy, PROMPTS, group_size=3, table=table, key=(0, 1), **options)


def all_tiles(rollout, size):
    steps = [rollout.table.stochastic_steps] * len(rollout)
    return tiles(rollout, range(len(rollout)), steps, torch.linspace(-1, 1, len(rollout)).double(), size)


def perturb(policy):
    with torch.no_grad():
        for p in policy.trainable().values():
            p.add_(torch.randn_like(p) * 0.05)


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_ode_rollout_equals_the_pipeline_under_ddim(folder, scale):
    from diffusers import DDIMScheduler

    policy = load(folder).with_guidance(scale)
    pipeline, shape = policy.family.pipeline, policy.latent_shape
    prompts = ["a red cat", "two dogs", "bold seven"]
    noise = initial_noise(shape, range(3), 1, "none", 5)
    x0 = solve(policy, noise, prompts, table_for(policy, "ode", 0.0, steps=10)).x0
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    theirs = pipeline(
        prompts, num_inference_steps=10, guidance_scale=scale, latents=noise, output_type="pt", eta=0.0
    ).images
    torch.testing.assert_close(decode(policy, x0), theirs, atol=2e-5, rtol=0)
    assert theirs.std() > 0.02


def test_t7_the_first_ratio_is_one_in_any_tile_and_guidance(folder):
    for guidance in ({}, {"guidance": "both_branches"}, {"guidance": "uncond_detached"}):
        policy = load(folder, **guidance, guidance_scale=3.0)
        rollout = roll(policy, table_for(policy))
        for size in (6, 1, 24):
            for tile in all_tiles(rollout, size):
                error = guards.first_ratio_errors(
                    replay(policy, tile, rollout.table).logp, tile.logp, rollout.table.std[tile.step]
                )
                guards.require_first_ratio(*error, guards.FIRST_RATIO_TOLERANCE["fp32"], "test")
    assert rollout.table.stochastic_steps == [0, 1, 2, 3]


def test_t17_detaching_the_unconditional_branch_keeps_the_value_and_drops_its_gradient(folder):
    def gradient(mode):
        policy = load(folder, guidance=mode, guidance_scale=3.0)
        torch.manual_seed(1)
        perturb(policy)
        x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
        output = policy.velocity(x, torch.tensor([500.0, 300.0]), PROMPTS)
        output.square().sum().backward()
        return output.detach(), torch.cat([p.grad.flatten() for p in policy.trainable().values()])

    (both, both_grad), (detached, detached_grad) = gradient("both_branches"), gradient("uncond_detached")
    torch.testing.assert_close(both, detached, atol=1e-5, rtol=0)
    assert detached_grad.norm() > 0 and (both_grad - detached_grad).norm() > 0.01 * both_grad.norm()

    # By hand: d/dw [u + s (c - u)]^2 with u held constant.
    policy = load(folder, guidance_scale=1.0)
    torch.manual_seed(1)
    perturb(policy)
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([500.0, 300.0])
    cond = policy.velocity(x, t, PROMPTS)
    with torch.no_grad():
        uncond = policy.velocity(x, t, ["", ""])
    (uncond + 3.0 * (cond - uncond)).square().sum().backward()
    by_hand = torch.cat([p.grad.flatten() for p in policy.trainable().values()])
    torch.testing.assert_close(detached_grad, by_hand, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_t21_the_reference_is_the_model_before_training(folder, train):
    policy = load(folder, train)
    before = load(folder, train)
    policy.keep_reference()
    rollout = roll(policy, table_for(policy))
    tile = next(iter(all_tiles(rollout, 8)))
    replayed = replay(policy, tile, rollout.table)
    assert torch.equal(reference_output(policy, tile, rollout.table), replayed.output)
    distance = (replayed.output - reference_output(policy, tile, rollout.table)).square().mean()
    distance.backward()
    assert float(distance.detach()) == 0 and all(
        p.grad is None or not p.grad.any() for p in policy.trainable().values()
    )
    torch.manual_seed(0)
    perturb(policy)
    replayed, reference = replay(policy, tile, rollout.table), reference_output(policy, tile, rollout.table)
    assert not torch.equal(replayed.output, reference) and not reference.requires_grad
    timestep = rollout.table.timestep[tile.step].float()
    torch.testing.assert_close(reference, before.velocity(tile.x, timestep, tile.prompts).detach())
    (replayed.output - reference).square().mean().backward()
    assert all(p.grad is not None for p in policy.trainable().values())
    assert sum(float(p.grad.norm()) for p in policy.trainable().values()) > 0


def test_a_full_fine_tune_without_a_kept_reference_is_told(folder):
    policy = load(folder, "full")
    with pytest.raises(ModelError, match="keep_reference"), policy.reference():
        pass


def test_flow_kernels_shifts_and_bad_sizes_are_refused(folder):
    policy = load(folder)
    with pytest.raises(KernelError, match="ddim"):
        table_for(policy, "dance_sde", 0.3)
    with pytest.raises(ModelError, match="no time shift"):
        policy.family.schedule(5, 3.0, (4, 8, 8))
    with pytest.raises(ModelError, match="multiples of 2"):
        policy.family.latent_shape(Size(15, 16))
    assert policy.family.latent_shape(Size(32)) == (4, 16, 8)
