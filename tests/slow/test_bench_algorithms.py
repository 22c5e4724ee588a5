"""The benchmark of the algorithms: its figures by hand, and a shrunken grid that is run, cut short and resumed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench_algorithms import compare, feq_to, gains, with_interval

ROOT = Path(__file__).parents[2]


def cell(*heldout, every=10.0):
    return {
        "heldout": list(heldout), "feq": [every * i for i in range(len(heldout))], "steps": list(range(len(heldout))),
        "summary": {"diversity_before": 0.2, "diversity_after": 0.1},
    }  # fmt: skip


def test_gain_and_cost_are_means_of_three_evaluations_and_reached_on_a_line():
    found = cell(-1.0, -0.7, -0.4, -0.1)
    assert gains(found) == pytest.approx([0.0, 0.15, 0.3, 0.6])
    assert feq_to(found, 0.15) == pytest.approx(5)  # the mean of 0 and 10
    assert feq_to(found, 0.45) == pytest.approx(15)  # half way between 10 (.3) and 20 (.6)
    assert feq_to(found, 0.61) == math.inf


def test_ratios_are_to_the_median_of_the_baseline_and_a_miss_is_kept():
    baseline = {s: cell(-1.0, -0.7, -0.4, -0.1) for s in (1, 2, 3)}  # last gain .6, so the target is .57, at 19
    other = {1: cell(-1.0, -0.7, -0.4, -0.1, every=5.0), 2: cell(-1.0, -1.0, -1.0, -1.0)}
    found = compare(other, baseline)
    assert found["target"] == pytest.approx(0.57) and found["seeds"] == [1, 2]
    assert found["ratios"] == [pytest.approx(0.5), None] and found["reached"] == 0.5
    assert found["to_95"]["median"] is None and found["diversity"] == pytest.approx(0.5)
    same = compare(baseline, baseline)
    assert same["ratio"] == {"median": 1.0, "ci_low": 1.0, "ci_high": 1.0}


def test_an_interval_with_a_miss_in_the_minority_has_a_median():
    found = with_interval([1.0, 2.0, 3.0, 4.0, math.inf])
    assert found["median"] == 3.0 and found["ci_low"] < 3.0 and found["ci_high"] is None


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_shrunken_grid_runs_and_resumes_from_its_cache(tmp_path):
    def bench(*more):
        command = [
            sys.executable, str(ROOT / "scripts" / "bench_algorithms.py"), "--json", str(tmp_path / "found.json"),
            "--cache", str(tmp_path / "cache"), "--plot", str(tmp_path / "found.svg"), "--arms", "dance,flash,nft",
            "--rates", "1e-3", "--tuning-seeds", "0", "--seeds", "1,2", "--budget", "2", *more,
            "model.path=digits/random", "prompts_per_step=2", "group_size=2", "evaluation.samples=20",
            "evaluation.final_samples=20", "evaluation.solver_steps=2",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads((tmp_path / "found.json").read_text())
        return found["arms"], done

    assert bench("--seconds", "0")[0] == {}
    first, done = bench()
    assert first["dance"]["seeds"] == [1, 2] and first["dance"]["feq"] == 2 * 55
    assert {arm: row["steps"] for arm, row in first.items()} == {"dance": 2, "flash": 2, "nft": 2}
    assert "| nft | 0.001 | 2 |" in done.stdout and "<svg" in (tmp_path / "found.svg").read_text()
    cells = sorted((tmp_path / "cache").glob("*.json"))
    assert len(cells) == 9
    times = {path: path.stat().st_mtime_ns for path in cells}
    cells[0].unlink()
    again, _ = bench()
    assert again == first
    assert [p for p in cells if p.stat().st_mtime_ns != times[p]] == [cells[0]]  # only what was missing was run
