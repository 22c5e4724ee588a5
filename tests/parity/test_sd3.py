"""The SD3 family against diffusers' own pipeline, and replay against rollout, on real components."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import tiny
from align import guards
from align.config import LoraConfig, ModelConfig
from align.diffusion.families import Size
from align.diffusion.kernels import step_table
from align.diffusion.policy import Policy, load_family
from align.diffusion.rollout import decode, initial_noise, replay, sample, solve, tiles
from align.errors import GuardError, ModelError
from trainers.objectives import grpo_clip

PROMPTS = ["a red cat", "two blue dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.sd3(tmp_path_factory.mktemp("models") / "sd3")


def load(folder, **options):
    guidance = {k: options.pop(k) for k in ("guidance", "guidance_scale", "size") if k in options}
    return Policy.load(folder, ModelConfig(path=str(folder), **options), seed=0, **guidance)


def table_for(policy, kind="dance_sde", eta=0.3, steps=6, shift=None):
    return step_table(kind, eta, policy.family.schedule(steps, shift, policy.latent_shape))


def roll(policy, table, batch=None, **options):
    return sample(
        policy,
        PROMPTS,
        group_size=3,
        table=table,
        key=(0, 1),
        batch=batch,
        **options,
    )


def errors(policy, rollout, size, reduction="mean"):
    trained = [rollout.table.stochastic_steps] * len(rollout)
    return [
        (replay(policy, tile, rollout.table, reduction).logp - tile.logp).abs().max().item()
        for tile in tiles(rollout, range(len(rollout)), trained, torch.zeros(len(rollout)), size)
    ]


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_ode_rollout_equals_the_pipeline(folder, scale):
    policy = load(folder).with_guidance(scale)
    shape, prompts = policy.latent_shape, ["a red cat", "two dogs", "bold seven"]
    noise = initial_noise(shape, range(3), 1, "none", 5)
    theirs = policy.family.pipeline(
        prompts, num_inference_steps=7, guidance_scale=scale, latents=noise, output_type="pt"
    ).images
    x0 = solve(policy, noise, prompts, table_for(policy, "ode", 0.0, steps=7)).x0
    torch.testing.assert_close(decode(policy, x0), theirs, atol=1e-5, rtol=0)
    assert theirs.std() > 0.05


def test_t24_timesteps_are_the_pipelines_floats(folder):
    policy = load(folder)
    table = table_for(policy)
    policy.family.pipeline.scheduler.set_timesteps(6)
    assert torch.equal(table.timestep.float(), policy.family.pipeline.scheduler.timesteps)
    assert table.timestep.frac().any()
    shifted = table_for(policy, shift=3.0)
    assert shifted.timestep.tolist() == pytest.approx((shifted.sigma * 1000).tolist(), rel=1e-6)


@pytest.mark.parametrize("kind", ["dance_sde", "flow_sde", "cps", "precise", "dance_precise"])
@pytest.mark.parametrize("guidance", [{}, {"guidance": "both_branches", "guidance_scale": 3.0}])
def test_t7_first_ratio(folder, kind, guidance):
    """Same batch shape: exactly 0 in float32. Other tiles and rollout batches: rounding."""
    policy = load(folder, **guidance)
    table = table_for(policy, kind, shift=3.0)
    rollout = roll(policy, table)
    assert errors(policy, rollout, len(rollout)) == [0.0] * 5
    for size in (1, 4, 100):
        assert max(errors(policy, rollout, size)) <= 1e-6
    assert max(errors(policy, roll(policy, table, batch=1), 6)) <= 1e-6
    assert max(errors(policy, roll(policy, table, reduction="sum"), 6, "sum")) == 0.0


def test_first_ratio_at_a_tiny_std(folder):
    """The pipeline's own schedule ends at sigma .009, where cps has std .004: rounding is magnified, and allowed for."""
    policy = load(folder)
    rollout = roll(policy, table_for(policy, "cps"))
    assert rollout.table.std[4] < 0.005
    for tile in tiles(rollout, range(6), [[3, 4]] * 6, torch.zeros(6), 1):
        logp = replay(policy, tile, rollout.table).logp
        guards.require_first_ratio(
            *guards.first_ratio_errors(logp, tile.logp, rollout.table.std[tile.step]), 1e-6, "test"
        )


