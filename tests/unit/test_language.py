"""Language-model trainers end to end on a tiny model saved to disk: they learn, resume bit for bit, stop before harm."""

from __future__ import annotations

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from align import checkpoint
from align.config import load_config
from align.errors import ConfigError, DataError, GuardError
from trainers import trainer_for
from trainers.bco import BCOObjective
from trainers.data_check import length_findings
from trainers.kto import KTOObjective
from trainers.language_reference import LogpCache
from trainers.tiny_language import build_tiny, toy_thumbs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("models") / "tiny")


def config(model, trainer, *overrides):
    return load_config(
        {
            "trainer": trainer, "name": "toy", "model": {"path": str(model), "train": "full"},
            "data": {"path": "toy", "heldout_fraction": 0.2, "max_length": 64}, "batch_size": 16, "microbatch": 8,
            "steps": 6, "optimizer": {"lr": 1e-3}, "evaluation": {"every": 2, "rows": 120, "prompts": 0},
            "checkpoint": {"every": 3},
        },
        overrides,
    )  # fmt: skip


def run(model, out, trainer="kto", *overrides, pairs=60, **options):
    rows = toy_thumbs(pairs).split(0.2)
    return trainer_for(config(model, trainer, *overrides), out=out, rows=rows, **options)


def metrics(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "seconds" not in k and "memory" not in k} for row in rows]


def measured(out):
    summary = json.loads((out / "summary.json").read_text())
    return {k: v for k, v in summary.items() if "seconds" not in k}


def weights(out, step=6, name="model"):
    return load_file(out / "checkpoints" / f"step_{step:06d}" / f"{name}.safetensors")


@pytest.mark.parametrize("trainer", ["kto", "bco", "dpo", "sft"])
def test_each_trainer_learns_the_toy_and_leaves_a_model_transformers_loads(model, tmp_path, trainer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = run(model, tmp_path / "run", trainer, "steps=40", "optimizer.schedule=constant", pairs=300).train()
    assert result.status == "complete"
    summary = result.summary
    if trainer == "sft":
        assert summary["nats_per_token_after"] < summary["nats_per_token_before"] - 0.3
    else:
        assert summary["auc_before"] == 0.5 and summary["auc_after"] > 0.8
        assert summary["pair_accuracy_after"]["ci_low"] > 0.6
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "complete" and record["engine"] == "single" and record["trainer"] == trainer
    folder = tmp_path / "run" / "checkpoints" / "step_000040"
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (
        loaded.generate(
            **tokenizer("Say: red", return_tensors="pt", return_token_type_ids=False), max_new_tokens=2
        ).shape[1]
        > 2
    )
    assert not list(folder.rglob("training_args.bin")) and not (folder.parent / ".staging").exists()


@pytest.mark.parametrize(
    ("trainer", "overrides"),
    [
        ("kto", ()), ("kto", ("objective.z0=ema", "microbatch=1", "batch_size=4")), ("bco", ()),
        ("bco", ("objective.delta=cumulative_pooled", "objective.balance=oversample")),
        ("kto", ("model.train=lora", "model.lora.rank=4")), ("kto", ("reference.mode=precomputed",)),
        pytest.param("dpo", (), marks=pytest.mark.slow), pytest.param("sft", (), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_stopped_run_goes_on_mid_epoch_bit_for_bit(model, tmp_path, trainer, overrides):
    if trainer != "sft":  # which has no reference
        overrides = (*overrides, f"reference.cache={tmp_path / 'cache'}")
    run(model, tmp_path / "whole", trainer, *overrides).train()
    stopped = run(model, tmp_path / "run", trainer, *overrides)
    collect = stopped.objective.finish

    def interrupted(world):
        if len(metrics(tmp_path / "run")) == 2 if (tmp_path / "run" / "metrics.jsonl").exists() else False:
            os.kill(os.getpid(), signal.SIGTERM)
        return collect(world)

    stopped.objective.finish = interrupted
    assert stopped.train().status == "stopped"
    assert max(checkpoint.checkpoints(tmp_path / "run" / "checkpoints")) == 3
    assert run(model, tmp_path / "run", trainer, *overrides).train().status == "complete"
    name = "adapter_model" if "model.train=lora" in overrides else "model"
    whole, parts = weights(tmp_path / "whole", name=name), weights(tmp_path / "run", name=name)
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "run")
    states = [
        json.loads((tmp_path / d / "checkpoints" / "step_000006" / "state.json").read_text()) for d in ("whole", "run")
    ]
    assert states[0]["objective"] == states[1]["objective"]


def test_a_finished_run_stays_finished_and_another_configuration_is_refused(model, tmp_path):
    run(model, tmp_path / "run", "kto", "steps=2").train()
    before, summary = metrics(tmp_path / "run"), measured(tmp_path / "run")
    assert run(model, tmp_path / "run", "kto", "steps=2").train().status == "complete"
    assert metrics(tmp_path / "run") == before and measured(tmp_path / "run") == summary
    with pytest.raises(ConfigError, match="objective.beta: 0.1 there, 0.2 now"):
        run(model, tmp_path / "run", "kto", "steps=2", "objective.beta=0.2")


def test_a_torn_checkpoint_is_not_resumed_from(model, tmp_path):
    from align.errors import CheckpointError

    run(model, tmp_path / "run", "kto", "steps=3").train()
    path = tmp_path / "run" / "checkpoints" / "step_000003" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"corrupt \(.*optimizer.pt"):
        run(model, tmp_path / "run", "kto", "steps=3").train()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_never_reaches_the_optimizer(model, tmp_path, where):
    poisoned = run(model, tmp_path / "run", "bco", "checkpoint.every=1")
    losses = poisoned.objective.losses

    def poison(models, batch, totals, world):
        found = losses(models, batch, totals, world)
        if len(metrics(tmp_path / "run")) == 2 if (tmp_path / "run" / "metrics.jsonl").exists() else False:
            parameter = next(models.plain.parameters())
            if where == "loss":
                found.rows[1] = float("nan")
            else:
                parameter.register_hook(lambda grad: grad * float("inf"))
        return found

    poisoned.objective.losses = poison
    with pytest.raises(
        GuardError, match="toy, row .*weights are unchanged" if where == "loss" else "gradient norm is not finite"
    ):
        poisoned.train()
    assert len(metrics(tmp_path / "run")) == 2 and max(checkpoint.checkpoints(tmp_path / "run" / "checkpoints")) == 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_a_policy_that_is_not_its_reference_is_refused_before_the_first_update(model, tmp_path, monkeypatch):
    from trainers import language_reference

    def moved(*args, copy=language_reference.frozen_copy):
        made = copy(*args)
        with torch.no_grad():
            made.lm_head.weight.add_(torch.randn_like(made.lm_head.weight) * 0.1)
        return made

    monkeypatch.setattr(language_reference, "frozen_copy", moved)
    with pytest.raises(GuardError, match="not the reference"):
        run(model, tmp_path / "run").train()


def same(a, b, tolerance=2e-6):
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], atol=tolerance, rtol=1e-4, msg=key)


