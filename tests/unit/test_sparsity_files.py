"""Masks and their overlap against chance, deltas that come back bit for bit, and the page."""

from __future__ import annotations

import hashlib
import json
import math
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from align.cli import main
from align.errors import ConfigError, DataError
from align.sparsity import delta as deltas
from align.sparsity.delta import apply_delta, ordered, write_delta
from align.sparsity.formats import FORMATS
from align.sparsity.masks import bits_set, count_overlap, overlap, read_mask, write_mask
from align.sparsity.nulls import overlap_null


def save(path, state):
    path.mkdir(parents=True, exist_ok=True)
    save_file(state, path / "model.safetensors")
    return path


def bf16(codes):
    return torch.from_numpy(np.asarray(codes, np.uint16).view(np.int16)).view(torch.bfloat16)


# --- masks -------------------------------------------------------------------------------------------


def test_an_overlap_worked_by_hand(tmp_path):
    """Ten weights: one run moves 0-3, another 2-5; of the common two, one moves the same way."""
    base = torch.ones(10).bfloat16()
    one, two = base.clone(), base.clone()
    one[:4], two[2:6] = 2.0, torch.tensor([2.0, 0.5, 2.0, 2.0]).bfloat16()
    runs = [save(tmp_path / name, {"w": w}) for name, w in (("base", base), ("one", one), ("two", two))]
    pair = overlap(runs[0], runs[1:])["pairs"][0]
    assert (pair["parameters"], pair["changed"], pair["common"]) == (10, [4, 4], 2)
    assert pair["one_sided"] == [0.5, 0.5] and pair["jaccard"] == 2 / 6 and pair["dice"] == 0.5
    assert pair["sign_agreement"] == 0.5 and pair["mask_drift"] == 0.4
    assert pair["cosine"] == pytest.approx((1 - 0.5) / math.sqrt(4 * 3.25))
    assert pair["cosine_common"] == pytest.approx((1 - 0.5) / math.sqrt(2 * 1.25))
    # All ten have one exponent: the nulls agree. E = 4 * 4 / 10, Var = 4 4 6 6 / (100 * 9).
    for null in pair["nulls"].values():
        assert null["expected"] == pytest.approx(1.6) and null["z"] == pytest.approx(0.4 / 0.8)
    assert pair["nulls"]["uniform"]["one_sided"] == [0.4, 0.4]


def test_the_variance_is_that_of_a_hypergeometric_draw():
    from scipy.stats import hypergeom

    n, n1, n2 = (np.array(v) for v in ([50, 9, 1, 0], [20, 9, 1, 0], [30, 4, 0, 0]))
    mean, variance = overlap_null([(n, n1, n2)])
    law = [hypergeom(a, b, c) for a, b, c in zip(n[:2], n1, n2, strict=False)]  # the others cannot vary
    assert mean == pytest.approx(sum(x.mean() for x in law)) and variance == pytest.approx(sum(x.var() for x in law))


def runs_of(tmp_path, planted=0.0, seed=0, size=200_000):
    """Two updates that share nothing but the base, and, where `planted`, a set of weights that both move."""
    rng = np.random.default_rng(seed)
    base = torch.from_numpy(rng.normal(0, 0.02, size).astype(np.float32)).bfloat16()
    both, runs = torch.from_numpy(rng.random(size) < planted), [save(tmp_path / f"{seed}-base", {"w": base})]
    for scale in (1.5e-5, 3e-5):
        update = torch.from_numpy(rng.normal(0, scale, size).astype(np.float32))
        tuned = (base.float() + update + both * 4e-4).bfloat16()
        runs.append(save(tmp_path / f"{seed}-{scale}", {"w": tuned}))
    return overlap(runs[0], runs[1:])["pairs"][0]["nulls"]


def test_independent_updates_are_not_called_overlapping_and_a_planted_overlap_is(tmp_path):
    """By magnitude z is N(0, 1): the mean square of 12 lies below 2.4 but for one time in 200. The uniform null fails."""
    nulls = [runs_of(tmp_path, seed=seed) for seed in range(12)]
    scores = np.array([null["by_magnitude"]["z"] for null in nulls])
    assert np.mean(scores**2) < 2.4 and abs(scores.mean()) < 0.9
    assert min(null["uniform"]["z"] for null in nulls) > 100
    assert runs_of(tmp_path, planted=0.01, seed=50)["by_magnitude"]["z"] > 5


