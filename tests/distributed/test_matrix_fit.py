"""A fit of a classifier under FSDP2: one process's reward, and what a process holds of it.

python -m pytest -n 0 -m "slow or soak" tests/distributed/test_matrix_fit.py -o junit_family=xunit1 --junitxml=fit.xml
"""

from __future__ import annotations

import shutil

import processes
import pytest
from torch.distributed.tensor import DTensor

from align import checkpoint
from align.errors import ConfigError
from align.launch import leave_world
from rewards import fit
from tests.distributed.test_fit_processes import config, require_equal, said_of_everything
from tests.distributed.weighing import cell, require_shares, shares_held

pytestmark = [pytest.mark.timeout(300)]
SLOW, SOAK = pytest.mark.slow, pytest.mark.soak


def fitted(own, out, *, fsdp):
    """Fit; return what this process can tell of its engine."""
    told = {}

    class Told(fit.Run):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            told.update(engine=type(self.engine).__name__, name=self.engine.name, stage=0)
            if fsdp:
                module, step = self.engine.parts[-1], self.engine.optimizer.step

                def weighed():
                    told["shares"] = shares_held(module, self.engine.optimizer)
                    return step()

                self.engine.optimizer.step = weighed
                told["split"] = all(isinstance(p, DTensor) for p in module.parameters())

    kept, fit.Run = fit.Run, Told
    try:
        told["status"] = fit.fit_reward(own, out, fsdp=fsdp).status
    finally:
        fit.Run = kept
    leave_world()
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What people said, and a model."""
    folder = tmp_path_factory.mktemp("said")
    said_of_everything(folder)
    return folder


def difference(one, other):
    """The largest difference in the last checkpoint."""
    first, second = (checkpoint.load_latest(out / "checkpoints").tensors for out in (one, other))
    return max(
        float((value.double() - second[group][name].double()).abs().max())
        for group in ("model", "average", "optimizer")
        for name, value in first[group].items()
    )


@pytest.mark.parametrize(
    ("train", "size"),
    [pytest.param("full", 2, marks=SLOW), *(pytest.param(*c, marks=SOAK) for c in (("lora", 2), ("full", 4)))],
)
def test_several_processes_fit_as_one_does(folder, tmp_path, record_property, train, size):
    own = config(folder, train)
    assert fitted(own, tmp_path / "alone", fsdp=False)["name"] == "single"
    work = lambda: fitted(own, tmp_path / "run", fsdp=True)  # noqa: E731
    ended = processes.world(size, work, tmp_path / "world", within=280)
    assert all(isinstance(e.value, dict) for e in ended), [e.output[-3000:] + str(e.value) for e in ended]
    for told in (e.value for e in ended):
        assert (told["status"], told["engine"], told["name"]) == ("complete", "FSDP2Engine", "fsdp2") and told["split"]
        require_shares(told["shares"], "fsdp2", size)
    require_equal(tmp_path / "alone", tmp_path / "run")
    found = difference(tmp_path / "alone", tmp_path / "run")
    assert found < 1e-5
    record_property("cell", cell("fit", "fsdp2", train, found, [e.value for e in ended]))


@SOAK
def test_a_fit_goes_on_bit_for_bit_and_in_one_process(folder, tmp_path):
    """From the checkpoint of step 4 of 6, which two processes wrote in pieces."""
    own = config(folder, "full")

    def run(name, size):
        work = lambda: fitted(own, tmp_path / name, fsdp=size > 1)  # noqa: E731
        ended = processes.world(size, work, tmp_path / "world", within=140)
        assert all(isinstance(e.value, dict) for e in ended), [e.output[-3000:] + str(e.value) for e in ended]

    run("whole", 2)
    for name, size in (("again", 2), ("one", 1)):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints/step_000006")
        shutil.rmtree(tmp_path / name / "reward")
        run(name, size)
    assert difference(tmp_path / "whole", tmp_path / "again") == 0
    assert difference(tmp_path / "whole", tmp_path / "one") < 1e-5
    require_equal(tmp_path / "whole", tmp_path / "again")


def test_only_a_classifier_is_split(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="FSDP2 splits classifiers"):
        fit.fit_reward(config(folder, "full", "model.backbone=words"), tmp_path / "run", fsdp=True)
    assert not (tmp_path / "run").exists()
