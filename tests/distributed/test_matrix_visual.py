"""DanceGRPO under every engine: one process's run, and what a process holds of it.

python -m pytest -n 0 -m "slow or soak" tests/distributed/test_matrix_visual.py -o junit_family=xunit1 --junitxml=visual.xml

runs all cells; visual.xml has of each the engine, the largest difference, and the shares held.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import processes
import pytest
from safetensors.torch import load_file

import tiny
from align.cli import main
from align.config import load_config
from align.errors import AlignError, ConfigError
from align.launch import leave_world
from tests.distributed.weighing import cell, largest_difference, require_shares, shares_held, weigh_second_step
from trainers import DanceGRPO

ENGINES = {"fsdp2": "fsdp2", "zero3": "deepspeed_zero3"}
"""Those that split weights."""
OTHERS = {None: "data_parallel", "zero1": "deepspeed_zero1", "zero2": "deepspeed_zero2"}
ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
CLIP = 1e-4
"""Every gradient is longer than this, so that each update is clipped; AdamW's eps is of the size of what is left."""

pytestmark = [pytest.mark.timeout(300)]
SLOW, SOAK = pytest.mark.slow, pytest.mark.soak


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model and prompts."""
    place = tmp_path_factory.mktemp("made")
    tiny.sd3(place / "sd3")
    prompts = [f"a {how} handwritten {digit}" for how in ("bold", "thin") for digit in ("two", "five", "seven")]
    (place / "zero3.json").write_text(json.dumps({"zero_optimization": ZERO3}))
    (place / "prompts.txt").write_text("\n".join(prompts) + "\n")
    return place


def config_of(made, *changed):
    """Four steps of 15 samples, 7 and 8 on two processes, in three updates of two tiles or three."""
    config = {
        "trainer": "dance_grpo", "name": "toy", "steps": 4,
        "model": {"path": str(made / "sd3"), "lora": {"rank": 4, "alpha": 8}},
        "prompts": {"path": str(made / "prompts.txt"), "heldout_fraction": 0.34},
        "rewards": [{"name": "digits/raw_ink"}], "prompts_per_step": 3, "group_size": 5, "updates_per_step": 3,
        "sampler": {"kernel": "cps", "eta": 0.5, "solver_steps": 6, "shift": 3}, "batch": {"tile": 8},
        "optimizer": {"lr": 1e-3, "eps": 1e-6, "max_grad_norm": CLIP, "ema_decay": 0.9}, "checkpoint": {"every": 2},
        "evaluation": {"every": 2, "samples": 7, "final_samples": 7, "solver_steps": 3},
    }  # fmt: skip
    return load_config(config, changed)


class Told(DanceGRPO):
    """A trainer that keeps its run, so that one can see what really carried its updates out.

    In `dies`, a step and a process, that process is killed when it has gone back through some of its tiles.
    """

    dies = None

    def terms(self, tile, rollout, run, *, first):
        if self.dies == (rollout.key[1], self.world.rank) and len(run.sitting.tiles) == 1 and not first:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().terms(tile, rollout, run, first=first)

    def open_run(self):
        self.run, self.shares = super().open_run(), {}
        engine, module = self.run.engine, self.policy.family.denoiser
        if hasattr(engine, "engine"):
            weigh_second_step(engine.engine, module, self.shares)
        elif self.world.size > 1:
            step = engine.optimizer.step

            def weighed():
                self.shares = shares_held(module, engine.optimizer)
                return step()

            engine.optimizer.step = weighed
        return self.run


def train(config, out, engine=None, dies=None):
    """Train; return what this process can tell of its engine, and its pieces of the weights."""
    from torch.distributed.tensor import DTensor

    how = {"fsdp": True} if engine == "fsdp2" else {"deepspeed": engine}
    if engine == "zero3":  # or DeepSpeed keeps weights as small as all of these whole
        how["deepspeed"] = str(Path(config.prompts.path).with_name("zero3.json"))
    if engine == "shipped":
        how["deepspeed"] = "zero3"
    trainer = Told(config, out=out, **how)
    trainer.dies = dies
    result = trainer.train()
    own, whole = (
        trainer.run.engine,
        [n for n, p in trainer.policy.family.denoiser.named_parameters() if not isinstance(p, DTensor)],
    )
    inner = getattr(own, "engine", None)
    told = {
        "status": result.status, "engine": type(own if inner is None else inner).__name__, "name": own.name,
        "stage": 0 if inner is None else inner.zero_optimization_stage(), "shares": trainer.shares, "whole": whole,
        "pieces": [(n, p.first, p.values.numel()) for n, p in own.pieces().items()],
    }  # fmt: skip
    leave_world()
    return told


def difference(one, other):
    """The largest difference of a weight, of the average or of the optimizer's state; the curves agree too."""
    for row, again in zip(processes.metrics(one), processes.metrics(other), strict=True):
        assert row.keys() == again.keys() and row["grad_norm"] > CLIP
        for name in ("loss", "reward", "grad_norm", "approx_kl", "first_ratio_error", "samples", "updates"):
            assert again[name] == pytest.approx(row[name], abs=1e-5, rel=1e-4), (row["step"], name)
    summaries = [json.loads((out / "summary.json").read_text()) for out in (one, other)]
    for name in ("reward_before", "reward_after"):
        assert summaries[1][name]["mean"] == pytest.approx(summaries[0][name]["mean"], abs=1e-5), name
    receipts = [summary["sparsity"] for summary in summaries]
    assert receipts[0].keys() == receipts[1].keys() and receipts[0]["status"] == "measured"
    for name in ("bit_identical", "norm", "relative_norm"):
        assert receipts[1][name] == pytest.approx(receipts[0][name], rel=1e-2, abs=1e-4), name
    return largest_difference(one, other)


