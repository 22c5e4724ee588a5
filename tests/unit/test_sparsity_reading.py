"""Checkpoints in every layout give the same numbers, and nothing that does not match is swallowed."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from align.cli import main
from align.errors import ModelError
from align.sparsity.compare import compare
from align.sparsity.pairs import load_pair
from align.sparsity.sources import open_source

STATE = {
    "model.embed_tokens.weight": (50, 16), "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.mlp.up_proj.weight": (64, 16), "model.layers.1.self_attn.q_proj.weight": (16, 16),
    "model.layers.1.mlp.up_proj.weight": (64, 16), "model.norm.weight": (16,), "lm_head.weight": (50, 16),
}  # fmt: skip
INTEGERS = ("bit_identical", "density", "sparsity_1e-5", "sparsity_authors_mode", "ulp_histogram", "sign_flips")


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {name: (0.02 * torch.randn(shape, generator=made)).bfloat16() for name, shape in STATE.items()}


def moved(state, scale=2e-5, seed=9):
    made = torch.Generator().manual_seed(seed)
    return {k: (v.float() + scale * torch.randn(v.shape, generator=made)).to(v.dtype) for k, v in state.items()}


def folder(path, state, config=None, name="model.safetensors"):
    path.mkdir(parents=True, exist_ok=True)
    save_file(state, path / name)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def sharded(path, state, shards=3, kind="safetensors"):
    path.mkdir(parents=True)
    stem, names, table = ("model" if kind == "safetensors" else "pytorch_model"), list(state), {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.{kind}"
        part = {n: state[n] for n in names[i::shards]}
        save_file(part, path / file) if kind == "safetensors" else torch.save(part, path / file)
        table |= dict.fromkeys(part, file)
    (path / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": table}))
    return path


@pytest.fixture
def pair(tmp_path):
    base = weights()
    return folder(tmp_path / "base", base), folder(tmp_path / "tuned", moved(base)), base, moved(base)


def test_every_layout_gives_the_same_numbers(tmp_path, pair):
    base, tuned, first, second = pair
    wanted = compare(base, tuned, threads=1).as_dict()
    assert 0.3 < wanted["bit_identical"] < 0.95 and wanted["parameters"] == sum(v.numel() for v in first.values())
    torch.save(second, tmp_path / "whole.bin")
    torch.save({"state_dict": second}, tmp_path / "nested.pt")
    others = [
        sharded(tmp_path / "shards", second), sharded(tmp_path / "bins", second, kind="bin"), tmp_path / "whole.bin",
        tmp_path / "nested.pt", tuned / "model.safetensors",
        folder(tmp_path / "run" / "checkpoints" / "step_000010", dict(reversed(second.items()))).parent.parent,
        folder(tmp_path / "odd", second, name="weights.safetensors"),
    ]  # fmt: skip
    for other in others:
        for threads in (1, 2):
            found = compare(base, other, threads=threads).as_dict()
            assert {k: found[k] for k in INTEGERS} == {k: wanted[k] for k in INTEGERS}, other
            assert found["norm"] == pytest.approx(wanted["norm"], rel=1e-12)
            assert found["coverage"] == 1 and found["bytes_read"] == wanted["bytes_read"]


def test_against_torch_and_by_hand(pair):
    base, tuned, first, second = pair
    found = compare(base, tuned).as_dict()
    same = sum(int((first[k].view(torch.int16) == second[k].view(torch.int16)).sum()) for k in first)
    assert found["bit_identical"] == same / found["parameters"]
    squares = sum((second[k].double() - first[k].double()).square().sum().item() for k in first)
    assert found["norm"] == pytest.approx(squares**0.5, rel=1e-12)
    assert found["base_norm"] == pytest.approx(sum(v.double().square().sum().item() for v in first.values()) ** 0.5)
    assert sum(found["ulp_histogram"].values()) == found["parameters"] - same
    assert set(found["modules"]) == {"embedding", "attention", "mlp", "norm", "head"}
    assert set(found["layers"]) == {"model.layers.0", "model.layers.1", "(outside layers)"}
    bits = compare(base, tuned, level="bits").as_dict()
    assert bits["bit_identical"] == found["bit_identical"]


def test_a_pipeline_and_one_component_of_it(tmp_path, pair):
    _, _, first, second = pair
    for name, state in (("base", first), ("tuned", second)):
        root = tmp_path / f"pipe-{name}"
        folder(root / "transformer", state, name="diffusion_pytorch_model.safetensors")
        folder(root / "vae", {"decoder.conv.weight": torch.ones(3, 3, dtype=torch.bfloat16)})
        (root / "model_index.json").write_text("{}")
    found = compare(tmp_path / "pipe-base", tmp_path / "pipe-tuned").as_dict()
    assert found["parameters"] == sum(v.numel() for v in first.values()) + 9
    part = compare(tmp_path / "pipe-base", tmp_path / "pipe-tuned" / "transformer").as_dict()
    assert part["parameters"] == found["parameters"] - 9 and part["coverage"] == 1
    share = f"{100 * part['bit_identical']:.2f} % of the others are bit-identical"
    assert part["bit_identical"] < found["bit_identical"] and any(share in note for note in found["notes"])


def test_a_lora_adapter_is_compared_merged(tmp_path):
    peft = pytest.importorskip("peft")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(24, 40), torch.nn.Linear(40, 24)

    torch.manual_seed(0)
    net = Net()
    base = folder(tmp_path / "base", {k: v.clone() for k, v in net.state_dict().items()})
    model = peft.get_peft_model(
        net, peft.LoraConfig(r=4, lora_alpha=10, target_modules=["up", "down"], use_rslora=True)
    )
    for name, value in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    merged = folder(tmp_path / "merged", {k: v.clone() for k, v in model.merge_and_unload().state_dict().items()})
    found, wanted = (compare(base, tmp_path / where).as_dict() for where in ("adapter", "merged"))
    assert found["norm"] == pytest.approx(wanted["norm"], rel=1e-5) and found["norm"] > 0.1
    near = {row["name"]: row["norm"] for row in wanted["per_tensor"]}
    assert all(row["norm"] == pytest.approx(near[row["name"]], rel=1e-5) for row in found["per_tensor"])
    assert not compare(base, tmp_path / "adapter", form="BF16").as_dict()["masters"]
    with pytest.raises(ModelError, match="base is an adapter"):
        load_pair(tmp_path / "adapter", base)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ModelError, match="DoRA"):
        load_pair(base, tmp_path / "adapter")


def test_checkpoints_of_ours_against_the_pipeline_they_came_from(tmp_path):
    from align.checkpoint import save

    made = torch.Generator().manual_seed(0)
    base = {f"blocks.{i}.q.weight": torch.randn(12, 8, generator=made) for i in range(3)}
    a, b = torch.randn(2, 8, generator=made), torch.randn(12, 2, generator=made)
    root = tmp_path / "base"
    folder(root / "transformer", base, name="diffusion_pytorch_model.safetensors")
    folder(root / "text_encoder", {"blocks.1.q.weight": torch.ones(12, 8)})
    (root / "model_index.json").write_text("{}")
    lora = {"blocks.1.q.lora_A.policy.weight": a, "blocks.1.q.lora_B.policy.weight": b}
    config = {"model": {"train": "lora", "lora": {"rank": 2, "alpha": 6.0}}}
    groups = {"optimizer": {"m": torch.zeros(5)}}
    save(tmp_path / "lora" / "checkpoints", 3, {"model": lora} | groups, {"config": config})
    found = compare(root, tmp_path / "lora").as_dict()
    assert found["norm"] == pytest.approx((3 * b @ a).norm().item(), rel=1e-5) and found["parameters"] == 3 * 96
    assert found["bit_identical"] == pytest.approx(2 / 3, abs=0.01)
    full = base | {"blocks.1.q.weight": base["blocks.1.q.weight"] + 3 * b @ a}
    save(tmp_path / "full" / "checkpoints", 3, {"model": full} | groups, {"config": {"model": {"train": "full"}}})
    again = compare(root, tmp_path / "full").as_dict()
    assert again["norm"] == pytest.approx(found["norm"], rel=1e-5) and again["coverage"] == 1
    save(tmp_path / "bare" / "checkpoints", 3, {"model": lora}, {})
    with pytest.raises(ModelError, match="does not say its scale"):
        compare(root, tmp_path / "bare")


def test_what_does_not_match_is_listed(tmp_path, pair):
    base, _, first, second = pair
    other = {("module." + k if "layers.0" in k else k): v for k, v in second.items()}
    del other["model.norm.weight"]
    other["model.extra.weight"] = torch.zeros(7, dtype=torch.bfloat16)
    other["model.embed_tokens.weight"] = torch.cat([other["model.embed_tokens.weight"], torch.zeros(3, 16).bfloat16()])
    other["model.layers.1.mlp.up_proj.weight"] = other["model.layers.1.mlp.up_proj.weight"].reshape(32, 32)
    other["model.layers.1.self_attn.q_proj.weight"] = first["model.layers.1.self_attn.q_proj.weight"].float()
    other["model.rotary.inv_freq"] = torch.ones(4)
    found = compare(base, folder(tmp_path / "other", other)).as_dict()
    keys = found["keys"]
    assert keys["missing"] == {"model.norm.weight": 16} and keys["extra"] == {"model.extra.weight": 7}
    assert set(keys["renamed"]) == {n for n in first if "layers.0" in n}
    assert keys["resized"] == {"model.embed_tokens.weight": [[50, 16], [53, 16]]}
    assert keys["reshaped"] == {"model.layers.1.mlp.up_proj.weight": [[64, 16], [32, 32]]}
    assert keys["retyped"] == {"model.layers.1.self_attn.q_proj.weight": ["BF16", "F32"]}
    assert found["parameters"] == 50 * 16 * 2 + 16 * 16 * 2 + 64 * 16 and 0.5 < found["coverage"] < 1
    row = next(r for r in found["per_tensor"] if r["name"].endswith("1.self_attn.q_proj.weight"))
    assert row["equal_exactly"] == row["bit_identical"] == 1
    assert len(found["notes"]) >= 5


def test_two_formats_say_what_is_exact_and_what_is_rounding(tmp_path):
    fine = {"w": torch.randn(1000, generator=torch.Generator().manual_seed(0))}
    coarse = {"w": fine["w"].bfloat16()}
    found = compare(folder(tmp_path / "a", coarse), folder(tmp_path / "b", fine)).as_dict()
    exact = (coarse["w"].float() == fine["w"]).double().mean().item()
    assert found["bit_identical"] == 1 and found["per_tensor"][0]["equal_exactly"] == exact < 0.1


def test_tied_weights_count_once(tmp_path):
    first = weights()
    first["lm_head.weight"] = first["model.embed_tokens.weight"].clone()
    second = moved(first)
    second["lm_head.weight"] = second["model.embed_tokens.weight"].clone()
    tie = {"tie_word_embeddings": True}
    short = {k: v for k, v in second.items() if k != "lm_head.weight"}
    total = sum(v.numel() for v in first.values())
    base = folder(tmp_path / "base", first, tie)
    both = compare(base, folder(tmp_path / "both", second, tie)).as_dict()
    assert both["parameters"] == total - 800 and both["keys"]["tied"] == ["lm_head.weight"]
    one = compare(base, folder(tmp_path / "one", short, tie)).as_dict()
    assert one["parameters"] == total - 800 and one["keys"]["missing"] == {} and one["coverage"] == 1
    apart = compare(base, folder(tmp_path / "apart", second, {"tie_word_embeddings": False})).as_dict()
    assert apart["keys"]["untied"] == ["lm_head.weight"] and "Tied on one side only" in " ".join(apart["notes"])
    shared = {"a.weight": first["lm_head.weight"]} | {"b.weight": first["lm_head.weight"]}
    torch.save(shared, tmp_path / "tied.bin")
    assert open_source(tmp_path / "tied.bin").aliases == {"b.weight": "a.weight"}


def raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_bad_input_is_refused_in_a_sentence(tmp_path, pair, capsys):
    base, _, _, second = pair
    entry = {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((base / "model.safetensors").read_bytes()[:-10])
    gone = sharded(tmp_path / "gone", second)
    (gone / "model-00002-of-00003.safetensors").unlink()
    lost = sharded(tmp_path / "lost", second)
    (lost / "model.safetensors.index.json").unlink()
    (lost / "model-00003-of-00003.safetensors").unlink()
    huge = tmp_path / "huge.safetensors"
    with huge.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_000))
        file.truncate(100_000_100)
    two = folder(tmp_path / "two", second, name="a.safetensors")
    save_file(second, two / "b.safetensors")
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / "__0_0.distcp").write_bytes(b"x")
    cases = {
        tmp_path / "dcp": "distributed checkpoint lacks its index",
        cut: "is truncated",
        gone: "names a file that is not there",
        lost: "2 of 3 are there",
        huge: "header of a safetensors file is too long",
        two: "several files of weights, and no index",
        raw(tmp_path / "long.safetensors", b"{}", length=1 << 60): "truncated or foreign",
        raw(tmp_path / "text.safetensors", b"no json!"): "header of a safetensors file cannot be read",
        raw(tmp_path / "list.safetensors", b"[1, 2, 3]"): "header of a safetensors file cannot be read",
        raw(
            tmp_path / "place.safetensors", {"w": entry | {"data_offsets": [0, 6]}}, b"0" * 8
        ): "does not fit its shape",
        raw(tmp_path / "kind.safetensors", {"w": entry | {"dtype": "Q3"}}, b"0" * 8): "format that is not known",
        raw(tmp_path / "minus.safetensors", {"w": entry | {"shape": [-4]}}, b"0" * 8): "does not fit its shape",
        folder(tmp_path / "small", {"other.weight": torch.zeros(9).bfloat16()}): "These are different models",
        folder(tmp_path / "wide", {k: torch.cat([v, v], -1) for k, v in second.items()}): "These are different models",
        folder(tmp_path / "int8", {k: v.to(torch.int8) for k, v in second.items()}): "Quantised weights",
        folder(tmp_path / "config", second, {"quantization_config": {"bits": 4}}): "Quantised weights",
        tmp_path: "holds",
        tmp_path / "nothing": "no such file or folder",
    }
    for path, words in cases.items():
        report = tmp_path / "report.json"
        assert main(["sparsity", "compare", str(base), str(path), "--json", str(report)]) == 2, path
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, (path, error)
        assert not report.exists()


def test_no_verb_crashes_or_leaves_half_a_file(tmp_path, pair, capsys):
    """What a reader may be handed, through every verb; a delta is lossless whatever the numbers mean."""
    base, tuned, _, second = pair
    numbers = [name for name, value in second.items() if value.ndim == 2]
    cut = sharded(tmp_path / "cut", second, kind="bin")
    shard = cut / "pytorch_model-00002-of-00003.bin"
    shard.write_bytes(shard.read_bytes()[:-200])
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00X\x01\x00\x00\x00aK\x01s.")
    packed = {n.replace("weight", "qweight"): torch.zeros(8, 16, dtype=torch.int32) for n in numbers}
    zero = {name: value[:0] for name, value in second.items()}
    cases = {
        cut: "the end of the archive is missing",
        bare: "file of weights cannot be read",
        folder(tmp_path / "gptq", packed): "Quantised weights",
        folder(tmp_path / "fp8", {k: v.to(torch.float8_e4m3fn) for k, v in second.items()}): "Quantised weights",
        folder(tmp_path / "ints", {k: v.long() for k, v in second.items()}): "no floating-point weights",
        folder(tmp_path / "zero", zero): "These are different models",
    }
    out = tmp_path / "out"
    out.mkdir()
    for path, words in cases.items():
        for verb in (
            ["compare", base, path, "--mask", out / "mask", "--json", out / "r.json"], ["compare", path, base],
            ["report", base, path, "--out", out / "page.html"], ["overlap", path, tuned, "--base", base],
        ):  # fmt: skip
            assert main(["sparsity", *map(str, verb)]) == 2, (path, verb)
            error = capsys.readouterr().err
            assert words in error and error.count("\n") == 1 and not any(out.iterdir()), (path, verb, error)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_diverged_is_called_that(tmp_path, pair, capsys, value):
    base, _, _, second = pair
    tuned = folder(tmp_path / "diverged", {k: torch.full_like(v, value) for k, v in second.items()})
    page = tmp_path / "page.html"
    assert main(["sparsity", "report", str(base), str(tuned), "--out", str(page)]) == 0
    assert "The tuned model is not finite" in page.read_text() and "Fewer weights" not in page.read_text()
    assert main(["sparsity", "compare", str(base), str(tuned), "--structure", "--json", str(tmp_path / "r.json")]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["bit_identical"] == 0 and found["norm"] == 0
    assert (found["nan"]["tuned"] or found["infinite"]) == found["parameters"]
    assert "NaN" in capsys.readouterr().out or found["infinite"]


def test_odd_but_sound_tensors_are_measured(tmp_path, capsys):
    base = {
        "w": torch.ones(40, 10).bfloat16(),
        "scalar": torch.tensor(1.0).bfloat16(),
        "empty": torch.zeros(0, 5).bfloat16(),
    }
    tuned = {k: v.clone() for k, v in base.items()}
    tuned["w"][0, :4] = torch.tensor([float("nan"), float("inf"), 2.0, -1.0]).bfloat16()
    base["w"][1, 0], tuned["w"][1, 0] = 0.0, -0.0
    found = compare(folder(tmp_path / "a", base), folder(tmp_path / "b", tuned)).as_dict()
    assert found["parameters"] == 401 and found["bit_identical"] == 396 / 401 and found["density"] == 4 / 401
    assert found["ulp_histogram"]["nan"] == 1 and found["ulp_histogram"]["zero_sign"] == 1
    assert found["nan"] == {"base": 0, "tuned": 1} and found["infinite"] == 1
    assert found["norm"] == pytest.approx(5**0.5) and found["sign_flips"] == 1 / 401
    same = compare(tmp_path / "a", tmp_path / "a").as_dict()
    assert same["bit_identical"] == 1 == same["expected_bit_identical_if_dense"] and "bit-identical" in same["notes"][0]
    assert main(["sparsity", "compare", str(tmp_path / "a"), str(tmp_path / "a")]) == 0
    assert "100.00 % of 401 weights" in capsys.readouterr().out
    with pytest.raises(ModelError, match="every tensor is empty"):
        compare(folder(tmp_path / "e", {"e": torch.zeros(0)}), tmp_path / "e").as_dict()


def test_the_verb_writes_what_it_promises(tmp_path, pair, capsys):
    base, tuned, *_ = pair
    assert main(["sparsity", "compare", str(base), str(tuned), "--json", str(tmp_path / "r.json")]) == 0
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    wanted = {
        "parameters", "bit_identical", "sparsity_1e-5", "sparsity_authors_mode", "expected_bit_identical_if_dense",
        "ulp_histogram", "dtype", "per_tensor", "seconds", "bytes_read", "peak_anonymous_mb",
    }  # fmt: skip
    assert wanted <= set(found) and found["dtype"] == "BF16" and len(found["per_tensor"]) == len(STATE)
    text = capsys.readouterr().out
    assert "bit-identical in BF16" in text and "if a dense update of the same norm were rounded" in text
    assert main(["sparsity", "compare", str(base), str(tuned), "--dry-run"]) == 0
    assert "would compare" in capsys.readouterr().out


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Two files of 80 MB in one tensor each; the kernels, tables and chunks take the same whatever the size."""
    from align.sparsity.compare import anonymous_mb

    sides = [tmp_path / f"{name}.safetensors" for name in ("a", "b")]
    for seed, path in enumerate(sides):
        block = np.random.default_rng(seed).integers(0x3C00, 0x3C04, 1 << 20, np.uint16).tobytes()
        raw(path, {"w": {"dtype": "BF16", "shape": [40 << 20], "data_offsets": [0, 80 << 20]}})
        with path.open("ab") as file:
            for _ in range(40):
                file.write(block)
    compare(sides[0], sides[0], level="bits", threads=1)
    before = anonymous_mb()
    found = compare(*sides, threads=1)
    assert found.peak_anonymous_mb - before < 40
    assert found.as_dict()["bit_identical"] == pytest.approx(0.25, abs=0.01)


