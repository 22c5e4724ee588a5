"""Distributed checkpoints read in place give the numbers of the same weights in safetensors, and run nothing."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
import zipfile
from argparse import Namespace

import numpy as np
import processes
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from align import unpickling
from align.cli import main
from align.errors import ModelError
from align.reports.sparsity import write_report
from align.sparsity.compare import compare
from align.sparsity.delta import apply_delta, write_delta
from align.sparsity.formats import FORMATS
from align.sparsity.masks import overlap
from align.sparsity.pieces import Files
from align.sparsity.sources import open_source
from align.unpickling import Placed, outline, outline_of_pickle

SAME = (
    "parameters",
    "bit_identical",
    "density",
    "sparsity_1e-5",
    "sparsity_authors_mode",
    "ulp_histogram",
    "l1",
    "norm",
)


def values(entry):
    """The tensor of an entry, read in uneven runs."""
    cuts = [0, *sorted({entry.count // 7, entry.count // 3, entry.count - 1} & set(range(1, entry.count))), entry.count]
    codes = [entry.read(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    return FORMATS[entry.dtype].values(np.concatenate(codes)).reshape(entry.shape)


def require_same(source, state):
    """Every tensor of `state` is in `source`, bit for bit."""
    held = {**source.entries, **{alias: source.entries[name] for alias, name in source.aliases.items()}}
    assert held.keys() == state.keys()
    for name, tensor in state.items():
        assert np.array_equal(values(held[name]), tensor.double().numpy()), name


# --- torch.distributed.checkpoint --------------------------------------------------------------------


def states(dtype=torch.bfloat16):
    made = torch.Generator().manual_seed(0)
    shapes = {"layers.0.q.weight": (37, 16), "layers.0.q.bias": (37,), "layers.1.mlp.weight": (64, 24), "scale": ()}
    base = {name: (0.02 * torch.randn(shape, generator=made)).to(dtype) for name, shape in shapes.items()}
    tuned = {k: (v.float() + 3e-5 * torch.randn(v.shape, generator=made)).to(dtype) for k, v in base.items()}
    return base, tuned


def save_dcp(state, path):
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(state, checkpoint_id=path)
    return path


def single(path, state):
    path.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in state.items()}, path / "model.safetensors")
    return path


def test_a_dcp_folder_gives_the_numbers_of_the_same_safetensors(tmp_path):
    base, tuned = states()
    optimizer = {"state": {name: {"exp_avg": torch.zeros_like(v)} for name, v in tuned.items()}}
    folders = [
        save_dcp({"model": base}, tmp_path / "base-dcp"),
        save_dcp({"app": {"model": tuned, "optim": optimizer}, "step": 7}, tmp_path / "tuned-dcp"),
    ]
    plain = [single(tmp_path / "base", base), single(tmp_path / "tuned", tuned)]
    wanted = compare(*plain).as_dict()
    assert 0 < wanted["bit_identical"] < 1
    for sides in ((folders[0], folders[1]), (plain[0], folders[1]), (folders[0], plain[1])):
        found = compare(*sides).as_dict()
        assert {key: found[key] for key in SAME} == {key: wanted[key] for key in SAME}
        assert found["coverage"] == 1 and not any(found["keys"].values())
    require_same(open_source(folders[1]), tuned)
    assert open_source(folders[1]).layout == "torch distributed checkpoint, 1 files"
    seen, plainly = (overlap(where[0], [where[1], plain[1]])["pairs"][0] for where in (folders, plain))
    skip = ("first", "second")
    assert {k: v for k, v in seen.items() if k not in skip} == {k: v for k, v in plainly.items() if k not in skip}
    write_delta(folders[0], folders[1], tmp_path / "delta")
    apply_delta(plain[0], tmp_path / "delta", tmp_path / "applied")
    again = load_file(tmp_path / "applied" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in tuned.items())


def test_odd_tensors_of_a_dcp_folder(tmp_path):
    turned = torch.arange(24.0).reshape(4, 6)
    state = {
        "turned": turned.t(),
        "part": torch.arange(100.0)[10:20],
        "empty": torch.zeros(0, 3, dtype=torch.bfloat16),
        "one": torch.tensor(2.0),
    }
    source = open_source(save_dcp(state, tmp_path / "odd"))
    require_same(source, state)
    assert source.entries["empty"].dtype == "BF16" and source.entries["turned"].read(5, 9).view(
        np.float32
    ).tolist() == (turned.t().reshape(-1)[5:9].tolist())


def test_the_names_that_trainers_give_a_model_in_a_dcp_folder(tmp_path):
    """torchtitan keeps the model's tensors at the top; accelerate puts the folder into one of its own."""
    _, tuned = states()
    extra = {"optimizer.state.layers.0.q.weight.exp_avg": torch.ones(3), "train_state": torch.ones(2)}
    require_same(open_source(save_dcp({**tuned, **extra}, tmp_path / "titan")), tuned)
    inside = {f"model.optimizer.{name}": value for name, value in tuned.items()}  # a module of that name is a module
    require_same(open_source(save_dcp(inside, tmp_path / "named")), inside)
    nested = {"model": {f"optimizer.{name}": value for name, value in tuned.items()}}
    require_same(open_source(save_dcp(nested, tmp_path / "nested")), nested["model"])
    save_dcp({"model": tuned}, tmp_path / "checkpoint-7" / "pytorch_model_fsdp_0")
    save_dcp({"optimizer": {"a": torch.ones(3)}}, tmp_path / "checkpoint-7" / "optimizer_0")
    require_same(open_source(tmp_path / "checkpoint-7"), tuned)
    with pytest.raises(ModelError, match="holds no model"):
        open_source(tmp_path / "checkpoint-7" / "optimizer_0")