@pytest.fixture(scope="module")
def alone(made, tmp_path_factory):
    """Returns the folder of a run in one process, made when it is first asked for."""
    root, runs = tmp_path_factory.mktemp("alone"), {}

    def find(*changed):
        if changed not in runs:
            runs[changed] = root / str(len(runs))
            assert train(config_of(made, *changed), runs[changed])["name"] == "single"
        return runs[changed]

    return find


def require_engine(told, engine, size):
    """The engine asked for carried the updates out, and each process held its share of what that splits."""
    for one in told:
        assert one["status"] == "complete" and one["name"] == (ENGINES | OTHERS)[engine]
        if engine == "fsdp2":
            assert one["engine"] == "FSDP2Engine" and not one["whole"]
        elif engine is None:
            assert one["engine"] == "ReplicaEngine"
        else:
            assert (one["engine"], one["stage"]) == ("DeepSpeedEngine", int(engine[-1]))
        require_shares(one["shares"], engine, size)


@pytest.mark.parametrize(
    ("engine", "train_what", "size"),
    [
        pytest.param(engine, what, size, marks=SLOW if (what, size) == ("full", 2) else SOAK)
        for engine in ENGINES
        for what, size in (("full", 2), ("lora", 2), ("full", 4))
    ]
    + [pytest.param(engine, what, 2, marks=SOAK) for engine in OTHERS for what in ("full", "lora")],
)
def test_several_processes_are_one(made, alone, tmp_path, record_property, engine, train_what, size):
    changed = (f"model.train={train_what}", "steps=3")
    work = lambda: train(config_of(made, *changed), tmp_path / "run", engine)  # noqa: E731
    ended = processes.world(size, work, tmp_path / "world", within=280)
    assert all(isinstance(e.value, dict) for e in ended), [e.output[-3000:] + str(e.value) for e in ended]
    told = [e.value for e in ended]
    require_engine(told, engine, size)
    found = difference(alone(*changed), tmp_path / "run")
    assert found < 1e-5
    assert json.loads((tmp_path / "run/run.json").read_text())["engine"] == told[0]["name"]
    record_property("cell", cell("dance_grpo", told[0]["name"], train_what, found, told))


@SOAK
@pytest.mark.parametrize("engine", ENGINES)
def test_a_killed_run_goes_on_bit_for_bit_and_under_any_number_of_processes(made, tmp_path, engine):
    """One of two processes is killed in step 4, between passes in which they meet; step 2 was saved in two pieces."""
    config = config_of(made, "evaluation.every=0", "evaluation.final_samples=5", "tracking.samples_every=0")

    def run(name, size, engine, dies=None):
        work = lambda: train(config, tmp_path / name, engine, dies)  # noqa: E731
        return processes.world(size, work, tmp_path / "world", within=140)

    first, second = run("again", 2, engine, dies=(4, 1))
    assert second.code == -signal.SIGKILL and isinstance(first.value, AlignError), first
    assert "Another process of the run is gone" in str(first.value) and "align resume" in str(first.value)
    assert [row["step"] for row in processes.metrics(tmp_path / "again")] == [1, 2, 3]
    step = tmp_path / "again/checkpoints/step_000002"
    assert len(list(step.glob("model.*.safetensors"))) == 2 and list(step.parent.glob("step_*")) == [step]
    for name in ("three", "one"):
        shutil.copytree(tmp_path / "again", tmp_path / name)
    for name, size, other in (("whole", 2, engine), ("again", 2, engine), ("three", 3, engine), ("one", 1, None)):
        ended = run(name, size, other)
        assert all(isinstance(e.value, dict) for e in ended), [e.output[-3000:] + str(e.value) for e in ended]
        assert [row["step"] for row in processes.metrics(tmp_path / name)] == [1, 2, 3, 4]
    files = sorted(path.name for path in (tmp_path / "whole/checkpoints/step_000004").glob("*.safetensors"))
    assert len(files) == 7
    for file in files:
        same = [(tmp_path / name / "checkpoints/step_000004" / file).read_bytes() for name in ("whole", "again")]
        assert same[0] == same[1], file
    assert difference(tmp_path / "whole", tmp_path / "three") < 1e-5
    assert difference(tmp_path / "whole", tmp_path / "one") < 1e-5
    for work in (exported, evaluated, compared):
        found = [work(tmp_path / name, made, tmp_path / f"{name}_{work.__name__}") for name in ("whole", "one")]
        assert found[0] and found[0] == pytest.approx(found[1], abs=1e-4, rel=1e-3), work.__name__


