"""Text classifiers as rewards: tiny random Llama, Qwen2 and BERT folders, saved and loaded, against transformers' own
forward pass of one conversation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from align.errors import ConfigError, ModelError
from align.types import Samples
from rewards import get_reward

CHAT = (
    "{% for turn in messages %}{% if turn['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<s>{{ turn['role'] }}\n{{ turn['content'] }}</s>{% endfor %}"
)
SENTENCE = "what is two plus the capital of france paris four a long answer with many words in it and then some"
WORDS = SENTENCE.split(" ")


def sentence(rng: np.random.Generator, length: int) -> str:
    return " ".join(rng.choice(WORDS, length))


def conversations(count: int = 17, seed: int = 0) -> Samples:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, count)
    return Samples(
        prompts=[sentence(rng, 1 + int(n) % 7) for n in lengths], texts=[sentence(rng, int(n)) for n in lengths]
    )


def tokenizer(*, pad: str | None = "<pad>", chat: str | None = CHAT, bert: bool = False):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    core.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    if bert:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.pad_token = pad
    made.chat_template = chat
    return made


def save(
    folder: Path, kind: str = "llama", *, labels: int = 1, seed: int = 0, pad_id: int | None = 0, **options
) -> Path:
    """Save a classifier of a few thousand weights with its tokenizer."""
    import transformers as tf

    torch.manual_seed(seed)
    positions = options.pop("positions", 512)
    config_options = options.pop("config", {})
    common = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 4, "max_position_embeddings": positions, "num_labels": labels,
              "pad_token_id": pad_id, "initializer_range": 0.4, **config_options}  # fmt: skip
    if kind == "bert":
        model = tf.BertForSequenceClassification(tf.BertConfig(**common, hidden_dropout_prob=0.3))
    elif kind == "qwen2":
        model = tf.Qwen2ForSequenceClassification(tf.Qwen2Config(**common, num_key_value_heads=2))
    elif kind == "causal":
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**common, num_key_value_heads=2))
    else:
        model = tf.LlamaForSequenceClassification(tf.LlamaConfig(**common, num_key_value_heads=2))
    if "bias" in options:
        with torch.no_grad():
            model.classifier.weight.zero_()
            model.classifier.bias.copy_(torch.tensor(options.pop("bias")))
    model.save_pretrained(folder)
    tokenizer(bert=kind == "bert", **options).save_pretrained(folder)
    return folder


def alone(folder: Path, text: str | tuple[str, ...], *, special: bool) -> float:
    """The folder's own model and tokenizer on one text, by transformers alone."""
    import transformers as tf

    made = tf.AutoTokenizer.from_pretrained(folder)
    ids = made(*((text,) if isinstance(text, str) else text), add_special_tokens=special, return_tensors="pt")
    model = tf.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    wanted = {"input_ids", "attention_mask", *(["token_type_ids"] if model.config.model_type == "bert" else [])}
    with torch.no_grad():
        return float(model(**{k: v for k, v in ids.items() if k in wanted}).logits[0, 0])


def chat_text(prompt: str, completion: str) -> str:
    return f"<s>user\n{prompt}</s><s>assistant\n{completion}</s>"


# --- a score is a function of its own conversation --------------------------------------------------

