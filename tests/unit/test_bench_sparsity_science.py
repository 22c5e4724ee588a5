"""The figures of scripts/bench_sparsity_science.py by hand, and its rounding of weights after every step."""

from __future__ import annotations

import pytest
import torch

from scripts.bench_sparsity_science import ARMS, at_norm, common_norm, figures, plot, rounded, table


def cell(arm, rate, seed, norm, identical, dense=0.5, precision="pure"):
    view = {"norm": norm, "identical": identical, "dense": dense, "core_identical": identical, "core_dense": dense}
    views = {"BF16": view, "F32": view}
    return {"arm": arm, "lr": rate, "seed": seed, "precision": precision, "views": views, "gain": {"auc": 0.6}}


def test_a_share_at_a_norm_lies_on_a_line_over_its_logarithm():
    cells = [cell("kto", 1, 0, 1e-4, 0.9), cell("kto", 2, 0, 1e-2, 0.5)]
    assert at_norm(cells, "BF16", 1e-3, "identical") == pytest.approx(0.7)
    assert at_norm(cells, "BF16", 1e-1, "identical") is None  # nothing is said beyond what was run
    assert at_norm([cell("kto", 1, 0, 0.0, 1.0), cells[0]], "BF16", 1e-4, "identical") is None


def test_the_common_norm_is_one_that_every_arm_reached_from_every_seed():
    arms = {
        "kto": [cell("kto", r, s, n, 0.5) for s, n0 in ((0, 1e-5), (1, 2e-5)) for r, n in ((1, n0), (2, 1e-2))],
        "sft": [cell("sft", r, 0, n, 0.5) for r, n in ((1, 4e-5), (2, 4e-3))],
    }
    assert common_norm(arms, "BF16") == pytest.approx(4e-4)  # from 4e-5 to 4e-3
    apart = {"kto": arms["kto"], "sft": [cell("sft", 1, 0, 0.1, 0.5), cell("sft", 2, 0, 0.2, 0.5)]}
    assert common_norm(apart, "BF16") is None


def test_rows_at_one_rate_and_at_one_norm():
    cells = [
        cell(arm, rate, seed, norm * far, identical - 0.1 * seed)
        for arm, far in (("kto", 1), ("sft", 10)) for seed in (0, 1) for rate, norm, identical in
        ((1e-5, 1e-4, 0.9), (1e-3, 1e-2, 0.5))
    ]  # fmt: skip
    rows = figures(cells)
    assert [(r["arm"], r["matched"]) for r in rows] == [
        ("kto", "rate"), ("sft", "rate"), ("kto", "rate"), ("sft", "rate"), ("kto", "norm"), ("sft", "norm")
    ]  # fmt: skip
    same_rate, same_norm = rows[0:2], rows[4:6]
    assert same_rate[0]["identical"] == same_rate[1]["identical"] == pytest.approx(0.85)
    # equal shares at one rate, though sft went ten times as far: at one norm it moved fewer weights
    assert same_norm[0]["identical"] < same_norm[1]["identical"] and same_norm[0]["norm"] == same_norm[1]["norm"]
    assert (same_rate[0]["excess_low"], same_rate[0]["excess_high"]) == (pytest.approx(0.3), pytest.approx(0.4))
    assert table(rows).count("\n") == 2 + len(rows) and "beyond rounding" in plot(rows)
    assert {ARMS[r["arm"]][0] for r in rows} == {r["domain"] for r in rows}


def test_pure_weights_are_values_of_bf16_after_every_step_and_only_within():
    weight = torch.nn.Parameter(torch.full((3,), 1.0))
    optimizer = torch.optim.SGD([weight], lr=1.0)

    def step(size):
        weight.grad = torch.full((3,), -size)
        optimizer.step()
        return weight[0].item()

    with rounded("pure"):
        assert step(2.0**-9) == 1.0  # half a step and less is lost
        assert step(2.0**-7) == 1.0 + 2.0**-7
    assert step(2.0**-9) == 1.0 + 2.0**-7 + 2.0**-9
    with rounded("master"):
        assert step(2.0**-9) == 1.0 + 2.0**-7 + 2.0**-8
