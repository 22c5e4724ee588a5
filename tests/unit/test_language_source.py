"""`align sample` and `align evaluate` of language models: what training measured and wrote, from any kind of source."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from align.checks import check_config
from align.cli import main
from align.config import load_config, save_config
from align.errors import ConfigError, DataError, ModelError
from align.language_config import LanguageModelConfig
from trainers import evaluate_language, find_source, sample_completions, sample_images, trainer_for
from trainers.language_export import export_language
from trainers.language_model import load_language_model
from trainers.language_source import find_language, load_asked, open_language
from trainers.tiny_language import build_tiny, toy_thumbs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, thumbs in a file, and a short run of each kind on them."""
    folder = tmp_path_factory.mktemp("made")
    build_tiny(folder / "model")
    rows = toy_thumbs(60).rows
    (folder / "thumbs.jsonl").write_text(
        "".join(
            json.dumps({"prompt": up.prompt, "chosen": up.completion, "rejected": down.completion}) + "\n"
            for up, down in zip(rows[::2], rows[1::2], strict=True)
        )
    )
    for trainer, train in (("kto", "full"), ("bco", "lora"), ("sft", "full")):
        config = load_config(
            {
                "trainer": trainer, "name": trainer, "seed": 3, "steps": 4, "batch_size": 16, "microbatch": 8,
                "model": {"path": str(folder / "model"), "train": train, "lora": {"rank": 4}},
                "data": {"path": str(folder / "thumbs.jsonl"), "heldout_fraction": 0.2, "max_length": 64},
                "optimizer": {"lr": 1e-2, "schedule": "constant"}, "checkpoint": {"every": 2},
                "evaluation": {"every": 2, "rows": 20, "prompts": 3, "max_new_tokens": 5},
            }
        )  # fmt: skip
        trainer_for(config, out=folder / trainer).train()
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without(row, *names):
    return {k: v for k, v in row.items() if k not in ("seconds", "step", *names)}


@pytest.mark.parametrize("trainer", ["kto", "bco", "sft"])
def test_evaluate_measures_what_training_measured(made, trainer):
    trained = {row["step"]: row for row in lines(made / trainer / "evaluation.jsonl")}
    for step, source in ((4, made / trainer), (2, made / trainer / "checkpoints" / "step_000002")):
        found = evaluate_language(source)
        assert found["step"] == step and found["trainer"] == trainer
        for key, value in without(trained[step]).items():
            if isinstance(value, dict):
                assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-7), key
            else:
                assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-7), key
    last = lines(made / trainer / "metrics.jsonl")[-1]
    assert [found.get(k) for k in ("z0", "delta")] == [
        {row["step"]: row for row in lines(made / trainer / "metrics.jsonl")}[2].get(k) for k in ("z0", "delta")
    ]
    assert ("z0" in last) == (trainer == "kto") and ("delta" in last) == (trainer == "bco")


@pytest.mark.parametrize("trainer", ["kto", "bco"])
def test_sample_says_what_the_run_wrote(made, trainer, tmp_path):
    written = lines(made / trainer / "generations.jsonl")
    found = sample_completions(made / trainer, base=True)
    assert lines(made / trainer / "completions.jsonl") == found
    assert [row["policy"] for row in found] == ["before"] * 3 + ["step 4"] * 3
    assert [row["completion"] for row in found] == [row["completion"] for row in written if row["step"] in (0, 4)]
    assert {(row["seed"], row["temperature"]) for row in found} == {(3, 1.0)} and found[-1]["step"] == 4
    assert found[0]["prompt"] == written[0]["prompt"]
    recipe = tmp_path / "recipe.yaml"
    save_config(load_config(made / trainer / "config.yaml"), recipe)
    untrained = sample_completions(recipe, base=True, out=tmp_path / "recipe.jsonl")
    assert [(row["policy"], row["completion"]) for row in untrained] == [
        (row["policy"], row["completion"]) for row in found[:3]
    ]
    bare = tmp_path / "bare"
    shutil.copytree(made / trainer / "checkpoints" / "step_000004", bare)
    how = {"seed": 3, "max_new_tokens": 5, "out": tmp_path / "bare.jsonl"}
    alone = sample_completions(bare, [row["prompt"] for row in found[3:]], **how)
    assert [row["completion"] for row in alone] == [row["completion"] for row in found[3:]]
    assert alone[0]["policy"] == str(bare) and alone[0]["step"] is None


