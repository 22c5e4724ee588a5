"""Constants of the published CLIPs, checked without their weights, and definitions worked by hand."""

from __future__ import annotations

import math
import os

import open_clip
import pytest
import torch

from align.errors import ModelError
from align.weights import load_tensors, structure_sha256
from rewards import get_reward
from rewards.aesthetic import fold_head
from rewards.clip import DFN5B, Cosine, FlowGRPO, Hessel, TorchMetrics, UniRL
from rewards.hps import HPSv2, HPSv21
from rewards.pickscore import PickScore
from rewards.towers import build_model, hf_to_open_clip, open_clip_to_hf, require_activation

H14 = "2d21a943bdca7a5569e9ad67870e7f0e5fc6deb5d023c6c177a279cc47148c4e"
ALL = (DFN5B, Cosine, FlowGRPO, Hessel, TorchMetrics, UniRL, HPSv2, HPSv21, PickScore)


@pytest.fixture(scope="module")
def models():
    names = ("ViT-H-14", "ViT-L-14-quickgelu", "ViT-B-32-quickgelu", "ViT-H-14-378-quickgelu")
    return {name: build_model(name) for name in names}


@pytest.mark.parametrize(
    ("architecture", "keys", "numbers", "side"),
    [
        ("ViT-H-14", 686, 986_109_441, 224),
        ("ViT-L-14-quickgelu", 446, 427_616_513, 224),
        ("ViT-B-32-quickgelu", 302, 151_277_313, 224),
        # The positions of 27 x 27 patches in place of 16 x 16, each 1,280 wide.
        ("ViT-H-14-378-quickgelu", 686, 986_109_441 + (27**2 - 16**2) * 1280, 378),
    ],
)
def test_structure_of_published_towers(models, architecture, keys, numbers, side):
    model = models[architecture]
    state = model.state_dict()
    assert len(state) == keys and sum(t.numel() for t in state.values()) == numbers
    assert model.visual.image_size == (side, side) and all(t.is_meta for t in state.values())


def test_structure_hash_and_both_layouts_of_the_largest(models):
    state = models["ViT-H-14"].state_dict()
    assert structure_sha256(state) == H14
    theirs = open_clip_to_hf(state)
    # q, k and v apart add two weights and two biases in each of the 24 + 32 layers.
    assert len(theirs) == 686 + 4 * (24 + 32)
    assert structure_sha256(hf_to_open_clip(theirs)) == H14
    assert structure_sha256(models["ViT-H-14-378-quickgelu"].state_dict()) != H14


def test_every_recipe_names_towers_with_its_activation(models):
    for kind in ALL:
        recipe = kind.recipe
        require_activation(models[recipe.architecture], recipe.quick_gelu, recipe.name)
        with pytest.raises(ModelError, match="QuickGELU"):
            require_activation(models[recipe.architecture], not recipe.quick_gelu, recipe.name)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Hessel, [0.0, 0.75]),
        (TorchMetrics, [0.0, 30.0]),
        (Cosine, [-0.2, 0.3]),
        (FlowGRPO, [-0.2, 0.3]),
        (UniRL, [-2 / 3, 1.0]),
        (DFN5B, [-0.2, 0.3]),
        (HPSv2, [-0.2, 0.3]),
        (HPSv21, [-0.2, 0.3]),
        (PickScore, [-20.0, 30.0]),
    ],
)
def test_definitions_of_a_cosine(kind, expected):
    cosine, logit_scale = torch.tensor([-0.2, 0.3]), torch.tensor(math.log(100.0))
    assert kind.recipe.value(cosine, logit_scale).tolist() == pytest.approx(expected, abs=5e-6)


def test_tokenizer_ids():
    tokens = open_clip.get_tokenizer("ViT-H-14")(["A cat with two horns on its head"])[0].tolist()
    assert tokens[:11] == [49406, 320, 2368, 593, 1237, 22109, 525, 902, 1375, 49407, 0] and not any(tokens[11:])


def chain(*widths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for n, (into, out) in zip((0, 2, 4, 6, 7), zip(widths, widths[1:], strict=False), strict=False):
        state[f"layers.{n}.weight"] = torch.randn(out, into, generator=generator, dtype=torch.float64)
        state[f"layers.{n}.bias"] = torch.randn(out, generator=generator, dtype=torch.float64)
    return state


def test_folding_by_hand():
    state = {
        "layers.0.weight": torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "layers.0.bias": torch.tensor([1.0, -1.0]),
        "layers.2.weight": torch.tensor([[3.0, -1.0]]), "layers.2.bias": torch.tensor([0.5]),
    }  # fmt: skip
    weight, bias = fold_head(state)
    assert weight.tolist() == [3.0, 5.0] and bias.item() == 4.5


@pytest.mark.parametrize("seed", range(3))
def test_folded_head_is_the_chain(seed):
    state = chain(768, 1024, 128, 64, 16, 1, seed=seed)
    embeddings = torch.nn.functional.normalize(torch.randn(5, 768, dtype=torch.float64), dim=1)
    out = embeddings
    for n in (0, 2, 4, 6, 7):
        out = torch.nn.functional.linear(out, state[f"layers.{n}.weight"], state[f"layers.{n}.bias"])
    weight, bias = fold_head(state)
    torch.testing.assert_close(embeddings @ weight + bias, out[:, 0], rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"mean": torch.zeros(1)}), "no head of linear layers"),
        (lambda s: s.pop("layers.4.bias"), "no head of linear layers"),
        (lambda s: s.update({"layers.4.weight": torch.zeros(64, 5).double()}), "do not follow"),
        (lambda s: s.update({"layers.7.weight": torch.zeros(2, 16).double()}), "do not follow"),
    ],
)
def test_a_foreign_head_is_refused(change, message):
    state = chain(768, 1024, 128, 64, 16, 1)
    change(state)
    with pytest.raises(ModelError, match=message):
        fold_head(state)
    with pytest.raises(ModelError, match="one output"):
        fold_head(chain(8, 4, 2))


@pytest.mark.weights
def test_published_aesthetic_head():
    state = load_tensors(os.environ["ALIGN_AESTHETIC_HEAD"])
    weight, bias = fold_head(state)
    first = torch.eye(768, dtype=torch.float64)[0]
    for embedding, expected in (
        (torch.full((768,), 768**-0.5, dtype=torch.float64), 4.883284568786621),
        (first, 4.545052528381348),
        (torch.zeros(768, dtype=torch.float64), 5.236645844819847),
    ):
        assert (embedding @ weight + bias).item() == pytest.approx(expected, abs=5e-6)
    assert weight.norm().item() == pytest.approx(17.99562, abs=1e-4)


@pytest.mark.weights
@pytest.mark.parametrize(
    ("name", "prompt", "expected"),
    [("hpsv2", "A cat with two horns on its head", 0.2876), ("hpsv2.1", "cat with horn", 0.288)],
)
def test_published_hps(name, prompt, expected):
    """The demonstration image of the vendor's repository, named by ALIGN_HPS_IMAGE."""
    import numpy as np
    from PIL import Image

    from align.types import Samples

    pixels = np.asarray(Image.open(os.environ["ALIGN_HPS_IMAGE"]).convert("RGB"), dtype=np.float32) / 255
    scores = get_reward(name).score(Samples(prompts=[prompt], images=[torch.tensor(pixels).permute(2, 0, 1)]))
    assert scores.values[0, 0] == pytest.approx(expected, abs=0.002)