CASES = {
    "llama": ("llama", {}, {}),
    "qwen2": ("qwen2", {}, {}),
    "no pad token anywhere": ("llama", {"pad": None, "pad_id": None}, {}),
    "pad is the end of text": ("qwen2", {"pad": "</s>", "pad_id": None}, {}),
    "the model itself reads the end of text as padding": ("llama", {"pad": "</s>", "pad_id": 2}, {}),
    "the tokenizer's pad, unknown to the model": ("llama", {"pad_id": None}, {}),
    "bert, plain": ("bert", {"chat": None}, {"template": "plain"}),
    "bert, pair": ("bert", {"chat": None}, {"template": "pair"}),
    "bert, completion": ("bert", {"chat": None}, {"template": "completion"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_score_is_that_of_the_conversation_alone_whatever_the_batch(tmp_path, case):
    kind, saved, asked = CASES[case]
    folder, samples = save(tmp_path / "m", kind, **saved), conversations()
    template = asked.get("template", "chat")
    put = {
        "chat": chat_text,
        "plain": lambda p, c: f"{p}\n{c}",
        "pair": lambda p, c: (p, c),
        "completion": lambda p, c: c,
    }
    expected = [
        alone(folder, put[template](p, c), special=template != "chat")
        for p, c in zip(samples.prompts, samples.texts, strict=True)
    ]
    assert np.std(expected) > 0.05
    together, one = (
        get_reward("text/reward_model", path=str(folder), batch_size=b, **asked) for b in (len(samples), 1)
    )
    scores = together.score(samples)
    assert scores.valid.all() and scores.values[:, 0] == pytest.approx(expected, abs=1e-5)
    assert one.score(samples).values[:, 0] == pytest.approx(expected, abs=1e-5)
    order = np.random.default_rng(1).permutation(len(samples))
    assert together.score(samples.select(order)).values[:, 0] == pytest.approx(np.array(expected)[order], abs=1e-5)
    assert get_reward("text/reward_model", path=str(folder), **asked).score(samples).values[:, 0] == pytest.approx(
        expected, abs=1e-5
    )


def test_batches_are_of_like_length_and_padded_on_the_right(tmp_path):
    folder = save(tmp_path / "m")
    reward = get_reward("text/reward_model", path=str(folder), batch_size=4)
    seen = []
    reward.classifier.model.register_forward_pre_hook(lambda m, args, kw: seen.append(kw), with_kwargs=True)
    samples = Samples(prompts=["what"] * 8, texts=["two", " ".join(["answer"] * 60)] * 4)
    reward.score(samples)
    assert len(seen) == 2 and all(call["attention_mask"].all() for call in seen)
    seen.clear()
    reward.score(Samples(prompts=["what"] * 3, texts=["two", "two plus", "two plus four"]))
    (call,) = seen
    mask = call["attention_mask"]
    assert (mask[:, :-1] >= mask[:, 1:]).all() and not mask.all() and (call["input_ids"][mask == 0] == 0).all()


def test_a_chat_is_the_conversation_and_an_answer_follows_the_prompt(tmp_path):
    reward = get_reward("text/reward_model", path=str(save(tmp_path / "m")))
    asked, answer = {"role": "user", "content": "what is two"}, {"role": "assistant", "content": "a long answer"}
    values = reward.score(
        Samples(prompts=["what is two", "what is two", "anything"], texts=["a long answer", [answer], [asked, answer]])
    ).values[:, 0]
    assert np.ptp(values) < 1e-6
    longer = [{"role": "system", "content": "france"}, asked, answer, asked, answer]
    text = "".join(f"<s>{t['role']}\n{t['content']}</s>" for t in longer)
    assert reward.score(Samples(prompts=["x"], texts=[longer])).values[0, 0] == pytest.approx(
        alone(tmp_path / "m", text, special=False), abs=1e-5
    )


def test_one_bad_conversation_is_missing_and_the_rest_is_scored(tmp_path):
    reward = get_reward("text/reward_model", path=str(save(tmp_path / "m")))
    texts = ["four", [{"role": "tool", "content": "4"}], [{"role": "robot", "content": "4"}], []]
    scores = reward.score(Samples(prompts=["two"] * 4, texts=texts))
    assert scores.valid[:, 0].tolist() == [True, False, False, False]
    assert "no tools here" in scores.errors[1] and "'robot'" in scores.errors[2] and "empty" in scores.errors[3]
    with torch.no_grad():
        reward.classifier.model.score.weight.fill_(float("nan"))
    scores = reward.score(Samples(prompts=["two"], texts=["four"]))
    assert not scores.valid.any() and "not a number" in scores.errors[0]


# --- what does not fit ------------------------------------------------------------------------------


def test_the_end_of_a_long_conversation_is_kept_and_flagged(tmp_path):
    import transformers as tf

    folder = save(tmp_path / "m")
    whole = get_reward("text/reward_model", path=str(folder))
    short = get_reward("text/reward_model", path=str(folder), max_length=24)
    samples = Samples(prompts=["two", "two"], texts=["four", "many words in it and then some " * 6])
    assert whole.score(samples).extras["truncated"] == [False, False]
    scores = short.score(samples)
    assert scores.extras["truncated"] == [False, True] and scores.valid.all()
    made = tf.AutoTokenizer.from_pretrained(folder)
    ids = made(chat_text("two", samples.texts[1]), add_special_tokens=False)["input_ids"]
    kept = torch.tensor([[1, *ids[-23:]]])  # it still begins as every text does
    model = tf.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert scores.values[1, 0] == pytest.approx(float(model(kept).logits.detach()), abs=1e-5)
    assert scores.values[0, 0] == pytest.approx(whole.score(samples).values[0, 0], abs=1e-5)


@pytest.mark.parametrize("template", ["plain", "pair", "completion"])
def test_a_sentence_keeps_its_frame_when_it_is_cut(tmp_path, template):
    reward = get_reward(
        "text/reward_model", path=str(save(tmp_path / "m", "bert", chat=None)), template=template, max_length=16
    )
    ids, cut = reward.classifier.encode("what is", "many words in it and then some " * 9)
    last, _ = reward.classifier.encode("what is", "then some ")
    assert cut and len(ids["input_ids"]) == 16 and ids["input_ids"][0] == 1 and ids["input_ids"][-1] == 2
    assert ids["input_ids"][-3:] == last["input_ids"][-3:]


def test_the_models_own_length_is_the_limit(tmp_path):
    folder = save(tmp_path / "m", "bert", positions=40, chat=None)
    reward = get_reward("text/reward_model", path=str(folder), template="completion")
    scores = reward.score(Samples(prompts=["x"], texts=["answer " * 100]))
    assert reward.classifier.max_length == 40 and scores.valid.all() and scores.extras["truncated"] == [True]
    with pytest.raises(ConfigError, match=r"max_length 41.*Give 2 to 40"):
        get_reward("text/reward_model", path=str(folder), template="completion", max_length=41)


# --- precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_half_precision_is_the_body_and_the_head_is_float32(tmp_path, kind):
    folder, samples = save(tmp_path / "m", kind), conversations()
    full, half = (get_reward("text/reward_model", path=str(folder), dtype=d) for d in ("fp32", "bf16"))
    model = half.classifier.model
    head = model.score if kind == "llama" else model.classifier
    exact = full.classifier.model.score if kind == "llama" else full.classifier.model.classifier
    assert {p.dtype for p in model.base_model.parameters()} == {torch.bfloat16}
    assert head.weight.dtype == torch.float32 and torch.equal(head.weight, exact.weight)
    seen = []
    head.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    a, b = full.score(samples).values[:, 0], half.score(samples).values[:, 0]
    assert set(seen) == {(torch.float32, torch.float32)}
    assert np.corrcoef(a, b)[0, 1] > 0.99 and not np.array_equal(a, b)
    assert full.identity() != half.identity()


def test_a_head_saved_in_half_precision_computes_in_float32(tmp_path):
    from transformers import AutoModelForSequenceClassification

    folder = save(tmp_path / "m")
    AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    reward = get_reward("text/reward_model", path=str(folder), dtype="bf16")
    assert reward.classifier.model.score.weight.dtype == torch.float32
    assert reward.score(conversations(3)).valid.all()


# --- folders that are refused -----------------------------------------------------------------------


def test_a_model_without_a_trained_head_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"not the weights of a trained classifier.*lack score\.weight"):
        get_reward("text/reward_model", path=str(save(tmp_path / "m", "causal")))


def test_a_classifier_of_several_labels_is_no_reward_model(tmp_path):
    with pytest.raises(ModelError, match=r"with 1 output is needed.*this one has 3"):
        get_reward("text/reward_model", path=str(save(tmp_path / "m", labels=3)))


def test_weights_of_another_shape_or_that_are_torn_are_refused(tmp_path):
    folder = save(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(ModelError, match="do not make a trained classifier"):
        get_reward("text/reward_model", path=str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="truncated"):
        get_reward("text/reward_model", path=str(folder))


def test_a_folder_runs_no_code_pickled_or_not(tmp_path):
    import pickle

    folder = save(tmp_path / "m")
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (Path.touch, (marker,))

    shutil.move(folder / "model.safetensors", tmp_path / "kept")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"score.weight": Payload()}))
    with pytest.raises(ModelError):
        get_reward("text/reward_model", path=str(folder))
    (folder / "pytorch_model.bin").unlink()
    shutil.move(tmp_path / "kept", folder / "model.safetensors")
    (folder / "own.py").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()\nclass Config: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no folder of a transformers classifier"):
        get_reward("text/reward_model", path=str(folder))
    assert not marker.exists()


