"""CLIP rewards on tiny random towers: what is loaded, kept, refused, and differentiated."""

from __future__ import annotations

import gc
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_clip
import torch
from safetensors.torch import save_file
from tiny_clip import GELU, QUICK

from align.errors import ConfigError, DataError, ModelError
from align.types import Samples, Video
from rewards import get_reward, towers
from rewards.aesthetic import Aesthetic
from rewards.base import score_safely
from rewards.clip import DFN5B, Cosine, FlowGRPO, Hessel, TorchMetrics, UniRL
from rewards.hps import HPSv2, HPSv21
from rewards.media import clip_pixels, normalise, resize
from rewards.pickscore import PickScore
from rewards.placement import Placement
from rewards.towers import open_clip_to_hf

CLIPS = (DFN5B, Cosine, FlowGRPO, Hessel, TorchMetrics, UniRL, HPSv2, HPSv21, PickScore)
PROMPTS = ["a red cat", "two blue dogs", "a red cat", "seven"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    tiny_clip.register(folder)
    found = {name: str(tiny_clip.save(tiny_clip.build(name), folder / f"{name}.pt")) for name in (GELU, QUICK)}
    torch.manual_seed(0)
    found["head"] = str(folder / "head.pth")
    torch.save({"layers.0.weight": torch.randn(4, 16), "layers.0.bias": torch.randn(4),
                "layers.2.weight": torch.randn(1, 4), "layers.2.bias": torch.randn(1)}, found["head"])  # fmt: skip
    return found


def build(kind, files, **arguments):
    if kind is Aesthetic:
        return Aesthetic(path=files[QUICK], head=files["head"], architecture=QUICK, **arguments)
    name = QUICK if kind.recipe.quick_gelu else GELU
    return kind(path=files[name], architecture=name, **arguments)


@pytest.fixture
def loads(monkeypatch):
    """The files whose tensors were read, in order; the real reading goes on underneath."""
    gc.collect()
    seen = []
    real = towers.load_tensors
    monkeypatch.setattr(towers, "load_tensors", lambda path: seen.append(str(path)) or real(path))
    return seen


def prompt_rows(reward):
    """Count the rows that go through a reward's prompt tower from now on."""
    rows = []
    reward.towers.model.transformer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    return rows


def test_rewards_share_the_towers_of_one_file(files, loads, tmp_path):
    first = build(Cosine, files)
    others = [build(kind, files) for kind in (TorchMetrics, UniRL, FlowGRPO, DFN5B, Hessel)]
    assert all(reward.towers is first.towers for reward in others) and loads == [files[QUICK]]
    # A copy of the file is the same weights; another precision of computing, too.
    copy = tmp_path / "copy.pt"
    copy.write_bytes(Path(files[QUICK]).read_bytes())
    assert Cosine(path=str(copy), architecture=QUICK, dtype="bf16").towers is first.towers
    assert build(HPSv2, files).towers is not first.towers and len(loads) == 2
    del first, others
    gc.collect()
    build(Cosine, files)
    assert len(loads) == 3  # nobody held them any more


def test_nothing_is_initialised_before_it_is_loaded(files, monkeypatch):
    gc.collect()
    made = []
    real = torch.nn.init.normal_
    monkeypatch.setattr(
        torch.nn.init, "normal_", lambda *a, **k: made.append((a or [*k.values()])[0].is_meta) or real(*a, **k)
    )
    reward = build(Cosine, files)
    assert made and all(made)
    left = [*reward.towers.model.parameters(), *reward.towers.model.buffers()]
    assert not any(t.is_meta or t.requires_grad for t in left) and not reward.towers.model.training
    assert {t.dtype for t in left} == {torch.float32}


def test_weights_in_any_layout_score_the_same(files, tmp_path):
    model = tiny_clip.build(GELU)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    paths = [tiny_clip.save(model, tmp_path / "bare.bin", nested=False), tmp_path / "ours.safetensors"]
    save_file(state, paths[1])
    parallel = tmp_path / "parallel.ckpt"
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, parallel)
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in open_clip_to_hf(state).items()}, folder / "model.safetensors")
    samples = tiny_clip.samples(PROMPTS, tiny_clip.images(4))
    expected = build(HPSv2, files).score(samples).values
    for path in (*paths, parallel, folder):
        assert np.array_equal(HPSv2(path=str(path), architecture=GELU).score(samples).values, expected)
    half = tiny_clip.save(model, tmp_path / "half.pt", half=True)
    assert HPSv2(path=str(half), architecture=GELU).score(samples).values == pytest.approx(expected, abs=2e-3)


