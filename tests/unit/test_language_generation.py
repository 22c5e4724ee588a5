"""What a language model says by itself: transformers' own greedy answers, draws from its softmax, a run undisturbed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import stats

from align.config import load_config
from align.preferences import Completion, PreferenceSet
from trainers import trainer_for
from trainers.language_generation import Decoding, answer, choose_prompts, end_tokens, read_prompts
from trainers.language_measures import answer_metrics, one_class_share
from trainers.language_model import load_language_model, load_tokenizer
from trainers.tiny_language import build_tiny, toy_thumbs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model(folder):
    settings = load_config({"trainer": "kto", "model": {"path": str(folder), "train": "full"}, "data": {"path": "toy"}})
    return load_language_model(settings.model, seed=0)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(str(folder))


def rows(*prompts):
    return [Completion(prompt, " x", True) for prompt in prompts]


TEXTS = ("Say: red", "Say: blue cat dog fox owl\nAnswer:", "Say: tea milk\nAnswer:")


def test_greedy_answers_are_those_of_transformers_in_any_batch(folder, model, tokenizer):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder)
    expected = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        made = plain.generate(**ids, do_sample=False, max_new_tokens=9)
        expected.append(made[0, ids["input_ids"].shape[1] :].tolist())
    model.generation_config.repetition_penalty = 1.9  # a folder's own defaults are no part of what is measured
    for batch in (1, 2, 8):
        said = answer(model, read_prompts(rows(*TEXTS), tokenizer), tokenizer, Decoding(9, 0.0), batch=batch)
        assert [a.tokens.tolist() for a in said] == expected
    assert [a.ended for a in said] == [ids[-1] == tokenizer.eos_token_id for ids in expected]
    assert model.generation_config.repetition_penalty == 1.9


def test_answers_depend_on_seed_prompt_and_number_alone(model, tokenizer):
    prompts = read_prompts(rows(*TEXTS), tokenizer)
    state = torch.get_rng_state()
    whole = answer(model, prompts, tokenizer, Decoding(6, seed=3), count=3)
    alone = answer(model, prompts[1:2], tokenizer, Decoding(6, seed=3), count=2, batch=1)
    other = answer(model, prompts[1:2], tokenizer, Decoding(6, seed=4), count=2)
    assert [a.text for a in alone] == [a.text for a in whole[3:5]] and whole[3].text != whole[4].text
    assert [a.text for a in other] != [a.text for a in alone]
    assert torch.equal(torch.get_rng_state(), state) and "forward" in model.__dict__


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.25, 1.0), (1.0, 0.3)])
def test_draws_follow_the_softmax(model, tokenizer, temperature, top_p):
    """Pearson's chi-square of the first token of 3000 answers against what temperature and top-p make of the logits."""
    prompts, n = read_prompts(rows(TEXTS[1]), tokenizer), 3000
    said = answer(model, prompts, tokenizer, Decoding(1, temperature, top_p), count=n, batch=n)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(prompts[0].tokens)[None]).logits[0, -1].double()
    p = (logits / temperature).softmax(0).numpy()
    order = np.argsort(-p)
    inside = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1]
    kept = np.zeros_like(p)
    kept[inside] = p[inside] / p[inside].sum()
    seen = np.bincount([int(a.tokens[0]) for a in said], minlength=len(p)).astype(float)
    assert seen[kept == 0].sum() == 0
    often = kept * n >= 5
    expected = [*(kept[often] * n), kept[~often].sum() * n]
    found = [*seen[often], seen[~often].sum()]
    keep = np.array(expected) > 0
    assert stats.chisquare(np.array(found)[keep], np.array(expected)[keep], sum_check=False).pvalue > 1e-3


