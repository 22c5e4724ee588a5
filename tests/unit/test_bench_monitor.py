"""The figures of the monitor's benchmark, worked by hand."""

from __future__ import annotations

import pytest

from scripts import bench_monitor


def cell(seed, accuracies, tripped_at):
    signals = [{"name": "judge", "tripped": True}]
    rows = [
        {"step": 2 * i, "accuracy": a, "hacked": tripped_at is not None and i >= tripped_at, "signals": signals}
        for i, a in enumerate(accuracies)
    ]
    return {"seed": seed, "rows": rows, "cpu_seconds": 1.0}


def test_a_trip_counts_when_the_judge_has_lost_less_than_five_points():
    cells = [cell(0, [0.95, 0.93, 0.6], 1), cell(1, [0.95, 0.9, 0.8], 2), cell(2, [0.9, 0.5, 0.5], None)]
    found = bench_monitor.summarise("hacked", cells)
    assert (found["runs"], found["tripped"], found["tripped_in_time"]) == (3, 2, 1)
    assert found["at"] == [2, 4, None] and found["lost_at_trip"][:2] == pytest.approx([2.0, 15.0])


def test_cells_are_kept(tmp_path):
    first = bench_monitor.run_cell("hacked_text", 3, tmp_path)
    assert first == bench_monitor.run_cell("hacked_text", 3, tmp_path) and len(list(tmp_path.iterdir())) == 1
    rows = first["rows"]
    trip = next(row for row in rows if row["hacked"])
    assert 0.1 < trip["farewells"] < 0.6 and any("bye" in s["name"] for s in trip["signals"] if s["tripped"])