def test_rollouts_do_not_depend_on_the_batch(folder):
    policy = load(folder)
    whole, parts = (roll(policy, table_for(policy), batch=b) for b in (None, 4))
    torch.testing.assert_close(whole.x, parts.x, atol=2e-6, rtol=0)
    torch.testing.assert_close(whole.samples.images, parts.samples.images, atol=2e-6, rtol=0)


def with_dropout(policy, rollout):
    hook = policy.family.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: (
            args,
            {**kwargs, "hidden_states": torch.nn.functional.dropout(kwargs["hidden_states"], 0.1)},
        ),
        with_kwargs=True,
    )
    return rollout, policy, hook.remove


def with_bf16_storage(policy, rollout):
    return dataclasses.replace(rollout, x=rollout.x.bfloat16().float()), policy, lambda: None


def with_swapped_guidance(policy, rollout):
    predict = policy.family.predict

    def swapped(x, timestep, conditioning):
        return predict(x, timestep, {n: torch.cat(v.chunk(2)[::-1]) for n, v in conditioning.items()})

    policy.family.predict = swapped
    return rollout, policy, lambda: None


def with_sigma_off_by_one(policy, rollout):
    table = rollout.table
    moved = {n: getattr(table, n).roll(1) for n in ("mean_x", "mean_v", "x0_x", "x0_v", "std")}
    return dataclasses.replace(rollout, table=dataclasses.replace(table, **moved)), policy, lambda: None


def with_timestep_truncated(policy, rollout):
    table = dataclasses.replace(rollout.table, timestep=rollout.table.timestep.trunc())
    return dataclasses.replace(rollout, table=table), policy, lambda: None


MUTATIONS = [with_dropout, with_bf16_storage, with_swapped_guidance, with_sigma_off_by_one, with_timestep_truncated]


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_t7_mutations_trip_the_guard(folder, mutate):
    policy = load(folder, guidance="both_branches", guidance_scale=3.0)
    rollout, policy, undo = mutate(policy, roll(policy, table_for(policy)))
    # The first row of a rolled table is its deterministic last step; leave it out so that only sigma is wrong.
    trained = [[2, 3]] * len(rollout)
    try:
        with pytest.raises(GuardError, match="first ratio is not 1"):
            for tile in tiles(rollout, range(len(rollout)), trained, torch.zeros(len(rollout)), 6):
                logp = replay(policy, tile, rollout.table).logp
                found = guards.first_ratio_errors(logp, tile.logp, rollout.table.std[tile.step])
                guards.require_first_ratio(*found, guards.FIRST_RATIO_TOLERANCE["fp32"], "test")
    finally:
        undo()


def gradients(policy, rollout, rows, size, updates=1):
    advantages = torch.linspace(-1, 1, len(rollout), dtype=torch.float64)
    trained = [[0, 2, 4]] * len(rows)
    for tile in tiles(rollout, rows, trained, advantages, size):
        logp = replay(policy, tile, rollout.table).logp
        terms = grpo_clip(logp, tile.logp, tile.advantage, clip_low=1e-4, clip_high=1e-4)
        (terms.loss.mean() * tile.share).backward()
    found = {n: p.grad.clone() for n, p in policy.trainable().items()}
    for p in policy.trainable().values():
        p.grad = None
    return found


def test_t14_tiles_add_up_to_one_batch(folder):
    policy = load(folder, train="full")
    rollout = roll(policy, table_for(policy))
    whole = gradients(policy, rollout, [0, 1, 2, 4, 5], 100)
    for size in (1, 4, 7):
        for name, part in gradients(policy, rollout, [0, 1, 2, 4, 5], size).items():
            torch.testing.assert_close(part, whole[name], atol=1e-6, rtol=1e-4)