def test_a_model_outside_of_its_run_is_measured_with_its_config(made, tmp_path):
    shutil.copytree(made / "bco" / "checkpoints" / "step_000004", tmp_path / "adapters")
    with pytest.raises(ConfigError, match="not known what this model was trained with.*--trained-with"):
        evaluate_language(tmp_path / "adapters")
    inside = evaluate_language(made / "bco")
    found = evaluate_language(tmp_path / "adapters", config=made / "bco" / "config.yaml")
    assert found["step"] is None and found["auc"] == inside["auc"] != 0.5 and found["kl"] == inside["kl"]
    untrained = evaluate_language("tiny", config=made / "kto" / "config.yaml", samples=2)
    assert untrained["n"] == 20 and untrained["prompts"] == 2


def test_rewards_are_compared_on_the_same_prompts(made, tmp_path):
    def ink(samples):
        return [text.count("a") for text in samples.texts]

    import sys
    import types

    module = types.ModuleType("letters_of_this_test")
    module.ink = ink
    sys.modules["letters_of_this_test"] = module
    found = evaluate_language(
        made / "kto", rewards=["letters_of_this_test:ink"], samples=8, out=tmp_path / "rows.jsonl"
    )
    rows = lines(tmp_path / "rows.jsonl")
    before, after = rows[:8], rows[8:]
    assert [row["prompt"] for row in before] == [row["prompt"] for row in after]
    assert all(row["scores"] == {"ink": row["completion"].count("a")} for row in rows)
    mean = {
        "before": np.mean([r["scores"]["ink"] for r in before]),
        "after": np.mean([r["scores"]["ink"] for r in after]),
    }
    rewards = found["rewards"]["ink"]
    assert {when: rewards[when]["mean"] for when in mean} == mean and rewards["gain"]["n"] == 8
    assert rewards["gain"]["mean"] == pytest.approx(mean["after"] - mean["before"])
    assert rewards["gain"]["ci_low"] <= rewards["gain"]["mean"] <= rewards["gain"]["ci_high"]


def test_the_loop_closes_samples_are_rated_and_train(made, tmp_path, capsys):
    """Sample, put the answers before people, read what they said, and check that it can train."""
    from align.feedback.tasks import load_task

    said = tmp_path / "candidates.jsonl"
    assert main(["sample", str(made / "kto"), "--before", "--count", "2", "--out", str(said)]) == 0
    out = capsys.readouterr().out
    assert "> Say: " in out and "  step 4: " in out and f"wrote 12 answers to {said}" in out
    rows = [row for row in lines(said) if row["completion"].strip()]
    said.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tmp_path / "task.yaml"
    task.write_text("name: t\nkind: thumbs\ndata: candidates.jsonl\ncolumns: {response: completion}\n")
    items = load_task(task).items.values()
    assert {item.metadata["policy"] for item in items} == {"before", "step 4"}
    rated = tmp_path / "rated.jsonl"
    rated.write_text("".join(json.dumps({**row, "label": i % 2 == 0}) + "\n" for i, row in enumerate(rows)))
    store = tmp_path / "store.db"
    assert main(["feedback", "import", str(store), str(rated)]) == 0
    assert main(["check", str(rated)]) == 0
    assert "trains" in capsys.readouterr().out
    unlabelled = main(
        ["score", "--config", str(_rewards(tmp_path)), "--prompts", str(said), "--out", str(tmp_path / "s.csv")]
    )
    assert unlabelled == 0 and "length" in (tmp_path / "s.csv").read_text().splitlines()[0]


def _rewards(folder):
    path = folder / "rewards.yaml"
    path.write_text("rewards:\n- {name: length, args: {low: 1, high: 9}}\n")
    return path


