"""Rewards as TRL reward functions and back, with TRL's own trainers on a tiny model."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest

from align.config import RewardConfig
from align.errors import ConfigError
from align.types import Samples, Scores
from rewards import get_reward
from rewards.adapters import as_trl_reward_func, from_trl_reward_func
from rewards.base import RewardCard, score_safely
from rewards.panel import Panel

PANEL = [
    RewardConfig(name="exact_match", weight=2.0, args={"field": "gold"}),
    RewardConfig(name="length", weight=0.5, args={"low": 1, "high": 3}),
]


class Two:
    """Letters and vowels; an empty completion has no vowels' share."""

    names = ("letters", "vowels")
    card = RewardCard("two", "letters, share of vowels", "0 upwards", "text", names)

    def identity(self):
        return "2"

    def score(self, samples: Samples) -> Scores:
        values = np.array([[len(t), sum(c in "aeiou" for c in t) / len(t) if t else np.nan] for t in samples.texts])
        return Scores(values, np.isfinite(values), self.names)


# --- to TRL -----------------------------------------------------------------------------------------


def test_columns_become_metadata_and_what_is_missing_is_none():
    function = as_trl_reward_func(get_reward("exact_match", field="gold"))
    assert function.__name__ == "exact_match"
    found = function(
        prompts=["p"] * 3, completions=["4", "5", "6"], completion_ids=[[1], [2], [3]],
        gold=["4", "4", None], trainer_state=None,
    )  # fmt: skip
    assert found == [1.0, 0.0, None] and all(v is None or type(v) is float for v in found)


def test_a_panel_is_one_function_of_its_weighted_sum():
    function = as_trl_reward_func(Panel.build(PANEL))
    assert function.__name__ == "exact_match+length"
    found = function(prompts=["p"] * 3, completions=["4", "55555", "4"], gold=["4", "4", None])
    assert found == [2.0, 0.5 * -1.0, None]


def test_several_components_need_weights():
    with pytest.raises(ConfigError, match=r"several components: letters, vowels.*Give weights"):
        as_trl_reward_func(Two())
    with pytest.raises(ConfigError, match="Did you mean 'vowels'"):
        as_trl_reward_func(Two(), {"vowel": 1.0})
    with pytest.raises(ConfigError, match="weights of its own"):
        as_trl_reward_func(Panel.build(PANEL), {"length": 1.0})
    asked = {"prompts": ["p", "p"], "completions": ["abba", ""]}
    assert as_trl_reward_func(Two(), {"letters": 0.25, "vowels": 2.0})(**asked) == [2.0, None]
    # What counts nothing may be missing.
    assert as_trl_reward_func(Two(), {"letters": 0.25}, name="mine")(**asked) == [1.0, 0.0]
    assert as_trl_reward_func(Two(), {"letters": 1.0}, name="mine").__name__ == "mine"


def test_chats_are_whole_conversations():
    seen = []

    class Spy(Two):
        def score(self, samples):
            seen.append(samples)
            return Scores(np.zeros((len(samples), 2)), np.ones((len(samples), 2), bool), self.names)

    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    answer = [{"role": "assistant", "content": "a"}]
    function = as_trl_reward_func(Spy(), {"letters": 1.0})
    function(prompts=[prompt, "q"], completions=[answer, answer], completion_ids=[[1], [2]], label=[3, 4])
    assert list(seen[0].metadata) == [{"label": 3}, {"label": 4}]
    assert list(seen[0].texts) == [[*prompt, *answer], answer] and list(seen[0].prompts) == ["q", "q"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "q"}]}]
    function(prompts=[parts], completions=["a"])
    assert seen[1].texts[0] == [{"role": "user", "content": "q"}, *answer]
    exact = as_trl_reward_func(get_reward("exact_match"))
    assert exact(prompts=[prompt], completions=[answer], answer=["a"]) == [1.0]


def test_the_share_of_missing_scores_is_logged():
    logged = {}
    as_trl_reward_func(Two(), {"letters": 1.0, "vowels": 1.0})(
        prompts=["p"] * 4, completions=["ab", "", "", "aa"], log_metric=lambda k, v: logged.__setitem__(k, v)
    )
    assert logged == {"rewards/two/missing": 0.5, "rewards/two/letters": 1.0, "rewards/two/vowels": 0.75}


def test_a_defect_is_not_hidden():
    class Broken(Two):
        def score(self, samples):
            raise AttributeError("a defect")

    with pytest.raises(AttributeError):
        as_trl_reward_func(Broken(), {"letters": 1.0})(prompts=["p"], completions=["a"])


# --- from TRL ---------------------------------------------------------------------------------------


def by_gold(prompts, completions, gold, **kwargs):
    """How near the length is to the gold one."""
    kwargs["log_extra"]("seen", list(gold))
    kwargs["log_metric"]("gold", 1.0)
    return [None if g is None else -abs(len(c) - g) for c, g in zip(completions, gold, strict=True)]


async def later(completions, **kwargs):
    await asyncio.sleep(0.001)
    return [float(len(c)) if c else None for c in completions]


class Callable:
    async def __call__(self, prompts, completions):
        return [1.0] * len(prompts)


SAMPLES = Samples(prompts=["p"] * 3, texts=["ab", "abc", "a"], metadata=[{"gold": 2}, {"gold": 5}, {}])