def test_p_times_g_samples_are_p_prompt_passes(files):
    reward = build(PickScore, files, batch_size=3)
    rows = prompt_rows(reward)
    prompts = [f"prompt {p}" for p in range(5) for _ in range(4)]
    reward.score(tiny_clip.samples(prompts, tiny_clip.images(20)))
    assert sum(rows) == 5
    reward.score(tiny_clip.samples(prompts, tiny_clip.images(20, seed=1)))
    build(HPSv21, files).score(tiny_clip.samples(prompts, tiny_clip.images(20)))  # the same towers, the same prompts
    assert sum(rows) == 5
    build(HPSv21, files).score(tiny_clip.samples(["prompt 6"], tiny_clip.images(1)))
    assert sum(rows) == 6


def test_prompt_passes_when_the_batch_size_is_derived(files):
    reward = build(PickScore, files)
    rows = prompt_rows(reward)
    reward.score(tiny_clip.samples(PROMPTS, tiny_clip.images(4)))
    assert sum(rows) == 3  # "a red cat" twice; measuring a row adds none


def test_old_prompts_are_forgotten_and_computed_again(files, monkeypatch):
    monkeypatch.setattr(towers, "PROMPTS_KEPT", 2)
    reward = build(PickScore, files)
    rows = prompt_rows(reward)
    samples = tiny_clip.samples(["a", "b", "c"], tiny_clip.images(3))
    before = reward.score(samples).values
    assert np.allclose(reward.score(samples).values, before) and len(reward.towers._prompts) == 2
    assert sum(rows) > 3
    reward.score(tiny_clip.samples(["c"], tiny_clip.images(1)))
    count = sum(rows)
    reward.score(tiny_clip.samples(["c"], tiny_clip.images(1)))
    assert sum(rows) == count


@pytest.mark.parametrize("kind", [*CLIPS, Aesthetic])
@pytest.mark.parametrize("size", [(32, 32), (40, 57)])
def test_differentiable_is_score(kind, size, files):
    reward = build(kind, files)
    images = tiny_clip.images(4, *size)
    scores = reward.score(tiny_clip.samples(PROMPTS, images))
    pixels = images.clone().requires_grad_()
    values = reward.differentiable(pixels, PROMPTS)
    assert values.shape == (4, 1) and scores.names == reward.names == reward.card.components
    assert values.detach().double().numpy() == pytest.approx(scores.values, rel=1e-5, abs=2e-6)
    (gradient,) = torch.autograd.grad(values.sum(), pixels)
    assert gradient.isfinite().all()
    moves = gradient.flatten(1).abs().amax(1) > 0
    assert moves.tolist() == (scores.values[:, 0] != 0).tolist()  # 0 is where a definition clamps a negative cosine


def core(reward, prompts):
    """The reward as a function of normalised pixels of the tower's size: everything but resizing and rounding."""
    reward.towers.model.double()
    texts = reward.towers.embed_prompts(prompts)[0]
    scale = reward.towers.model.logit_scale
    return lambda seen: reward.recipe.value((reward.towers.embed_pixels(seen) * texts).sum(-1), scale)


@pytest.mark.parametrize("kind", [Cosine, HPSv2, PickScore])
def test_gradient_of_the_pixels_is_the_numeric_one(kind, tmp_path):
    """In float64, every pixel of a small patch; rounding, whose numeric gradient is 0 or infinite, is left out."""
    tiny_clip.register(tmp_path)
    name = QUICK if kind.recipe.quick_gelu else GELU
    reward = kind(path=str(tiny_clip.save(tiny_clip.build(name, seed=5), tmp_path / "w.pt")), architecture=name)
    value = core(reward, ["a red cat"])
    image = tiny_clip.images(1).double()
    patch = image[..., 8:12, 8:12].clone().requires_grad_()

    def score(pixels):
        row = torch.cat([image[..., 8:12, :8], pixels, image[..., 8:12, 12:]], -1)
        return value(normalise(torch.cat([image[..., :8, :], row, image[..., 12:, :]], -2)))

    assert torch.autograd.gradcheck(score, (patch,), eps=1e-6, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("fit", ["shortest", "longest", "squash"])
def test_gradient_of_fitting_is_the_numeric_one(fit):
    image = tiny_clip.images(1, 9, 7).double().mul(0.5).add(0.25).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: clip_pixels(x, 4, fit=fit, eight_bit=False), (image,))


