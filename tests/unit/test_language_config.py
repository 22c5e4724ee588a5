"""Configs of the language-model trainers: `trainer` decides the type, mistakes are refused as everywhere."""

from __future__ import annotations

import json
import re
from typing import Literal

import pytest

from align.checks import check_config, describe_config
from align.cli import main
from align.config import DanceGRPOConfig, config_origins, config_types, diff_configs, load_config, save_config
from align.errors import ConfigError
from align.language_config import BCOConfig, DPOConfig, KTOConfig, LanguageConfig, SFTConfig
from align.preferences import load_preferences
from align.recipes import list_recipes, read_recipe
from trainers import KTO

BASE = {"model": {"path": "tiny"}, "data": {"path": "toy"}}


def made(trainer="kto", *overrides):
    return load_config({"trainer": trainer, **BASE}, overrides)


def codes(*overrides, trainer="kto"):
    return {f.code for f in check_config(made(trainer, *overrides))}


@pytest.mark.parametrize(
    ("trainer", "kind"), [("kto", KTOConfig), ("bco", BCOConfig), ("dpo", DPOConfig), ("sft", SFTConfig)]
)
def test_the_trainer_decides_the_type_and_saved_configs_come_back(trainer, kind, tmp_path):
    config = made(trainer, "optimizer.lr=1e-4")
    assert type(config) is kind and config.name == trainer
    save_config(config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    assert again == config and config_origins(again)["optimizer.lr"] == "command line"
    assert diff_configs(config, made(trainer)) == [("optimizer.lr", 1e-4, made(trainer).optimizer.lr)]
    assert {"dance_grpo", "forward", "kto", "bco", "dpo", "sft"} <= set(config_types())


def test_papers_learning_rates_are_the_defaults():
    assert [made(t).optimizer.lr for t in ("kto", "bco", "dpo", "sft")] == [1e-6, 5e-7, 1e-6, 1e-5]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer=kot", r"'trainer' is wrong.*found 'kot'.*Did you mean 'kto'"),
        ("objective.bta=1", "Unknown key 'objective.bta'.*Did you mean 'objective.beta'"),
        ("batch.size=4", "Unknown key 'batch'"),
        ("objective.z0=mean", "objective.z0.*expected one of 'batch', 'ema', 'zero'"),
        ("objective.weight_desirable=heavy", "objective.weight_desirable"),
        ("objective.humanline=[1]", "expected 2 numbers"),
        ("microbatch=0", "a number >= 1"),
    ],
)
def test_mistakes_are_refused_in_one_sentence(override, message):
    with pytest.raises(ConfigError, match=message):
        made("kto", override)


def test_auto_is_what_is_derived():
    assert made("kto", "objective.weight_desirable=auto").objective.weight_desirable is None
    assert made("kto", "objective.weight_desirable=0").objective.weight_desirable == 0.0


def test_a_trainer_refuses_the_config_of_another():
    with pytest.raises(ConfigError, match="config of the trainer 'bco'"):
        KTO({"trainer": "bco", **BASE})
    with pytest.raises(ConfigError, match="config of the trainer 'kto'"):
        load_config("kto/smoke", kind=DanceGRPOConfig)


@pytest.mark.parametrize(
    ("overrides", "code"),
    [
        (("microbatch=1",), "microbatch_of_one"), (("microbatch=2",), "small_microbatch"),
        (("batch_size=12",), "uneven_batches"), (("batch_size=8",), "batch_size"),
        (("data.max_prompt_length=2000",), "no_room"), (("data.heldout_fraction=0",), "no_heldout_rows"),
        (("model.train=full", "reference.mode=lora_off"), "no_adapters"),
        (("objective.humanline=[-1, 1.5]", "reference.mode=precomputed"), "humanline_tokens"),
        (("objective.humanline=[2, 1]",), "humanline_order"), (("data.allow_one_class=true",), "one_class"),
        (("model.train=full", "model.path=other", "optimizer.lr=1e-4"), "lr_high"),
        (("objective.loss=apo_zero_unpaired", "objective.z0=ema"), "z0_unused"),
    ],
)  # fmt: skip
def test_each_finding_is_found_and_not_otherwise(overrides, code):
    assert code in codes(*overrides) and code not in codes()
    assert not {f.code for f in check_config(load_config("kto/smoke")) if f.level == "error"}


def test_a_row_a_time_is_right_with_a_running_reference_point_and_with_bco():
    for made_codes in (codes("microbatch=1", "objective.z0=ema"), codes("microbatch=1", trainer="bco")):
        assert "microbatch_of_one" not in made_codes


