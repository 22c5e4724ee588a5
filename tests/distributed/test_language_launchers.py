"""Every launcher starts every trainer of language models; the engine is the one asked for, the weights are one process's."""

from __future__ import annotations

import json
import re
import sys

import processes
import pytest
import torch
import yaml
from safetensors.torch import load_file

from align.launch import launch_command
from tests.distributed.language_runs import small
from trainers import trainer_for
from trainers.tiny_language import build_tiny

BIN = processes.Path(sys.executable).parent
DEEPSPEED = [str(BIN / "deepspeed"), "--num_gpus", "2"]
TORCHRUN = [str(BIN / "torchrun"), "--nproc_per_node", "2"]
ALIGN = [sys.executable, "-m", "align.cli", "train"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The model, and a function that writes the configuration of a trainer to a file and trains it in one process."""
    root = tmp_path_factory.mktemp("made")
    model = build_tiny(root / "model")

    def make(trainer):
        file, out = root / f"{trainer}.yaml", root / trainer
        config = small(model, trainer, "steps=2", "evaluation.rows=4")
        if not file.exists():
            file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
            assert trainer_for(config, out=out).train().status == "complete"
        return file, out

    return make


def accelerate_config(tmp_path, **deepspeed):
    file = tmp_path / "accelerate.yaml"
    file.write_text(yaml.safe_dump({
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "mixed_precision": "no",
        "num_machines": 1, "num_processes": 2, "machine_rank": 0, "main_training_function": "main", "use_cpu": False,
        "deepspeed_config": deepspeed,
    }))  # fmt: skip
    return [str(BIN / "accelerate"), "launch", "--config_file", str(file)]


def settings_file(tmp_path, stage):
    """What the documentation of transformers gives as an example, with the optimizer and the schedule left to it."""
    auto = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({
        "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": stage}, "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "optimizer": {"type": "AdamW", "params": auto},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": "auto", "total_num_steps": "auto"}},
    }))  # fmt: skip
    return str(file)


CASES = {
    "align_deepspeed": ("kto", "deepspeed_zero3", "deepspeed"),
    "align_accelerate": ("sft", "data_parallel", "accelerate"),
    "deepspeed": ("bco", "deepspeed_zero2", "deepspeed"),
    "accelerate_stage": ("dpo", "deepspeed_zero3", "accelerate"),
    "accelerate_file": ("sft", "deepspeed_zero2", "accelerate"),
    "torchrun": ("dpo", "data_parallel", "torchrun"),
    "torchrun_zero": ("sft", "deepspeed_zero1", "torchrun"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_launcher_trains_what_one_process_does(made, tmp_path, name):
    trainer, engine, launcher = CASES[name]
    file, alone = made(trainer)
    out, port = tmp_path / "run", str(processes.free_port())
    script = ["scripts/train.py", str(file), "--out", str(out)]
    command = {
        "align_deepspeed": lambda: [
            *ALIGN, str(file), "--out", str(out), "--launch", "deepspeed", "--nproc", "2", "--deepspeed", "zero3",
        ],
        "align_accelerate": lambda: [*ALIGN, str(file), "--out", str(out), "--launch", "accelerate", "--nproc", "2"],
        "deepspeed": lambda: [*DEEPSPEED, "--master_port", port, *script, "--deepspeed", "zero2"],
        "accelerate_stage": lambda: [
            *accelerate_config(
                tmp_path, zero_stage=3, offload_optimizer_device="none", offload_param_device="none",
                zero3_init_flag=True, zero3_save_16bit_model=True, gradient_accumulation_steps=2,
            ),
            "--main_process_port", port, *script,
        ],
        "accelerate_file": lambda: [
            *accelerate_config(tmp_path, deepspeed_config_file=settings_file(tmp_path, 2), zero3_init_flag=False),
            "--main_process_port", port, *script,
        ],
        "torchrun": lambda: [*TORCHRUN, "--master_port", port, *script],
        "torchrun_zero": lambda: [*TORCHRUN, "--master_port", port, *script, "--deepspeed", "zero1"],
    }[name]()  # fmt: skip
    log = tmp_path / "log"
    with processes.launched(
        command, log, PYTHONPATH=str(processes.ROOT), TORCH_EXTENSIONS_DIR=str(tmp_path)
    ) as process:
        code = process.wait(timeout=200)
    assert code == 0, log.read_text()[-4000:]
    record = json.loads((out / "run.json").read_text())
    assert (record["engine"], record["processes"], record["launcher"], record["status"], record["trainer"]) == (
        engine, 2, launcher, "complete", trainer,
    )  # fmt: skip
    one, two = (load_file(run / "checkpoints/step_000002/model.safetensors") for run in (alone, out))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-5, rtol=1e-4, msg=key)
    assert not list(tmp_path.rglob("*.so"))  # nothing was compiled
    if name.startswith("align"):
        printed = next(line for line in log.read_text().splitlines() if line.startswith("align: "))
        words = ["train", str(file), "--out", str(out), *(["--deepspeed", "zero3"] if "zero3" in engine else [])]
        expected = " ".join(launch_command(launcher, 2, words)[0])
        assert re.sub(r"port \d+", "port N", expected) in re.sub(r"port \d+", "port N", printed)
