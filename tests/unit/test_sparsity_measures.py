"""What changed, against exact integers, torch, and the goldens of a rounded dense update."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from align.sparsity.formats import FORMATS
from align.sparsity.measure import CHUNK, Measures, Pass, kernels, new_scratch
from align.sparsity.nulls import (
    expected_identical,
    matching_scale,
    visible_after_sign_step,
    visible_energy,
    visible_share,
)

BF16, F32 = FORMATS["BF16"], FORMATS["F32"]


def measure(old, new, form=BF16, kernel="numpy", chunk=CHUNK):
    work = Pass(form, kernels(kernel), new_scratch())
    for start in range(0, len(old), chunk):
        work.add(old[start : start + chunk], new[start : start + chunk])
    return work.finish()


def same(a: Measures, b: Measures) -> bool:
    exact = [f.name for f in fields(Measures) if f.name not in ("l1", "energy", "base_energy")]
    close = all(math.isclose(getattr(a, n), getattr(b, n), rel_tol=1e-12) for n in ("l1", "energy", "base_energy"))
    return close and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in exact)


def exact(code: int) -> int:
    """The value of a finite bf16 code in units of 2^-133, a whole number."""
    exponent, mantissa = (code >> 7) & 255, code & 127
    size = mantissa if exponent == 0 else (128 + mantissa) << (exponent - 1)
    return -size if code >> 15 else size


@pytest.mark.parametrize("kernel", ["numpy", "numba"])
@pytest.mark.parametrize("partner", ["+1", "-1", "+2", "random", "negated"])
def test_every_bf16_code_against_whole_numbers(kernel, partner):
    """Compare, steps, |difference| at every power of two, 1e-5, signs and classes, in exact arithmetic."""
    old = np.arange(65536, dtype=np.uint16)
    new = {
        "+1": old + np.uint16(1), "-1": old - np.uint16(1), "+2": old + np.uint16(2), "negated": old ^ np.uint16(0x8000),
        "random": np.random.default_rng(0).integers(0, 65536, 65536).astype(np.uint16),
    }[partner]  # fmt: skip
    found = measure(old, new, kernel=kernel)
    nan = zero = flips = beyond = infinite = 0
    steps, sizes = [], []
    limit = int(1e-5 * 2.0**133)  # 1e-5 as a double is a whole number of these units
    for a, b in zip(old.tolist(), new.tolist(), strict=True):
        if a == b:
            continue
        if (a & 0x7FFF) > 0x7F80 or (b & 0x7FFF) > 0x7F80:
            nan += 1
            continue
        if not (a | b) & 0x7FFF:
            zero += 1
            continue
        steps.append(abs((-(a & 0x7FFF) if a >> 15 else a) - (-(b & 0x7FFF) if b >> 15 else b)))
        x, y = exact(a), exact(b)
        flips += x * y < 0
        if 0x7F80 in (a & 0x7FFF, b & 0x7FFF):
            infinite += 1
            beyond += 1
            continue
        sizes.append(abs(y - x))
        beyond += abs(y - x) > limit
    bins = [0] * 9
    for step in steps:
        bins[min((step - 1).bit_length(), 8)] += 1
    assert found.parameters == 65536 and found.different == int((old != new).sum())
    assert (found.nan, found.zero_sign, found.infinite, found.sign_flips) == (nan, zero, infinite, flips)
    assert found.ulp.tolist() == bins
    assert found.different == zero + nan + sum(bins) and found.magnitude.sum() == sum(bins)
    assert found.beyond == beyond
    sizes = np.sort(np.array(sizes, object))
    unchanged = 65536 - found.different + zero
    for power in range(-133, 128):
        assert found.within(power) == unchanged + int(np.searchsorted(sizes, 1 << (power + 133), side="right")), power


def test_steps_and_rounding_by_definition():
    one = measure(np.array([0x3F80, 0x0000, 0x0001], np.uint16), np.array([0x3F81, 0x8000, 0x8001], np.uint16))
    assert one.ulp[:3].tolist() == [1, 1, 0] and one.zero_sign == 1  # 1 to 1.0078125 is 1; 2^-133 to -2^-133 is 2
    starts = np.float32([1 + 0.0039, 1 + 0.00391, 1 - 0.0019, 1 - 0.00196])
    assert BF16.values(BF16.encode(starts)).tolist() == [1.0, 1.0078125, 1.0, 0.99609375]


@pytest.mark.parametrize(("name", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)])
def test_the_papers_tolerance_equals_torch_to_the_last_count(name, dtype):
    torch.manual_seed(0)
    base = (torch.randn(200_000) * 0.02).to(dtype)
    tuned = (base.float() + 1.5e-5 * torch.randn(200_000)).to(dtype)
    edge = torch.tensor([1.0013580322265625e-05, 1e-5, float("nan"), float("inf"), float("inf")]).to(dtype)
    base = torch.cat(
        [base, torch.zeros(3, dtype=dtype), torch.tensor([float("inf"), float("-inf")]).to(dtype), edge[2:3]]
    )
    tuned = torch.cat([tuned, edge, edge[2:3]])
    form = FORMATS[name]
    view = torch.int32 if name == "F32" else torch.int16
    a, b = (t.view(view).numpy().view(form.code) for t in (base, tuned))
    found = measure(a, b, form)
    assert found.beyond_authors == int((~torch.isclose(base, tuned, rtol=0, atol=1e-5)).sum())
    gap = (base.double() - tuned.double()).abs()
    assert found.beyond == int((gap > 1e-5).sum())
    shared = ~(gap.isnan() | gap.isinf())
    assert found.energy == pytest.approx(gap[shared].square().sum().item(), rel=1e-12)
    assert found.l1 == pytest.approx(gap[shared].sum().item(), rel=1e-12)
    assert (found.nan_base, found.nan_tuned) == (1, 2)


CODES = arrays(np.uint16, st.integers(0, 400), elements=st.integers(0, 65535))


@settings(max_examples=25, deadline=None)
@given(CODES, st.integers(1, 70), st.randoms(use_true_random=False))
def test_counts_do_not_depend_on_chunks_kernels_or_order(old, chunk, random):
    new = np.array([c if random.random() < 0.5 else random.randrange(65536) for c in old.tolist()], np.uint16)
    whole = measure(old, new)
    order = np.array(random.sample(range(len(old)), len(old)), np.int64)
    assert same(whole, measure(old, new, chunk=chunk))
    assert same(whole, measure(old, new, kernel="numba", chunk=chunk))
    assert same(whole, measure(old[order], new[order]))
    half = len(old) // 2
    assert same(whole, measure(old[:half], new[:half]) + measure(old[half:], new[half:]))
    assert whole.exponents.sum() == whole.exponents_tuned.sum() == len(old)
    assert np.array_equal(whole.exponents_tuned, np.bincount(BF16.exponent(new), minlength=256))
    assert whole.exponents_changed.sum() == whole.different == int((old != new).sum())


def test_bits_alone_count_the_same():
    rng = np.random.default_rng(1)
    for code in (np.uint8, np.uint16, np.uint32):
        a = rng.integers(0, 3, 100_003).astype(code)
        b = rng.integers(0, 3, 100_003).astype(code)
        assert kernels("numba").count(a, b) == kernels("numpy").count(a, b) == int((a != b).sum())


# --- what rounding would show ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights():
    return BF16.encode(np.random.default_rng(0).normal(0, 0.02, 2_000_000).astype(np.float32))


@pytest.fixture(scope="module")
def histogram(weights):
    return np.bincount(BF16.exponent(weights), minlength=256)


@pytest.mark.parametrize(
    ("scale", "aligned", "unaligned"),
    [(3e-6, 3.52, 8.05), (1.5e-5, 17.1, 26.1), (3e-5, 31.9, 40.1), (1e-4, 67.5, 69.6)],
)
def test_density_of_a_rounded_dense_update(histogram, scale, aligned, unaligned):
    for mode, golden in ((True, aligned), (False, unaligned)):
        share = visible_share(scale, BF16.spacing(), aligned=mode)
        assert 100 * (histogram * share).sum() / histogram.sum() == pytest.approx(golden, abs=0.06)


@pytest.mark.parametrize(
    ("rate", "aligned", "unaligned"),
    [(1e-7, 0.12, 0.6), (1e-6, 1.95, 4.2), (3e-6, 3.9, 10.2), (1e-5, 15.5, 25), (1e-4, 88, 87)],
)
def test_what_one_sign_step_shows(histogram, rate, aligned, unaligned):
    for mode, golden in ((True, aligned), (False, unaligned)):
        seen = 100 * visible_after_sign_step(rate, histogram, BF16.spacing(), aligned=mode)
        assert seen == pytest.approx(golden, rel=0.06)  # two digits of 0.12


@pytest.mark.parametrize("scale", [3e-6, 3e-5, 1e-4])
@pytest.mark.parametrize("aligned", [True, False])
def test_the_expected_share_agrees_with_a_simulation(weights, histogram, scale, aligned):
    rng = np.random.default_rng(2)
    start = BF16.values(weights)
    if not aligned:  # masters lie anywhere between the neighbours that round to the stored value
        start = start + (rng.random(len(start)) - 0.5) * BF16.spacing()[BF16.exponent(weights)]
    stored = BF16.encode(start.astype(np.float32))
    tuned = BF16.encode((start + rng.normal(0, scale, len(start))).astype(np.float32))
    found = measure(stored, tuned)
    expected = expected_identical(found.energy, histogram, BF16.spacing(), aligned=aligned)
    assert expected / len(weights) == pytest.approx(1 - found.different / len(weights), abs=0.002)
    matched = matching_scale(found.energy, histogram, BF16.spacing(), aligned=aligned)
    assert matched == pytest.approx(scale, rel=0.01)


def test_the_visible_norm_is_not_the_norm(histogram):
    """||E|| / ||D|| = 0.34, 0.73, 0.94, 1.04: why s is matched on what is visible."""
    for scale, ratio in ((3e-6, 0.34), (1.5e-5, 0.73), (3e-5, 0.94), (1e-4, 1.04)):
        energy = visible_energy(scale, histogram, BF16.spacing(), aligned=True)
        assert math.sqrt(energy / histogram.sum()) / scale == pytest.approx(ratio, abs=0.006)


def test_nothing_visible_predicts_nothing(histogram):
    assert matching_scale(0.0, histogram, BF16.spacing(), aligned=True) == 0
    assert expected_identical(0.0, histogram, BF16.spacing(), aligned=True) == histogram.sum()


def test_concentration_against_sorting(weights):
    tuned = BF16.encode(
        (BF16.values(weights) + np.random.default_rng(3).normal(0, 1.5e-5, len(weights))).astype(np.float32)
    )
    found = measure(weights, tuned)
    energy = np.sort((BF16.values(tuned) - BF16.values(weights)) ** 2)[::-1]
    for share in (0.01, 0.05, 0.1, 0.2):
        assert found.top_energy(share) == pytest.approx(
            energy[: int(share * len(energy))].sum() / energy.sum(), abs=0.01
        )


def test_rounding_never_hides_more_than_the_certificate():
    rng = np.random.default_rng(4)
    start = BF16.encode(rng.normal(0, 0.02, 50_000).astype(np.float32))
    update = rng.normal(0, 2e-5, 50_000)
    tuned = BF16.encode((BF16.values(start) + update).astype(np.float32))
    found = measure(start, tuned)
    hidden = np.linalg.norm(BF16.values(tuned) - BF16.values(start) - update)
    certificate = math.sqrt(float((found.exponents_tuned * BF16.spacing() ** 2)[:-1].sum())) / 2
    assert hidden < certificate < 4 * hidden