def test_unaligned_data_is_read_right(tmp_path):
    """A header of an odd length puts every number across a word."""
    values = torch.arange(8).float().bfloat16()
    data = values.view(torch.int16).numpy().tobytes()
    header = json.dumps({"w": {"dtype": "BF16", "shape": [8], "data_offsets": [0, 16]}}).encode()
    path = raw(tmp_path / "odd.safetensors", header + b" " * (1 - len(header) % 2), data)
    entry = open_source(path).entries["w"]
    assert np.array_equal(entry.read(0, 8).view(np.int16), values.view(torch.int16).numpy())
    assert compare(path, folder(tmp_path / "even", {"w": values})).as_dict()["bit_identical"] == 1


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(50, 16)
        self.up = torch.nn.Linear(16, 48)
        self.head = torch.nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight


def test_a_model_in_memory_against_a_folder(tmp_path):
    from align.sparsity.compare import anonymous_mb

    torch.manual_seed(0)
    net = Tied().bfloat16()
    state = {k: v.clone() for k, v in net.state_dict().items() if k != "head.weight"}
    base = folder(tmp_path / "base", state, {"tie_word_embeddings": True})
    tuned = moved(state)
    net.load_state_dict({**tuned, "head.weight": tuned["embed.weight"]})
    wanted = compare(base, folder(tmp_path / "tuned", tuned, {"tie_word_embeddings": True})).as_dict()
    for side in (net, net.state_dict(), tuned):
        found = compare(base, side).as_dict()
        assert all(found[key] == wanted[key] for key in (*INTEGERS, "parameters", "norm"))
        assert found["tuned"] == f"{type(side).__name__} in memory" and found["coverage"] == 1
        turned = compare(side, base).as_dict()
        assert turned["bit_identical"] == wanted["bit_identical"] and turned["norm"] == wanted["norm"]
    net.up.weight = torch.nn.Parameter(net.up.weight.t().contiguous().t())  # the same numbers in another order of bytes
    assert compare(base, net).as_dict()["ulp_histogram"] == wanted["ulp_histogram"]
    for odd, words in ((Tied().to("meta"), "not here as a whole"), (3, "no model"), ({}, "holds no tensor")):
        with pytest.raises(ModelError, match=words):
            compare(base, odd)
    big = {"w": torch.zeros(20 << 20, dtype=torch.bfloat16)}
    path = folder(tmp_path / "big", big)
    compare(path, path, threads=1)
    before = anonymous_mb()
    assert compare(path, big, threads=1).peak_anonymous_mb - before < 30  # 80 MB were it copied in fp32