@pytest.mark.parametrize(
    ("shape", "stride", "first"),
    [
        ((1000,), (1,), 0),
        ((10**9,), (0,), 0),
        ((10,), (1,), 95),
        ((-3,), (1,), 0),
        ((10,), (100,), 0),
    ],
)
def test_a_tensor_that_claims_more_than_its_file_holds(tmp_path, shape, stride, first):
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": {"w": torch.arange(100.0)}, "param_shapes": None}, path)
    placed = outline(path)["module"]["w"]
    assert (placed.shape, placed.stride, placed.bytes) == ((100,), (1,), 400)
    odd = Placed("float32", shape, stride, placed.offset + 4 * first, placed.bytes - 4 * first)
    with pytest.raises(ModelError, match="does not fit its file"):
        Files().entry(path, "w", odd)
    assert values(open_source(tmp_path).entries["w"]).tolist() == list(range(100))
    for begin in (-5, 101):
        with pytest.raises(ValueError, match="outside of its storage"):
            unpickling._Outline(b"", (), {})._place(("Float", (64, 400)), begin, (1,), (1,))


def fsdp(out, state, columns):
    """Save `state` cut over two processes by rows, or by columns as tensor parallelism does."""
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo")
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    cut = {
        name: distribute_tensor(tensor, mesh, [Shard(1 if columns and tensor.ndim == 2 else 0)])
        if tensor.ndim
        else tensor
        for name, tensor in state.items()
    }
    masters = {f"optimizer.state.fp32_param.{name}": tensor.float() * 1.0001 for name, tensor in cut.items()}
    dcp.save({"model": cut, **masters}, checkpoint_id=out)
    dist.destroy_process_group()


@pytest.mark.parametrize("columns", [False, True])
def test_tensors_cut_over_two_processes_are_whole_again(tmp_path, columns):
    base, tuned = states()
    out = tmp_path / "cut"
    ended = processes.world(2, lambda: fsdp(out, tuned, columns), tmp_path / "world")
    assert [e.code for e in ended] == [0, 0], ended[0].output
    source = open_source(out)
    assert source.layout.endswith("2 files")
    require_same(source, tuned)
    assert source.masters.keys() == tuned.keys() - {"scale"} or source.masters.keys() == tuned.keys()
    for name, entry in source.masters.items():
        assert np.array_equal(values(entry), (tuned[name].float() * 1.0001).double().numpy())
    wanted, found = (compare(single(tmp_path / f"b{i}", base), where).as_dict() for i, where in enumerate(
        (single(tmp_path / "tuned", tuned), out)))  # fmt: skip
    assert {key: found[key] for key in SAME} == {key: wanted[key] for key in SAME}
    assert wanted["masters"] is None and found["masters"]["parameters"] == sum(v.numel() for v in tuned.values())


