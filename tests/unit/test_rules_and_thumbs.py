"""Rules, thumbs and thresholds: values worked by hand, JPEG sizes measured once, and what makes a score missing."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from align.errors import ConfigError, DataError
from align.scoretable import write_scores
from align.types import Samples
from rewards import get_reward
from rewards.base import score_safely
from rewards.chats import as_turns, completion_text, split_turns


def texts(*completions, metadata=()):
    return Samples(prompts=["p"] * len(completions), texts=list(completions), metadata=metadata)


def column(reward, samples):
    scores = reward.score(samples)
    return [float(v) if ok else None for v, ok in zip(scores.values[:, 0], scores.valid[:, 0], strict=True)]


# --- jpeg -------------------------------------------------------------------------------------------

RAMP = np.broadcast_to(np.arange(512)[None, :, None] // 2, (512, 512, 3))
NOISE = np.random.RandomState(0).randint(0, 256, (512, 512, 3))
JPEGS = [(np.zeros((512, 512, 3)), 4.723), (np.full((512, 512, 3), 255), 4.723), (RAMP, 11.929), (NOISE, 308.091)]


def as_images(arrays):
    return torch.stack([torch.from_numpy(np.array(a, dtype=np.float32) / 255).permute(2, 0, 1) for a in arrays])


def test_jpeg_sizes():
    """Pillow 12.3 over libjpeg-turbo 3.1.4.1 wrote these kilobytes; another encoder may differ by half a percent."""
    images = Samples(prompts=[""] * 4, images=as_images([a for a, _ in JPEGS]))
    expected = [kilobytes for _, kilobytes in JPEGS]
    assert column(get_reward("jpeg", direction="incompressible"), images) == pytest.approx(expected, rel=5e-3)
    assert column(get_reward("jpeg", scale=500), images) == pytest.approx([-k / 500 for k in expected], rel=5e-3)


def test_jpeg_rounds_pixels_and_takes_gray_sizes_of_any_kind_and_bad_ones_apart():
    gray, colour = torch.full((1, 16, 16), 0.5), torch.full((3, 16, 16), 0.5)
    bad = torch.full((3, 16, 16), 1.5)
    reward = get_reward("jpeg")
    values = column(reward, Samples(prompts=[""] * 4, images=[gray, colour, torch.zeros(3, 64, 32), bad]))
    assert values[0] == values[1] != values[2] and values[3] is None
    # 126.9 is nearer to 127 than to 126: truncating would give another picture.
    noisy = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)).mul(255).round()
    low, exact = (Samples(prompts=[""], images=[(noisy + d).clamp(0, 255) / 255]) for d in (-0.1, 0.0))
    assert column(reward, low) == column(reward, exact)


def test_jpeg_refuses_other_arguments():
    with pytest.raises(ConfigError, match="Did you mean 'compressible'"):
        get_reward("jpeg", direction="compresible")
    for scale in (0, -1, float("inf")):
        with pytest.raises(ConfigError, match="above 0"):
            get_reward("jpeg", scale=scale)
    with pytest.raises(DataError, match="scores images"):
        get_reward("jpeg").score(texts("a"))


# --- texts ------------------------------------------------------------------------------------------


def test_length_is_0_inside_and_minus_the_share_of_the_band_outside():
    reward = get_reward("length", low=2, high=6)
    assert column(reward, texts("", "ab", "abcdef", "a", "abcdefghij")) == [-0.5, 0.0, 0.0, -0.25, -1.0]
    words = get_reward("length", low=1, high=3, unit="words")
    assert column(words, texts("one  two\nthree", "a b c d")) == [0.0, -0.5]
    for bad in ({"low": 3, "high": 3}, {"low": -1, "high": 2}, {"low": 5, "high": 2}):
        with pytest.raises(ConfigError, match="low to high"):
            get_reward("length", **bad)
    with pytest.raises(ConfigError, match="Did you mean 'words'"):
        get_reward("length", low=1, high=2, unit="word")


def test_regex_is_searched_and_a_broken_one_is_refused_with_its_place():
    assert column(get_reward("regex", pattern=r"(?i)\banswer: \d+$"), texts("The Answer: 42", "answer: x")) == [
        1.0,
        0.0,
    ]
    with pytest.raises(ConfigError, match=r"position 3\): missing \)"):
        get_reward("regex", pattern="abc(d")
    with pytest.raises(ConfigError, match="needs pattern"):
        get_reward("regex")
    with pytest.raises(ConfigError, match="is text"):
        get_reward("regex", pattern=7)


def test_exact_match_compares_with_the_metadata_and_is_missing_without_it():
    rows = [{"answer": "42"}, {"answer": 42}, {"answer": " 43 "}, {}, {"answer": None}]
    scores = get_reward("exact_match").score(texts("42\n", "42", "42", "42", "42", metadata=rows))
    assert scores.values[:3, 0].tolist() == [1.0, 1.0, 0.0] and scores.valid[:, 0].tolist() == [True] * 3 + [False] * 2
    assert "no 'answer'" in scores.errors[3] and scores.errors[0] == ""
    assert column(get_reward("exact_match", field="gold"), texts("a", metadata=[{"gold": "a"}])) == [1.0]
    assert column(get_reward("exact_match"), texts("a")) == [None]


def test_rules_read_what_the_model_said_of_a_chat():
    chat = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    longer = [
        *chat,
        {"role": "user", "content": "4!"},
        {"role": "assistant", "content": [{"type": "text", "text": "24"}]},
    ]
    broken = [{"role": "robot", "content": "4"}]
    reward = get_reward("exact_match", field="a")
    scores = reward.score(
        texts(chat, longer, chat[1:], broken, metadata=[{"a": "4"}, {"a": "24"}, {"a": "4"}, {"a": "4"}])
    )
    assert (
        scores.values[:3, 0].tolist() == [1.0, 1.0, 1.0]
        and "Turn 0" in scores.errors[3]
        and "'robot'" in scores.errors[3]
    )


def test_prompt_and_completion_of_a_chat():
    answer = [{"role": "assistant", "content": "a"}]
    assert as_turns("q", "a") == [{"role": "user", "content": "q"}, *answer] == as_turns("q", answer)
    whole = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, *answer]
    assert as_turns("ignored", whole) == whole
    assert split_turns(whole) == (whole[:2], answer)
    assert completion_text([*whole, {"role": "tool", "content": "t"}, {"role": "assistant", "content": "b"}]) == "a\nb"
    for bad in ([], [{"role": "user"}], ["text"]):
        with pytest.raises(DataError):
            as_turns("q", bad)


def test_rules_are_quick_on_big_batches():
    """20,000 texts, or 256 images, take far less than this on one core."""
    many = texts(*["the answer: 42 and some more words"] * 20_000, metadata=[{"answer": "42"}] * 20_000)
    rules = [
        get_reward("length", low=1, high=9, unit="words"),
        get_reward("regex", pattern="42"),
        get_reward("exact_match"),
    ]
    began = time.process_time()
    for rule in rules:
        assert rule.score(many).valid.all()
    assert time.process_time() - began < 2.0
    images = Samples(prompts=[""] * 256, images=torch.rand(256, 3, 64, 64))
    began = time.process_time()
    assert get_reward("jpeg").score(images).valid.all()
    assert time.process_time() - began < 4.0


def test_identities_tell_arguments_apart():
    made = [
        get_reward("jpeg"), get_reward("jpeg", scale=2.0), get_reward("jpeg", direction="incompressible"),
        get_reward("length", low=1, high=2), get_reward("length", low=1, high=2, unit="words"),
        get_reward("regex", pattern="a"), get_reward("regex", pattern="b"), get_reward("exact_match"),
        get_reward("exact_match", field="b"), get_reward("thumbs"), get_reward("thumbs", field="b"),
    ]  # fmt: skip
    assert len({reward.identity() for reward in made}) == len(made)
    assert get_reward("length", low=1, high=2).identity() == get_reward("length", low=1.0, high=2.0).identity()


# --- thumbs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "value"),
    [
        (True, 1), (1, 1), (1.0, 1), ("up", 1), ("UP ", 1), ("+1", 1), ("1", 1), ("true", 1), (np.int64(1), 1), (np.bool_(True), 1),
        (False, 0), (0, 0), (-1, 0), ("down", 0), ("-1", 0), ("0", 0), ("False", 0), (-1.0, 0),
        (None, None), ("", None), (float("nan"), None), (2, None), ("maybe", None), (0.5, None), ([1], None), ("1.0x", None),
    ],
)  # fmt: skip
def test_thumbs(label, value):
    assert column(get_reward("thumbs"), texts("a", metadata=[{"label": label}])) == [value]


def test_a_thumb_that_is_none_says_so_and_one_that_is_wrong_says_what_it_is():
    scores = get_reward("thumbs").score(texts("a", "b", "c", metadata=[{}, {"label": "perhaps"}, {"label": 1}]))
    assert scores.errors == (
        "thumbs: the sample has no 'label'",
        "thumbs: 'label' is 'perhaps', neither up nor down",
        "",
    )
    images = Samples(prompts=["x"], images=torch.zeros(1, 3, 2, 2), metadata=[{"liked": "down"}])
    assert column(get_reward("thumbs", field="liked"), images) == [0.0]
    assert column(get_reward("thumbs"), texts("a")) == [None]


# --- thresholds -------------------------------------------------------------------------------------


def test_a_threshold_cuts_strictly_above_and_keeps_what_is_missing():
    inner = {"reward": "length", "args": {"low": 2, "high": 4}}
    reward = get_reward("threshold", at=-0.5, **inner)
    samples = texts("abc", "abcde", "abcdef", [{"role": "robot", "content": ""}])
    scores = score_safely(reward, samples)
    assert reward.names == ("length_above_-0.5",)
    assert column(reward, samples) == [1.0, 0.0, 0.0, None] and scores.extras["raw/length"][:3].tolist() == [
        0.0,
        -0.5,
        -1.0,
    ]
    assert reward.identity() != get_reward("threshold", at=-0.6, **inner).identity()


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_the_quantile_of_a_reference_set_is_found_recorded_and_part_of_the_identity(tmp_path, suffix):
    inner = {"reward": "length", "args": {"low": 2, "high": 4}}
    version = get_reward("length", **inner["args"]).identity()
    values = [-3.0, -1.0, None, 0.0, -2.0]
    rows = [
        {"prompt": "p", "completion": "c", "length": v, "valid": v is not None, "error": None, "identity": version}
        for v in values
    ]
    path = tmp_path / f"reference{suffix}"
    write_scores(path, rows)
    # -3, -2, -1, 0: half of them are at or below -2, three quarters at or below -1.
    for quantile, at in ((0.5, -2.0), (0.51, -1.0), (0.75, -1.0), (0.9, 0.0)):
        reward = get_reward("threshold", quantile=quantile, reference=path, **inner)
        assert reward.at == at and reward.names == (f"length_above_{at:g}",)
    assert "above the 0.9 quantile of its reference set: length 0" in reward.card.definition
    assert reward.identity() == get_reward("threshold", at=0.0, **inner).identity()
    rows[0]["length"], rows[1]["length"] = 5.0, 5.0
    write_scores(path, rows)
    assert get_reward("threshold", quantile=0.9, reference=path, **inner).identity() != reward.identity()


def test_a_reference_of_another_reward_is_refused(tmp_path):
    inner = {"reward": "length", "args": {"low": 2, "high": 4}}
    row = {"prompt": "p", "completion": "c", "length": 1.0, "valid": True, "error": None, "identity": "0" * 16}
    write_scores(tmp_path / "r.jsonl", [row])
    with pytest.raises(DataError, match="another version of this one.*its identity is 0000"):
        get_reward("threshold", quantile=0.5, reference=tmp_path / "r.jsonl", **inner)
    write_scores(tmp_path / "r.jsonl", [{**row, "identity": None, "length": None}])
    with pytest.raises(DataError, match="no score of 'length'"):
        get_reward("threshold", quantile=0.5, reference=tmp_path / "r.jsonl", **inner)
    with pytest.raises(DataError, match="no such table"):
        get_reward("threshold", quantile=0.5, reference=tmp_path / "none.jsonl", **inner)
    (tmp_path / "r.jsonl").write_text('{"length": "high"}\n')
    with pytest.raises(DataError, match="row 1, column length.*'high'"):
        get_reward("threshold", quantile=0.5, reference=tmp_path / "r.jsonl", **inner)


@pytest.mark.parametrize(
    "wrong",
    [{}, {"at": 1.0, "quantile": 0.5}, {"quantile": 0.5}, {"at": 1.0, "reference": "r.jsonl"}, {"quantile": 0.5, "reference": "r", "at": 0}],
)  # fmt: skip
def test_a_threshold_is_one_thing(wrong):
    with pytest.raises(ConfigError, match="a number, or at a quantile"):
        get_reward("threshold", reward="length", args={"low": 1, "high": 2}, **wrong)


def test_thresholds_and_quantiles_are_numbers_of_their_kind(tmp_path):
    inner = {"reward": "length", "args": {"low": 1, "high": 2}}
    for at in ("high", float("nan"), True):
        with pytest.raises(ConfigError, match="finite number"):
            get_reward("threshold", at=at, **inner)
    with pytest.raises(ConfigError, match="strictly between 0 and 1"):
        get_reward("threshold", quantile=1.0, reference="r.jsonl", **inner)
