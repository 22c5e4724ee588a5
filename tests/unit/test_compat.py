"""TRL's arguments become our config, field by field, and nothing is dropped unsaid."""

from __future__ import annotations

import json
import warnings

import pytest

from align.cli import main
from align.config import load_config
from align.errors import ConfigError
from trainers.compat import from_trl


def said(ported):
    return " ".join(finding.message for finding in ported.findings)


@pytest.mark.parametrize("trainer", ["kto", "dpo", "sft"])
def test_defaults_are_those_of_the_installed_trl(trainer):
    import trl

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about its own defaults
        theirs = getattr(trl, f"{trainer.upper()}Config")(output_dir="x", bf16=False, use_cpu=True)
    found = from_trl(theirs)
    assert found.config == from_trl({"bf16": False}, trainer=trainer).config
    assert found.config.trainer == trainer and "corresponds" not in said(found)


GIVEN = {
    "model_name_or_path": "m", "dataset_name": "d.jsonl", "per_device_train_batch_size": 4, "max_steps": 200,
    "gradient_accumulation_steps": 4, "learning_rate": 5e-7, "lr_scheduler_type": "cosine", "warmup_steps": 20,
    "max_length": 512, "beta": 0.2, "desirable_weight": 1.0, "undesirable_weight": 1.5, "loss_type": "kto",
    "use_peft": True, "lora_r": 8, "lora_alpha": 16, "lora_target_modules": ["q_proj"], "max_grad_norm": 0,
    "precompute_ref_log_probs": True, "gradient_checkpointing": False, "seed": 7, "eval_strategy": "steps",
    "eval_steps": 25, "save_steps": 50,
}  # fmt: skip


def test_every_field_lands_where_it_belongs():
    found = from_trl(GIVEN, processes=2)
    assert found.config == load_config({
        "trainer": "kto", "batch_size": 32, "microbatch": 8, "steps": 200, "epochs": 3, "seed": 7,
        "model": {"path": "m", "dtype": "bf16", "train": "lora", "lora": {"rank": 8, "alpha": 16, "targets": ["q_proj"]}},
        "data": {"path": "d.jsonl", "max_length": 512}, "reference": {"mode": "precomputed"},
        "optimizer": {"lr": 5e-7, "schedule": "cosine", "warmup": 0.1, "max_grad_norm": None},
        "objective": {"beta": 0.2, "weight_desirable": 1.0, "weight_undesirable": 1.5, "loss": "kto"},
        "evaluation": {"every": 25}, "checkpoint": {"every": 50},
    })  # fmt: skip
    assert "corresponds" not in said(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sync_ref_model": True, "packing": True}, "Nothing here corresponds to packing=True, sync_ref_model=True"),
        ({"loss_type": "sigmoid"}, "corresponds to loss_type=sigmoid"),
        ({"label_smoothing": 0.1}, "corresponds to label_smoothing=0.1"),
        ({"disable_dropout": False}, "corresponds to disable_dropout=False"),
        ({"lr_scheduler_type": "polynomial"}, "polynomial became linear"),
        ({"max_steps": -1, "num_train_epochs": 1.5}, "num_train_epochs 1.5 is no whole number"),
        ({"max_steps": -1}, "warmup_steps 20 of a number of steps that is not given"),
    ],
)
def test_what_has_no_counterpart_is_said(change, message):
    assert message in said(from_trl({**GIVEN, **change}))


def test_bco_points_to_matching_and_to_what_trl_does():
    found = from_trl({"min_density_ratio": 0.5, "prompt_sample_size": 512})
    assert found.config.trainer == "bco" and found.config.optimizer.lr == 5e-7
    assert "match-prompts DATA --out FILE --sample 512 --low 0.5" in said(found)
    assert (found.config.objective.delta, found.config.objective.balance) == ("cumulative_pooled", "pooled")
    assert "leave out delta and balance for the paper's" in said(found)


def test_what_is_said_elsewhere_is_pointed_to():
    found = said(from_trl({**GIVEN, "deepspeed": "zero3.json", "output_dir": "out", "dataset_name": "org/thumbs"}))
    assert "--deepspeed FILE" in found and "the run folder is --out" in found
    assert "save the data set org/thumbs to a file first" in found


def test_the_command_prints_a_config_that_loads(tmp_path, capsys):
    source, out = tmp_path / "trl.yaml", tmp_path / "ours.yaml"
    source.write_text(json.dumps({**GIVEN, "packing": True}))
    assert main(["configs", "from-trl", str(source), "--nproc", "2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# ") and "packing=True" in text
    out.write_text(text)
    assert load_config(out) == from_trl(GIVEN, processes=2).config
    source.write_text("beta: 0.1\n")
    assert main(["configs", "from-trl", str(source)]) == 2
    assert "do not say which trainer" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="Unknown trainer 'ppo'"):
        from_trl({}, trainer="ppo")