# --- what a file may ask for -------------------------------------------------------------------------


class Runs:
    """Unpickled with pickle it would make a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_that_a_checkpoint_names_is_run(tmp_path, capsys):
    base, tuned = states()
    plain, ran = single(tmp_path / "base", base), tmp_path / "ran"
    bad = save_dcp({"model": tuned}, tmp_path / "dcp")
    for kind in (Runs(ran), torch.distributed.checkpoint.FileSystemWriter):
        (bad / ".metadata").write_bytes(pickle.dumps(kind))
        assert main(["sparsity", "compare", str(plain), str(bad)]) == 2
        error = capsys.readouterr().err
        assert "asks for a class that is not allowed" in error and error.count("\n") == 1
        assert "posix.mkdir" in error or "FileSystemWriter" in error
    dotted = b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93."
    (bad / ".metadata").write_bytes(dotted)
    with pytest.raises(ModelError, match=r"collections\.OrderedDict\.fromkeys"):
        open_source(bad)
    step = tmp_path / "zero"
    step.mkdir()
    torch.save({"module": tuned, "client": Runs(ran)}, step / "mp_rank_00_model_states.pt")
    with pytest.raises(ModelError, match=r"posix\.mkdir"):
        open_source(step)
    torch.save({"module": tuned, "client": Namespace(lr=1)}, step / "mp_rank_00_model_states.pt")
    held = outline(step / "mp_rank_00_model_states.pt", ["argparse.Namespace"])["client"]
    assert held.get("lr") == 1 and type(held) is not Namespace
    assert not ran.exists()


def test_a_file_cannot_change_what_the_next_one_finds(tmp_path):
    """BUILD on a class of the table sets attributes of that class; the next file has a class of its own."""
    name = "argparse.Namespace"
    build = b"\x80\x02cargparse\nNamespace\nN}X\x03\x00\x00\x00getK\x01s\x86b."  # Namespace.get = 1, were it allowed
    state = pickle.dumps(Namespace(lr=1), protocol=2)
    for data in (build, state, build, state):
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            archive.writestr("a/data.pkl", data)
        if data == state:
            assert outline(tmp_path / "a.pt", [name]).get("lr") == 1
        else:
            with pytest.raises(ModelError, match="cannot be read"):
                outline(tmp_path / "a.pt", [name])


def test_damaged_distributed_checkpoints_are_refused_in_a_sentence(tmp_path, capsys):
    base, tuned = states()
    plain = single(tmp_path / "base", base)

    def broken(name, change):
        path = save_dcp({"model": tuned}, tmp_path / name)
        change(path)
        return path

    def cut(path, many):
        path.write_bytes(path.read_bytes()[:-many])

    def squeeze(path):
        data = (path / "__0_0.distcp").read_bytes()
        (path / "__0_0.distcp").write_bytes(b"\0" * len(data))

    compressed = tmp_path / "compressed"
    compressed.mkdir()
    with zipfile.ZipFile(compressed / "mp_rank_00_model_states.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, protocol=2))
    layers = tmp_path / "layers"
    layers.mkdir()
    for name in ("mp_rank_00_model_states.pt", "layer_00-model_states.pt"):
        torch.save({"module": None}, layers / name)
    cases = {
        broken("no-index", lambda p: (p / ".metadata").unlink()): "lacks its index",
        broken("no-file", lambda p: (p / "__0_0.distcp").unlink()): "lacks a file",
        broken("short", lambda p: cut(p / "__0_0.distcp", 500)): "is truncated",
        broken("zeros", squeeze): "cannot be read",
        broken("half-index", lambda p: cut(p / ".metadata", 40)): "cannot be read",
        broken("list", lambda p: (p / ".metadata").write_bytes(pickle.dumps([1]))): "not laid out as expected",
        compressed: "it is compressed",
        layers: "split by layers",
    }
    for path, words in cases.items():
        assert main(["sparsity", "compare", str(plain), str(path), "--json", str(tmp_path / "r.json")]) == 2, path
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and not (tmp_path / "r.json").exists(), (path, error)


# --- DeepSpeed ---------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    """Odd sizes, so that parts are padded; tied, frozen, and in two groups of parameters."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(37, 16)
        self.up = torch.nn.Linear(16, 23)
        self.frozen = torch.nn.Linear(23, 23).requires_grad_(False)
        self.norm = torch.nn.LayerNorm(23)
        self.down = torch.nn.Linear(23, 16, bias=False)
        self.head = torch.nn.Linear(16, 37, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(3.0))

    def forward(self, tokens):
        return self.head(self.down(self.norm(self.frozen(self.up(self.embed(tokens))))))


