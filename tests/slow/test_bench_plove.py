"""The benchmark of P[Love]: its figures by hand, and a shrunken one that is run and read again from its cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench_plove import accounts, gains, probabilities, span

ROOT = Path(__file__).parents[2]


def test_figures_by_hand():
    none = {"rho_up": 0.0, "rho_down": 0.0}
    cells = {
        ("w", "naive"): [{"spearman": s, "thumbs": 10, "mistakes": none} for s in (0.5, 0.6, 0.9)],
        ("w", "robust"): [
            {"spearman": s, "thumbs": 9, "mistakes": {"rho_up": 0.1, "rho_down": 0.3}} for s in (0.7, 0.7)
        ],
    }
    found = gains(cells, "w", "robust")
    assert found["mean"] == pytest.approx(0.15) and found["least"] == pytest.approx(0.1) and found["n"] == 2
    assert found["naive"] == pytest.approx(0.55), "the seeds that both arms have"
    assert found["mistakes"] == pytest.approx({"rho_up": 0.1, "rho_down": 0.3})
    people = [
        {"listed": ["always-up-0", "always-up-1", "user-0"], "coordinated": 4},
        {"listed": ["always-up-0"], "coordinated": 1},
    ]
    found = accounts(people)
    assert (found["precision"], found["recall"]) == (0.75, 0.6) and found["seeds_with_both"] == 1
    assert found["precision_ci"] == pytest.approx([2 / 3, 1]), "seeds are resampled whole"
    assert "recall" not in accounts([{"listed": [], "coordinated": 0}])
    cell = dict.fromkeys(
        ("n", "base_rate", "auroc", "auroc_uncalibrated", "brier", "brier_of_base_rate", "ece", "debiased_ece",
         "debiased_ece_with_the_listed"), 0.25,
    )  # fmt: skip
    found = probabilities([cell, cell | {"debiased_ece": 0.75, "brier": 0.2}])
    assert found["debiased_ece"] == 0.5 and found["largest_debiased_ece"] == 0.75
    assert found["least_brier_gain"] == 0 and found["brier"] == pytest.approx(0.225)
    assert span("100-102") == [100, 101, 102] and span("7") == [7]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_shrunken_run_is_read_again_from_its_cache(tmp_path):
    def bench():
        command = [
            sys.executable, str(ROOT / "scripts" / "bench_plove.py"), "--json", str(tmp_path / "found.json"),
            "--cache", str(tmp_path / "cells"), "--seeds", "0-1", "--list-seeds", "0", "--calibration-seeds", "0",
            "--steps", "5",
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        return json.loads((tmp_path / "found.json").read_text())

    found = bench()
    assert found["gain"]["corrupted"]["n"] == 2 and found["accounts"]["corrupted"]["recall"] > 0.6
    assert found["calibration"]["corrupted"]["n"] > 20_000
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert bench()["gain"] == found["gain"]
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()} == made