@pytest.mark.slow
def test_z_is_standard_normal_under_independence_and_finds_one_per_cent():
    """Over 300 pairs of independent updates: mean 0 +- 0.2, sd 1 +- 0.13, 5 % rejected; three standard errors each.

    With powers of two in the strata of their neighbours the mean is 0.25 at this size, and grows with the square root of
    the number of weights; the uniform null rejects every pair. One weight in a hundred moved by both is always found.
    """
    form, size, rng = FORMATS["BF16"], 200_000, np.random.default_rng(0)
    scores, uniform, coarse, planted = [], [], [], []

    def z(both, strata):
        mean, variance = overlap_null([strata])
        return (both - mean) / math.sqrt(variance)

    for _ in range(300):
        old = form.encode(rng.normal(0, 0.02, size).astype(np.float32))
        values, shared = form.values(old), rng.random(size) < 0.01
        exponents, powers = form.exponent(old), old & 127 == 0
        updates = [rng.normal(0, scale, size) for scale in (1.5e-5, 3e-5)]
        for extra, kept in ((0.0, scores), (4e-4, planted)):
            masks = [form.encode((values + u + extra * shared).astype(np.float32)) != old for u in updates]
            held = 2 * exponents + powers
            strata = tuple(np.bincount(held[m], minlength=512) for m in (np.ones(size, bool), *masks))
            both = int((masks[0] & masks[1]).sum())
            kept.append(z(both, strata))
            if not extra:
                uniform.append(z(both, tuple(s.sum(keepdims=True) for s in strata)))
                coarse.append(z(both, tuple(s.reshape(256, 2).sum(1) for s in strata)))
    scores = np.array(scores)
    assert abs(scores.mean()) < 0.2 and abs(scores.std(ddof=1) - 1) < 0.13
    assert 0.012 < np.mean(np.abs(scores) > 1.96) < 0.088
    assert min(uniform) > 100 and min(planted) > 5
    assert np.mean(coarse) > scores.mean() + 0.1


def test_powers_of_two_are_strata_of_their_own(tmp_path):
    """Of eight weights of one exponent four are 1: both runs move all four, and nothing else moves."""
    base = torch.tensor([1.0] * 4 + [1.5] * 4).bfloat16()
    tuned = base - torch.tensor([1 / 256] * 4 + [0.0] * 4).bfloat16()
    paths = [save(tmp_path / name, {"w": w}) for name, w in (("base", base), ("one", tuned), ("two", tuned))]
    null = overlap(paths[0], paths[1:])["pairs"][0]["nulls"]
    assert null["uniform"]["expected"] == 2.0 and null["by_magnitude"]["expected"] == 4.0


def test_masks_on_disk_say_what_checkpoints_say(tmp_path):
    rng = np.random.default_rng(1)
    base = {
        "a": torch.from_numpy(rng.normal(0, 0.02, (300, 7)).astype(np.float32)).bfloat16(),
        "b": torch.ones(13).bfloat16(),
    }
    paths = [save(tmp_path / "base", base)]
    for seed in (2, 3):
        made = torch.Generator().manual_seed(seed)
        moved = {k: (v.float() + 5e-5 * torch.randn(v.shape, generator=made)).bfloat16() for k, v in base.items()}
        paths.append(save(tmp_path / f"run{seed}", moved))
        write_mask(paths[0], paths[-1], tmp_path / f"{seed}.mask")
    mask = read_mask(tmp_path / "2.mask")
    bits = np.unpackbits(mask.source.entries["a"].read(0, 263), bitorder="little")[:2100]
    wanted = load_file(paths[1] / "model.safetensors")["a"].view(torch.int16) != base["a"].view(torch.int16)
    assert np.array_equal(bits, wanted.flatten().numpy()) and mask.exponents("a")[1].sum() == wanted.sum()
    direct = overlap(paths[0], paths[1:])["pairs"][0]
    stored = overlap(None, [tmp_path / "2.mask", tmp_path / "3.mask"])["pairs"][0]
    skip = ("first", "second", "cosine", "cosine_common")
    assert {k: v for k, v in direct.items() if k not in skip} == {k: v for k, v in stored.items() if k not in skip}
    with pytest.raises(DataError, match="needs two runs"):
        overlap(None, [tmp_path / "2.mask"])
    with pytest.raises(DataError, match="no mask without its base"):
        overlap(None, [tmp_path / "2.mask", paths[1]])
    write_mask(paths[1], paths[2], tmp_path / "foreign.mask")
    with pytest.raises(DataError, match="different bases"):
        overlap(None, [tmp_path / "2.mask", tmp_path / "foreign.mask"])
    with pytest.raises(DataError, match="no mask of ours"):
        read_mask(paths[1] / "model.safetensors")