def test_t8_first_gradient_is_the_policy_gradient(folder):
    policy = load(folder)
    rollout = roll(policy, table_for(policy))
    clipped = gradients(policy, rollout, range(6), 18)
    advantages = torch.linspace(-1, 1, 6)
    tile = next(iter(tiles(rollout, range(6), [[0, 2, 4]] * 6, advantages, 18)))
    (-(tile.advantage * replay(policy, tile, rollout.table).logp).mean()).backward()
    for name, p in policy.trainable().items():
        torch.testing.assert_close(p.grad, clipped[name], atol=1e-7, rtol=1e-4)


def test_a_step_moves_every_adapter_and_nothing_else(folder):
    policy = load(folder, lora=LoraConfig(rank=4, alpha=8.0))
    before = {n: p.detach().clone() for n, p in policy.family.denoiser.named_parameters()}
    rollout = roll(policy, table_for(policy))
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-2, weight_decay=0.0)
    for _ in range(2):  # B starts at 0, so A gets its first gradient after B has moved
        for name, gradient in gradients(policy, rollout, range(6), 100).items():
            policy.trainable()[name].grad = gradient
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, p in policy.family.denoiser.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(policy.trainable())
    assert moved and all("lora" in name for name in moved)


def test_t17_gradients_reach_both_branches(folder):
    policy = load(folder, guidance="both_branches", guidance_scale=3.0)
    seen = {}

    def keep(module, args, kwargs, output):
        output[0].register_hook(lambda g: seen.update(norms=g.flatten(1).norm(dim=1)))

    rollout = roll(policy, table_for(policy))
    policy.family.denoiser.register_forward_hook(keep, with_kwargs=True)
    tile = next(iter(tiles(rollout, range(6), [[0]] * 6, torch.ones(6), 6)))
    replay(policy, tile, rollout.table).logp.sum().backward()
    assert len(seen["norms"]) == 12 and (seen["norms"] > 0).all()
    # v = (1 - s) v_uncond + s v_cond: the unconditional half carries |1 - s| / s = 2/3 of the gradient
    torch.testing.assert_close(seen["norms"][:6] / seen["norms"][6:], torch.full((6,), 2 / 3))


def test_gradient_checkpointing_and_bf16(folder):
    plain, checkpointed = load(folder), load(folder, gradient_checkpointing=True)
    rollout = roll(plain, table_for(plain))
    for name, gradient in gradients(checkpointed, rollout, range(6), 9).items():
        torch.testing.assert_close(gradient, gradients(plain, rollout, range(6), 9)[name], atol=1e-6, rtol=1e-4)
        break
    half = load(folder, dtype="bf16")
    rollout = roll(half, table_for(half))
    assert rollout.x.dtype == torch.float32
    assert max(errors(half, rollout, 6)) == 0.0
    assert max(errors(half, rollout, 4)) <= guards.FIRST_RATIO_TOLERANCE["bf16"]


def test_prompts_are_encoded_once(folder):
    policy = load(folder)
    calls = []
    encode = policy.family.encode
    policy.family.encode = lambda prompts, size: calls.append(list(prompts)) or encode(prompts, size)
    roll(policy, table_for(policy))
    roll(policy, table_for(policy))
    assert calls == [PROMPTS]


def test_bad_folders_are_named(folder, tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        load_family(tmp_path / "absent")
    with pytest.raises(ModelError, match="no model_index.json"):
        load_family(tmp_path)
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(ModelError, match="cannot be read"):
        load_family(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDifusion3Pipeline"}))
    with pytest.raises(ModelError, match="Did you mean 'StableDiffusion3Pipeline'"):
        load_family(tmp_path)
    (tmp_path / "model_index.json").write_text((folder / "model_index.json").read_text())
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_family(tmp_path)
    with pytest.raises(ModelError, match="matches no linear layer"):
        load(folder, lora=LoraConfig(targets=("attn.to_qq",)))
    with pytest.raises(ModelError, match="multiples of 4"):
        load(folder, size=Size(18, 16))