def begin():
    torch.manual_seed(0)
    return Net()


def train(stage, out):
    """Two updates under ZeRO; the checkpoint, and the 16-bit weights as DeepSpeed consolidates them."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would need a compiler
    deepspeed.init_distributed("gloo", verbose=False)
    net = begin()
    groups = [[p for p in net.parameters() if p.requires_grad and (p.ndim > 1) == matrix] for matrix in (True, False)]
    adam = {"lr": 2e-4, "torch_adam": True}
    engine, *_ = deepspeed.initialize(
        model=net, model_parameters=[{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1]}],
        config={
            "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}, "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": adam},
        },
    )  # fmt: skip
    for step in range(2):
        tokens = torch.arange(step, step + 10).reshape(2, 5)
        loss = torch.nn.functional.cross_entropy(engine(tokens).float().reshape(-1, 37), tokens.reshape(-1))
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(out, client_state={"tokens": 20})
    state = engine._zero3_consolidated_16bit_state_dict() if stage == 3 else engine.module.state_dict()
    if torch.distributed.get_rank() == 0:
        torch.save({name: value.clone() for name, value in state.items()}, out.with_suffix(".pt"))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of each stage, made by two processes, and the folder of the weights they began with."""
    root = tmp_path_factory.mktemp("zero")
    for stage in (1, 2, 3):
        out = root / f"stage{stage}"
        ended = processes.world(2, lambda stage=stage, out=out: train(stage, out), root / f"world{stage}", within=200)
        assert [e.code for e in ended] == [0, 0], ended[0].output[-2000:]
    state = {name: value.bfloat16() if name != "table" else value for name, value in begin().state_dict().items()}
    del state["head.weight"]
    single(root / "base", state)
    (root / "base" / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    return root


def masters_of(folder):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return {name: value.detach() for name, value in get_fp32_state_dict_from_zero_checkpoint(folder).items()}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_zero_checkpoint_gives_the_numbers_of_the_weights_deepspeed_consolidates(trained, tmp_path, stage):
    folder, state = trained / f"stage{stage}", torch.load(trained / f"stage{stage}.pt")
    source = open_source(folder)
    require_same(source, state)
    assert f"stage {stage}, of 2 processes" in source.layout
    assert source.training == {"steps": 2, "optimizer": "AdamW", "learning_rate": 2e-4}
    masters = masters_of(folder)  # DeepSpeed's own conversion
    assert source.masters.keys() == {n for n, _ in begin().named_parameters() if not n.startswith("frozen")}
    for name, entry in source.masters.items():
        assert np.array_equal(values(entry), masters[name].double().numpy()), name
    plain = single(tmp_path / "tuned", {k: v for k, v in state.items() if k != "head.weight"})
    wanted, found = (compare(trained / "base", where).as_dict() for where in (plain, folder))
    assert {key: found[key] for key in SAME} == {key: wanted[key] for key in SAME}
    assert compare(trained / "base", folder / "global_step2").as_dict()["bit_identical"] == wanted["bit_identical"]
    # The masters began as the bf16 weights, so D is known in full here.
    began = load_file(trained / "base" / "model.safetensors")
    d = torch.cat([(masters[n].double() - began[n].double()).flatten() for n in source.masters])
    e = torch.cat([(state[n].double() - began[n].double()).flatten() for n in source.masters])
    figures = found["masters"]
    assert figures["parameters"] == len(d) and figures["base"] == "weights as stored"
    assert figures["bit_identical"] == (d == 0).double().mean().item() < figures["bit_identical_as_stored"]
    assert figures["bit_identical_as_stored"] == (e == 0).double().mean().item()
    assert figures["sparsity_1e-5"] == (d.abs() <= 1e-5).double().mean().item()
    assert figures["norm"] == pytest.approx(d.norm().item(), rel=1e-12)
    assert figures["norm_seen"] == pytest.approx((e.norm() / d.norm()).item(), rel=1e-12)
    assert figures["cosine"] == pytest.approx((d @ e / d.norm() / e.norm()).item(), rel=1e-12)
    assert figures["hidden"] == pytest.approx(((e - d).norm() / d.norm()).item(), rel=1e-12)
    ulp = torch.cat([torch.exp2(torch.frexp(state[n])[1].double() - 8).flatten() for n in source.masters])
    assert figures["certificate"] == pytest.approx((ulp.norm() / 2 / d.norm()).item(), rel=1e-9)
    assert figures["certificate_holds"] and figures["hidden"] < figures["certificate"]
    assert figures["round_to_weights"] == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_zero_checkpoints_have_masters_on_both_sides(trained, tmp_path, capsys):
    one, three = trained / "stage1", trained / "stage3"
    assert main(["sparsity", "compare", str(one), str(three), "--json", str(tmp_path / "r.json")]) == 0
    figures = json.loads((tmp_path / "r.json").read_text())["masters"]
    first, second = masters_of(one), masters_of(three)
    names = [n for n, _ in begin().named_parameters() if not n.startswith("frozen")]
    d = torch.cat([(second[n].double() - first[n].double()).flatten() for n in names])
    assert figures["base"] == "masters" and figures["norm"] == pytest.approx(d.norm().item(), rel=1e-9)
    assert figures["bit_identical"] == (d == 0).double().mean().item()
    assert "fp32 masters of" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_universal_checkpoint_and_a_models_folder_with_a_zero_checkpoint_in_it(trained, tmp_path):
    made = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers", "1"]
    made += ["--num_merge_workers", "1", "--inject_missing_state"]
    for stage in (2, 3):
        out = tmp_path / f"universal{stage}"
        sides = ["--input_folder", str(trained / f"stage{stage}" / "global_step2"), "--output_folder", str(out)]
        subprocess.run([*made, *sides], check=True, capture_output=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})
        source = open_source(out)
        require_same(source, torch.load(trained / f"stage{stage}.pt"))
        wanted = open_source(trained / f"stage{stage}").masters
        assert source.masters.keys() == wanted.keys() and "universal" in source.layout
        for name, entry in source.masters.items():
            assert np.array_equal(entry.read(0, entry.count), wanted[name].read(0, entry.count))
    both = tmp_path / "checkpoint-2"  # as transformers' Trainer saves
    both.mkdir()
    state = torch.load(trained / "stage2.pt")
    save_file({k: v for k, v in state.items() if k != "head.weight"}, both / "model.safetensors")
    (both / "latest").write_text("global_step2")
    (both / "global_step2").symlink_to(trained / "stage2" / "global_step2")
    source = open_source(both)
    assert source.layout == "folder" and source.masters and source.training["steps"] == 2
    state["up.weight"] = state["up.weight"] * 2
    save_file({k: v for k, v in state.items() if k != "head.weight"}, both / "model.safetensors")
    found = compare(trained / "base", both).as_dict()
    odd = 368 / sum(e.count for e in source.masters.values())
    assert found["masters"]["round_to_weights"] == pytest.approx(1 - odd, abs=2e-3)
    assert any("not their masters rounded" in note for note in found["notes"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_zero_checkpoint_that_lost_a_process(trained, tmp_path, capsys):
    import shutil

    for stage in (2, 3):
        for what, words in (
            ("optim", "file is missing"),
            ("model", "no file of the model" if stage == 2 else "file is missing"),
        ):
            folder = tmp_path / f"{stage}{what}"
            shutil.copytree(trained / f"stage{stage}" / "global_step2", folder)
            lost = sorted(folder.glob(f"*_{what}_states.pt"))[0]
            lost.unlink()
            assert main(["sparsity", "compare", str(trained / "base"), str(folder)]) == 2
            error = capsys.readouterr().err
            assert words in error and error.count("\n") == 1, error


def test_the_certificate_holds_and_the_null_from_masters_is_that_of_a_dense_update(tmp_path):
    """A dense update of fp32 masters, as Megatron's folders keep them: all that is hidden is rounding."""
    made = torch.Generator().manual_seed(1)
    w = (0.02 * torch.randn(200_000, generator=made)).bfloat16()
    master = w.float() + 1.5e-5 * torch.randn(200_000, generator=made)
    tuned = save_dcp({"model": {"w": master.bfloat16()}, "optimizer.state.fp32_param.w": master}, tmp_path / "tuned")
    plain = single(tmp_path / "plain", {"w": w})
    found = compare(plain, tuned).as_dict()
    figures = found["masters"]
    assert figures["base"] == "weights as stored" and figures["bit_identical"] < 0.001 < 0.8 < found["bit_identical"]
    assert figures["expected_bit_identical_if_dense"] == pytest.approx(found["bit_identical"], abs=0.003)
    assert figures["norm_seen"] == pytest.approx(0.73, abs=0.01)  # ||E|| / ||D|| at this density
    assert figures["hidden"] == pytest.approx(0.85, abs=0.01) and math.isclose(figures["cosine"], 0.57, abs_tol=0.02)
    assert figures["hidden"] < figures["certificate"] and figures["certificate_holds"]
    write_report(plain, tuned, tmp_path / "page.html")
    assert "In fp32, as the optimizer holds it" in (tmp_path / "page.html").read_text()
    assert "fp32 masters of 200,000 weights" in (tmp_path / "page.md").read_text()
    again = save_dcp({"model": {"w": w}, "optimizer.state.fp32_param.w": w.float()}, tmp_path / "again")
    assert compare(again, tuned).as_dict()["masters"] == figures | {"base": "masters"}
    # Masters that lie between values of the format: more of the same update shows, and W0 may hide as much again.
    ulp = torch.exp2(torch.frexp(w.float())[1] - 8.0)
    finer = w.float() + (torch.rand(200_000, generator=made) - 0.5) * ulp
    ended = finer + 1.5e-5 * torch.randn(200_000, generator=made)
    sides = [
        save_dcp({"model": {"w": m.bfloat16()}, "optimizer.state.fp32_param.w": m}, tmp_path / f"finer{i}")
        for i, m in enumerate((finer, ended))
    ]
    second = compare(*sides).as_dict()
    assert second["masters"]["expected_bit_identical_if_dense"] == pytest.approx(1 - 0.261, abs=0.003)
    assert second["masters"]["expected_bit_identical_if_dense"] == pytest.approx(second["bit_identical"], abs=0.01)
    assert second["masters"]["certificate"] == pytest.approx(2 * figures["certificate"], rel=0.02)


@pytest.mark.parametrize("payload", [b"\x80\x02\x82\x07.", b"\x80\x02\x83\x07\x00."], ids=["EXT1", "EXT2"])
def test_codes_of_registered_globals_are_refused(tmp_path, payload):
    """The unpickler in C would answer them from a cache of the process, past every list."""
    import copyreg

    copyreg.add_extension("posix", "system", 7)
    try:
        assert pickle.loads(payload).__name__ == "system"  # noqa: S301
        path = tmp_path / ".metadata"
        path.write_bytes(payload)
        with pytest.raises(ModelError, match="not allowed"):
            outline_of_pickle(path, ())
    finally:
        copyreg.remove_extension("posix", "system", 7)


def test_a_place_in_the_memo_costs_nothing(tmp_path):
    path = tmp_path / ".metadata"
    path.write_bytes(b"\x80\x02Kxr\xff\xff\xff\xff.")  # LONG_BINPUT 2^32 - 1
    assert outline_of_pickle(path, ()) == ord("x")