def test_a_trl_function_is_a_reward():
    reward = from_trl_reward_func(by_gold, "nearness")
    scores = reward.score(SAMPLES)
    assert scores.names == ("nearness",) and reward.card.definition == "How near the length is to the gold one."
    assert scores.values[:2, 0].tolist() == [0.0, -2.0] and scores.valid[:, 0].tolist() == [True, True, False]
    assert "no number" in scores.errors[2] and scores.extras["seen"] == [2, 5, None]
    assert reward.identity() == from_trl_reward_func(by_gold, "nearness").identity()
    assert reward.identity() != from_trl_reward_func(later, "nearness").identity()


def test_an_async_function_is_awaited_even_inside_a_running_loop():
    reward = from_trl_reward_func(later, "length")
    samples = Samples(prompts=["p"] * 2, texts=["abc", ""])
    assert reward.score(samples).values[0, 0] == 3.0 and not reward.score(samples).valid[1, 0]

    async def in_a_notebook():
        return reward.score(samples).values[0, 0]

    assert asyncio.run(in_a_notebook()) == 3.0
    assert from_trl_reward_func(Callable(), "one").score(samples).values[:, 0].tolist() == [1.0, 1.0]


def test_chats_are_handed_over_as_trl_does():
    seen = {}

    def spy(prompts, completions, **kwargs):
        seen.update(prompts=prompts, completions=completions)
        return [1.0] * len(prompts)

    answer = [{"role": "assistant", "content": "a"}]
    whole = [{"role": "user", "content": "q"}, *answer]
    from_trl_reward_func(spy, "spy").score(Samples(prompts=["q", "q"], texts=[whole, "a"]))
    assert seen == {"prompts": [whole[:1]] * 2, "completions": [answer] * 2}


def test_what_is_no_reward_function_is_refused():
    with pytest.raises(ConfigError, match="is callable.*text/reward_model"):
        from_trl_reward_func("some/model", "x")
    with pytest.raises(ConfigError, match="needs token ids"):
        from_trl_reward_func(lambda completion_ids, **kwargs: [], "x")


def test_one_bad_sample_of_a_trl_function_never_spoils_its_batch():
    def picky(completions, **kwargs):
        return [1 / 1 if float(c) else 0.0 for c in completions]

    scores = score_safely(from_trl_reward_func(picky, "picky"), Samples(prompts=["p"] * 3, texts=["1", "x", "2"]))
    assert scores.valid[:, 0].tolist() == [True, False, True] and "could not convert" in scores.errors[1]


def test_there_and_back_again():
    reward = get_reward("length", low=1, high=3)
    again = from_trl_reward_func(as_trl_reward_func(reward), "again")
    assert np.array_equal(again.score(SAMPLES).values, reward.score(SAMPLES).values)
    assert not math.isnan(again.score(SAMPLES).values.sum())


# --- with TRL ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    import torch
    import transformers as tf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = tf.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.model_input_names = ["input_ids", "attention_mask"]
    made.chat_template = (
        "{% for t in messages %}{{ t['role'] }}: {{ t['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    made.save_pretrained(folder)
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "conversational"), [("GRPO", False), ("GRPO", True), ("RLOO", False)])
def test_trls_trainers_train_on_our_rewards(tiny_model, tmp_path, kind, conversational):
    """Two steps: TRL logs our function under its name, with the mean our reward gives to what was sampled."""
    import trl
    from datasets import Dataset

    calls = []
    panel = Panel.build([
        RewardConfig(name="regex", weight=2.0, args={"pattern": "[aeiou]"}),
        RewardConfig(name="length", args={"low": 1, "high": 9}),
    ])  # fmt: skip
    inner = as_trl_reward_func(panel, name="ours")

    def ours(**asked):
        found = inner(**asked)
        calls.append((asked["completions"], asked["label"], found))
        return found

    prompts = [f"count to {i}" for i in range(8)]
    rows = [[{"role": "user", "content": p}] for p in prompts] if conversational else prompts
    dataset = Dataset.from_dict({"prompt": rows, "label": list(range(8))})
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=2, per_device_train_batch_size=4,
        num_generations=4, max_completion_length=8, logging_steps=1, save_strategy="no", bf16=False, seed=0,
        disable_tqdm=True, beta=0.0,
    )  # fmt: skip
    trainer = getattr(trl, f"{kind}Trainer")(
        model=str(tiny_model), reward_funcs=[ours, as_trl_reward_func(get_reward("length", low=1, high=9))],
        args=config, train_dataset=dataset,
    )  # fmt: skip
    trainer.train()
    logs = [row for row in trainer.state.log_history if "rewards/ours/mean" in row]
    assert len(logs) == 2 and len(calls) == 2
    for row, (completions, labels, found) in zip(logs, calls, strict=True):
        assert row["rewards/ours/mean"] == pytest.approx(np.mean(found), abs=1e-5)
        assert row["rewards/ours/missing"] == 0.0 and "rewards/length/mean" in row
        assert len(set(labels)) == 1 and len(found) == 4
        texts = [c[0]["content"] if conversational else c for c in completions]
        assert found == [2.0 * any(v in t for v in "aeiou") + min(0, len(t) - 1, 9 - len(t)) / 8 for t in texts]