def test_precomputed_log_probs_train_as_live_ones_and_are_kept(model, tmp_path):
    cache = f"reference.cache={tmp_path / 'cache'}"
    for trainer in ("bco", "kto", "dpo"):
        run(model, tmp_path / f"{trainer}_live", trainer, "reference.mode=copy", "steps=3").train()
        run(model, tmp_path / f"{trainer}_kept", trainer, "reference.mode=precomputed", cache, "steps=3").train()
        same(weights(tmp_path / f"{trainer}_live", 3), weights(tmp_path / f"{trainer}_kept", 3))
        epochs = [json.loads((tmp_path / f"{trainer}_{k}" / "run.json").read_text())["epoch"] for k in ("live", "kept")]
        assert [e["same_rows"] for e in epochs] == [False, trainer == "kto"]
        assert epochs[0]["left_out"] == epochs[1]["left_out"] < 16
    again = run(model, tmp_path / "again", "dpo", "reference.mode=precomputed", cache, "steps=1")
    from trainers.language_model import load_language_model

    loaded = load_language_model(again.config.model, seed=0)
    assert again._precompute(loaded).computed == 0  # KTO and BCO had worked it all out
    other = LogpCache(tmp_path / "cache", str(model), "bf16")
    assert not other.folder.exists()  # another precision is another reference


def test_adapters_switched_off_are_the_separate_reference(model, tmp_path):
    lora = ("model.train=lora", "model.lora.rank=4", "steps=3", "optimizer.lr=0.01")
    run(model, tmp_path / "off", "kto", *lora).train()
    run(
        model, tmp_path / "kept", "kto", *lora, "reference.mode=precomputed", f"reference.cache={tmp_path / 'c'}"
    ).train()
    same(weights(tmp_path / "off", 3, "adapter_model"), weights(tmp_path / "kept", 3, "adapter_model"), 1e-5)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model), tmp_path / "off" / "checkpoints" / "step_000003"
    )
    assert loaded.peft_config["default"].r == 4