def test_a_chat_is_answered_through_its_template_and_ends_with_its_turn(model, tokenizer):
    asked = ({"role": "user", "content": "Say: red"},)
    chat = Completion(asked, ({"role": "assistant", "content": "red"},), True)
    spoken = Completion("Say: red", ({"role": "assistant", "content": "red"},), True)
    found = read_prompts([chat, spoken], tokenizer)
    assert found[0].tokens.tolist() == found[1].tokens.tolist() and found[1].given == asked
    text = tokenizer.decode(found[0].tokens)
    assert text == tokenizer.apply_chat_template(list(asked), add_generation_prompt=True, tokenize=False)
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert set(end_tokens(model, tokenizer)) == {tokenizer.eos_token_id, turn}
    with torch.no_grad():  # a model that can say nothing but the end of its turn
        model.lm_head.weight.zero_()
        model.lm_head.weight[turn] = 0
    found = answer(model, found[:1], tokenizer, Decoding(5, 0.0))[0]
    assert not found.ended and found.tokens.tolist() == [0] * 5  # all tokens tie, the first wins
    model.lm_head.register_forward_hook(lambda module, given, out: out + 9 * (torch.arange(out.shape[-1]) == turn))
    found = answer(model, read_prompts([chat], tokenizer), tokenizer, Decoding(5, 0.0))[0]
    assert found.ended and found.tokens.tolist() == [turn] and found.text == ""


def test_fixed_prompts_are_distinct_held_out_and_seeded():
    held = toy_thumbs(40).split(0.5)[1]
    chosen = choose_prompts(held, 6, 0)
    texts = [row.prompt for row in chosen]
    assert len(set(texts)) == 6 and set(texts) <= {row.prompt for row in held.rows}
    assert texts == [row.prompt for row in choose_prompts(held, 6, 0)]
    assert texts != [row.prompt for row in choose_prompts(held, 6, 1)]
    assert len(choose_prompts(held, 100, 0)) == 20 and choose_prompts(held, 0, 0) == []
    assert choose_prompts(PreferenceSet((Completion("", "text", True),)), 3, 0) == []


def test_metrics_of_answers_by_hand(model, tokenizer):
    said = answer(model, read_prompts(rows(*TEXTS), tokenizer), tokenizer, Decoding(4, 0.0))
    ratio = np.array([1.0, 2.0, 6.0])
    found = answer_metrics(said, ratio, ["a", "b", "c"], Decoding(4))
    assert found["answer_tokens"] == np.mean([len(a.tokens) for a in said]) and found["kl"]["mean"] == 3.0
    assert "kl" not in answer_metrics(said, ratio, ["a", "b", "c"], Decoding(4, 0.7))
    assert "kl" not in answer_metrics(said, None, ["a", "b", "c"], Decoding(4))


def test_microbatches_of_one_class_are_counted_over_processes():
    def rows(*labels):
        return {"desirable": np.array(labels, dtype=np.float32)}

    parts = [[rows(1, 1), rows(0), rows(1)], [rows(1), rows(1), rows(1, 1)]]
    assert one_class_share(parts) == {"one_class_share": 2 / 3}
    assert one_class_share([[{"logp": np.zeros(2)}]]) == {} and one_class_share([[]]) == {}


# In a run


def run(folder, out, trainer="kto", *overrides):
    config = load_config(
        {
            "trainer": trainer, "name": "toy", "model": {"path": str(folder), "train": "full"},
            "data": {"path": "toy", "heldout_fraction": 0.2, "max_length": 64}, "batch_size": 16, "microbatch": 8,
            "steps": 4, "optimizer": {"lr": 1e-2}, "checkpoint": {"every": 2},
            "evaluation": {"every": 1, "rows": 16, "prompts": 3, "max_new_tokens": 5},
        },
        overrides,
    )  # fmt: skip
    return trainer_for(config, out=out, rows=toy_thumbs(60).split(0.2))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def numbers(out):
    return [
        {k: v for k, v in row.items() if "seconds" not in k and "memory" not in k}
        for row in lines(out / "metrics.jsonl")
    ]


