"""What a plan says, against bytes worked by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from align.cli import main
from align.footprint import LOGITS
from align.plan import OVERHEAD, Job, choose, held, launch, layout, per_weight, refusal, step_seconds, table

MILLION = 1_000_000


@pytest.mark.parametrize(
    ("kind", "engine", "half", "accumulation", "bytes_of"),
    [
        ("language", "single", False, 1, (4, 4, 8, 0)),  # weights, gradients, two moments
        ("language", "data_parallel", False, 1, (4, 4, 8, 4)),  # DDP's buckets
        ("language", "zero1", True, 1, (2, 2, 3, 0.5)),  # bfloat16; (4 + 8) / 4 of the optimizer
        ("language", "zero2", True, 1, (2, 0.5, 3, 0)),  # gradients split as they arise
        ("language", "zero3", True, 1, (0.5, 0.5, 3, 0)),
        ("language", "fsdp2", False, 1, (1, 1, 2, 0)),
        ("language", "fsdp2", False, 2, (1, 4, 2, 1)),  # gradients are whole until the update
        ("visual", "zero2", False, 1, (4, 4, 3, 1)),  # our own loop adds gradients up once an update
        ("visual", "zero3", True, 1, (3, 4, 3, 1)),  # and autocast keeps copies of 2 B
        ("visual", "fsdp2", False, 1, (1, 4, 2, 1)),
        ("fit", "fsdp2", False, 1, (1, 1, 2, 0)),  # one pass an update
    ],
)
def test_bytes_of_a_trained_weight_on_one_of_four(kind, engine, half, accumulation, bytes_of):
    found = per_weight(kind, engine, 4, half=half, accumulation=accumulation)
    assert tuple(found[part] for part in ("weights", "gradients", "optimizer", "exchange")) == bytes_of


def test_the_peak_is_the_largest_phase_on_top_of_what_stays():
    job = Job("language", trained=10 * MILLION, training=5e6, sampling=1e6, logits=1e5, microbatch=8, rows=8)
    found = held(job, "single", 1)
    assert found.parts["trained weights"] == 40e6 and found.parts["optimizer"] == 80e6
    assert found.rows == 8 and found.phase == "training"
    assert found.peak == 40e6 + 80e6 + OVERHEAD + 40e6 + 8 * 5e6 + 2 * 8e5
    assert held(job, "data_parallel", 4).parts["training activations"] == 2 * 5e6 + 2 * 2e5, "two rows on each"
    assert held(replace(job, logits=1e9), "single", 1).parts["training activations"] == 8 * 5e6 + 2 * LOGITS
    lora = Job("language", trained=MILLION, frozen=100e6, reference=0, training=0.0, sampling=9e6, microbatch=4, rows=4)
    assert held(lora, "single", 1).phase == "sampling"
    assert held(lora, "single", 1).peak == 4e6 + 100e6 + 8e6 + OVERHEAD + 4 * 9e6


def test_frozen_weights_are_split_where_weights_are():
    job = Job("language", trained=MILLION, frozen=800e6, microbatch=4, rows=4, widest=10 * MILLION, outside=5 * MILLION)
    assert held(job, "zero2", 4).parts["frozen weights"] == 800e6
    assert held(job, "fsdp2", 4).parts["frozen weights"] == 200e6
    assert held(job, "fsdp2", 4).parts["gathered weights"] == 4 * (5 + 2 * 10) * MILLION


def test_a_rollout_holds_whole_what_is_split():
    job = Job("visual", trained=30 * MILLION, widest=4 * MILLION, outside=2 * MILLION, beside=7e6, rows=8)
    found = held(job, "fsdp2", 4)
    assert found.parts["gathered weights"] == 4 * (2 + 2 * 4) * MILLION and found.parts["text encoders"] == 7e6
    assert found.parts["gathered weights"] + found.parts["whole weights"] == 120e6  # in a rollout
    assert found.phase == "update" and found.peak == 30e6 + 40e6 + 60e6 + 7e6 + OVERHEAD + 120e6 + 30e6
    assert held(job, "zero2", 4).parts["whole weights"] == 0
    unknown = Job("visual", trained=30 * MILLION, frozen=8e6, rows=8)
    assert held(unknown, "fsdp2", 4).parts["gathered weights"] == 128e6


@pytest.mark.parametrize(
    ("recipe", "offered"), [("digits/full", True), ("digits/nft", False), ("digits/diffusion_kto", False)]
)
def test_engines_that_split_weights_are_offered_where_they_exist(recipe, offered):
    from align.commands.jobs import describe_job
    from align.config import load_config

    job, _ = describe_job(load_config(recipe, ["model.path=digits/random"]))  # of the same shape, and not pretrained
    rows = [row for row in table(job, 80e9) if row.engine in ("fsdp2", "zero3")]
    assert bool(rows) == offered and not any(row.why_not for row in rows)
    assert 0 < job.widest < job.trained + job.frozen / 4 and job.outside > 0


def test_a_plan_takes_what_fits_on_most_and_exchanges_least():
    job = Job("language", trained=1000 * MILLION, microbatch=8, rows=8)
    rows = table(job, memory=20e9)
    assert not next(row for row in rows if row.engine == "data_parallel" and row.processes == 8).fits
    best = choose(rows, 8, per_node=8)
    assert (best.engine, best.processes) == ("zero1", 8)
    assert choose(table(job, memory=1e9), 64, per_node=8) is None
    assert all(row.why_not for row in rows if row.processes > 8), "a microbatch of 8 does not divide over 16"
    assert refusal(Job("visual", trained=1, rows=3), 4) == "3 rows a step are fewer than 4 processes"


def test_a_step_is_the_busiest_process():
    assert step_seconds(Job("visual", trained=1, rows=10, feq=22.0), 4, 0.5) == 3 * 22 * 0.5


def test_commands_start_what_was_planned():
    assert launch("a.yaml", "zero3", 8, 8) == "align train a.yaml --launch deepspeed --nproc 8 --deepspeed zero3"
    assert launch("a.yaml", "fsdp2", 2, 8) == "align train a.yaml --launch torchrun --nproc 2 --fsdp"
    assert "--num_nodes 2 --num_gpus 8 " in launch("a.yaml", "zero2", 16, 8)
    assert "--nnodes 2 " in launch("a.yaml", "fsdp2", 16, 8)


def test_each_machine_has_equally_many_processes():
    assert layout(16, 8) == (2, 8) and layout(16, 6) == (4, 4) and layout(8, 5) == (2, 4) and layout(4, 8) == (1, 4)
    assert "--nnodes 4 --node_rank $RANK_OF_NODE --nproc_per_node 4 " in launch("a.yaml", "fsdp2", 16, 6)
    rows = table(Job("visual", trained=1, rows=64), memory=80e9)
    assert choose(rows, 18, per_node=6).processes == 8, "three machines: 16 would need a fourth"
    assert choose(rows, 24, per_node=6).processes == 16


def test_the_verb_tells_what_fits_and_refuses_what_it_cannot_know(tmp_path, capsys):
    assert main(["plan", "kto/qwen2_5_7b_ultrafeedback", "--gpus", "4", "--json", str(tmp_path / "p.json")]) == 0
    said, plan = capsys.readouterr().out, json.loads((tmp_path / "p.json").read_text())
    assert plan["parameters"] == 7_615_616_512 and "recommended: zero1 on 4" in said and "Extrapolated" in said
    assert plan["recommendation"]["command"].endswith("--launch deepspeed --nproc 4 --deepspeed zero1")
    assert main(["plan", "kto/smoke", "model.path=nobody/nothing"]) == 2
    assert "Nothing tells how large" in capsys.readouterr().err
    assert main(["plan", "fit/digits"]) == 2 == main(["plan", "fit/digits", "--dry-run"])


def test_a_small_classifier_is_planned_without_a_time_that_nobody_asked_for(tmp_path, capsys):
    from transformers import Qwen2Config

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    Qwen2Config(vocab_size=64, num_key_value_heads=2, num_labels=1, **sizes).save_pretrained(tmp_path)
    file = tmp_path / "fit.yaml"
    file.write_text(f"trainer: fit\ndata: {{paths: [none]}}\nmodel: {{backbone: classifier, path: {tmp_path}}}\n")
    assert main(["plan", str(file), "--json", str(tmp_path / "p.json")]) == 0
    assert json.loads((tmp_path / "p.json").read_text())["forward_seconds_are"] == "unknown"
    assert main(["plan", str(file), "--measure"]) == 2 and "not timed here" in capsys.readouterr().err
