"""Towers, layouts and preprocessing against open_clip's own pipelines, transformers and torchvision."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import tiny_clip
import torch
from open_clip.transform import image_transform
from PIL import Image
from safetensors.torch import save_file

from rewards.aesthetic import Aesthetic
from rewards.clip import Cosine, FlowGRPO, Hessel, TorchMetrics
from rewards.hps import HPSv21
from rewards.media import OPENAI_MEAN, OPENAI_STD, clip_pixels, resize
from rewards.pickscore import PickScore
from rewards.towers import hf_to_open_clip, open_clip_to_hf

PROMPTS = ["a red cat", "two dogs and a very long description of the sea at night", "7"]
LEVEL = 1 / 255 / min(OPENAI_STD)  # one 8-bit level in normalised units


@pytest.fixture(scope="module", autouse=True)
def tiny_architectures(tmp_path_factory):
    tiny_clip.register(tmp_path_factory.mktemp("architectures"))


def hf_clip(hidden_act="gelu", seed=0):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    common = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": hidden_act}
    text = {"hidden_size": 16, "intermediate_size": 64, "vocab_size": 49408, "projection_dim": 16, **common}
    vision = {"hidden_size": 32, "intermediate_size": 128, "image_size": tiny_clip.SIDE, "patch_size": 8, **common}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim else 1))
    return model


def gradient(height, width):
    """A photograph-like test image, 8 bits: smooth shading, edges and texture."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    rng = np.random.default_rng(height * width)
    base = np.stack([x + y, np.sin(20 * x) * np.cos(14 * y), (x > 0.3) * (y < 0.4)], -1)
    return np.clip(255 * (0.25 + 0.5 * base) + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


def tensor(array):
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255


SIZES = [(512, 512), (480, 832), (832, 480), (301, 457), (767, 225), (224, 224), (100, 151), (225, 1000), (333, 224)]


@pytest.mark.parametrize("fit", ["shortest", "longest", "squash"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pixels_equal_open_clips_transform(fit, height, width):
    array = gradient(height, width)
    theirs = image_transform(224, is_train=False, resize_mode=fit)(Image.fromarray(array))[None]
    ours = clip_pixels(tensor(array), fit=fit)
    assert ours.shape == theirs.shape
    apart = (ours - theirs).abs()
    assert apart.max() < 1.01 * LEVEL and (apart > LEVEL / 2).float().mean() < 5e-4
    # Black at exactly the same places: the padding is where open_clip puts it.
    if fit == "longest":
        black = (-torch.tensor(OPENAI_MEAN) / torch.tensor(OPENAI_STD)).view(1, 3, 1, 1)
        rows, columns = ((p - black).abs().amax(1) < 1e-6 for p in (ours, theirs))
        assert torch.equal(rows.all(1), columns.all(1)) and torch.equal(rows.all(2), columns.all(2))


@pytest.mark.parametrize("side", [64, 448, 896])
def test_halves_are_rounded_up_as_pil_does(side):
    """At 2 to 1 many sums end in exactly .5: every pixel is the same, not one in a thousand."""
    array = gradient(side, side)
    theirs = np.asarray(Image.fromarray(array).resize((side // 2, side // 2), Image.Resampling.BICUBIC))
    for image in (tensor(array), tensor(array).requires_grad_()):
        ours = resize(image, side // 2, side // 2).detach() * 255
        assert np.array_equal(ours[0].permute(1, 2, 0).round().numpy(), theirs)


@pytest.mark.parametrize(("height", "width"), [*SIZES, (832, 1216)])
def test_pixels_equal_transformers_processor(height, width):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    array = gradient(height, width)
    theirs = CLIPImageProcessorPil()(Image.fromarray(array), return_tensors="pt").pixel_values
    apart = (clip_pixels(tensor(array), crop="floor") - theirs).abs()
    assert apart.max() < 1.01 * LEVEL and (apart > LEVEL / 2).float().mean() < 5e-4


def test_the_two_crops_differ_by_a_pixel_where_half_rounds_up():
    """832 x 1216 becomes 224 x 327: the middle of 103 spare columns is 51.5, 52 to torchvision and 51 to the others."""
    image = tensor(gradient(832, 1216))
    even, floor = clip_pixels(image), clip_pixels(image, crop="floor")
    assert torch.equal(even[..., :-1], floor[..., 1:]) and (even - floor).abs().mean() > 0.03


@pytest.mark.parametrize(
    ("name", "make", "bounds"),
    [
        # mean of the difference to PIL's, in normalised units: what each shortcut costs
        ("ours", lambda x: clip_pixels(x), (0, 5e-6)),
        ("bilinear", lambda x: clip_pixels(x, resample="bilinear"), (5e-3, 0.3)),
        ("float", lambda x: clip_pixels(x, eight_bit=False), (1e-3, 2e-2)),
        ("padded", lambda x: clip_pixels(x, fit="longest"), (0.5, 3)),
    ],
)
def test_what_each_preprocessing_is_worth(name, make, bounds):
    apart = []
    for height, width in [(512, 512), (480, 832), (301, 457), (767, 480), (1024, 1024)]:
        array = gradient(height, width)
        theirs = image_transform(224, is_train=False)(Image.fromarray(array))[None]
        if name != "padded" or height != width:
            apart.append((make(tensor(array)) - theirs).abs().mean().item())
    assert bounds[0] <= np.mean(apart) <= bounds[1]


def test_float_pixels_are_seen_as_they_would_be_saved():
    image = torch.rand(1, 3, 50, 70, generator=torch.Generator().manual_seed(0))
    saved = (image * 255).round() / 255
    torch.testing.assert_close(clip_pixels(image), clip_pixels(saved), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(512, 512), (301, 457), (100, 151)])
def test_float_resize_is_torchvisions(height, width):
    from torchvision.transforms.functional import InterpolationMode
    from torchvision.transforms.functional import resize as theirs

    image = tensor(gradient(height, width))
    for resample, mode in (("bilinear", InterpolationMode.BILINEAR), ("bicubic", InterpolationMode.BICUBIC)):
        torch.testing.assert_close(
            resize(image, 224, 300, resample=resample, eight_bit=False),
            theirs(image, [224, 300], mode, antialias=True),
            rtol=0, atol=2e-6,
        )  # fmt: skip


def test_layouts_are_the_same_numbers():
    theirs = hf_clip().state_dict()
    ours = hf_to_open_clip(theirs)
    model = open_clip.CLIP(**open_clip.get_model_config(tiny_clip.GELU))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in model.state_dict().items()}
    back = open_clip_to_hf(ours)
    assert back.keys() == theirs.keys() and all(torch.equal(back[key], theirs[key]) for key in theirs)
    again = hf_to_open_clip(open_clip_to_hf(model.state_dict()))
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())
    values = torch.cat([v.flatten() for v in ours.values()])
    assert values.sum().item() == pytest.approx(
        torch.cat([v.flatten() for v in theirs.values()]).sum().item(), rel=1e-4
    )


@pytest.mark.parametrize("old_buffers", [False, True])
def test_pickscore_is_transformers_logit(tmp_path, old_buffers):
    model = hf_clip()
    model.save_pretrained(tmp_path)
    if old_buffers:  # checkpoints of older versions keep the positions as tensors
        state = {k: v.contiguous() for k, v in model.state_dict().items()}
        state |= {f"{t}_model.embeddings.position_ids": torch.arange(9)[None] for t in ("text", "vision")}
        save_file(state, tmp_path / "model.safetensors")
    reward = PickScore(path=str(tmp_path), architecture=tiny_clip.GELU)
    images = tiny_clip.images(3)
    ours = reward.score(tiny_clip.samples(PROMPTS, images)).values[:, 0]
    tokens = open_clip.get_tokenizer(tiny_clip.GELU)(PROMPTS)
    # transformers pads with the end token; what follows the first one is never looked at.
    padded = torch.where(tokens == 0, 49407, tokens)
    with torch.no_grad():
        logits = model(input_ids=padded, pixel_values=clip_pixels(images, tiny_clip.SIDE, crop="floor"))
    theirs = logits.logits_per_image.diagonal().numpy()
    assert np.abs(ours - theirs).max() < 4e-6 * model.logit_scale.exp().item() and np.ptp(ours) > 1e-3


@pytest.mark.parametrize(
    ("kind", "quick", "mode", "value"),
    [
        (Hessel, True, "shortest", lambda cos: 2.5 * np.maximum(cos, 0)),
        (Cosine, True, "shortest", lambda cos: cos),
        (HPSv21, False, "longest", lambda cos: cos),
    ],
)
def test_scores_equal_open_clips_own_pipeline(tmp_path, kind, quick, mode, value):
    """open_clip loads the file, transforms PIL images and tokenises, as a user would by its documentation."""
    name = tiny_clip.QUICK if quick else tiny_clip.GELU
    file = tiny_clip.save(tiny_clip.build(name), tmp_path / "weights.pt", half=True)
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=str(file), image_resize_mode=mode)
    model.eval()
    images = [tiny_clip.images(1, *size, seed=i)[0] for i, size in enumerate([(48, 83), (64, 64), (40, 33)])]
    prefix = "A photo depicts " if kind is Hessel else ""
    with torch.no_grad():
        seen = model.encode_image(torch.stack([transform(tiny_clip.pil(i)) for i in images]), normalize=True)
        texts = model.encode_text(open_clip.get_tokenizer(name)([prefix + p for p in PROMPTS]), normalize=True)
    ours = kind(path=str(file), architecture=name).score(tiny_clip.samples(PROMPTS, images)).values[:, 0]
    assert ours == pytest.approx(value((seen * texts).sum(-1).numpy()), abs=1e-4)


def test_flow_grpo_sees_a_bilinear_image(tmp_path):
    from torchvision import transforms

    file = tiny_clip.save(tiny_clip.build(tiny_clip.QUICK), tmp_path / "weights.pt")
    reward = FlowGRPO(path=str(file), architecture=tiny_clip.QUICK)
    image = torch.rand(1, 3, 57, 90, generator=torch.Generator().manual_seed(1))
    see = transforms.Compose([
        transforms.Resize(32), transforms.CenterCrop(32), transforms.Normalize(OPENAI_MEAN, OPENAI_STD),
    ])  # fmt: skip
    with torch.no_grad():
        expected = reward.towers.embed_pixels(see(image)) @ reward.towers.embed_prompts(["a cat"])[0].T
    scored = reward.score(tiny_clip.samples(["a cat"], image)).values
    assert scored == pytest.approx(expected.double().numpy(), abs=2e-6)
    bicubic = Cosine(path=str(file), architecture=tiny_clip.QUICK).score(tiny_clip.samples(["a cat"], image)).values
    assert abs(scored - bicubic) > 1e-4


def test_aesthetic_is_its_head_on_the_unit_embedding(tmp_path):
    file = tiny_clip.save(tiny_clip.build(tiny_clip.QUICK), tmp_path / "weights.pt")
    torch.manual_seed(0)
    widths = (16, 32, 8, 8, 4, 1)
    layers = torch.nn.ModuleList([torch.nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)])
    state = {
        f"layers.{n}.{k}": getattr(m, k)
        for n, m in zip((0, 2, 4, 6, 7), layers, strict=True)
        for k in ("weight", "bias")
    }
    torch.save(state, tmp_path / "head.pth")
    reward = Aesthetic(path=str(file), head=str(tmp_path / "head.pth"), architecture=tiny_clip.QUICK)
    images = tiny_clip.images(4, 40, 60)
    with torch.no_grad():
        out = reward.towers.model.encode_image(clip_pixels(images, 32), normalize=True)
        for layer in layers:
            out = layer(out)
    scores = reward.score(tiny_clip.samples(["", "x", "", "y"], images))
    assert scores.values == pytest.approx(out.double().numpy(), abs=1e-6) and scores.valid.all()


def test_truncation_keeps_the_end_where_transformers_does(tmp_path):
    """A prompt of 90 words is the prompt of its first 75 tokens."""
    file = tiny_clip.save(tiny_clip.build(tiny_clip.QUICK), tmp_path / "weights.pt")
    reward = TorchMetrics(path=str(file), architecture=tiny_clip.QUICK)
    words = ["cat"] * 75
    whole, cut = " ".join(words), " ".join([*words, *["dog"] * 15])
    scores = reward.score(tiny_clip.samples([whole, cut, "cat"], tiny_clip.images(1).expand(3, -1, -1, -1)))
    assert scores.values[0, 0] == pytest.approx(scores.values[1, 0], abs=1e-6)
    assert list(scores.extras["truncated"]) == [False, True, False]