def test_packed_bits_count_like_bools():
    rng = np.random.default_rng(0)
    for size in (0, 1, 7, 8, 9, 1000, 300_001):
        a, b = rng.integers(0, 256, (2, size), np.uint8)
        assert bits_set(a) == np.unpackbits(a).sum()
        assert count_overlap(a, b) == (np.unpackbits(a) & np.unpackbits(b)).sum()


# --- deltas ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [np.uint16, np.uint32])
def test_the_order_of_codes_loses_nothing(code):
    codes = np.arange(65536).astype(code) << (0 if code == np.uint16 else 16)
    there = ordered(codes)
    assert len(np.unique(there)) == 65536 and np.array_equal(ordered(there.view(code)).view(code), codes)


def test_gaps_come_back():
    rng = np.random.default_rng(0)
    for where in (np.array([], np.int64), np.array([0]), np.array([254]), np.array([255]), np.array([510, 511, 2000]),
                  np.flatnonzero(rng.random(100_000) < 0.002)):  # fmt: skip
        assert np.array_equal(deltas._places(deltas._gaps(where)), where)


def states():
    rng = np.random.default_rng(5)
    old = rng.integers(0, 65536, 70_000).astype(np.uint16)  # every class of code: NaN payloads, -0, subnormals
    new = np.where(rng.random(70_000) < 0.1, rng.integers(0, 65536, 70_000), old).astype(np.uint16)
    near = np.where(rng.random(70_000) < 0.02, old + np.uint16(1), old)
    near = near.astype(np.uint16)
    half = torch.from_numpy(rng.normal(0, 1, 500)).half()
    base = {"wild": bf16(old), "near": bf16(old.copy()), "fp32": torch.from_numpy(rng.normal(0, 1, (30, 30)).astype(np.float32)),
            "half": half, "gone": torch.ones(3), "int": torch.arange(5), "empty": torch.zeros(0, 3), "shape": torch.ones(4)}  # fmt: skip
    tuned = {**base, "wild": bf16(new), "near": bf16(near), "half": half * 1.01, "int": torch.arange(5) * 2,
             "fp32": base["fp32"] * 1.001, "added": torch.full((2, 2), -0.0), "shape": torch.ones(2, 2)}  # fmt: skip
    del tuned["gone"]
    return base, tuned


@pytest.mark.parametrize(("block", "codec"), [(1 << 22, "zstd"), (4096, "zstd"), (4096, "zlib")])
def test_a_delta_gives_back_every_bit(tmp_path, monkeypatch, block, codec):
    monkeypatch.setattr(deltas, "BLOCK", block)
    if codec == "zlib":
        monkeypatch.setitem(sys.modules, "pyarrow", None)  # as where it is not installed
    base, tuned = states()
    first, second = save(tmp_path / "base", base), save(tmp_path / "tuned", tuned)
    (first / "config.json").write_text('{"a": 1}')
    found = write_delta(first, second, tmp_path / "d.delta")
    assert (
        found["codec"] == codec and found["changed"] > 7000 and found["bytes"] == (tmp_path / "d.delta").stat().st_size
    )
    apply_delta(first, tmp_path / "d.delta", tmp_path / "out")
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert set(back) == set(tuned)
    for name, tensor in tuned.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert back[name].contiguous().numpy(force=True).tobytes() == tensor.numpy().tobytes() if tensor.dtype != torch.bfloat16 \
            else torch.equal(back[name].view(torch.int16), tensor.view(torch.int16))  # fmt: skip
    assert (tmp_path / "out" / "config.json").read_text() == '{"a": 1}'