@pytest.mark.parametrize("kind", [Cosine, HPSv2, PickScore])
def test_straight_through_gradient_is_the_unrounded_one_at_the_rounded_image(kind, tmp_path):
    """d score / d image = (d core / d seen at the rounded pixels) (d seen / d image without rounding)."""
    tiny_clip.register(tmp_path)
    name = QUICK if kind.recipe.quick_gelu else GELU
    reward = kind(path=str(tiny_clip.save(tiny_clip.build(name, seed=6), tmp_path / "w.pt")), architecture=name)
    value, settings = core(reward, ["a red cat"]), dict(kind.recipe.pixels)
    # Within [.25, .75], so that no overshoot of the bicubic filter is clamped.
    image = (
        torch.rand(1, 3, 44, 61, generator=torch.Generator().manual_seed(0)).double() * 0.5 + 0.25
    ).requires_grad_()
    (whole,) = torch.autograd.grad(reward.differentiable(image, ["a red cat"]).sum(), image)
    seen = clip_pixels(image, 32, **settings).detach().requires_grad_()
    (inner,) = torch.autograd.grad(value(seen).sum(), seen)
    (expected,) = torch.autograd.grad(clip_pixels(image, 32, **settings, eight_bit=False), image, inner)
    torch.testing.assert_close(whole, expected, rtol=1e-9, atol=1e-14)
    assert whole.abs().max() > 0
    levels = resize(image, 32, 32) * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", [*CLIPS, Aesthetic])
def test_a_score_does_not_depend_on_its_batch(kind, files):
    """Alone, with others, in any order, in batches of any size, beside images of other sizes."""
    images = [*tiny_clip.images(4), *tiny_clip.images(3, 40, 57, seed=1), *tiny_clip.images(2, 33, 33, seed=2)]
    prompts = [f"prompt {i % 5}" for i in range(9)]
    samples = Samples(prompts=prompts, images=images)
    together = build(kind, files).score(samples).values
    assert np.isfinite(together).all() and np.ptp(together) > 1e-4
    scale = np.abs(together).max()
    for batch_size in (1, 2, 5, None):
        reward = build(kind, files, batch_size=batch_size)
        assert reward.score(samples).values == pytest.approx(together, abs=2e-6 * max(1, scale))
    for i in range(9):
        assert reward.score(samples.select([i])).values[0] == pytest.approx(together[i], abs=2e-6 * max(1, scale))
    order = [3, 8, 0, 5, 1, 7, 2, 6, 4]
    assert reward.score(samples.select(order)).values == pytest.approx(together[order], abs=2e-6 * max(1, scale))


def bad_images():
    good = tiny_clip.images(1)[0]
    return {
        "4 channels; convert to RGB": torch.cat([good, torch.ones(1, 32, 32)]),
        "2 channels": good[:2],
        "uint8": (good * 255).byte(),
        "not numbers": torch.where(torch.arange(32) == 3, float("nan"), good),
        "run from": good * 255,
        "-0.50": good - 0.5 - good.min(),
        r"not \[C, H, W\]": good[0],
        "no pixels": torch.zeros(3, 0, 5),
        "not a tensor": tiny_clip.pil(good),
    }


@pytest.mark.parametrize("reason", list(bad_images()))
@pytest.mark.parametrize("kind", [HPSv2, Aesthetic])
def test_one_bad_image_never_spoils_its_batch(reason, kind, files):
    good = list(tiny_clip.images(3))
    reward = build(kind, files)
    alone = reward.score(Samples(prompts=PROMPTS[:3], images=good))
    mixed = score_safely(
        reward, Samples(prompts=[*PROMPTS[:2], "x", PROMPTS[2]], images=[*good[:2], bad_images()[reason], good[2]])
    )
    assert mixed.valid[:, 0].tolist() == [True, True, False, True] and np.isnan(mixed.values[2, 0])
    assert mixed.values[[0, 1, 3]] == pytest.approx(alone.values, abs=1e-6)
    assert re.search(reason, mixed.errors[2]) and mixed.errors[0] == ""


@pytest.mark.parametrize("prompt", ["", "  \n\t"])
def test_an_empty_prompt_is_missing_and_reads_no_tower(prompt, files):
    reward = build(Hessel, files)
    rows = prompt_rows(reward)
    scores = reward.score(tiny_clip.samples(["a cat", prompt], tiny_clip.images(2)))
    assert scores.valid[:, 0].tolist() == [True, False] and "prompt is empty" in scores.errors[1] and sum(rows) == 1
    assert list(scores.extras["truncated"]) == [False, None]
    assert build(Aesthetic, files).score(tiny_clip.samples(["a cat", prompt], tiny_clip.images(2))).valid.all()


