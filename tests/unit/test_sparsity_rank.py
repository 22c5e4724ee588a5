"""Ranks against numpy's singular values, what rounding leaves of planted ones, and certificates that can refuse."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from align.cli import main
from align.errors import ConfigError
from align.sparsity import ranks, spectrum
from align.sparsity.formats import FORMATS
from align.sparsity.ranks import rank
from align.sparsity.spectrum import count_above, noise_edge, unit_scaled

BF16 = FORMATS["BF16"]


def save(path, state, **config):
    path.mkdir(parents=True, exist_ok=True)
    save_file(state, path / ("adapter_model.safetensors" if config else "model.safetensors"))
    if config:
        (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def exact(matrix):
    return np.linalg.svd(matrix.astype(np.float64), compute_uv=False)


def weights(shape, seed=0, rows=0.0):
    made = torch.Generator().manual_seed(seed)
    return 0.02 * torch.randn(shape, generator=made) * torch.exp(rows * torch.randn(shape[0], 1, generator=made))


def low_rank(shape, rank, scale, seed=1):
    made = torch.Generator().manual_seed(seed)
    up, down = torch.randn(shape[0], rank, generator=made), torch.randn(rank, shape[1], generator=made)
    return scale * up @ down / math.sqrt(rank)


def pair_of(tmp_path, base, update, name="w"):
    tuned = (base.bfloat16().float() + update).bfloat16()
    return save(tmp_path / "base", {name: base.bfloat16()}), save(tmp_path / "tuned", {name: tuned})


def difference(base, tuned):
    states = [load_file(path / "model.safetensors") for path in (base, tuned)]
    (name,) = states[0]
    return (states[1][name].double() - states[0][name].double()).flatten(1).numpy()


# --- counts with a proof -----------------------------------------------------------------------------


def matrices():
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((150, 120))
    yield "dense", dense
    yield "low rank", rng.standard_normal((130, 6)) @ rng.standard_normal((6, 110))
    yield "duplicate rows", np.repeat(dense[:60, :90], 2, axis=0)
    codes = [BF16.values(BF16.encode((0.02 * dense + d).astype(np.float32))) for d in (0, 3e-5 * dense[::-1])]
    yield "rounded", codes[1] - codes[0]
    yield "one entry", np.eye(40)[:, :30] * np.r_[3.0, np.zeros(29)]
    yield "graded", dense * np.exp2(-np.arange(120) / 4)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(("name", "matrix"), list(matrices()), ids=lambda v: v if isinstance(v, str) else "")
def test_inertia_counts_what_singular_values_count(name, matrix, many):
    scaled, scale = unit_scaled(matrix.astype(np.float32))
    assert np.array_equal(scaled / np.float32(scale), matrix.astype(np.float32))
    values = exact(scaled)
    for place in (1, 5, len(values) // 2, len(values) - 1):
        low, high = values[place], values[place - 1]
        edge = math.sqrt(low * high) if low > 1e-6 * high else high / 2
        if high < 1e-5 * values[0] or high / edge < 1 + 1e-7:
            continue  # two values within rounding of each other
        found = count_above(scaled, edge, many=many)
        assert (found.above, found.certificate) == (int(np.sum(values > edge)), "exact"), (name, place, found.proof)
        assert spectrum.count_in_spectrum(exact(scaled)[::-1] ** 2, edge, len(scaled)).above == found.above
    assert count_above(scaled, 2 * values[0], many=many).above == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(0, 30), st.integers(0, 10**6), st.floats(0.05, 1.5))
def test_an_exact_count_is_never_wrong(n, more, seed, where):
    matrix, _ = unit_scaled(np.random.default_rng(seed).standard_normal((n + more, n)).astype(np.float32))
    values = exact(matrix)
    found = count_above(matrix, where * values[0])
    assert found.certificate == "uncertified" or found.above == int(np.sum(values > where * values[0]))


def test_a_singular_value_on_the_edge_is_not_certified():
    rng = np.random.default_rng(2)
    matrix, _ = unit_scaled(rng.standard_normal((90, 70)).astype(np.float32))
    edge = exact(matrix)[10]
    for found in (
        count_above(matrix, edge),
        spectrum.count_in_spectrum(np.linalg.eigvalsh(spectrum.gram(matrix)), edge, 90),
    ):
        assert found.certificate == "uncertified" and "where rounding decides" in found.proof


def test_a_certificate_does_not_trust_the_gram_matrix_it_is_given():
    """The residual is taken against E itself: a wrong product is found out, and worked out again."""
    rng = np.random.default_rng(3)
    matrix, _ = unit_scaled(rng.standard_normal((90, 70)).astype(np.float32))
    wrong = spectrum.gram(matrix, np.float32) + np.diag(np.linspace(0, 300, 70)).astype(np.float32)
    edge = 0.6 * exact(matrix)[0]
    at_once = spectrum._by_inertia(matrix, wrong, edge**2, np.float32)
    assert at_once.above != np.sum(exact(matrix) > edge) and at_once.certificate == "uncertified"
    found = count_above(matrix, edge, single=wrong)
    assert (found.above, found.certificate) == (int(np.sum(exact(matrix) > edge)), "exact")


def test_factors_and_solves_are_those_of_the_matrix():
    rng = np.random.default_rng(4)
    product = spectrum.gram(rng.standard_normal((700, 600)))  # more than one panel
    sigma = float(np.median(np.diag(product)))
    factors, z = spectrum.Factors.of(product, sigma, np.float64), rng.standard_normal((600, 3))
    shifted = product - sigma * np.eye(600)
    assert np.count_nonzero(factors.beside) > 5  # blocks of two are there
    assert np.allclose(factors.times(z), shifted @ z, rtol=1e-9, atol=1e-8)
    assert np.allclose(shifted @ factors.solve(z), z, atol=1e-6)
    assert factors.positive == np.sum(np.linalg.eigvalsh(shifted) > 0)


def test_without_lapack_the_count_is_the_same(monkeypatch):
    matrix, _ = unit_scaled(np.random.default_rng(5).standard_normal((80, 50)).astype(np.float32))
    edge = 0.5 * exact(matrix)[0]
    with_lapack = count_above(matrix, edge)
    monkeypatch.setattr(spectrum, "_has_lapack", lambda: False)
    without = count_above(matrix, edge)
    assert (without.above, without.certificate) == (with_lapack.above, "exact") and "all eigenvalues" in without.proof


# --- the edge ----------------------------------------------------------------------------------------


def test_the_edge_of_equal_spacings_is_that_of_marchenko_and_pastur():
    m, n, u = 48, 27, 0.5
    assert noise_edge(np.full(m, n * u**2), np.full(n, m * u**2)) == pytest.approx((48**0.5 + 27**0.5) * u / 12**0.5)


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_rounding_noise_stays_below_the_edge_whatever_the_scales_of_rows(spread):
    """Where rows differ in scale the edge of equal spacings is passed by rounding alone."""
    u = BF16.spacing()[BF16.exponent(BF16.encode(weights((512, 512), rows=spread).numpy()))]
    noise = u * (np.random.default_rng(0).random(u.shape) - 0.5)
    edge, flat = noise_edge((u**2).sum(1), (u**2).sum(0)), 2 * math.sqrt(512 * float(np.mean(u**2)) / 12)
    largest = exact(noise)[0]
    assert largest < edge < 2 * largest
    assert flat == pytest.approx(edge, rel=0.15) if not spread else largest > 2 * flat


@pytest.mark.parametrize(
    ("scale", "density", "status", "above"),
    [(1e-5, 0.115, "below the precision floor", 0), (3e-5, 0.31, "above the edge", 16), (1e-4, 0.66, "above the edge", 16),
     (4e-4, 0.91, "above the edge", 16)],
)  # fmt: skip
@pytest.mark.parametrize("whole", [True, False])
def test_a_planted_rank_is_found_or_said_to_be_below_the_floor(
    tmp_path, monkeypatch, scale, density, status, above, whole
):
    """Rank 16 seen through bf16; `matrix_rank` calls the same updates nearly full."""
    monkeypatch.setattr(ranks, "WHOLE", 1024 if whole else 0)
    shape = (640, 512)
    paths = pair_of(tmp_path, weights(shape), low_rank(shape, 16, scale))
    (row,) = rank(*paths)["matrices"]
    update = difference(*paths)
    assert np.mean(update != 0) == pytest.approx(density, abs=0.01)
    assert (row["status"], row["above_edge"], row["certificate"]) == (status, above, "exact")
    assert row["all_values"] is whole and row["structural_rank"] == 512
    if whole:
        assert row["matrix_rank"] == np.linalg.matrix_rank(update.astype(np.float32)) > 490
    else:
        assert "inertia" in row["proof"] and "matrix_rank" not in row
    values = exact(update)
    assert row["norm"] == pytest.approx(np.linalg.norm(update))
    assert row["stable_rank"] == pytest.approx(np.sum(values**2) / values[0] ** 2, rel=1e-3)
    assert row["top_energy"]["8"] == pytest.approx(np.sum(values[:8] ** 2) / np.sum(values**2), rel=1e-2)
    assert [i for i, _ in row["singular_values"][:64]] == list(range(1, 65))
    assert np.allclose([v for _, v in row["singular_values"][: above or 1]], values[: above or 1], rtol=1e-3)


def test_largest_values_are_bounds_from_below():
    rng = np.random.default_rng(6)
    matrix = rng.standard_normal((300, 200)).astype(np.float32)
    matrix[:, :5] *= 4
    found, values = spectrum.largest_values(matrix, spectrum.gram(matrix, np.float32), 20), exact(matrix)[:20]
    assert np.all(found <= values * (1 + 1e-12)) and np.all(found > 0.9 * values)
    assert found[:5] == pytest.approx(values[:5], rel=1e-6)


# --- closed forms ------------------------------------------------------------------------------------


def test_effective_ranks_in_closed_form():
    equal, two = np.full(7, 3.0), np.array([2.0, 1.0, 0.0])
    assert spectrum.effective_rank(equal) == pytest.approx(7) and spectrum.participation_rank(equal) == pytest.approx(7)
    assert spectrum.effective_rank(two) == pytest.approx(
        math.exp(-(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3))
    )
    assert spectrum.participation_rank(two) == pytest.approx(25 / 17)
    matrix = np.random.default_rng(7).standard_normal((30, 20))
    assert spectrum.participation_rank(spectrum.gram(matrix)) == pytest.approx(
        spectrum.participation_rank(exact(matrix))
    )
    assert spectrum.effective_rank(np.zeros(3)) is None and spectrum.participation_rank(np.zeros(3)) is None


def test_angles_in_closed_form():
    for degrees in (90.0, 30.0, 1e-5):
        angle = math.radians(degrees)
        first, second = np.eye(4)[:, :2], np.eye(4)[:, :2].copy()
        second[:, 1] = [0, math.cos(angle), math.sin(angle), 0]
        assert spectrum.largest_angle(first, second) == pytest.approx(degrees, rel=1e-6)
        assert spectrum.subspace_cosines(first, second) == pytest.approx([1, math.cos(angle)], abs=1e-12)


def test_the_spectral_shift_and_what_an_isotropic_update_has(tmp_path):
    base = weights((120, 80))
    noise = 1e-3 * torch.randn(120, 80, generator=torch.Generator().manual_seed(3))
    paths = [save(tmp_path / name, {"w": w}) for name, w in (("base", base), ("tuned", base + noise))]
    (row,) = rank(*paths, level="full")["matrices"]
    before, after = (np.linalg.svd(w.double().numpy(), compute_uv=False) for w in (base, base + noise))
    assert row["nss"] == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(before), rel=1e-6)
    assert row["nss"] < row["nss_bound"]
    assert row["nss"] == pytest.approx(row["nss_if_isotropic"], rel=0.25)
    assert row["principal_energy"] == pytest.approx(row["principal_by_chance"], rel=0.6)
    assert np.allclose(row["shared_with_base"], row["shared_by_chance"], atol=0.06)


@pytest.mark.parametrize("turn", [False, True])
def test_what_lies_in_the_top_of_the_base_is_seen_there(tmp_path, turn):
    """An update along the two largest singular vectors of the base: all its energy is principal, and nothing turns."""
    rng = np.random.default_rng(8)
    u, v = np.linalg.qr(rng.standard_normal((40, 16)))[0], np.linalg.qr(rng.standard_normal((16, 16)))[0]
    s = np.r_[8.0, 6.0, np.linspace(1, 0.1, 14)]
    base, update = (u * s) @ v.T, 0.5 * (u[:, :2] * s[:2]) @ v[:, :2].T
    if turn:
        base, update = base.T, update.T
    paths = [
        save(tmp_path / n, {"w": torch.tensor(w.copy()).float()}) for n, w in (("base", base), ("tuned", base + update))
    ]
    (row,) = rank(*paths, level="full")["matrices"]
    assert row["k"] == 2 and row["above_edge"] == 2 and row["dtype"] == "F32"
    assert row["proof"].startswith("all singular values")  # the edge lies below what the Gram matrix resolves
    assert row["principal_energy"] == pytest.approx(1) and row["shared_with_base"] == pytest.approx([1, 1])
    assert max(row["angle"]) < 1e-5
    assert row["shared_by_chance"] == pytest.approx([2 / 16, 2 / 40] if turn else [2 / 40, 2 / 16])
    assert row["nss"] == pytest.approx(row["nss_bound"])  # Mirsky's bound is met where singular vectors stay


# --- checkpoints -------------------------------------------------------------------------------------


def test_every_matrix_has_one_outcome(tmp_path):
    made = torch.Generator().manual_seed(0)
    base = {
        "conv": 0.02 * torch.randn(8, 4, 3, 3, generator=made), "norm": torch.ones(8), "row": torch.ones(1, 9),
        "same": torch.randn(6, 5, generator=made), "bad": torch.ones(4, 4), "wide": 0.02 * torch.randn(12, 90, generator=made),
    }  # fmt: skip
    base = {k: v.bfloat16() for k, v in base.items()}
    tuned = {k: (v.float() * 1.1).bfloat16() for k, v in base.items()} | {"same": base["same"].clone()}
    tuned["bad"][1, 2] = float("nan")
    paths = save(tmp_path / "base", base), save(tmp_path / "tuned", tuned)
    found = rank(*paths, level="full")
    rows = {row["name"]: row for row in found["matrices"]}
    assert set(rows) == {"conv", "same", "bad", "wide"} and found["vectors"] == 2
    assert rows["conv"]["shape"] == [8, 36] and rows["conv"]["status"] == "above the edge"
    update = (tuned["conv"].double() - base["conv"].double()).flatten(1).numpy()
    assert [v for _, v in rows["conv"]["singular_values"]] == pytest.approx(exact(update), rel=1e-6)
    assert rows["same"]["status"] == "unchanged" and "angle" not in rows["same"]
    assert rows["bad"]["status"] == "not measured" and "above_edge" not in rows["bad"]
    assert found["summary"]["status"] == {
        "above the edge": 2, "below the precision floor": 0, "unchanged": 1, "not measured": 1,
    }  # fmt: skip
    json.dumps(found, allow_nan=False)
    with pytest.raises(ConfigError, match="no level"):
        rank(*paths, level="deep")


def test_turning_a_matrix_changes_nothing(tmp_path):
    base, update = weights((60, 90)), low_rank((60, 90), 3, 2e-4)
    (tall,) = rank(*pair_of(tmp_path / "a", base, update), level="full")["matrices"]
    (wide,) = rank(*pair_of(tmp_path / "b", base.T.contiguous(), update.T.contiguous()), level="full")["matrices"]
    assert (tall["above_edge"], tall["matrix_rank"]) == (wide["above_edge"], wide["matrix_rank"])
    assert tall["noise_edge"] == pytest.approx(wide["noise_edge"]) and tall["nss"] == pytest.approx(wide["nss"])
    assert tall["angle"] == pytest.approx(wide["angle"][::-1])


def test_a_finer_tuned_model_does_not_hide_that_the_base_was_rounded(tmp_path):
    """A bf16 base against its fp32 master: all that differs is rounding, and none of it is called an update."""
    master = weights((128, 96))
    paths = save(tmp_path / "base", {"w": master.bfloat16()}), save(tmp_path / "tuned", {"w": master})
    (row,) = rank(*paths)["matrices"]
    assert row["status"] == "below the precision floor" and row["matrix_rank"] == 96


def test_an_adapter_has_its_own_spectrum_beside_that_of_the_merged_weights(tmp_path):
    made = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 48, generator=made), torch.randn(64, 4, generator=made) * 1e-4
    base = save(tmp_path / "base", {"layer.weight": weights((64, 48)).bfloat16()})
    names = ("base_model.model.layer.lora_A.weight", "base_model.model.layer.lora_B.weight")
    adapter = save(tmp_path / "lora", dict(zip(names, (down, up), strict=True)), lora_alpha=8, r=4, peft_type="LORA")
    found = rank(base, adapter)
    (row,) = found["matrices"]
    values = exact(2 * (up.double() @ down.double()).numpy())
    assert row["factors"]["rank"] == 4 and row["factors"]["singular_values"] == pytest.approx(values[:4], rel=1e-6)
    assert row["matrix_rank"] > 40 and row["above_edge"] <= 4
    assert "adapter of rank 4" in ranks.as_text(found)


def test_an_adapter_larger_than_its_layer_counts_no_more_directions_than_it_has(tmp_path):
    base = save(tmp_path / "base", {"layer.weight": weights((64, 48))})
    made = torch.Generator().manual_seed(1)
    up, down = torch.randn(64, 8, generator=made), 0.02 * torch.randn(8, 48, generator=made)
    names = ("base_model.model.layer.lora_A.weight", "base_model.model.layer.lora_B.weight")
    adapter = save(tmp_path / "lora", dict(zip(names, (down, up), strict=True)), lora_alpha=8, r=8, peft_type="LORA")
    (row,) = rank(base, adapter)["matrices"]
    assert row["above_edge"] == 8 and row["certificate"] == spectrum.EXACT


def test_the_verb_and_the_page(tmp_path, capsys):
    shape = (96, 64)
    base = {f"layers.{i}.<w>.weight": weights(shape, i) for i in range(3)}
    moves = [low_rank(shape, 2, 3e-4), 1e-6 * weights(shape, 5) / 0.02, torch.zeros(shape)]
    tuned = {k: v.bfloat16().float() + d for (k, v), d in zip(base.items(), moves, strict=True)}
    a, b = (str(save(tmp_path / n, {k: v.bfloat16() for k, v in s.items()})) for n, s in (("a", base), ("b", tuned)))
    assert main(["sparsity", "rank", a, b, "--json", str(tmp_path / "r.json")]) == 0
    text, found = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    assert [row["above_edge"] for row in found["matrices"]] == [2, 0, 0]
    assert "below" in text and "unchanged" in text and "rank is unknown" in text
    page = tmp_path / "page.html"
    assert main(["sparsity", "report", a, b, "--rank", "full", "--out", str(page)]) == 0
    shown = page.read_text(encoding="utf-8")
    assert "edge of rounding noise" in shown and "below precision floor" in shown and "spectral shift" in shown
    assert "layers.0.&lt;w&gt;" in shown and "<w>" not in shown
    rows = [json.loads(line) for line in page.with_suffix(".jsonl").read_text().splitlines()]
    assert rows[0]["rank"]["summary"]["exact"] == 3 and rows[1]["spectrum"]["above_edge"] == 2
    assert "| layers.0.<w>.weight | 2 | exact |" in page.with_suffix(".md").read_text()
    assert main(["sparsity", "report", a, b, "--rank", "none", "--out", str(page)]) == 0
    assert "edge of rounding noise" not in page.read_text(encoding="utf-8")
    assert main(["sparsity", "rank", a, b, "--dry-run"]) == 0