def test_the_card_of_a_delta(tmp_path, monkeypatch, capsys):
    markdown_it = pytest.importorskip("markdown_it")
    monkeypatch.chdir(tmp_path)
    base, tuned = states()
    first, second = save(tmp_path / "base <b>`", base), save(tmp_path / "tuned", tuned)
    (first / "README.md").write_text("---\nlicense: mit\n---\n")
    assert main(["sparsity", "delta", str(first), str(second), "--out", "d.delta", "--json", "found.json"]) == 0
    found, text = json.loads((tmp_path / "found.json").read_text()), (tmp_path / "d.delta.md").read_text()
    assert "card: d.delta.md" in capsys.readouterr().out and found["card"] == "d.delta.md"
    assert text.startswith("---\nlicense: mit\ntags:\n- align\n- sparse-delta\n---\n")
    assert f"{found['changed']:,} weights that changed" in text
    assert f"`d.delta`, sha256 `{hashlib.sha256((tmp_path / 'd.delta').read_bytes()).hexdigest()}`" in text
    tokens = markdown_it.MarkdownIt("commonmark").parse(text.split("\n---\n", 1)[1])
    assert not {"html_block", "html_inline"} & {t.type for token in tokens for t in (token, *(token.children or ()))}
    exec(next(token.content for token in tokens if token.type == "fence"), {})
    assert load_file(tmp_path / "applied" / "model.safetensors").keys() == tuned.keys()


def test_an_embedded_model_may_be_the_base(tmp_path, monkeypatch, capsys):
    from trainers.tiny_language import tiny_model

    assert main(["sparsity", "delta", "tiny", str(tiny_model()), "--out", str(tmp_path / "d"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changed"] == 0
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "tiny", states()[0])
    assert main(["sparsity", "delta", "tiny", str(tiny_model()), "--out", "own", "--json"]) == 0, "a folder goes before"
    assert json.loads(capsys.readouterr().out)["changed"] > 0


def test_what_is_wrong_with_a_delta_is_said_and_nothing_is_left(tmp_path):
    base, tuned = states()
    first, second = save(tmp_path / "base", base), save(tmp_path / "tuned", tuned)
    path = tmp_path / "d.delta"
    write_delta(first, second, path)
    other = save(tmp_path / "other", base | {"near": base["near"] * 2})
    with pytest.raises(DataError, match="belongs to another base"):
        apply_delta(other, path, tmp_path / "out")
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    begin, end = header["wild::0::steps"]["data_offsets"]
    place = 8 + size + (begin + end) // 2
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
    with pytest.raises(DataError, match="damaged|does not give the tuned model back"):
        apply_delta(first, path, tmp_path / "out")
    path.write_bytes(whole)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="there already"):
        apply_delta(first, path, tmp_path / "there")
    assert not (tmp_path / "out").exists()
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".") or "writing" in p.name]
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "model.safetensors").write_bytes((second / "model.safetensors").read_bytes()[:-100])
    assert main(["sparsity", "delta", str(first), str(cut), "--out", str(tmp_path / "never")]) == 2
    assert not (tmp_path / "never").exists()


def test_a_delta_of_zstd_where_it_cannot_be_read(tmp_path, monkeypatch, capsys):
    base, tuned = save(tmp_path / "base", {"w": torch.zeros(9)}), save(tmp_path / "tuned", {"w": torch.ones(9)})
    write_delta(base, tuned, tmp_path / "d")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["sparsity", "apply", str(base), str(tmp_path / "d"), "--out", str(tmp_path / "out")]) == 2
    assert "needs pyarrow" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_a_part_that_is_longer_or_shorter_than_it_says_is_refused(size):
    for name in ("zstd", "zlib"):
        _, squeeze, expand = deltas._codec(name)
        data = squeeze(bytes(range(100)) * 3)
        with pytest.raises(ValueError, match=r"instead of|claims|has"):
            deltas._bounded(expand)(data if size else b"", size or 5)
        assert deltas._bounded(expand)(data, 300) == bytes(range(100)) * 3


@pytest.mark.parametrize(("scale", "ratio"), [(1e-6, 109), (3e-6, 46), (1e-5, 17), (3e-5, 7.8)])
def test_deltas_are_as_small_as_the_prototypes(tmp_path, scale, ratio):
    """Ratios to dense bf16 of N(0, 0.02) weights under a Gaussian update, on fewer weights than they were measured on."""
    made = torch.Generator().manual_seed(0)
    w = (0.02 * torch.randn(1 << 21, generator=made)).bfloat16()
    tuned = (w.float() + scale * torch.randn(1 << 21, generator=made)).bfloat16()
    found = write_delta(save(tmp_path / "a", {"w": w}), save(tmp_path / "b", {"w": tuned}), tmp_path / "d")
    assert found["ratio"] > 0.9 * ratio


