"""What DeepSpeed settings a language run has, whoever gives them, and which are refused in a sentence."""

from __future__ import annotations

import json

import pytest

from align.cli import main
from align.config import load_config
from align.doctor import run_checks
from align.engine import read_settings
from align.errors import ConfigError
from align.launch import World, launch_command, started_by
from trainers import language_engine
from trainers.language_engine import engine_settings

pytest.importorskip("deepspeed")


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """As a launcher leaves the environment; joining the processes is left out."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(language_engine, "_start_deepspeed", lambda: None)
    return monkeypatch


def config(*overrides):
    return load_config("kto/smoke", [*overrides])


def settings(deepspeed=None, *overrides):
    return engine_settings(deepspeed, config(*overrides), World(0, 2))


def file(tmp_path, **options):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, **options}))
    return str(path)


def test_settings_by_name_are_completed():
    made = settings("zero3")
    assert made["zero_optimization"]["stage"] == 3 and made["zero_optimization"]["reduce_bucket_size"] == "auto"
    assert made["train_micro_batch_size_per_gpu"] == made["gradient_clipping"] == "auto"
    assert made["bf16"] == {"enabled": "auto"} and settings() is None


def test_weights_are_gathered_when_they_are_saved_whatever_the_file_says(tmp_path):
    said = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}
    assert settings(file(tmp_path, zero_optimization=said))["zero_optimization"] == {
        "stage": 3, "stage3_gather_16bit_weights_on_model_save": True,
    }  # fmt: skip


def test_blocks_left_to_the_trainer_go_and_the_same_numbers_may_stand(tmp_path):
    made = settings(file(
        tmp_path, optimizer={"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}, train_batch_size=32,
        train_micro_batch_size_per_gpu=8, gradient_accumulation_steps=2, fp16={"enabled": False},
    ))  # fmt: skip
    assert not {"optimizer", "scheduler", "fp16"} & made.keys() and made["train_batch_size"] == "auto"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_batch_size": 64}, "train_batch_size is 64, and the configuration makes it 32"),
        (
            {"train_micro_batch_size_per_gpu": 4},
            "train_micro_batch_size_per_gpu is 4, and the configuration makes it 8",
        ),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps is 1, and the configuration makes it 2"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, and the configuration makes it 1.0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True, and the configuration makes it False"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True, and the configuration makes it False"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}}, "DeepSpeed's optimizer sets lr"),
        ({"optimizer": {"type": "Lion", "params": {}}}, "DeepSpeed's optimizer sets type"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}, "scheduler sets warmup_num_steps"),
        ({"zero_optimization": {"stage": 0}}, "ZeRO stage 0 is not supported here"),
        ({"zero_optimization": []}, "one JSON object"),
    ],
)
def test_settings_that_contradict_the_configuration_are_refused(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        settings(file(tmp_path, **options))


def test_settings_that_are_none_or_have_no_launcher_are_refused(launched):
    with pytest.raises(ConfigError, match="no DeepSpeed settings 'zero9'"):
        read_settings("zero9")
    launched.delenv("RANK")
    with pytest.raises(ConfigError, match="ZeRO needs a launcher"):
        settings("zero2")


def test_what_accelerate_asks_for_becomes_settings(launched, tmp_path):
    launched.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert settings()["zero_optimization"] == {"stage": 2}  # accelerate's own default
    launched.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    launched.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    launched.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
    launched.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    assert settings()["zero_optimization"] == {
        "stage": 3, "offload_optimizer": {"device": "cpu"}, "stage3_gather_16bit_weights_on_model_save": True,
    }  # fmt: skip
    launched.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", file(tmp_path, zero_optimization={"stage": 1}))
    assert settings()["zero_optimization"] == {"stage": 1}
    with pytest.raises(ConfigError, match="Two DeepSpeed settings are given"):
        settings("zero2")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"USE_FSDP": "true"}, "accelerate asks for FSDP.* add --fsdp"),
        ({"USE_MEGATRON_LM": "true"}, "accelerate asks for Megatron-LM"),
        ({"MIXED_PRECISION": "bf16"}, "accelerate asks for bf16, and model.dtype is fp32"),
        ({"MIXED_PRECISION": "fp8"}, "accelerate asks for fp8"),
        ({"DYNAMO_BACKEND": "INDUCTOR"}, "a compiled model"),
        ({"USE_DEEPSPEED": "true", "GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps is 4"),
        ({"USE_DEEPSPEED": "true", "GRADIENT_CLIPPING": "0.1"}, "gradient_clipping is 0.1"),
        ({"USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": "0"}, "ZeRO stage 0 is not supported here"),
    ],
)
def test_what_accelerate_asks_for_in_vain_is_refused(launched, environment, words):
    for name, value in environment.items():
        launched.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(ConfigError, match=words):
        settings()


def test_accelerate_that_was_to_start_several_and_started_one_is_refused(launched):
    """It leaves the address of a meeting, and nobody to meet."""
    launched.delenv("RANK")
    launched.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert engine_settings(None, config(), World()) is None
    launched.setenv("MASTER_PORT", "29500")
    with pytest.raises(ConfigError, match="asked for several processes and started one.*--multi_gpu"):
        engine_settings(None, config(), World())


@pytest.mark.parametrize("package", ["accelerate", "deepspeed"])
def test_what_is_not_installed_is_named(launched, package):
    found = language_engine.find_spec
    launched.setattr(language_engine, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(ConfigError, match=rf"{package}.* not installed.*pip install|DeepSpeed is not installed"):
        settings("zero2")


def test_doctor_looks_for_both():
    assert {"accelerate", "deepspeed"} <= {check.name for check in run_checks()}


def test_who_started_a_process_is_read_from_its_environment(launched):
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "LOCAL_SIZE"):
        launched.delenv(name, raising=False)
    assert started_by() is None
    for name, launcher in (("LOCAL_SIZE", "deepspeed"), ("TORCHELASTIC_RUN_ID", "torchrun"),
                           ("ACCELERATE_MIXED_PRECISION", "accelerate")):  # fmt: skip
        launched.setenv(name, "1")
        assert started_by() == launcher


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--launch", "torchrun", "--nproc", "3"], "A microbatch of 16 does not divide over 3 processes"),
        (["--launch", "deepspeed", "--deepspeed", "zero9"], "There are no DeepSpeed settings 'zero9'"),
        (["--launch", "torchrun", "--deepspeed", "zero2"], "ZeRO needs DeepSpeed's launcher"),
        (["--launch", "acelerate"], "Unknown launcher 'acelerate'"),
        (["--fsdp"], "FSDP2 needs several processes (--fsdp): there is one"),
        (["--launch", "torchrun", "--nproc", "1", "--fsdp"], "FSDP2 needs several processes"),
        (["--launch", "deepspeed", "--deepspeed", "zero2", "--fsdp"], "FSDP2 and DeepSpeed do not go together"),
    ],
)
def test_a_launch_that_cannot_be_is_refused_before_anything_starts(capsys, tmp_path, flags, words):
    assert main(["train", "kto/smoke", "--out", str(tmp_path / "run"), *flags]) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [("digits/smoke", "FSDP2 needs several processes"), ("digits/nft", "The trainer forward needs whole weights")],
)
def test_fsdp2_is_refused_where_weights_cannot_be_split(capsys, tmp_path, recipe, words):
    assert main(["train", recipe, "--out", str(tmp_path / "run"), "--fsdp"]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_accelerate_launches_language_models_alone(capsys, tmp_path):
    assert main(["train", "digits/smoke", "--out", str(tmp_path / "run"), "--launch", "accelerate"]) == 2
    assert "accelerate launches language models" in capsys.readouterr().err
    command, _ = launch_command("accelerate", 2, ["train", "kto/smoke", "--deepspeed", "zero3"])
    assert command[1:5] == ["-m", "accelerate.commands.launch", "--num_processes", "2"]
    assert command[-5:] == ["--module", "align.cli", "train", "kto/smoke", "--deepspeed", "zero3"][-5:]