@pytest.mark.parametrize("trainer", ["bco", "dpo", "sft", "kto"])
def test_accumulation_changes_nothing(model, tmp_path, trainer):
    """k microbatches of B are one of k B: for KTO with z0 held fixed, for all with the same rows in an update."""
    rows, found = toy_thumbs(12), []
    batch = 24 if trainer in ("kto", "bco") else 12
    for size in (2, batch // 2, batch):
        over = [f"microbatch={size}", f"batch_size={batch}", "steps=1", "data.heldout_fraction=0", "optimizer.eps=1e-3"]
        over += ["objective.z0=zero"] if trainer == "kto" else []
        trainer_for(config(model, trainer, *over), out=tmp_path / f"{size}", rows=(rows, None)).train()
        found.append((weights(tmp_path / f"{size}", 1), metrics(tmp_path / f"{size}")[0]["loss"]))
    for state, loss in found[1:]:
        assert loss == pytest.approx(found[0][1], rel=1e-6)
        same(found[0][0], state, 2e-6)


def test_one_class_is_refused_unless_asked_for(model, tmp_path):
    rows = toy_thumbs(30)
    ups = rows.__class__(tuple(r for r in rows.rows if r.label), "thumbs.jsonl")
    with pytest.raises(DataError, match="no thumb down in the data.*thumbs.jsonl"):
        trainer_for(config(model, "kto"), out=tmp_path / "run", rows=(ups, None))
    assert not (tmp_path / "run").exists()
    allowed = config(model, "bco", "data.allow_one_class=true", "steps=1")
    assert trainer_for(allowed, out=tmp_path / "run", rows=(ups, None)).train().status == "complete"


def test_class_weights_count_what_is_left_and_are_recorded(model, tmp_path):
    rows = toy_thumbs(40)
    few = rows.__class__(tuple(r for i, r in enumerate(rows.rows) if r.label or i % 8 == 1), "few")
    made = trainer_for(config(model, "kto", "steps=1"), out=tmp_path / "run", rows=(few, None))
    assert made.objective.weights == (1.0, 4.0)
    made.train()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["weights"] == {
        "desirable": 1.0, "undesirable": 4.0, "up": 40, "down": 10
    }  # fmt: skip
    fixed = config(model, "kto", "objective.weight_desirable=1", "objective.weight_undesirable=1", "steps=1")
    trainer_for(fixed, out=tmp_path / "fixed", rows=(few, None)).train()
    assert "the paper advises 1 to 1.5" in (tmp_path / "fixed" / "warnings.jsonl").read_text()


def test_rows_beyond_the_positions_of_a_model_are_told(model, tmp_path):
    longest = max(run(model, tmp_path / "run").tokens.length)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Say: red", "completion": " red", "label": true}\n' * 2)
    for positions, told in ((longest, 0), (2, 1)):
        short = shutil.copytree(model, tmp_path / f"short_{positions}")
        about = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": int(positions)}
        (short / "config.json").write_text(json.dumps(about))
        warnings = run(short, tmp_path / f"run_{positions}").about["warnings"]
        expected = f"The longest row has {longest} tokens, and the model was made for 2"
        assert sum(expected in warning for warning in warnings) == told
        findings = length_findings(config(short, "kto", f"data.path={tmp_path / 'rows.jsonl'}"))
        assert [f.code for f in findings if f.level == "warning"] == ["positions"] * told


def test_microbatches_must_divide(model):
    with pytest.raises(ConfigError, match="batch_size 10 is no multiple of microbatch 8"):
        trainer_for(config(model, "kto", "batch_size=10"))
    with pytest.raises(ConfigError, match="no mismatched pair.*trainer: bco"):
        trainer_for(config(model, "kto", "microbatch=1"))


def test_the_running_states_move_as_their_equations_say(model, tmp_path):
    made = run(model, tmp_path / "run", "bco", "objective.delta_decay=0.5", "steps=3")
    made.train()
    rows = metrics(tmp_path / "run")
    assert rows[0]["delta"] == 0  # a step sees what the one before left
    assert rows[1]["delta"] == pytest.approx((rows[0]["delta/mean_up"] + rows[0]["delta/mean_down"]) / 2)
    up = rows[0]["rewards/up"]
    assert rows[0]["delta/mean_up"] == pytest.approx(up, abs=1e-6)
    assert rows[1]["delta/mean_up"] == pytest.approx(2 / 11 * up + 9 / 11 * rows[1]["rewards/up"], abs=1e-6)
    assert isinstance(made.objective, BCOObjective) and made.objective.delta.updates == 3
    assert not KTOObjective(config(model, "kto", "objective.loss=apo_zero_unpaired")).mismatched


def test_humanline_clamps_the_tokens_of_rows_and_mismatched_pairs(model, tmp_path):
    run(model, tmp_path / "plain", "kto", "steps=6", "optimizer.lr=0.02").train()
    run(model, tmp_path / "line", "kto", "steps=6", "optimizer.lr=0.02", "objective.humanline=[-0.01, 0.01]").train()
    plain, line = metrics(tmp_path / "plain"), metrics(tmp_path / "line")
    assert abs(plain[-1]["log_ratio/up"]) > 0.5
    assert all(abs(row["log_ratio/up"]) < 0.1 and abs(row["z0_mean"]) < 0.1 for row in line)


def test_a_copy_multiplies_in_the_policys_precision(tmp_path):
    from trainers import BCO

    run = BCO(load_config("bco/smoke", ["model.dtype=bf16", "steps=1", "evaluation.prompts=0"]), out=tmp_path / "run")
    run.train()
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["log_ratio/up"] == first["log_ratio/down"] == 0


def test_the_measured_rows_hold_both_classes_of_sorted_data():
    from trainers.language_measures import measured_rows

    tokens = type("Rows", (), {"pair": np.full(400, -1), "__len__": lambda self: 400})()
    rows = measured_rows(tokens, 40)
    assert len(rows) == 40 and rows == sorted(set(rows)) and 8 < sum(r < 200 for r in rows) < 32
    tokens.pair = np.arange(400) // 2
    rows = measured_rows(tokens, 40)
    assert {r // 2 for r in rows} == {r // 2 for r in rows if r % 2} and len(rows) == 40