@pytest.mark.parametrize("name", ["../../evil/w", "/abs/w", "../w", "a/b/w"])
def test_a_delta_writes_nowhere_else(tmp_path, name):
    base = save(tmp_path / "deep" / "base", {"w": torch.ones(3)})
    write_delta(base, save(tmp_path / "deep" / "tuned", {name: torch.ones(3)}), tmp_path / "d")
    with pytest.raises(DataError, match="names a folder"):
        apply_delta(base, tmp_path / "d", tmp_path / "deep" / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"deep", "d"}
    assert {p.name for p in (tmp_path / "deep").iterdir()} == {"base", "tuned"}


def test_a_delta_of_a_pipeline_is_a_pipeline_again(tmp_path):
    for name, add in (("base", 0.0), ("tuned", 0.01)):
        root = tmp_path / name
        for part, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
            (root / part).mkdir(parents=True)
            (root / part / "config.json").write_text("{}")
            save_file({"w": torch.ones(20, 20).bfloat16() + add}, root / part / f"{stem}.safetensors")
        (root / "model_index.json").write_text("{}")
    write_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "d")
    apply_delta(tmp_path / "base", tmp_path / "d", tmp_path / "out")
    files = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert files == {str(p.relative_to(tmp_path / "tuned")) for p in (tmp_path / "tuned").rglob("*") if p.is_file()}


# --- verbs and page ----------------------------------------------------------------------------------


def test_the_verbs_of_the_page_and_the_page(tmp_path, capsys):
    made = torch.Generator().manual_seed(0)
    names = {
        "model.embed.weight": (40, 20),
        "model.layers.0.attn.<b>.weight": (30, 20),
        "model.layers.10.norm.weight": (20,),
    }
    base = {k: (0.02 * torch.randn(v, generator=made)).bfloat16() for k, v in names.items()}
    paths = [save(tmp_path / "base", base)]
    for i in range(2):
        moved = {k: (v.float() + 2e-5 * torch.randn(v.shape, generator=made)).bfloat16() for k, v in base.items()}
        paths.append(save(tmp_path / f"run{i}", moved))
    a, b, c = map(str, paths)
    page = tmp_path / "out" / "page.html"
    assert main(["sparsity", "report", a, b, "--other", c, "--out", str(page), "--json", str(tmp_path / "r.json")]) == 0
    text = page.read_text(encoding="utf-8")
    result = json.loads((tmp_path / "r.json").read_text())
    assert f"{100 * result['bit_identical']:.2f}\u00a0%" in text and "Rounding alone is enough" in text
    assert "unknown: the checkpoint does not say" in text and "chance, by magnitude" in text
    assert "attn.&lt;b&gt;" in text and "attn.<b>" not in text and "http:" not in text
    assert text.count('class="cell"') == 2
    rows = [json.loads(line) for line in page.with_suffix(".jsonl").read_text().splitlines()]
    assert len(rows) == 4 and rows[0]["parameters"] == sum(row["parameters"] for row in rows[1:])
    assert f"{100 * result['bit_identical']:.2f} % of weights are bit-identical" in page.with_suffix(".md").read_text()
    assert main(["sparsity", "report", a, b, "--out", str(tmp_path / "page.txt")]) == 2
    assert main(["sparsity", "compare", a, b, "--mask", str(tmp_path / "m"), "--threads", "2"]) == 2
    assert main(["sparsity", "compare", a, b, "--mask", str(tmp_path / "m")]) == 0
    assert main(["sparsity", "overlap", str(tmp_path / "m"), c, "--base", a]) == 0
    assert "by chance, by magnitude" in capsys.readouterr().out
    assert main(["sparsity", "delta", a, b, "--out", str(tmp_path / "d")]) == 0
    assert main(["sparsity", "apply", a, str(tmp_path / "d"), "--out", str(tmp_path / "applied")]) == 0
    assert main(["sparsity", "compare", b, str(tmp_path / "applied"), "--level", "bits"]) == 0
    assert "100.00 % of" in capsys.readouterr().out
    assert main(["sparsity"]) == 2