@pytest.mark.parametrize("over", [(), ("model.train=lora", "model.lora.rank=4")])
def test_a_run_is_the_same_bit_for_bit_with_and_without_answers(folder, tmp_path, over):
    from safetensors.torch import load_file

    for name, more in (("on", ()), ("off", ("evaluation.prompts=0",))):
        run(folder, tmp_path / name, "kto", *over, *more).train()
    assert numbers(tmp_path / "on") == numbers(tmp_path / "off")
    assert not (tmp_path / "off" / "generations.jsonl").exists()
    file = "adapter_model.safetensors" if over else "model.safetensors"
    on, off = (load_file(tmp_path / n / "checkpoints" / "step_000004" / file) for n in ("on", "off"))
    assert all(torch.equal(value, off[name]) for name, value in on.items())
    said = lines(tmp_path / "on" / "generations.jsonl")
    assert [(row["step"], row["index"]) for row in said] == [(s, i) for s in range(5) for i in range(3)]
    assert all(row["log_ratio"] == 0 for row in said[:3]) and all(row["log_ratio"] != 0 for row in said[-3:])
    evaluations = lines(tmp_path / "on" / "evaluation.jsonl")
    assert evaluations[-1]["kl"]["mean"] == pytest.approx(np.mean([row["log_ratio"] for row in said[-3:]]))
    assert set(evaluations[-1]) - set(lines(tmp_path / "off" / "evaluation.jsonl")[-1]) == {
        "kl", "answer_tokens", "answers_ended"
    }  # fmt: skip


@pytest.mark.parametrize("where", ["answers", "written"])
def test_a_run_that_dies_around_its_answers_writes_each_once(folder, tmp_path, where):
    """Killed at step 3, before its answers, or after them and before the evaluation: step 2's checkpoint goes on."""
    run(folder, tmp_path / "whole").train()
    broken = run(folder, tmp_path / "run")
    from trainers import language_measures

    original = getattr(language_measures.LanguageEvaluation, "answers" if where == "answers" else "_written")
    calls = []

    class Killed(Exception):
        pass

    def killed(self, *args, **options):
        calls.append(0)
        if len(calls) == 4 and where == "answers":
            raise Killed
        found = original(self, *args, **options)
        if len(calls) == 4:
            self.log.generations(3, found)
            raise Killed
        return found

    setattr(language_measures.LanguageEvaluation, original.__name__, killed)
    try:
        with pytest.raises(Killed):
            broken.train()
    finally:
        setattr(language_measures.LanguageEvaluation, original.__name__, original)
    assert len(lines(tmp_path / "run" / "generations.jsonl")) == (9 if where == "answers" else 12)
    assert run(folder, tmp_path / "run").train().status == "complete"
    for name in ("generations.jsonl", "evaluation.jsonl"):
        whole, again = ([{**row, "seconds": 0} for row in lines(tmp_path / d / name)] for d in ("whole", "run"))
        assert whole == again
    run(folder, tmp_path / "run").train()  # a finished run measures its last step again
    assert lines(tmp_path / "run" / "generations.jsonl") == lines(tmp_path / "whole" / "generations.jsonl")


def test_what_cannot_be_measured_is_said(folder, tmp_path):
    over = ("reference.mode=precomputed", f"reference.cache={tmp_path / 'cache'}", "steps=1")
    run(folder, tmp_path / "run", "bco", *over).train()
    assert "kl" not in lines(tmp_path / "run" / "evaluation.jsonl")[-1]
    assert lines(tmp_path / "run" / "generations.jsonl")[-1]["log_ratio"] is None
    assert "kl is not measured" in (tmp_path / "run" / "warnings.jsonl").read_text()
    run(folder, tmp_path / "sft", "sft", "steps=1").train()
    assert len(lines(tmp_path / "sft" / "generations.jsonl")) == 6
    assert not (tmp_path / "sft" / "warnings.jsonl").exists()