def test_a_prompt_at_the_limit_is_whole_and_one_beyond_is_flagged(files):
    """77 tokens: a start, 75 words, an end. The end is where the embedding is read, so it is kept."""
    reward = build(Cosine, files)
    prompts = [" ".join(["cat"] * n) for n in (74, 75, 76, 200)]
    scores = reward.score(tiny_clip.samples(prompts, tiny_clip.images(1).expand(4, -1, -1, -1)))
    assert list(scores.extras["truncated"]) == [False, False, True, True] and scores.valid.all()
    assert scores.values[1] == pytest.approx(scores.values[2], abs=1e-6)
    assert scores.values[0] != pytest.approx(scores.values[1], abs=1e-6)
    # The prefix counts: CLIPScore's three words leave room for 72.
    hessel = build(Hessel, files).score(tiny_clip.samples(prompts[1:2], tiny_clip.images(1)))
    assert list(hessel.extras["truncated"]) == [True]


def test_gray_is_three_equal_channels(files):
    gray = tiny_clip.images(2)[:, :1]
    reward = build(Cosine, files)
    both = [reward.score(tiny_clip.samples(PROMPTS[:2], g)).values for g in (gray, gray.expand(-1, 3, -1, -1))]
    assert np.array_equal(*both)


def test_other_media_are_refused(files):
    video = Samples(prompts=["x"], videos=[Video(torch.zeros(2, 3, 8, 8), 8.0)])
    for kind in (Cosine, Aesthetic):
        with pytest.raises(DataError, match="scores images"):
            build(kind, files).score(video)


def test_differentiable_refuses_what_score_calls_missing(files):
    images = tiny_clip.images(2)
    for kind, wrong, prompts, message in (
        (Cosine, images * 2, PROMPTS[:2], "image 0.*run from"),
        (Cosine, images, ["x", " "], "image 1.*empty"),
        (Aesthetic, images.byte(), ["x", "y"], "uint8"),
    ):
        with pytest.raises(DataError, match=message):
            build(kind, files).differentiable(wrong, prompts)
    assert build(Aesthetic, files).differentiable(images, ["", ""]).shape == (2, 1)


def test_the_wrong_activation_is_refused_not_warned_about(files):
    for kind in (HPSv2, PickScore):
        with pytest.raises(ModelError, match="QuickGELU instead of GELU"):
            kind(path=files[QUICK], architecture=QUICK)
    for kind in (Cosine, Hessel):
        with pytest.raises(ModelError, match="GELU instead of QuickGELU.*quickgelu"):
            kind(path=files[GELU], architecture=GELU)
    held = build(HPSv2, files)  # also where the towers are in use by a reward that wants them so
    with pytest.raises(ModelError, match="activation"):
        Cosine(path=files[GELU], architecture=GELU)
    samples = tiny_clip.samples(PROMPTS, tiny_clip.images(4))
    other = tiny_clip.save(tiny_clip.build(GELU), f"{files[GELU]}.pt")
    quick = Cosine(path=str(other), architecture=QUICK)
    assert np.abs(quick.score(samples).values - held.score(samples).values).max() > 1e-4  # it would have mattered


def test_weights_of_another_architecture_are_refused(files, tmp_path):
    state = tiny_clip.build(GELU).state_dict()
    for change, message in (
        (lambda s: s.pop("ln_final.bias"), "lacks tensor ln_final.bias"),
        (lambda s: s.update(logit_bias=torch.zeros(1)), "foreign tensor logit_bias"),
        (lambda s: s.update(text_projection=torch.zeros(16, 9)), "text_projection.*9"),
    ):
        wrong = dict(state)
        change(wrong)
        torch.save(wrong, tmp_path / "w.pt")
        with pytest.raises(ModelError, match=message):
            HPSv2(path=str(tmp_path / "w.pt"), architecture=GELU)
    theirs = open_clip_to_hf(state)
    for change, message in (
        (lambda s: s.pop("visual_projection.weight"), "lack the tensor visual_projection"),
        (
            lambda s: s.update({"text_model.embeddings.extra": torch.zeros(1)}),
            "foreign tensor text_model.embeddings.extra",
        ),
    ):
        wrong = dict(theirs)
        change(wrong)
        torch.save(wrong, tmp_path / "w.pt")
        with pytest.raises(ModelError, match=message):
            HPSv2(path=str(tmp_path / "w.pt"), architecture=GELU)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("ViTH-14", "Unknown CLIP architecture.*Did you mean 'ViT-H-14'"),
        ("hf-hub:someone/model", "Unknown CLIP architecture"),
        ("RN50", "convolutional"),
        ("ViT-B-16-SigLIP", "not a CLIP of two transformers"),
        ("xlm-roberta-base-ViT-B-32", "not a CLIP of two transformers"),
    ],
)
def test_architectures_that_are_not_ours(architecture, message, files):
    with pytest.raises(ModelError, match=message):
        HPSv2(path=files[GELU], architecture=architecture)


