"""A fit of a classifier under every engine: one process's reward, and what a process holds of it.

python -m pytest -n 0 -m "slow or soak" tests/distributed/test_matrix_fit.py -o junit_family=xunit1 --junitxml=fit.xml

runs all cells; see test_matrix_visual.py.
"""

from __future__ import annotations

import json
import shutil

import processes
import pytest
from torch import nn
from torch.distributed.tensor import DTensor

from align.cli import main
from align.errors import ConfigError
from align.launch import leave_world
from rewards import fit
from tests.distributed.test_fit_processes import config, require_equal, said_of_everything
from tests.distributed.weighing import cell, largest_difference, require_shares, shares_held, weigh_second_step

ENGINES = {"fsdp2": ("FSDP2Engine", 0, "fsdp2"), "zero3": ("DeepSpeedEngine", 3, "deepspeed_zero3")}
"""Those that split weights."""
OTHERS = {
    None: ("ReplicaEngine", 0, "data_parallel"), "zero1": ("DeepSpeedEngine", 1, "deepspeed_zero1"),
    "zero2": ("DeepSpeedEngine", 2, "deepspeed_zero2"),
}  # fmt: skip
SOAK = pytest.mark.soak

pytestmark = [pytest.mark.timeout(300)]


def fitted(own, out, engine=None):
    """Fit; return what this process can tell of its engine."""
    told = {"shares": {}}

    class Told(fit.Run):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            inner = getattr(self.engine, "engine", None)
            told.update(
                engine=type(self.engine if inner is None else inner).__name__, name=self.engine.name,
                stage=0 if inner is None else inner.zero_optimization_stage(),
            )  # fmt: skip
            if inner is not None:
                weigh_second_step(inner, inner.module, told["shares"])
            elif self.world.size > 1:
                split = engine == "fsdp2"
                module = (
                    self.engine.parts[-1]
                    if split
                    else nn.ParameterDict({str(i): p for i, p in enumerate(self.engine.named.values())})
                )
                step = self.engine.optimizer.step

                def weighed():
                    told["shares"] = shares_held(module, self.engine.optimizer)
                    return step()

                self.engine.optimizer.step = weighed
                assert all(isinstance(p, DTensor) is split for p in module.parameters())

    how = {"fsdp": True} if engine == "fsdp2" else {"deepspeed": engine}
    if engine == "zero3":  # or DeepSpeed keeps weights as small as all of these whole
        how["deepspeed"] = str(out.parent / "zero3.json")
    kept, fit.Run = fit.Run, Told
    try:
        told["status"] = fit.fit_reward(own, out, **how).status
    finally:
        fit.Run = kept
    leave_world()
    return told


def together(own, out, engine, size):
    """Fit in several processes; return what each told."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    (out.parent / "zero3.json").write_text(json.dumps({"zero_optimization": zero}))
    ended = processes.world(size, lambda: fitted(own, out, engine), out.parent / "world", within=140)
    assert all(isinstance(e.value, dict) for e in ended), [e.output[-3000:] + str(e.value) for e in ended]
    return [e.value for e in ended]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What people said, and a model."""
    folder = tmp_path_factory.mktemp("said")
    said_of_everything(folder)
    return folder


@SOAK
@pytest.mark.parametrize(
    ("engine", "train", "size"),
    [(engine, what, size) for engine in ENGINES for what, size in (("full", 2), ("lora", 2), ("full", 4))]
    + [(engine, what, 2) for engine in OTHERS for what in ("full", "lora")],
)
def test_several_processes_fit_as_one_does(folder, tmp_path, record_property, engine, train, size):
    own = config(folder, train)
    assert fitted(own, tmp_path / "alone")["name"] == "single"
    told = together(own, tmp_path / "run", engine, size)
    for one in told:
        assert one["status"] == "complete" and (one["engine"], one["stage"], one["name"]) == (ENGINES | OTHERS)[engine]
        require_shares(one["shares"], engine, size)
    require_equal(tmp_path / "alone", tmp_path / "run")
    receipts = [json.loads((tmp_path / run / "sparsity.json").read_text()) for run in ("alone", "run")]
    assert [found["status"] for found in receipts] == ["measured", "measured"]
    found = largest_difference(tmp_path / "alone", tmp_path / "run")
    assert found < 1e-5
    record_property("cell", cell("fit", told[0]["name"], train, found, told))


@SOAK
@pytest.mark.parametrize("engine", ENGINES)
def test_a_fit_goes_on_bit_for_bit_and_in_one_process(folder, tmp_path, engine):
    """From the checkpoint of step 4 of 6, which two processes wrote in pieces."""
    own = config(folder, "full")
    together(own, tmp_path / "whole", engine, 2)
    for name, size, other in (("again", 2, engine), ("one", 1, None)):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints/step_000006")
        shutil.rmtree(tmp_path / name / "reward")
        together(own, tmp_path / name, other, size)
    assert largest_difference(tmp_path / "whole", tmp_path / "again") == 0
    assert largest_difference(tmp_path / "whole", tmp_path / "one") < 1e-5
    require_equal(tmp_path / "whole", tmp_path / "again")


@pytest.mark.parametrize(
    "flags", [["--fsdp", "--launch", "torchrun"], ["--deepspeed", "zero3", "--launch", "deepspeed"]]
)
def test_only_a_classifier_is_split(folder, tmp_path, monkeypatch, capsys, flags):
    """Said before anything starts; a call from Python hears it too."""
    (tmp_path / "towers.yaml").write_text(
        f"trainer: fit\ndata: {{paths: [{folder / 'feedback.db'}], media: image}}\n"
        f"model: {{backbone: clip, path: {folder / 'model'}, architecture: ViT-B-32, unfreeze_image: 1}}\n"
    )
    out = tmp_path / "run"
    assert main(["fit", str(tmp_path / "towers.yaml"), "--out", str(out), "--nproc", "2", *flags]) == 2
    said = capsys.readouterr().err
    assert "splits classifiers (model.backbone clip)" in said and "zero2" in said and "Traceback" not in said
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="FSDP2 splits classifiers"):
        fit.fit_reward(config(folder, "full", "model.backbone=words"), out, fsdp=True)
    assert not out.exists()