def test_the_verbs_print_tables_and_write_json(made, tmp_path, capsys):
    assert main(["evaluate", str(made / "kto"), "--config", str(_rewards(tmp_path)), "--samples", "4",
                 "--json", str(tmp_path / "e.json")]) == 0  # fmt: skip
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "e.json").read_text())
    assert f"auc                  {found['auc']:.4f}  [" in out and "pair_accuracy" in out and "length gain" in out
    assert found["rewards"]["length"]["gain"]["n"] == 4
    before = sorted(tmp_path.iterdir())
    assert main(["evaluate", str(made / "kto"), "--dry-run"]) == 0
    assert main(["sample", str(made / "kto"), "--dry-run", "--temperature", "0", "--out", str(tmp_path / "x")]) == 0
    assert sorted(tmp_path.iterdir()) == before and "would sample" in capsys.readouterr().out
    assert main(["sample", "tiny", "--prompt", "a\x1b[31m", "--max-new-tokens", "2", "--json", "-",
                 "--out", str(tmp_path / "x.jsonl")]) == 0  # fmt: skip
    (row,) = json.loads(capsys.readouterr().out)
    assert row["prompt"] == "a\x1b[31m" and row["tokens"] <= 2
    assert main(["sample", "tiny", "--prompt", "a\x1b[31m", "--out", str(tmp_path / "x.jsonl")]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_chats_are_asked_through_the_template(made, tmp_path):
    asked = [{"role": "user", "content": "Say: red"}]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"prompt": asked}) + "\n" + json.dumps({"prompt": asked, "id": 2}) + "\n")
    how = {"max_new_tokens": 4, "out": tmp_path / "o.jsonl"}
    (chat,) = sample_completions(made / "model", path, **how)
    (spoken,) = sample_completions(made / "model", ["Say: red"], chat=True, **how)
    (text,) = sample_completions(made / "model", ["Say: red"], **how)
    assert chat["prompt"] == asked == spoken["prompt"] and chat["completion"][0]["role"] == "assistant"
    assert isinstance(text["completion"], str)
    words = tmp_path / "words.txt"
    words.write_text("Say: red\nSay: blue\nSay: red\n")
    assert [row.prompt for row in load_asked(words)] == ["Say: red", "Say: blue"]


def test_what_cannot_be_done_is_said(made, tmp_path):
    with pytest.raises(ConfigError, match="model before training is not known"):
        sample_completions(made / "model", ["a"], base=True, out=tmp_path / "o")
    with pytest.raises(ConfigError, match="brings no prompts.*--prompts FILE"):
        sample_completions(made / "model", out=tmp_path / "o")
    with pytest.raises(DataError, match="leaves no room for an answer.*tokens, and the model reads 2048"):
        sample_completions(made / "model", ["red " * 2100], out=tmp_path / "o")
    answered = tmp_path / "answered.jsonl"
    answered.write_text(json.dumps({"prompt": [{"role": "assistant", "content": "red"}]}))
    with pytest.raises(DataError, match="ends with the assistant.*answered.jsonl"):
        sample_completions(made / "model", answered, out=tmp_path / "o")
    with pytest.raises(ConfigError, match="makes no images"):
        sample_images(made / "kto")
    with pytest.raises(ConfigError, match="completes no text"):
        find_language("digits")
    broken = tmp_path / "adapters"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="do not say which model"):
        open_language(find_language(broken))
    assert not list(tmp_path.glob("o*"))


def test_adapters_alone_are_no_model_to_train_and_merged_they_are(made, tmp_path):
    """Read as a model they would be made anew at random by LoRA, or leave nothing to train without it."""
    adapters = made / "bco" / "checkpoints" / "step_000004"
    for train in ("lora", "full"):
        with pytest.raises(ModelError, match="cannot be adapters alone.*--to full"):
            load_language_model(LanguageModelConfig(path=str(adapters), train=train), seed=0)
    found = check_config(load_config("kto/smoke", [f"model.path={adapters}"]), files=True)
    assert [(f.key, "--to full" in f.do) for f in found if f.level == "error"] == [("model.path", True)]
    export_language(made / "bco", to="full", out=tmp_path / "merged")
    load_language_model(LanguageModelConfig(path=str(tmp_path / "merged"), train="full"), seed=0)


def test_a_source_is_found_by_what_it_is(made):
    assert find_source("tiny").language and find_source("kto/smoke").config.name == "kto_smoke"
    assert not find_source("digits").language and not find_source("digits/smoke").language
    found = find_source(made / "kto")
    assert found.language and found.run == made / "kto" and found.checkpoint.name == "step_000004"