def test_forwards_of_a_step_are_those_of_the_objective():
    def forwards(trainer, *overrides):
        return describe_config(made(trainer, *overrides), [])["forwards"]

    again = "model.gradient_checkpointing=true"
    assert forwards("kto", again) == 7 and forwards("kto", again, "reference.mode=precomputed") == 5
    assert forwards("bco", again) == 5 and forwards("bco", again, "reference.mode=precomputed") == 4
    assert forwards("sft") == 3 and forwards("kto", "objective.loss=apo_zero_unpaired") == 4


def test_check_reads_data_and_names_what_is_wrong(tmp_path, capsys):
    path = tmp_path / "thumbs.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "label": true}\n')
    assert main(["check", str(path), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["one_class"] is True
    assert main(["check", "kto/smoke", f"data.path={path}"]) == 2
    assert "no thumb down" in capsys.readouterr().out
    path.write_text('{"prompt": "a", "completion": "b", "label": "meh"}\n')
    assert main(["check", str(path)]) == 2
    assert "line 1, field 'label'): found 'meh'" in capsys.readouterr().err


def test_the_smoke_recipes_run_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    for recipe in ("kto/smoke", "bco/smoke"):
        out = tmp_path / recipe.replace("/", "_")
        assert main(["train", recipe, "steps=3", "--out", str(out), "--json", str(tmp_path / "found.json")]) == 0
        found = json.loads((tmp_path / "found.json").read_text())
        assert found["status"] == "complete" and (out / "report.html").is_file()
        assert main(["resume", str(out)]) == 0
    assert isinstance(load_config(out / "config.yaml"), LanguageConfig)
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "file"))
    assert main(["train", "kto/smoke", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert f"(ALIGN_CACHE={tmp_path / 'file'})" in said and "Set ALIGN_CACHE to a folder" in said


def test_the_tables_of_the_docs_say_what_the_code_says(monkeypatch):
    from scripts import docs_tables

    assert docs_tables.stale() == []
    monkeypatch.setattr(docs_tables, "language_configuration", lambda: ["| `never.written` |"])
    assert docs_tables.stale() == ["cli.md"]


HELPSTEER = dict.fromkeys(("correctness", "coherence", "complexity", "verbosity"), 2)
MARKED = "Is it?\n<extra_id_1>Assistant\nYes.\n<extra_id_1>User\nWhy?"


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_helpsteer2_as_published_becomes_thumbs(tmp_path, capsys):
    rows = [{"prompt": "Name a prime.", "response": f"It is {i}.", "helpfulness": i, **HELPSTEER} for i in range(5)] + [
        {"prompt": MARKED, "response": "Because.", "helpfulness": 4, **HELPSTEER}
    ]
    source, out = lines(tmp_path / "train.jsonl", rows), tmp_path / "thumbs.jsonl"
    assert main(["check", str(source)]) == 2
    assert "it is helpsteer. Run `align feedback convert train.jsonl" in capsys.readouterr().err
    how = ["--to", "unpaired", "--up-from", "4", "--down-to", "3", "--chat", "--duplicates", "mean"]
    assert main(["feedback", "convert", str(source), str(out), *how]) == 0
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["label"] for row in made] == [False, False, False, False, True, True]
    assert made[0]["prompt"] == [{"role": "user", "content": "Name a prime."}]
    assert made[0]["completion"] == [{"role": "assistant", "content": "It is 0."}]
    assert made[5]["prompt"] == [
        {"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
    ]  # fmt: skip


def test_ultrafeedback_as_published_is_read_and_converted_without_its_prompt_twice(tmp_path):
    user = {"role": "user", "content": "Name a prime."}
    chats = {
        name: [user, {"role": "assistant", "content": text}] for name, text in (("chosen", "7"), ("rejected", "9"))
    }
    row = {"prompt": "Name a prime.", "prompt_id": "x", **chats, "messages": chats["chosen"],
           "score_chosen": 8.5, "score_rejected": 2.0}  # fmt: skip
    source, out = lines(tmp_path / "train.jsonl", [row]), tmp_path / "thumbs.jsonl"
    assert main(["feedback", "convert", str(source), str(out), "--to", "unpaired"]) == 0
    for found in (load_preferences(source).rows, load_preferences(out).rows):
        said = {row.label: (row.prompt, row.completion) for row in found}
        assert said == {up: ((user,), (chats[name][1],)) for up, name in ((True, "chosen"), (False, "rejected"))}


PAPERS = [name for name, _ in list_recipes() if name.split("/")[0] in ("kto", "bco") and not name.endswith("smoke")]


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_recipes_say_what_is_missing_and_what_is_claimed(name, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = load_config(name)
    assert config.name == name.replace("/", "_") and config.batch_size % config.microbatch == 0
    assert "claimed" in read_recipe(name).lower() and "not reproduced" in read_recipe(name)
    assert main(["check", name]) == 2
    text = capsys.readouterr().out
    assert re.search(r"error +There is no such data file \((helpsteer2.jsonl|ultrafeedback.parquet)\)", text)
    assert re.search(rf"warning +'{config.model.path}' is no folder here", text)
    assert "Traceback" not in text and text.count("error") == 1


def test_the_papers_numbers_are_in_the_recipes():
    assert len(PAPERS) == 8
    for name in PAPERS:
        config = load_config(name)
        assert config.objective.beta == 0.1 and config.model.train == "full" and config.data.max_length == 2048
        helpsteer = name.endswith("helpsteer2")
        assert config.epochs == (3 if helpsteer else 1) and config.optimizer.warmup == 0.1
        assert config.optimizer.lr == (5e-7 if helpsteer or config.trainer == "bco" else 5e-6)
        if config.trainer == "bco":
            assert config.objective.balance == ("oversample" if helpsteer else "class_mean")
        assert ("Qwen" in config.model.path) == ("qwen" in name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"instruction": "a", "output": "b", "kto_tag": true}', "it is llama-factory.*align feedback convert"),
        (
            '{"question": "a", "answer": "b"}',
            "neither those of prompts nor of feedback.*they are question, answer.*--columns prompt=COLUMN",
        ),
        ("prompt;completion;label\na;b;1", "not separated by commas.*';'"),
    ],
)
def test_check_leads_other_forms_to_convert(tmp_path, capsys, text, message):
    path = tmp_path / ("rows.csv" if ";" in text else "rows.jsonl")
    path.write_text(text + "\n")
    assert main(["check", str(path)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_check_counts_rows_weights_and_tokens(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"say {i}", "completion": " red blue" * (1 + i % 2), "label": i % 10 == 0} for i in range(100)]
    path = f"data.path={lines(tmp_path / 'thumbs.jsonl', rows)}"
    found = {f.code: f for f in check_config(load_config("kto/smoke", [path]), files=True)}
    assert "90 rows train (10 up, 80 down), 10 rows are held out; 2 updates an epoch" in found["rows"].message
    unanswered = f"data.path={lines(tmp_path / 'more.jsonl', [*rows, {**rows[1], 'completion': ''}])}"
    more = {f.code: f for f in check_config(load_config("kto/smoke", [unanswered]), files=True)}
    assert more["rows"].message == found["rows"].message  # a run drops it
    few = check_config(load_config("kto/smoke", [path, "batch_size=96"]), files=True)
    assert [f.message for f in few if f.level == "error"] == ["90 rows to train on are fewer than the 96 of one update"]
    given = ["objective.weight_desirable=1", "objective.weight_undesirable=1"]
    wrong = {f.code: f for f in check_config(load_config("kto/smoke", [path, *given]), files=True)}["class_weights"]
    assert "is 0.125, outside the advised 1 to 3/2" in wrong.message and "from 8 to 12" in wrong.do
    given[0] = "objective.weight_desirable=10"
    assert "class_weights" not in {f.code for f in check_config(load_config("kto/smoke", [path, *given]), files=True)}
    assert "uneven_classes" in {f.code for f in check_config(load_config("bco/smoke", [path]), files=True)}
    assert main(["check", "bco/smoke", path, "objective.balance=oversample", "data.max_length=8"]) == 0
    text = capsys.readouterr().out
    assert "160 rows, the smaller class repeated, train (10 up, 80 down)" in text
    assert re.search(r"warning +Of 100 rows half have over \d+ tokens.*max_length 8 cuts ", text)
    assert main(["check", path.partition("=")[2], "--tokenizer", "tiny", "--max-length", "64"]) == 0
    assert "max_length 64 cuts none" in capsys.readouterr().out


def test_a_model_that_is_not_there_is_an_error_if_a_path_and_a_warning_if_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))

    def found(path):
        return [
            (f.level, f.code) for f in check_config(made("kto", f"model.path={path}"), files=True) if "model" in f.key
        ]

    assert found("./nowhere") == found("a/b/c") == [("error", "model")]
    assert found("someone/some-model") == [("warning", "model_not_here")] and found("tiny") == []
    assert found(tmp_path) == [("error", "model")]


class Plain(LanguageConfig):
    """A loop of someone else's that has no reference and no objective."""

    trainer: Literal["plain"] = "plain"
    name: str = "plain"


def test_a_config_without_a_reference_is_checked_and_counted():
    config = Plain(steps=2, batch_size=8, microbatch=8, model={"path": "tiny"}, data={"path": "toy"})
    found = describe_config(config, check_config(config, files=True))
    assert found["valid"] and found["forwards"] == 3 + config.model.gradient_checkpointing