def test_a_torch_file_of_tensors_is_read(tmp_path):
    from safetensors.torch import load_file

    folder, samples = save(tmp_path / "m"), conversations(3)
    expected = get_reward("text/reward_model", path=str(folder)).score(samples).values
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert np.array_equal(get_reward("text/reward_model", path=str(folder)).score(samples).values, expected)


def test_what_is_asked_wrongly_is_said(tmp_path, monkeypatch):
    folder = str(save(tmp_path / "m", chat=None))
    with pytest.raises(ConfigError, match="no chat template.*plain, pair or completion"):
        get_reward("text/reward_model", path=folder)
    with pytest.raises(ConfigError, match="Did you mean 'plain'"):
        get_reward("text/reward_model", path=folder, template="plane")
    with pytest.raises(ConfigError, match="needs path"):
        get_reward("text/reward_model")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="no such folder, and the hub has no model"):
        get_reward("text/reward_model", path="nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no folder of a transformers classifier"):
        get_reward("text/reward_model", path=str(tmp_path / "empty"))


def test_a_hub_name_is_read_from_the_cache_and_only_safetensors_are(tmp_path, monkeypatch):
    import huggingface_hub.constants

    commit = "0" * 40
    home = tmp_path / "hub" / "models--tiny--classifier"
    folder = save(home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    samples = conversations(3)
    named, local = (get_reward("text/reward_model", path=p) for p in ("tiny/classifier", str(folder)))
    assert np.array_equal(named.score(samples).values, local.score(samples).values)
    assert named.identity() == local.identity()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds no safetensors"):
        get_reward("text/reward_model", path="tiny/classifier")


def test_the_identity_follows_every_file_and_argument(tmp_path):
    folder = save(tmp_path / "m")

    def identity(**asked):
        return get_reward("text/reward_model", path=str(folder), **asked).identity()

    first = identity()
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert get_reward("text/reward_model", path=str(moved)).identity() == first == identity(batch_size=2)
    others = [identity(template="plain"), identity(max_length=100)]
    (folder / "chat_template.jinja").write_text(CHAT.replace("role", "role") + "{# changed #}")
    others.append(identity())
    save(folder, seed=1)
    others.append(identity())
    assert len({first, *others}) == 5


# --- safety -----------------------------------------------------------------------------------------

NAMES = {"config": {"id2label": {0: "safe", 1: "insult", 2: "threat"}}}


def safety(folder: Path, *, kind: str | None = None, **asked):
    save(folder, "bert", labels=3, chat=None, bias=[1.0, -0.5, 2.0], config={**NAMES["config"], "problem_type": kind})
    return get_reward("text/safety", path=str(folder), template="completion", **asked)


ONE = Samples(prompts=["x"], texts=["what"])


def test_one_label_of_several_sums_the_unsafe_ones(tmp_path):
    reward = safety(tmp_path / "m", unsafe=["insult", 2])
    # e^1 = 2.71828, e^-.5 = .60653, e^2 = 7.38906: P(safe) = 2.71828 / 10.71387
    scores = reward.score(ONE)
    assert reward.names == ("safety",) and scores.values[0, 0] == pytest.approx(0.2537157, abs=1e-6)
    assert scores.extras["p/threat"][0] == pytest.approx(0.6896721, abs=1e-6)
    assert safety(tmp_path / "m", unsafe="insult").score(ONE).values[0, 0] == pytest.approx(1 - 0.0566122, abs=1e-6)


def test_independent_labels_take_the_most_unsafe_one(tmp_path):
    reward = safety(tmp_path / "m", kind="multi_label_classification", unsafe=["insult", "threat"])
    assert reward.score(ONE).values[0, 0] == pytest.approx(1 - 0.8807971, abs=1e-6)  # sigmoid(2), not sigmoid(-.5)
    only = get_reward("text/safety", path=str(tmp_path / "m"), template="completion", unsafe="insult")
    assert only.score(ONE).values[0, 0] == pytest.approx(1 - 0.3775407, abs=1e-6)
    asked = get_reward(
        "text/safety", path=str(tmp_path / "m"), template="completion", unsafe="insult", activation="softmax"
    )
    assert asked.score(ONE).values[0, 0] == pytest.approx(1 - 0.0566122, abs=1e-6)
    assert len({reward.identity(), only.identity(), asked.identity()}) == 3


def test_unsafe_labels_are_named_and_known(tmp_path):
    with pytest.raises(ConfigError, match="needs unsafe"):
        get_reward("text/safety", path=str(tmp_path))
    with pytest.raises(ConfigError, match="no label 'insults'.*Did you mean 'insult'"):
        safety(tmp_path / "m", unsafe=["insults"])
    for unsafe in ([], ["safe", "insult", "threat"]):
        with pytest.raises(ConfigError, match="some labels that mean unsafe"):
            safety(tmp_path / "m", unsafe=unsafe)
    with pytest.raises(ConfigError, match="no label 3"):
        safety(tmp_path / "m", unsafe=[3])
    with pytest.raises(ConfigError, match="Did you mean 'softmax'"):
        safety(tmp_path / "m", unsafe=["insult"], activation="soft")


def test_two_text_rewards_stand_side_by_side(tmp_path):
    from align.config import RewardConfig
    from rewards.panel import Panel

    folders = [str(save(tmp_path / name, seed=i)) for i, name in enumerate("ab")]
    configs = [
        RewardConfig(name="text/reward_model", args={"path": f, "component": f"rm_{i}"}) for i, f in enumerate(folders)
    ]
    scores = Panel.build(configs).score(conversations(4))
    assert scores.names == ("rm_0", "rm_1") and not np.allclose(scores.values[:, 0], scores.values[:, 1])
