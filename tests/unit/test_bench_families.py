"""The benchmark of families: its real shapes are the published ones, and all its arms run."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from align.published import PUBLISHED

ROOT = Path(__file__).parents[2]
HUB = {
    "stable_diffusion": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "flux": "black-forest-labs/FLUX.1-dev",
}


@pytest.mark.parametrize("name", HUB)
def test_real_shapes_have_the_weights_of_the_published_models(monkeypatch, name):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    bench = importlib.import_module("bench_families")
    monkeypatch.setattr(bench, "DEVICE", "meta")
    shape = bench.FAMILY[name]("real")
    family = bench.family_of(shape, bench.build(shape))
    assert sum(p.numel() for p in family.denoiser.parameters()) == PUBLISHED[HUB[name]].parameters
    channels = 4 if name == "stable_diffusion" else 16
    assert family.latent_shape(bench.Size(shape.side, shape.side)) == (channels, shape.side // 8, shape.side // 8)


@pytest.mark.slow
def test_every_arm_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench_families.py"), "--json", str(tmp_path / "found.json"),
         "--shape", "tiny", "--families", "stable_diffusion", "flux", "--rounds", "1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    for name in ("stable_diffusion", "flux"):
        figures = found["families"][name]
        assert min(figures["seconds"].values()) > 0
        assert figures["official_loop_ratio"] < 1, "batches beat one row at a time even on tiny models"
        assert set(figures["trained_step_feq"]) == {"full", "lora", "lora_checkpointed"}
    assert done.stdout.splitlines()[0] == "| figure | stable_diffusion | flux | bar |"
