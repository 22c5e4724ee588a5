"""Configs of the language-model trainers: `trainer` decides the type, mistakes are refused as everywhere."""

from __future__ import annotations

import json

import pytest

from align.checks import check_config, describe_config
from align.cli import main
from align.config import DanceGRPOConfig, config_origins, config_types, diff_configs, load_config, save_config
from align.errors import ConfigError
from align.language_config import BCOConfig, DPOConfig, KTOConfig, LanguageConfig, SFTConfig
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
    assert set(config_types()) == {"dance_grpo", "kto", "bco", "dpo", "sft"}


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


def test_the_tables_of_the_docs_say_what_the_code_says(monkeypatch):
    from scripts import docs_tables

    assert docs_tables.stale() == []
    monkeypatch.setattr(docs_tables, "language_configuration", lambda: ["| `never.written` |"])
    assert docs_tables.stale() == ["cli.md"]