def exported(out, made, place):
    """Sums of the tensors that a run is exported as."""
    assert main(["export", str(out), "--to", "full", "--out", str(place)]) == 0
    tensors = load_file(next((place / "transformer").glob("*.safetensors")))
    return {name: float(value.double().abs().sum()) for name, value in tensors.items()}


def evaluated(out, made, place):
    """What `align evaluate` measures of a run."""
    assert main(["evaluate", str(out), "--samples", "5", "--json", str(place)]) == 0
    return {"reward": json.loads(place.read_text())["rewards"]["reward"]["mean"]}


def compared(out, made, place):
    """Which weights `align sparsity compare` finds moved in a checkpoint."""
    step = str(out / "checkpoints/step_000004")
    assert main(["sparsity", "compare", str(made / "sd3/transformer"), step, "--json", str(place)]) == 0
    found = json.loads(place.read_text())
    return {name: found[name] for name in ("bit_identical", "norm")}


@SOAK
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "changed",
    [
        ("objective.kl_weight=0.1", "trained_steps.window=2", "trained_steps.move_every=1"),
        ("objective.loss=dppo", "objective.dppo_threshold=1e-5"),
    ],
    ids=["kl and window", "dppo"],
)
def test_other_losses_are_those_of_one_process(made, alone, tmp_path, engine, changed):
    """A KL term takes a second pass without adapters; dppo masks terms, so that tiles of a process may weigh nothing."""
    changed = ("steps=2", *changed)
    work = lambda: train(config_of(made, *changed), tmp_path / "run", engine)  # noqa: E731
    ended = processes.world(2, work, tmp_path / "world", within=280)
    assert all(isinstance(e.value, dict) for e in ended), [e.output[-3000:] + str(e.value) for e in ended]
    assert difference(alone(*changed), tmp_path / "run") < 1e-5


@SOAK
def test_small_weights_that_deepspeed_keeps_whole_are_those_that_are_delivered(made, alone, tmp_path):
    """Under the settings that ship every weight of so small a model is kept whole between updates."""
    changed = ("model.train=full", "optimizer.lr=0.03", "tracking.samples_every=0")
    work = lambda: train(config_of(made, *changed), tmp_path / "run", "shipped")  # noqa: E731
    ended = processes.world(2, work, tmp_path / "world", within=280)
    assert all(isinstance(e.value, dict) for e in ended), [e.output[-3000:] + str(e.value) for e in ended]
    assert ended[0].value["stage"] == 3 and ended[0].value["shares"]["parameters"] >= 1
    assert difference(alone(*changed), tmp_path / "run") < 1e-5


@SOAK
@pytest.mark.parametrize("engine", ENGINES)
def test_it_trains_in_bfloat16(made, tmp_path, engine):
    config = config_of(made, "model.dtype=bf16")
    ended = processes.world(2, lambda: train(config, tmp_path / "run", engine), tmp_path / "world", within=280)
    assert all(isinstance(e.value, dict) for e in ended), [e.output[-3000:] + str(e.value) for e in ended]
    require_engine([e.value for e in ended], engine, 2)
    shutil.rmtree(tmp_path / "run/checkpoints/step_000004")
    ended = processes.world(2, lambda: train(config, tmp_path / "run", engine), tmp_path / "world", within=280)
    rows = processes.metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(math.isfinite(row["grad_norm"]) for row in rows)
    assert (tmp_path / "run/checkpoints/step_000004").is_dir()


@SOAK
def test_it_trains_with_weights_and_optimizer_offloaded(made, tmp_path):
    where = {"device": "cpu"}
    settings = tmp_path / "offload.json"
    settings.write_text(
        json.dumps({"zero_optimization": {**ZERO3, "offload_optimizer": where, "offload_param": where}})
    )
    for step in (4, 2):
        ended = processes.world(
            2, lambda: train(config_of(made), tmp_path / "run", str(settings)), tmp_path / "world", within=280
        )
        assert all(isinstance(e.value, dict) for e in ended), [e.output[-3000:] + str(e.value) for e in ended]
        assert ended[0].value["stage"] == 3
        rows = processes.metrics(tmp_path / "run")
        assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(math.isfinite(row["grad_norm"]) for row in rows)
        if step == 4:
            shutil.rmtree(tmp_path / "run/checkpoints/step_000004")


def test_what_needs_whole_weights_is_refused(made, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for changed in (["sparsity.every=1"], ["model.train=full", "objective.kl_weight=0.1"]):
        with pytest.raises(ConfigError, match=r"whole weights.*FSDP2"):
            DanceGRPO(config_of(made, *changed), out=tmp_path / "run", fsdp=True)
    with pytest.raises(ConfigError, match="do not go together"):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        DanceGRPO(config_of(made), out=tmp_path / "run", fsdp=True, deepspeed="zero2")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ConfigError, match="FSDP2 needs several processes"):
        DanceGRPO(config_of(made), out=tmp_path / "run", fsdp=True)
    assert not (tmp_path / "run").exists()
