"""Tokens that do not depend on the machine, and the plan of an epoch: mixed, length-grouped, paired off."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.errors import DataError
from align.preferences import load_preferences
from trainers.language_model import load_tokenizer
from trainers.preference_data import CHUNK, Tokens, collate, plan_epoch, tokenise
from trainers.tiny_language import WORDS, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(path)
    (path / "config.json").write_text('{"model_type": "qwen2"}')
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(str(folder))


class Reload:
    def __init__(self, path: Path):
        self.path = str(path)

    def __call__(self):
        return load_tokenizer(self.path)


def thumbs(count, up=0.5, seed=0):
    draw = np.random.default_rng(seed)
    return load_preferences([
        {"prompt": f"Say: {' '.join(draw.choice(WORDS, 1 + i % 4))} {i}", "completion": " ".join(draw.choice(WORDS, 1 + int(draw.integers(9)))),
         "label": i < up * count} for i in range(count)
    ])  # fmt: skip


def test_text_ends_in_an_end_token_and_does_not_depend_on_its_prompt(tokenizer):
    rows = load_preferences(
        [{"prompt": p, "completion": " red dog", "label": True} for p in ("Say: red", "Say: re", "")]
    )
    found = tokenise(rows, tokenizer, max_length=64)
    assert all(torch.equal(torch.tensor(c), torch.tensor(found.completions[0])) for c in found.completions[1:])
    assert found.completions[0][-1] == tokenizer.eos_token_id
    assert (
        tokenizer.decode(found.completions[0][:-1]) == " red dog" and tokenizer.decode(found.prompts[0]) == "Say: red"
    )
    assert found.prompts[2].tolist() == [tokenizer.eos_token_id]  # something to predict the first token from


def test_chats_follow_the_template(tokenizer):
    user, answer = {"role": "user", "content": "red?"}, {"role": "assistant", "content": "red"}
    rows = load_preferences([{"prompt": [user, answer, user], "completion": [answer], "label": True}])
    found = tokenise(rows, tokenizer, max_length=256)
    whole = tokenizer.apply_chat_template([user, answer, user, answer], tokenize=False)
    assert tokenizer.decode(found.prompts[0]) + tokenizer.decode(found.completions[0]) == whole
    assert tokenizer.decode(found.completions[0]) == "red<|im_end|>\n"


def test_tools_and_template_arguments_reach_the_template(tokenizer):
    tokenizer.chat_template = "{{ tools | length }}{{ mood }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    row = {
        "prompt": [{"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
        "label": True,
    }
    row |= {"tools": '[{"name": "f"}, {"name": "g"}]', "chat_template_kwargs": {"mood": "!"}}
    try:
        found = tokenise(load_preferences([row]), tokenizer, max_length=64)
    finally:
        from trainers.tiny_language import TEMPLATE

        tokenizer.chat_template = TEMPLATE
    assert tokenizer.decode(found.prompts[0]) == "2!a" and tokenizer.decode(found.completions[0]) == "b"


def test_a_template_that_refuses_names_the_row(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    row = {
        "prompt": [{"role": "system", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
        "label": True,
    }
    try:
        with pytest.raises(DataError, match="item 0.*no system turn"):
            tokenise(load_preferences([row]), tokenizer, max_length=64)
    finally:
        from trainers.tiny_language import TEMPLATE

        tokenizer.chat_template = TEMPLATE


def test_rows_without_a_completion_are_dropped_and_counted_with_the_other_of_their_pair(tokenizer):
    rows = load_preferences([
        {"prompt": "Say: dog", "chosen": " dog", "rejected": " cat"},
        {"prompt": "Say: dog " * 40, "chosen": " dog", "rejected": " cat"},
        {"prompt": "Say: red", "completion": "", "label": False},
        {"prompt": "Say: dog", "completion": " dog" * 40, "label": False},
    ])  # fmt: skip
    found = tokenise(rows, tokenizer, max_length=24)
    assert len(found) == 3 and max(found.length) == 24
    assert found.dropped == {"no completion left, up": 1, "no completion left, down": 1, "empty completion, down": 1}
    assert found.truncated == {"up": 0.0, "down": 0.5}
    kept = tokenise(rows, tokenizer, max_length=24, max_prompt_length=8)
    assert len(kept) == 5 and len(kept.prompts[2]) == 8  # the end of the prompt
    with pytest.raises(DataError, match="No row is left.*Raise data.max_length"):
        tokenise(load_preferences([{"prompt": "red " * 9, "completion": "a", "label": True}]), tokenizer, max_length=2)


def test_half_a_pair_goes_with_the_other_half(tokenizer):
    rows = load_preferences([{"prompt": "Say: red", "chosen": " red", "rejected": " x"}])
    broken = tuple(r if r.label else r.__class__(r.prompt, "", False, pair=r.pair) for r in rows.rows)
    with pytest.raises(DataError, match="other of a dropped pair: 1"):
        tokenise(rows.__class__(broken, "x"), tokenizer, max_length=24)


def test_tokens_are_the_same_for_any_number_of_workers(tokenizer, folder):
    rows = thumbs(CHUNK * 3 + 17)
    alone = tokenise(rows, tokenizer, max_length=32)
    shared = tokenise(rows, tokenizer, max_length=32, workers=2, reload=Reload(folder))
    for a, b in zip((*alone.prompts, *alone.completions), (*shared.prompts, *shared.completions), strict=True):
        assert np.array_equal(a, b)
    plans = [plan_epoch(t, microbatch=8, batch_size=16, seed=0, epoch=1) for t in (alone, shared)]
    assert np.array_equal(plans[0].rows, plans[1].rows) and np.array_equal(plans[0].partners, plans[1].partners)


def made(labels, lengths=None, prompts=None) -> Tokens:
    count = len(labels)
    lengths = lengths if lengths is not None else [4] * count
    return Tokens(
        [np.zeros(1, np.int64)] * count, [np.zeros(n - 1, np.int64) for n in lengths], np.array(labels, float),
        np.full(count, -1), np.ones(count), np.arange(count) if prompts is None else np.array(prompts),
        [f"row {i}" for i in range(count)], {}, {}, 1 << 20,
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    up=st.integers(1, 60), down=st.integers(1, 60), size=st.sampled_from([2, 4, 8]), accumulation=st.integers(1, 3),
    epoch=st.integers(0, 2),
)  # fmt: skip
def test_every_plan_mixes_classes_and_uses_each_row_once(up, down, size, accumulation, epoch):
    if up + down < size * accumulation:
        return
    tokens = made([1] * up + [0] * down)  # sorted by label, as concatenated files are
    plan = plan_epoch(tokens, microbatch=size, batch_size=size * accumulation, seed=1, epoch=epoch)
    used = plan.rows.flatten().tolist()
    assert len(set(used)) == len(used) == up + down - plan.left_out and plan.left_out < size * accumulation
    ups = tokens.desirable[plan.rows].sum(1)
    assert ups.max() - ups.min() <= 1  # an even share everywhere
    if min(up, down) >= len(plan.rows) + size * accumulation:
        assert plan.single_class == 0
    assert all(sorted(a) == sorted(b) for a, b in zip(plan.rows.tolist(), plan.partners.tolist(), strict=True))
    assert plan.same_prompt == 0


def test_epochs_differ_and_are_functions_of_the_seed():
    tokens = made([1, 0] * 40)
    plans = [
        plan_epoch(tokens, microbatch=8, batch_size=8, seed=s, epoch=e) for s, e in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    assert np.array_equal(plans[0].rows, plans[1].rows)
    assert not np.array_equal(plans[0].rows, plans[2].rows) and not np.array_equal(plans[0].rows, plans[3].rows)


def test_a_fixed_plan_reorders_microbatches_and_nothing_else():
    tokens = made([1, 0] * 40)
    plans = [plan_epoch(tokens, microbatch=8, batch_size=16, seed=0, epoch=e, fixed=True) for e in (0, 1)]
    sets = [
        {(tuple(r), tuple(p)) for r, p in zip(plan.rows.tolist(), plan.partners.tolist(), strict=True)}
        for plan in plans
    ]
    assert sets[0] == sets[1] and not np.array_equal(plans[0].rows, plans[1].rows)


def test_rows_of_like_length_stand_together():
    draw = np.random.default_rng(0)
    lengths = draw.integers(2, 200, 1024)
    tokens = made([1, 0] * 512, lengths)
    plan = plan_epoch(tokens, microbatch=8, batch_size=8, seed=0, epoch=0)
    real = lengths[plan.rows].sum() / (lengths[plan.rows].max(1) * 8).sum()
    shuffled = lengths[draw.permutation(1024)].reshape(-1, 8)
    assert real > 0.9 > 0.6 > shuffled.sum() / (shuffled.max(1) * 8).sum()


@pytest.mark.parametrize(
    ("prompts", "met"),
    [([0] * 4 + [1, 2, 3, 4], 0), ([0] * 5 + [1, 2, 3], 2), ([0, 0, 1, 1, 2, 2, 3, 3], 0), ([0] * 8, 8)],
)
def test_partners_avoid_their_own_prompt_as_far_as_can_be(prompts, met):
    """A prompt with m of G rows meets itself max(0, 2 m - G) times at the least."""
    plan = plan_epoch(made([1, 0] * 4, prompts=prompts), microbatch=8, batch_size=8, seed=0, epoch=0)
    assert plan.same_prompt == met


def test_a_microbatch_of_one_takes_its_partner_from_another():
    plan = plan_epoch(made([1, 0] * 8), microbatch=1, batch_size=4, seed=0, epoch=0)
    assert plan.rows.shape == (16, 1) and (plan.rows != plan.partners).all()
    assert sorted(plan.rows.flatten()) == sorted(plan.partners.flatten())


def test_oversampling_repeats_the_smaller_class_evenly():
    tokens = made([1] * 30 + [0] * 8)
    plan = plan_epoch(tokens, microbatch=4, batch_size=4, seed=0, epoch=0, oversample=True)
    times = Counter(plan.rows.flatten().tolist())
    assert (tokens.desirable[plan.rows].sum(1) == 2).all()
    assert all(times[i] == 1 for i in range(30)) and {times[i] for i in range(30, 38)} == {3, 4}


def test_too_few_rows_for_an_update_are_refused():
    with pytest.raises(DataError, match="6 rows, batch_size 8"):
        plan_epoch(made([1, 0] * 3), microbatch=4, batch_size=8, seed=0, epoch=0)


def test_collate_marks_completions_and_pads_on_the_right():
    batch = collate([(np.array([5, 6]), np.array([7])), (np.array([1]), np.array([2, 3, 4]))], pad=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9], [1, 2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100], [-100, 2, 3, 4]]


def test_a_mismatched_pair_is_cut_to_the_longest_sequence():
    tokens = made([1, 0], [5, 9])
    cut = Tokens(**{**tokens.__dict__, "longest": 6})
    assert [len(part) for part in cut.sequence(0, 1)] == [1, 5]
    assert cut.digest(0, 1) != tokens.digest(0, 1) and cut.digest(0, 0) == tokens.digest(0, 0)
