"""The embedded default: real data, disjoint splits, a folder diffusers itself can load."""

from __future__ import annotations

import json
import os

import pytest
import torch

from align.diffusion import digits_data
from align.diffusion.digits import TOKENS, build_digits
from align.diffusion.digits_data import build_once, digit_prompts, load_split, parse_prompt, prompt_for
from align.diffusion.families import Size
from align.diffusion.policy import load_family
from align.errors import ConfigError, DataError


def test_splits_are_disjoint_stratified_and_whole():
    splits = [load_split(name) for name in ("generator", "reward", "evaluator")]
    assert sum(len(s.images) for s in splits) == 1797
    assert sum(float(s.images.sum()) for s in splits) == pytest.approx(
        float(digits_data._all_digits()[0].sum()), rel=1e-5
    )
    for digit in range(10):
        shares = [int((s.labels == digit).sum()) for s in splits]
        assert shares[0] == pytest.approx(2 * shares[1], abs=3) and shares[1] == pytest.approx(shares[2], abs=2)
    assert all(s.images.min() >= 0 and s.images.max() <= 1 for s in splits)


def test_prompts_round_trip():
    prompts = digit_prompts()
    assert len(set(prompts)) == 30
    assert all(prompt_for(*parse_prompt(p)) == p for p in prompts)
    for bad in ("a red cat", "seven or three", "a bold thin handwritten seven", ""):
        with pytest.raises(DataError, match="one digit"):
            parse_prompt(bad)


@pytest.fixture(scope="module")
def folder():
    return build_digits("random", progress=False)


def test_it_is_an_ordinary_sd3_folder(folder):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        "a bold handwritten seven", num_inference_steps=2, max_sequence_length=TOKENS, output_type="pt"
    ).images
    assert images.shape == (1, 3, 16, 16)
    assert json.loads((folder / "card.json").read_text())["recipe"]["flow_steps"] == 0


def test_every_prompt_is_told_apart_and_word_by_word(folder):
    family = load_family(folder)
    assert family.pipeline.tokenizer("a bold handwritten seven").input_ids.__len__() == TOKENS
    encoded = family.encode(digit_prompts(), Size())
    assert encoded["encoder_hidden_states"].shape[1] == 2 * TOKENS
    for name in ("encoder_hidden_states", "pooled_projections"):
        rows = encoded[name].flatten(1)
        distances = torch.cdist(rows, rows) + 1e9 * torch.eye(30)
        assert distances.min() > 0.05 * rows.std() * rows.shape[1] ** 0.5


def test_a_build_is_published_whole_or_not_at_all(tmp_path):
    def broken(place):
        (place / "half").write_text("x")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        build_once(tmp_path / "model", broken)
    assert not (tmp_path / "model").exists()
    made = []
    for _ in range(2):
        build_once(tmp_path / "model", lambda place: made.append(place) or (place / "whole").write_text("x"))
    assert len(made) == 1 and os.listdir(tmp_path / "model") == ["whole"]


def test_unknown_names():
    with pytest.raises(ConfigError, match="Did you mean 'smoke'"):
        build_digits("smokes")
    with pytest.raises(ConfigError, match="Did you mean 'evaluator'"):
        load_split("evaluators")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_default_passes_its_acceptance():
    card = json.loads((build_digits("default", progress=False) / "card.json").read_text())
    plain = card["guidance_1.0"]
    assert card["refused"] == [] and 0.80 <= plain["accuracy"] <= 0.97
    assert min(plain["pixel_std_ratio"], plain["class_variance_ratio"]) >= 0.85
    assert plain["ink"]["thin"] < plain["ink"]["plain"] < plain["ink"]["bold"]
