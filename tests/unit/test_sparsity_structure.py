"""Where changes lie: channels, heads and n:m groups, by hand, against brute force, and against independence."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import binom

from align.cli import main
from align.sparsity.compare import compare
from align.sparsity.measure import CHUNK
from align.sparsity.structure import gini, group_laws, head_place


def pair(tmp_path, base, tuned, config=None):
    for name, state in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir(parents=True)
        save_file(state, tmp_path / name / "model.safetensors")
        if config:
            (tmp_path / name / "config.json").write_text(json.dumps(config))
    return compare(tmp_path / "base", tmp_path / "tuned", structure=True).as_dict()


def test_structure_worked_by_hand(tmp_path):
    """4 x 4 ones, all of one exponent. Row 0 changes whole, row 1 twice, the others not at all."""
    base = torch.ones(4, 4).bfloat16()
    tuned = base.clone()
    tuned[0], tuned[1, 0], tuned[1, 3] = 2.0, 2.0, 4.0
    found = pair(tmp_path, {"w": base}, {"w": tuned})["structure"]
    p = 6 / 16
    rows, columns = found["rows"], found["columns"]
    assert (rows["channels"], rows["untouched"]) == (4, 2) and columns["untouched"] == 0
    assert rows["untouched_expected"] == pytest.approx(4 * (1 - p) ** 4)
    # Counts 4, 2, 0, 0 of mean 1.5 and variance 4 p (1 - p); of columns 2, 1, 1, 2.
    assert rows["dispersion"] == rows["dispersion_uniform"] == pytest.approx(11 / (16 * p * (1 - p)))
    assert columns["dispersion"] == pytest.approx(1 / (16 * p * (1 - p)))
    assert rows["gini"] == pytest.approx((2 + 3 * 4 - 0) / (4 * 6)) and rows["top_tenth"] == 4 / 6
    two = found["groups"]["2:4"]
    assert two["share"] == 3 / 4 and two["by_magnitude"] == two["uniform"] == pytest.approx(binom.cdf(2, 4, p))
    assert found["groups"]["1:4"]["share"] == 2 / 4 and "4:8" not in found["groups"] and found["heads"] is None
    # Row 0 keeps two of four equal changes, row 1 both of its two: 1 and 9.
    assert found["energy_kept_2_4"]["share"] == pytest.approx((2 + 10) / (4 + 10))


def test_the_law_of_a_group_is_that_of_all_its_outcomes():
    rng = np.random.default_rng(0)
    chance = rng.random((7, 4))
    wanted = np.zeros(5)
    for bits in range(16):
        on = np.array([bits >> i & 1 for i in range(4)], bool)
        wanted[on.sum()] += np.where(on, chance, 1 - chance).prod(1).sum()
    found = group_laws(chance.astype(np.float32).reshape(-1), [2, 4])
    assert found[4] == pytest.approx(wanted, rel=1e-5) and found.keys() == {2, 4}
    pairs = chance.reshape(-1, 2)
    assert found[2][2] == pytest.approx(pairs.prod(1).sum(), rel=1e-5)
    assert gini(np.ones(9)) == 0 and gini(np.array([0.0, 0, 0, 1])) == 0.75 and gini(np.zeros(3)) == 0


@pytest.mark.parametrize("shape", [(700, 300), (3, 70_000), (2, CHUNK + 24), (6, 5, 3, 3), (5, 7)])
def test_counts_are_those_of_the_whole_mask_whatever_the_chunks(tmp_path, shape):
    made = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(shape, generator=made)).bfloat16()
    tuned = (base.float() + 3e-5 * torch.randn(shape, generator=made)).bfloat16()
    found = pair(tmp_path, {"w": base}, {"w": tuned})["structure"]
    mask = (base.view(torch.int16) != tuned.view(torch.int16)).double()
    for axis, counts in (
        ("rows", mask.flatten(1).sum(1)),
        ("columns", mask.reshape(*shape[:2], -1).sum((0, 2))),
    ):
        assert found[axis]["channels"] == len(counts) and found[axis]["untouched"] == (counts == 0).sum()
        assert found[axis]["gini"] == pytest.approx(gini(counts.numpy()))
    flat = mask.flatten(1)
    for kind in ("1:4", "2:4", "4:8"):
        n, m = map(int, kind.split(":"))
        if len(shape) == 2 and shape[1] % m == 0:
            counts = flat.reshape(-1, m).sum(1)
            assert found["groups"][kind]["share"] == pytest.approx((counts <= n).double().mean().item())
            p = mask.mean().item()
            assert found["groups"][kind]["uniform"] == pytest.approx(binom.cdf(n, m, p), abs=1e-5)
        else:
            assert kind not in found.get("groups", {})


def rows_of(tmp_path, spread, planted):
    """An i.i.d. update of weights whose rows have scales of their own; `planted` rows get nothing."""
    made = torch.Generator().manual_seed(3)
    scale = torch.exp(spread * torch.randn(512, 1, generator=made)) * 0.02
    base = (scale * torch.randn(512, 1024, generator=made)).bfloat16()
    update = 1.5e-5 * torch.randn(512, 1024, generator=made)
    update[:planted] = 0
    return pair(tmp_path, {"w": base}, {"w": (base.float() + update).bfloat16()})["structure"]


def test_uneven_rows_of_weights_are_not_taken_for_uneven_training(tmp_path):
    """Rows of lognormal scales: the uniform null sees structure in an i.i.d. update, the null by magnitude sees none."""
    even, uneven, planted = (rows_of(tmp_path / str(i), *args) for i, args in enumerate(((0, 0), (0.5, 0), (0.5, 40))))
    assert even["rows"]["gini"] == pytest.approx(0.027, abs=0.02) and uneven["rows"]["gini"] == pytest.approx(
        0.255, abs=0.03
    )
    assert uneven["rows"]["top_tenth"] == pytest.approx(0.199, abs=0.03)
    assert uneven["rows"]["dispersion"] == pytest.approx(1, abs=0.25) and uneven["rows"]["dispersion_uniform"] > 20
    assert uneven["rows"]["gini_expected"] == pytest.approx(uneven["rows"]["gini"], abs=0.02)
    assert uneven["columns"]["dispersion"] == pytest.approx(1, abs=0.25)
    assert planted["rows"]["untouched"] == 40 and planted["rows"]["untouched_expected"] < 1
    assert planted["rows"]["dispersion"] > 5
    two = even["groups"]["2:4"]
    assert two["share"] == pytest.approx(0.982, abs=0.003) and two["by_magnitude"] == pytest.approx(
        two["share"], abs=0.001
    )


LLAMA = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}


def test_heads_with_shared_keys_are_told_apart(tmp_path, capsys):
    """8 heads of queries and outputs of 8 numbers, 2 of keys and values: one head of each is trained."""
    shapes = {"q": (64, 64), "k": (16, 64), "v": (16, 64), "o": (64, 64)}
    base = {f"model.layers.0.self_attn.{n}_proj.weight": torch.ones(shape).bfloat16() for n, shape in shapes.items()}
    tuned = {name: value.clone() for name, value in base.items()}
    for n, rows in (("q", slice(24, 32)), ("k", slice(8, 16)), ("v", slice(0, 8))):
        tuned[f"model.layers.0.self_attn.{n}_proj.weight"][rows] = 2.0
    tuned["model.layers.0.self_attn.o_proj.weight"][:, 24:28] = 2.0
    found = pair(tmp_path, base, tuned, LLAMA)
    heads = {row["name"].split(".")[4][0]: row["structure"]["heads"] for row in found["per_tensor"]}
    assert heads["q"]["density"] == [0, 0, 0, 1, 0, 0, 0, 0] and heads["q"]["role"] == "query"
    assert heads["k"]["density"] == [0, 1] and heads["v"]["density"] == [1, 0]
    assert heads["o"]["density"] == [0, 0, 0, 0.5, 0, 0, 0, 0] and heads["o"]["role"] == "output"
    assert heads["q"]["expected"] == pytest.approx([1 / 8] * 8) and heads["q"]["untouched"] == 7
    assert found["structure"]["heads"]["channels"] == 8 + 2 + 2 + 8
    sides = [str(tmp_path / "base"), str(tmp_path / "tuned")]
    assert main(["sparsity", "compare", *sides, "--structure", "--json", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["structure"] == found["structure"]
    assert "attention heads: 16 of 20 untouched" in capsys.readouterr().out
    assert main(["sparsity", "report", *sides, "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "Channels, heads, groups" in page and "Heads: query" in page and "attention heads" in page
    rows = [json.loads(line) for line in (tmp_path / "page.jsonl").read_text().splitlines()]
    assert rows[0]["structure"]["heads"] == found["structure"]["heads"]
    assert [r["structure"]["heads"]["density"] for r in rows[1:]] == [h["density"] for h in heads.values()]
    capsys.readouterr()
    assert main(["sparsity", "compare", *sides, "--structure", "--level", "bits"]) == 2
    assert "needs the whole comparison" in capsys.readouterr().err


def test_where_heads_lie_is_read_from_configurations():
    q, k, o = (f"layers.0.attn.{n}.weight" for n in ("q_proj", "k_proj", "o_proj"))
    assert head_place(q, (64, 64), LLAMA) == ("rows", "query", 8) and head_place(k, (16, 64), LLAMA) == (
        "rows",
        "key",
        8,
    )
    assert head_place(o, (64, 64), LLAMA) == ("columns", "output", 8)
    assert head_place(q, (60, 64), LLAMA) is None and head_place("layers.0.mlp.weight", (64, 64), LLAMA) is None
    assert head_place(q, (64, 64), {}) is None and head_place(q, (128, 64), LLAMA | {"head_dim": 16}) == (
        "rows",
        "query",
        16,
    )
    vision = {"text_config": LLAMA, "vision_config": {"num_heads": 4, "hidden_size": 32}}
    assert head_place(q, (64, 64), vision) == ("rows", "query", 8)
    assert head_place("visual.blocks.0.attn.q_proj.weight", (32, 32), vision) == ("rows", "query", 8)
    sd3 = {"transformer": {"num_attention_heads": 4, "attention_head_dim": 16}}
    assert head_place("transformer/blocks.0.attn.to_out.0.weight", (64, 64), sd3) == ("columns", "output", 16)
    assert head_place("SelfAttention.q.weight", (96, 64), {"num_heads": 6, "d_kv": 16, "d_model": 64}) == (
        "rows",
        "query",
        16,
    )
