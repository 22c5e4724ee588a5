"""Families of videos against diffusers' own pipelines, and replay against rollout, on real components."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatchcase
from functools import partial

import pytest
import tiny_videos
import torch

import tiny
from align import guards
from align.config import LoraConfig, ModelConfig, load_config
from align.diffusion.families import Size
from align.diffusion.kernels import step_table
from align.diffusion.policy import Policy, load_family
from align.diffusion.rollout import decode, initial_noise, replay, sample, solve, tiles
from align.diffusion.schedules import shifted_sigmas
from align.errors import ConfigError, DataError, ModelError
from align.types import ImagePrompt
from trainers.objectives import grpo_clip

SIZE = Size(32, 32, 5)
TEXTS = ["a red cat", "two dogs running slowly"]
BUILD = {
    "wan": tiny_videos.wan,
    "wan_image_to_video": partial(tiny_videos.wan, image=True),
    "hunyuan_video": tiny_videos.hunyuan,
    "skyreels": partial(tiny_videos.hunyuan, image=True),
}
TAKES_IMAGE = ("wan_image_to_video", "skyreels")
FAMILIES = pytest.mark.parametrize("name", list(BUILD))
# What starts from an image does all that its text-to-video family does.
LARGEST_FIRST = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in TAKES_IMAGE else pytest.mark.slow) for name in BUILD]
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("models"), {}

    def folder(name):
        if name not in made:
            made[name] = BUILD[name](root / name)
            for i in range(2):
                tiny_videos.picture(root / f"{i}.png", seed=i)
        return made[name]

    return folder


def load(folder, **options):
    policy = {k: options.pop(k) for k in ("guidance", "guidance_scale", "embedded_guidance") if k in options}
    size = options.pop("size", SIZE)
    return Policy.load(folder, ModelConfig(path=str(folder), **options), seed=0, size=size, **policy)


def asked(folder, name):
    images = [folder.parent / f"{i}.png" for i in range(2)]
    return [ImagePrompt(t, i) for t, i in zip(TEXTS, images, strict=True)] if name in TAKES_IMAGE else TEXTS


def table_for(policy, kind="dance_sde", eta=0.3, steps=3, shift=None):
    return step_table(kind, eta, policy.family.schedule(steps, shift, policy.latent_shape))


def roll(policy, prompts, batch=None):
    return sample(policy, prompts, group_size=2, table=table_for(policy), key=(0, 1), batch=batch)


def errors(policy, rollout, size):
    trained = [rollout.table.stochastic_steps] * len(rollout)
    return max(
        (replay(policy, tile, rollout.table).logp - tile.logp).abs().max().item()
        for tile in tiles(rollout, range(len(rollout)), trained, torch.zeros(len(rollout)), size)
    )


def gradients(policy, rollout):
    advantages = torch.linspace(-1, 1, len(rollout), dtype=torch.float64)
    for tile in tiles(rollout, range(len(rollout)), [rollout.table.stochastic_steps] * len(rollout), advantages, 100):
        terms = grpo_clip(
            replay(policy, tile, rollout.table).logp, tile.logp, tile.advantage, clip_low=0.99, clip_high=99.0
        )
        (terms.loss.mean() * tile.share).backward()
    found = {n: p.grad.clone() for n, p in policy.trainable().items() if p.grad is not None}
    for p in policy.trainable().values():
        p.grad = None
    return found


def pipeline_output(policy, prompt, noise, scale, output_type):
    from PIL import Image

    told = {"guidance_scale": scale} if policy.family.name.startswith("wan") else {"true_cfg_scale": scale}
    if isinstance(prompt, ImagePrompt):
        told |= {"image": Image.open(prompt.image), "generator": torch.Generator().manual_seed(0)}
        prompt = prompt.text
    return policy.family.pipeline(
        prompt=prompt, negative_prompt=policy.family.unconditional, height=32, width=32, num_frames=5,
        num_inference_steps=3, latents=noise, output_type=output_type, **told,
    ).frames  # fmt: skip


@FAMILIES
@pytest.mark.parametrize("scale", [pytest.param(1.0, marks=pytest.mark.slow), 4.0])
def test_ode_rollout_equals_the_pipeline(folders, name, scale):
    """The final latents of one prompt and the frames of another of another length, made in one batch."""
    folder = folders(name)
    policy = load(folder).with_guidance(scale)
    prompts, noise = asked(folder, name), initial_noise(policy.latent_shape, range(2), 1, "none", 5)
    x0 = solve(policy, noise, prompts, table_for(policy, "ode", 0.0)).x0
    latents = pipeline_output(policy, prompts[0], noise[:1], scale, "latent")
    torch.testing.assert_close(x0[:1], latents, atol=1e-5, rtol=1e-5)
    assert (latents - noise[:1]).std() > 0.1
    frames = pipeline_output(policy, prompts[1], noise[1:], scale, "pt")
    torch.testing.assert_close(decode(policy, x0)[1:], frames, atol=1e-5, rtol=0)
    assert frames.std() > 0.03


@LARGEST_FIRST
def test_what_a_prompt_is_matters(folders, name):
    """Text, first frame and guidance each move the output, so that parity with the pipeline says something."""
    folder = folders(name)
    policy = load(folder)
    prompts = asked(folder, name)
    x, t = torch.randn(1, *policy.latent_shape), torch.tensor([500.0])
    base = policy.velocity(x, t, prompts[:1])
    others = [
        policy.velocity(x, t, [prompts[1] if isinstance(prompts[1], str) else ImagePrompt(TEXTS[1], prompts[0].image)])
    ]
    if name in TAKES_IMAGE:
        others.append(policy.velocity(x, t, [ImagePrompt(TEXTS[0], prompts[1].image)]))
    if policy.family.embedded_guidance is not None:
        assert policy.embedded_guidance == {"hunyuan_video": 6.0, "skyreels": 1.0}[name]
        other = load(folder, embedded_guidance=3.0)
        others.append(other.velocity(x, t, prompts[:1]))
    for other in others:
        assert (other - base).abs().max() > 1e-4


@LARGEST_FIRST
def test_first_ratio(folders, name):
    """Same batch shape: exactly 0 in float32. Other tiles and rollout batches: rounding."""
    folder = folders(name)
    policy = load(folder, guidance="both_branches", guidance_scale=3.0)
    rollout = roll(policy, asked(folder, name))
    assert errors(policy, rollout, 4) == 0.0
    assert errors(policy, rollout, 3) <= 1e-6
    assert errors(policy, roll(policy, asked(folder, name), batch=3), 4) <= 1e-6


@LARGEST_FIRST
def test_first_ratio_in_bf16(folders, name):
    """Half-precision matrices, encoders and products; latents and trained weights stay float32."""
    folder = folders(name)
    policy = load(folder, dtype="bf16")
    rollout = roll(policy, asked(folder, name))
    assert rollout.x.dtype == torch.float32
    assert errors(policy, rollout, 4) == 0.0
    assert errors(policy, rollout, 3) <= guards.FIRST_RATIO_TOLERANCE["bf16"]


@LARGEST_FIRST
def test_a_step_moves_every_adapter_and_nothing_else(folders, name):
    folder = folders(name)
    policy = load(folder, lora=LoraConfig(rank=2, alpha=4.0))
    rollout = roll(policy, asked(folder, name))
    before = {n: p.detach().clone() for n, p in policy.family.denoiser.named_parameters()}
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-2, weight_decay=0.0)
    for _ in range(2):  # B starts at 0, so A gets its first gradient after B has moved
        for key, gradient in gradients(policy, rollout).items():
            policy.trainable()[key].grad = gradient
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, p in policy.family.denoiser.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(policy.trainable())
    assert moved and all("lora" in key for key in moved)
    endings = {e for e in policy.family.lora_targets if any(fnmatchcase(f".{n}", f"*.{e}.lora_A*") for n in moved)}
    absent = {"attn2.add_k_proj", "attn2.add_v_proj"} if name == "wan" else set()
    assert endings == set(policy.family.lora_targets) - absent
    # With the adapter off, the model is the one in the folder again, bit for bit.
    x, t = torch.randn(2, *policy.latent_shape), torch.full((2,), 700.0)
    with policy.reference():
        reference = policy.velocity(x, t, asked(folder, name))
    base = load(folder, train="full")
    assert torch.equal(reference, base.velocity(x, t, asked(folder, name)).detach())
    assert not torch.equal(reference, policy.velocity(x, t, asked(folder, name)))


@LARGEST_FIRST
def test_full_gradients_with_and_without_checkpointing(folders, name):
    folder = folders(name)
    plain, checkpointed = load(folder, train="full"), load(folder, train="full", gradient_checkpointing=True)
    rollout = roll(plain, asked(folder, name))
    whole, again = gradients(plain, rollout), gradients(checkpointed, rollout)
    assert set(whole) == set(plain.trainable()) == set(again)
    for key, gradient in whole.items():
        torch.testing.assert_close(again[key], gradient, atol=1e-7, rtol=1e-4)
    still = {key for key, gradient in whole.items() if not gradient.any()}
    # A key's bias shifts all of a query's logits alike, which softmax does not see.
    assert all(key.endswith(("k.bias", "k_proj.bias")) for key in still), still


def test_levels_of_a_unipc_folder_are_those_of_its_flow(folders, tmp_path):
    folder = tiny_videos.wan(tmp_path / "wan", unipc=True)
    family = load_family(folder)
    found = family.schedule(10, None, (16, 2, 4, 4))
    torch.testing.assert_close(found.sigma, shifted_sigmas(10, 3.0), atol=1e-7, rtol=0)
    assert found.timestep.tolist() == pytest.approx((found.sigma[:-1] * 1000).tolist(), rel=1e-6)
    scheduler = family.pipeline.scheduler
    scheduler.set_timesteps(10)
    # UniPC starts a thousandth below pure noise, and cuts its timesteps to whole numbers.
    torch.testing.assert_close(found.sigma.float(), scheduler.sigmas, atol=3.1e-3, rtol=0)
    assert (found.timestep - scheduler.timesteps).abs().max() < 3.1
    assert family.schedule(10, 5.0, (16, 2, 4, 4)).sigma[1] == pytest.approx(5 * 0.9 / (1 + 4 * 0.9), abs=1e-7)
    scheduler.register_to_config(use_flow_sigmas=False)
    with pytest.raises(ModelError, match="none of a flow"):
        family.schedule(10, None, (16, 2, 4, 4))


def test_text_is_stored_at_its_own_length(folders):
    """No padding to 512 tokens is kept, and what is stacked is filled up with zeros and masked."""
    wan, hunyuan = load(folders("wan")), load(folders("hunyuan_video"))
    rows = wan.encodings.stack(TEXTS)["encoder_hidden_states"]
    assert rows.shape[1] == 5 and not rows[0, 4:].any() and rows[1].any(-1).all()
    told = hunyuan.encodings.stack(TEXTS)
    lengths = told["encoder_attention_mask"].sum(1).tolist()
    assert lengths[1] - lengths[0] == 1 and told["encoder_hidden_states"].shape[1] == lengths[1] < 256
    assert not told["encoder_hidden_states"][0, -1].any()


@FAMILIES
def test_sizes_the_model_cannot_make_are_named(folders, name):
    family = load_family(folders(name))
    assert family.latent_shape(Size(32, 48, 9))[1:] == (3, 4, 6)
    native = family.native
    assert family.latent_shape(Size())[1:] == ((native.frames - 1) // 4 + 1, native.height // 8, native.width // 8)
    with pytest.raises(ModelError, match=r"multiples of 16(.|\n)*Try 48x32"):
        family.latent_shape(Size(44, 32, 5))
    with pytest.raises(ModelError, match=r"1 more than a multiple of 4(.|\n)*sampler.frames to 17"):
        family.latent_shape(Size(32, 32, 16))


@pytest.mark.parametrize(
    ("folder", "claimed", "message"),
    [
        ("wan", "WanImageToVideoPipeline", "reads 16 channels and wan_image_to_video gives it 36"),
        ("wan_image_to_video", "WanPipeline", "reads 36 channels and wan gives it 16"),
        ("skyreels", "HunyuanVideoPipeline", "reads 8 channels and hunyuan_video gives it 4"),
        ("hunyuan_video", "HunyuanSkyreelsImageToVideoPipeline", "reads 4 channels and skyreels gives it 8"),
        ("hunyuan_video", "WanPipeline", "WanPipeline folder cannot be loaded"),
    ],
)
def test_folders_of_another_family_are_named(folders, folder, claimed, message):
    with pytest.raises(ModelError, match=message):
        load_family(folders(folder), claimed)


def test_folders_that_lack_something_are_named(folders, tmp_path):
    broken = shutil.copytree(folders("wan"), tmp_path / "wan")
    shutil.rmtree(broken / "vae")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_family(broken)
    without = shutil.copytree(folders("wan_image_to_video"), tmp_path / "image")
    index = json.loads((without / "model_index.json").read_text())
    (without / "model_index.json").write_text(json.dumps({**index, "image_encoder": [None, None]}))
    with pytest.raises(ModelError, match="image encoder is missing"):
        load_family(without)
    (without / "model_index.json").write_text(json.dumps({**index, "transformer_2": index["transformer"]}))
    shutil.copytree(without / "transformer", without / "transformer_2")
    with pytest.raises(ModelError, match="Only Wan 2.1"):
        load_family(without)


def test_a_text_alone_starts_no_video_from_an_image(folders):
    with pytest.raises(DataError, match="has no first frame"):
        load(folders("skyreels")).encodings.add(["a red cat"])


def test_guidance_and_frames_where_there_are_none_are_refused(folders, tmp_path):
    with pytest.raises(ModelError, match="told no guidance scale"):
        load(folders("wan"), embedded_guidance=6.0)
    images = tiny.sd3(tmp_path / "sd3")
    with pytest.raises(ModelError, match=r"makes images(.|\n)*sampler.frames"):
        load(images, size=Size(frames=5))
    with pytest.raises(ModelError, match=r"makes images(.|\n)*sampler.fps"):
        load(images, size=Size(fps=8))


def trainer(folder, name, out, *overrides, rows=None):
    from trainers import DanceGRPO

    out.parent.mkdir(parents=True, exist_ok=True)
    prompts, texts = out.parent / "prompts.jsonl", [f"{text} {word}" for text in TEXTS for word in ("a", "of", "blue")]
    if rows is None and name in TAKES_IMAGE:
        rows = [{"image": tiny_videos.picture(out.parent / "first" / f"{i}.png", seed=i).name} for i in range(6)]
        rows = [{"image": f"first/{row['image']}"} for row in rows]
    lines = [{"prompt": text, **row} for text, row in zip(texts, rows or [{}] * 6, strict=True)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "name": "toy", "model": {"path": str(folder), "lora": {"rank": 2, "alpha": 4}},
        "prompts": {"path": str(prompts), "heldout_fraction": 0.34, "image_column": "image" if rows else None},
        "rewards": [{"name": "tiny_videos:redness"}], "steps": 2, "prompts_per_step": 2, "group_size": 2,
        "heldout_rewards": [{"name": "frames", "args": {"reward": "jpeg", "count": 2}}],
        "updates_per_step": 1, "sampler": {"solver_steps": 3, "height": 32, "width": 32, "frames": 5, "fps": 8},
        "optimizer": {"lr": 1e-3}, "tracking": {"samples_every": 1}, "batch": {"rollout": 3, "tile": 4},
        "evaluation": {"every": 0, "samples": 2, "final_samples": 4, "solver_steps": 2},
    }  # fmt: skip
    return DanceGRPO(load_config(config, overrides), out=out)


def trained(folder, name, out, *overrides):
    from align.reports import write_report

    run = trainer(folder, name, out, *overrides)
    before = {n: p.detach().clone() for n, p in run.policy.trainable().items()}
    run.train()
    write_report(out)
    return run, {n for n, p in run.policy.trainable().items() if not torch.equal(p, before[n])}


def require_a_run_of_videos(out, steps):
    import imageio_ffmpeg
    from PIL import Image

    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == steps and summary["heldout_before"]["n"] == 4
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["first_ratio_error"] <= 1e-6 for row in rows] == [True] * steps
    meters = json.loads((out / "evaluation.jsonl").read_text().splitlines()[0])["meters"]
    assert set(meters) >= {"saturation", "contrast", "sharpness"}
    for step in range(steps + 1):
        videos = sorted((out / "samples").glob(f"step_{step:06d}_*.mp4"))
        assert [video.stem[-2:] for video in videos] == ["00", "01"]
        frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(videos[0]))
        assert frames == 5 and frames / seconds == pytest.approx(8, rel=0.01)
        with Image.open(out / "samples" / f"step_{step:06d}.png") as sheet:
            assert sheet.size == (150 + 2 + 4 * 32 + 2, 2 * (32 + 2) + 2)
    page = (out / "report.html").read_text()
    assert 'href="samples/step_000000_00.mp4"' in page and f'href="samples/step_{steps:06d}_01.mp4"' in page


def test_two_steps_of_a_video_run_and_what_is_sampled_from_it(folders, tmp_path):
    import imageio_ffmpeg

    from trainers import evaluate, sample_images

    _, moved = trained(folders("skyreels"), "skyreels", tmp_path / "run")
    assert moved and all("lora_B" in n or "lora_A" in n for n in moved)
    require_a_run_of_videos(tmp_path / "run", 2)
    some = tmp_path / "some.jsonl"
    some.write_text((tmp_path / "prompts.jsonl").read_text().splitlines()[0])
    made = sample_images(
        tmp_path / "run", some, count=1, solver_steps=2, seed=3, guidance_scale=2.0, out=tmp_path / "made"
    )
    rows = [json.loads(line) for line in (made / "samples.jsonl").read_text().splitlines()]
    assert [(row["video"], row["prompt"], row["solver_steps"]) for row in rows] == [("0000_00.mp4", "a red cat a", 2)]
    assert imageio_ffmpeg.count_frames_and_secs(str(made / "0000_00.mp4")) == (5, pytest.approx(5 / 8, abs=0.01))
    found = evaluate(tmp_path / "run", some, samples=2, solver_steps=2)
    assert found["samples"] == 2 and found["rewards"]["reward"]["mean"] < 0
    with pytest.raises(DataError, match="has no first frame"):
        sample_images(tmp_path / "run", "a red cat", count=1, solver_steps=1, out=tmp_path / "none")


@pytest.mark.slow
@pytest.mark.parametrize("train", ["lora", "full"])
@FAMILIES
def test_every_family_trains(folders, tmp_path, name, train):
    steps = 2 if train == "lora" else 1
    guided = ["sampler.guidance=both_branches", "sampler.guidance_scale=3", "evaluation.guidance_scale=3"]
    run, moved = trained(
        folders(name),
        name,
        tmp_path / "run",
        f"model.train={train}",
        f"steps={steps}",
        *(guided if train == "lora" else []),
    )
    assert len(moved) > 0.9 * len(run.policy.trainable())
    require_a_run_of_videos(tmp_path / "run", steps)


def test_first_frames_are_checked_before_anything_is_made(folders, tmp_path):
    from PIL import Image

    def refused(problem, name="skyreels", rows=None, *overrides):
        with pytest.raises((ConfigError, DataError), match=problem):
            trainer(folders(name), name, tmp_path / "run", *overrides, rows=rows)
        assert not (tmp_path / "run").exists()

    refused("A prompt has no first frame", "skyreels", None, "prompts.image_column=null")
    refused("There is no such image", "skyreels", [{"image": "nowhere.png"}] * 6)
    first = tiny_videos.picture(tmp_path / "first" / "0.png")
    refused("takes no first frame", "wan", [{"image": "first/0.png"}] * 6)
    (tmp_path / "first" / "cut.png").write_bytes(first.read_bytes()[:60])
    refused("cannot be read", "skyreels", [{"image": "first/cut.png"}] * 6)
    tiny_videos.picture(tmp_path / "first" / "wide.png", 48, 32)
    refused(r"would be squeezed(.|\n)*1.50 in its 48x32 pixels and 1.00", "skyreels", [{"image": "first/wide.png"}] * 6)
    Image.new("1", (9000, 9000)).save(tmp_path / "first" / "huge.png")
    refused("9000x9000 pixels, more than 64 million", "skyreels", [{"image": "first/huge.png"}] * 6)


def test_rewards_of_images_are_refused_before_a_video_is_made(folders, tmp_path):
    with pytest.raises(ConfigError, match=r"'jpeg' scores images(.|\n)*makes videos(.|\n)*name: frames"):
        trainer(folders("wan"), "wan", tmp_path / "run", "rewards=[{name: jpeg}]")
    assert not (tmp_path / "run").exists()
