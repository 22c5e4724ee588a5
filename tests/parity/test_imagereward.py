"""ImageReward against BLIP written out in plain torch on the published names, its structure, and its goldens."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path

import numpy as np
import pytest
import tiny_vl
import torch
import torch.nn.functional as F

from align.errors import ModelError
from align.types import Samples
from align.weights import structure_sha256, without_storage
from rewards import get_reward
from rewards.imagereward import LENGTH, STRUCTURE, TEXT, UNUSED, VISION, Network, rename
from rewards.media import OPENAI_MEAN, OPENAI_STD


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_vl.imagereward(tmp_path_factory.mktemp("weights") / "imagereward")


@pytest.fixture(scope="module")
def reward(folder):
    return get_reward("imagereward", path=str(folder))


def eight_bit(count, side=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator).float() / 255


# --- BLIP as its source has it: a timm vision transformer, and a BERT with cross-attention ------------


def linear(state, key, x):
    return x @ state[f"{key}.weight"].T + state[f"{key}.bias"]


def norm(state, key, x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * state[f"{key}.weight"] + state[f"{key}.bias"]  # fmt: skip


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attend(q, k, v, heads, blocked=None):
    def split(x):
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    scores = split(q) @ split(k).transpose(-1, -2) / math.sqrt(q.shape[-1] / heads)
    if blocked is not None:
        scores = scores.masked_fill(blocked[:, None, None, :], float("-inf"))
    return (scores.softmax(-1) @ split(v)).transpose(1, 2).flatten(2)


def blip_image(state, pixels, heads, depth):
    s = {k.removeprefix("blip.visual_encoder."): v for k, v in state.items()}
    patch = s["patch_embed.proj.weight"].shape[-1]
    x = F.unfold(pixels, patch, stride=patch).transpose(1, 2) @ s["patch_embed.proj.weight"].flatten(1).T
    x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x + s["patch_embed.proj.bias"]], 1) + s["pos_embed"]
    for n in range(depth):
        q, k, v = linear(s, f"blocks.{n}.attn.qkv", norm(s, f"blocks.{n}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(s, f"blocks.{n}.attn.proj", attend(q, k, v, heads))
        inner = gelu(linear(s, f"blocks.{n}.mlp.fc1", norm(s, f"blocks.{n}.norm2", x, 1e-6)))
        x = x + linear(s, f"blocks.{n}.mlp.fc2", inner)
    return norm(s, "norm", x, 1e-6)


def blip_text(state, ids, mask, image, heads, depth):
    s = {k.removeprefix("blip.text_encoder."): v for k, v in state.items()}
    e = "embeddings"
    x = s[f"{e}.word_embeddings.weight"][ids] + s[f"{e}.position_embeddings.weight"][: ids.shape[1]]
    x = norm(s, f"{e}.LayerNorm", x, 1e-12)
    for n in range(depth):
        for block, source, blocked in (("attention", None, mask == 0), ("crossattention", image, None)):
            key, source = f"encoder.layer.{n}.{block}", x if source is None else source
            q, k, v = linear(s, f"{key}.self.query", x), linear(s, f"{key}.self.key", source), linear(s, f"{key}.self.value", source)  # fmt: skip
            x = norm(s, f"{key}.output.LayerNorm", x + linear(s, f"{key}.output.dense", attend(q, k, v, heads, blocked)), 1e-12)  # fmt: skip
        key = f"encoder.layer.{n}"
        inner = gelu(linear(s, f"{key}.intermediate.dense", x))
        x = norm(s, f"{key}.output.LayerNorm", x + linear(s, f"{key}.output.dense", inner), 1e-12)
    return x


def plain_reward(state, images, ids, mask):
    pixels = (images - torch.tensor(OPENAI_MEAN).view(3, 1, 1)) / torch.tensor(OPENAI_STD).view(3, 1, 1)
    image = blip_image(state, pixels, tiny_vl.VISION["num_attention_heads"], tiny_vl.VISION["num_hidden_layers"])
    x = blip_text(state, ids, mask, image, tiny_vl.TEXT["num_attention_heads"], tiny_vl.TEXT["num_hidden_layers"])[:, 0]
    for at in (0, 2, 4, 6, 7):
        x = linear(state, f"mlp.layers.{at}", x)
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_equals_blip_written_out(folder, reward):
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    prompts = ["a red cat", "seas on the moon", "the blue dog on a sea", "cat"]
    words = {w: i for i, w in enumerate((folder / "vocab.txt").read_text().split())}
    rows = [[2, *(words[w] for w in p.replace("seas", "sea ##s").split()), 3] for p in prompts]
    ids = torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])
    images = eight_bit(4)
    expected = plain_reward(state, images, ids, (ids != 0).long())
    scores = reward.score(Samples(prompts=prompts, images=images))
    assert scores.values[:, 0] == pytest.approx(expected.double().numpy(), abs=1e-5)
    assert expected.std() > 0.01, "the images must matter"


def test_structure_of_the_published_file():
    """625 keys, their shapes and the parameter count, from the published sizes, without any memory."""
    with without_storage():
        network = Network()
    assert all(p.is_meta for p in network.parameters())
    assert not network.text.embeddings.position_ids.is_meta
    shapes = {key: torch.empty(shape, device="meta") for key, shape in tiny_vl.blip_shapes(VISION, TEXT).items()}
    assert len(shapes) == 625 and structure_sha256(shapes) == STRUCTURE
    buffers = sum(v.numel() for k, v in shapes.items() if k.endswith("position_ids"))
    assert sum(v.numel() for v in shapes.values()) - buffers == 446_665_953
    renamed = {rename(key): value for key, value in shapes.items()}
    assert len(renamed) == 625, "no two tensors share a name"
    own = network.state_dict()
    assert {k: v.shape for k, v in renamed.items() if k not in UNUSED} == {k: v.shape for k, v in own.items()}
    assert set(UNUSED) == renamed.keys() - own.keys() and len(UNUSED) == 5


def test_the_head_is_affine(reward):
    a, b = torch.randn(2, 5, tiny_vl.TEXT["hidden_size"], generator=torch.Generator().manual_seed(1)) * 10
    head = reward.network.head
    zero = head(torch.zeros_like(a))
    assert torch.allclose(head(a - 2 * b), head(a) - 2 * head(b) + 2 * zero, atol=1e-5)


def test_a_prompt_is_cut_at_35_tokens_and_says_so(reward):
    fits, cut = " ".join(["cat"] * 33), " ".join(["cat"] * 34)
    (ids, length, truncated), (longer, _, flag) = reward.encode(fits), reward.encode(cut)
    assert (length, truncated, flag) == (35, False, True)
    assert ids.tolist() == longer.tolist() == [2] + [7] * 33 + [3]
    scores = reward.score(Samples(prompts=[fits, cut, "cat"], images=eight_bit(1).expand(3, -1, -1, -1)))
    assert scores.extras["truncated"] == [False, True, False]
    assert scores.values[0] == pytest.approx(scores.values[1], abs=1e-6)
    assert abs(scores.values[0, 0] - scores.values[2, 0]) > 1e-3


def test_a_prompt_is_tokenised_once(reward):
    reward.encode.cache_clear()
    reward.score(Samples(prompts=["a red cat"] * 6, images=eight_bit(6)))
    assert reward.encode.cache_info().misses == 1


def test_batches_do_not_matter(folder):
    prompts = ["a red cat", "the sea", "a dog on the moon"]
    images = [eight_bit(1)[0], eight_bit(1, 48, 1)[0], eight_bit(1, seed=2)[0]]
    samples = Samples(prompts=prompts, images=images)
    one, many = (get_reward("imagereward", path=str(folder), batch_size=n).score(samples) for n in (1, 3))
    assert one.values == pytest.approx(many.values, abs=1e-5) and one.valid.all()
    alone = get_reward("imagereward", path=str(folder)).score(samples.select([1]))
    assert alone.values[0] == pytest.approx(many.values[1], abs=1e-5)


def test_gradient_in_double_precision(folder):
    """Of the path without rounding to 8 bits: normalised pixels in, reward out."""
    reward = get_reward("imagereward", path=str(folder))
    network, (ids, length, _) = reward.network.double(), reward.encode("a red cat on the sea")
    mask = (torch.arange(LENGTH) < length).long()[None]
    pixels = torch.randn(1, 3, 32, 32, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(
        lambda x: network(x, ids[None], mask), pixels.requires_grad_(), fast_mode=True, atol=1e-6
    )


def test_the_differentiable_path_is_the_scoring_path(reward):
    images = eight_bit(2, 48).requires_grad_()
    values = reward.differentiable(images, ["a red cat", "the sea"])
    assert values.shape == (2, 1)
    expected = reward.score(Samples(prompts=["a red cat", "the sea"], images=images.detach())).values
    assert values.detach().double().numpy() == pytest.approx(expected, abs=1e-6)
    (gradient,) = torch.autograd.grad(values[0, 0], images)
    assert gradient[0].abs().sum() > 0 and not gradient[1].any()
    assert bool(gradient.isfinite().all())


def test_bad_samples_are_missing_and_spoil_nothing(reward):
    images = eight_bit(4)
    images[1, 0, 0, 0] = float("nan")
    images[2] *= 255
    samples = Samples(prompts=["a red cat", "a cat", "a cat", " "], images=images)
    scores = reward.score(samples)
    assert scores.valid[:, 0].tolist() == [True, False, False, False]
    assert "not numbers" in scores.errors[1] and "255" in scores.errors[2] and "prompt is empty" in scores.errors[3]
    assert scores.values[0] == pytest.approx(reward.score(samples.select([0])).values[0], abs=1e-6)


def test_foreign_weights_are_refused(folder, tmp_path):
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    for change, message in (
        (lambda s: s.pop("mlp.layers.7.bias"), "lacks tensor head.7.bias"),
        (lambda s: s.update({"blip.itm_head.weight": torch.zeros(2, 2)}), "foreign tensor blip.itm_head.weight"),
        (lambda s: s.update({"mlp.layers.7.bias": torch.zeros(2)}), "shape"),
    ):
        broken = dict(state)
        change(broken)
        torch.save(broken, tmp_path / "ImageReward.pt")
        (tmp_path / "med_config.json").write_text((folder / "med_config.json").read_text())
        with pytest.raises(ModelError, match=message):
            get_reward("imagereward", path=str(tmp_path), tokenizer=str(folder))
    with pytest.raises(ModelError, match="not there"):
        get_reward("imagereward", path=str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="tokenizer cannot be read"):
        get_reward("imagereward", path=str(folder), tokenizer=str(tmp_path / "nowhere"))
    (tmp_path / "med_config.json").write_text("[1, 2")
    with pytest.raises(ModelError, match="sizes of BLIP"):
        get_reward("imagereward", path=str(tmp_path), tokenizer=str(folder))


def test_identity_follows_what_the_scores_depend_on(folder, reward, tmp_path):
    same = get_reward("imagereward", path=str(folder / "ImageReward.pt"), batch_size=2)
    other = get_reward("imagereward", path=str(tiny_vl.imagereward(tmp_path, seed=1)))
    half = get_reward("imagereward", path=str(folder), dtype="bf16")
    assert reward.identity() == same.identity()
    assert len({reward.identity(), other.identity(), half.identity()}) == 3


GOLDENS = (  # THUDM/ImageReward, assets/images
    ("1.webp", "a5fcd126763da8b3fe2a9e620fc1ba03d215d20de36c77bf6770a540a9bc972d", 0.5811622738838196),
    ("2.webp", "dc13919a49a37987d19c8be3ba0c1ef2941570f820f90fb66ac91a9a9db24082", 0.2745276093482971),
    ("3.webp", "ee859bac167e6a04cbcde63454757b6fc7d9b8704429c15725ca8c4accf176e3", -1.4131819009780884),
    ("4.webp", "84faf59d59d9ca7ab298c9acb957d727365ae104768ac1a1ec55ab96be68aaf9", -2.029569625854492),
)


@pytest.mark.weights
def test_published_imagereward():
    """Needs ALIGN_IMAGEREWARD: a folder with ImageReward.pt, the tokenizer of bert-base-uncased, and 1.webp to 4.webp."""
    from PIL import Image

    folder = Path(os.environ["ALIGN_IMAGEREWARD"])
    images = []
    for name, sha256, _ in GOLDENS:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256
        pixels = np.asarray(Image.open(folder / name).convert("RGB"), dtype=np.float32) / 255
        images.append(torch.tensor(pixels).permute(2, 0, 1))
    prompt = "a painting of an ocean with clouds and birds, day time, low depth field effect"
    scores = get_reward("imagereward", path=str(folder)).score(Samples(prompts=[prompt] * 4, images=images))
    assert scores.values[:, 0] == pytest.approx([expected for *_, expected in GOLDENS], abs=0.01)