def test_published_weights_are_checked_and_ones_own_need_an_architecture(files, tmp_path):
    with pytest.raises(ConfigError, match="path"):
        HPSv2(architecture=GELU)
    with pytest.raises(ModelError, match="not the published weights"):
        HPSv21(path=files[GELU])
    with pytest.raises(ModelError, match="Weights of another model"):
        HPSv2(path=files[GELU])
    with pytest.raises(ModelError, match="no HPS_v2_compressed.pt in it"):
        HPSv2(path=str(tmp_path))
    with pytest.raises(ModelError, match="no such file"):
        HPSv2(path=str(tmp_path / "gone.pt"), architecture=GELU)
    with pytest.raises(ModelError, match="not the published weights"):
        Aesthetic(path=files[QUICK], head=files["head"])
    torch.save({"layers.0.weight": torch.ones(1, 5), "layers.0.bias": torch.ones(1)}, tmp_path / "head.pth")
    with pytest.raises(ModelError, match="5 inputs, not 16"):
        Aesthetic(path=files[QUICK], head=str(tmp_path / "head.pth"), architecture=QUICK)


def test_identity_follows_what_the_score_depends_on(files, tmp_path):
    other = tiny_clip.save(tiny_clip.build(GELU, seed=1), tmp_path / "other.pt")
    base = build(HPSv2, files)
    assert base.identity() == build(HPSv2, files, batch_size=2, placement="cpu").identity()
    different = [
        base, build(HPSv21, files), build(PickScore, files), build(HPSv2, files, dtype="bf16"),
        HPSv2(path=str(other), architecture=GELU), build(Cosine, files), build(FlowGRPO, files), build(Aesthetic, files),
    ]  # fmt: skip
    assert len({reward.identity() for reward in different}) == len(different)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_close_and_returns_whole(dtype, files):
    samples = tiny_clip.samples(PROMPTS, tiny_clip.images(4))
    full, half = build(HPSv2, files), build(HPSv2, files, dtype=dtype)
    rows = prompt_rows(full)
    expected = full.score(samples).values
    values = half.score(samples).values
    assert values == pytest.approx(expected, abs=0.02) and not np.array_equal(values, expected)
    assert half.towers is full.towers and sum(rows) == 6  # prompts kept in one precision are not used in the other
    assert np.array_equal(full.score(samples).values, expected) and sum(rows) == 6


def test_derived_batch_size_follows_what_a_row_keeps(files, monkeypatch):
    import rewards.placement as placement

    reward, seen = build(HPSv2, files), []
    monkeypatch.setattr(placement, "rows_within", lambda row, device: seen.append(row) or 2)
    reward.score(tiny_clip.samples(PROMPTS, tiny_clip.images(4)))
    tokens, width, layers = 17, 32, 2
    assert seen[0] > 4 * tokens * width * layers * 8  # attention, its four maps, and a block four times as wide
    assert not any(p.requires_grad for p in reward.towers.model.parameters())
    values = reward.score(tiny_clip.samples(PROMPTS, tiny_clip.images(4))).values
    assert len(seen) == 1 and np.isfinite(values).all()


def test_offloaded_rewards_keep_no_graph(files):
    reward = build(HPSv2, files, placement="offload")
    samples = tiny_clip.samples(PROMPTS, tiny_clip.images(4))
    assert reward.score(samples).values == pytest.approx(build(HPSv2, files).score(samples).values, abs=1e-6)

    class Accelerated(Placement):
        device = property(lambda self: torch.device("cuda"))

    with pytest.raises(ConfigError, match="offloaded"):
        Accelerated("offload").require_graph("hpsv2")
    Accelerated("resident").require_graph("hpsv2")


def test_the_registry_builds_each_by_name(files):
    for kind in (*CLIPS, Aesthetic):
        name = "aesthetic" if kind is Aesthetic else kind.recipe.name
        quick = kind is Aesthetic or kind.recipe.quick_gelu
        extra = {"head": files["head"]} if kind is Aesthetic else {}
        architecture = QUICK if quick else GELU
        reward = get_reward(name, path=files[architecture], architecture=architecture, dtype="fp32", **extra)
        assert type(reward) is kind and reward.card.name == name and reward.card.differentiable
        assert {"path", "placement", "dtype", "batch_size", "architecture"} <= set(inspect.signature(kind).parameters)
    with pytest.raises(ConfigError, match="Did you mean 'fp16'"):
        build(HPSv2, files, dtype="f16")
