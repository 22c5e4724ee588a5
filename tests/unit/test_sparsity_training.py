"""Subnetworks, measures while training and the receipts of runs: goldens by hand, parity with torch, runs for real."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from align import checkpoint
from align.cli import main
from align.config import load_config
from align.errors import CheckpointError, ConfigError, DataError, ModelError
from align.reports.training import write_report
from align.sparsity.callback import Tracker, Travelled, predictions
from align.sparsity.compare import compare
from align.sparsity.equality import equality
from align.sparsity.live import live_source
from align.sparsity.masks import read_mask, write_control, write_mask
from align.sparsity.nulls import visible_after_steps
from align.sparsity.subnetwork import SubnetworkAdamW, read_places
from align.tracking import RunLog
from trainers import DanceGRPO, trainer_for
from trainers.sparsity import end_with_receipt
from trainers.tiny_language import build_tiny, toy_thumbs

SHAPES = [(37,), (16, 9), (5, 7, 3, 3), (4, 4)]


def weights_and_places(share=0.3):
    generator = torch.Generator().manual_seed(1)
    weights = [torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in SHAPES]
    masks = [torch.rand(shape, generator=generator) < share for shape in SHAPES]
    masks[3][:] = False  # nothing of this one
    return weights, masks, [m.reshape(-1).nonzero()[:, 0].int() for m in masks]


def give_gradients(weights, step):
    generator = torch.Generator().manual_seed(step)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)


def bits(tensor):
    return tensor.detach().clone().view(torch.int32)


# The optimizer


def test_it_is_dense_masked_adamw_bit_for_bit():
    dense, masks, places = weights_and_places()
    sparse, _, _ = weights_and_places()
    options = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.0}
    reference = torch.optim.AdamW(dense, foreach=False, fused=False, **options)
    ours = SubnetworkAdamW(sparse, places, **options)
    for step in range(100):
        for weights in (dense, sparse):
            give_gradients(weights, step)
        for weight, mask in zip(dense, masks, strict=True):
            weight.grad *= mask
        ours.mask_gradients()
        norms = [torch.nn.utils.get_total_norm([w.grad for w in weights]) for weights in (dense, sparse)]
        assert norms[0] == norms[1]  # the norm is that of the subnetwork
        reference.step()
        ours.step()
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(dense, sparse, strict=True))
    assert not torch.equal(bits(sparse[0]), bits(weights_and_places()[0][0]))


def test_weight_decay_moves_the_chosen_alone():
    dense, masks, places = weights_and_places()
    sparse, _, _ = weights_and_places()
    begun = [bits(w) for w in sparse]
    reference = torch.optim.AdamW(dense, lr=1e-2, weight_decay=0.1, foreach=False, fused=False)
    ours = SubnetworkAdamW(sparse, places, lr=1e-2, weight_decay=0.1)
    for step in range(20):
        for weights in (dense, sparse):
            give_gradients(weights, step)
        reference.step()
        ours.step()  # gradients outside of the mask are not read, masked or not
    for a, b, mask, start in zip(dense, sparse, masks, begun, strict=True):
        assert torch.equal(bits(a)[mask], bits(b)[mask])
        assert torch.equal(bits(b)[~mask], start[~mask])
        assert not mask.any() or not torch.equal(bits(a)[~mask], start[~mask])  # the dense one leaks


def test_only_the_chosen_have_state_and_it_can_be_resumed():
    weights, _, places = weights_and_places()
    ours = SubnetworkAdamW([{"params": weights[:2]}, {"params": weights[2:], "weight_decay": 0.5}], places, lr=1e-2)
    copies, _, _ = weights_and_places()
    for step in range(5):
        give_gradients(weights, step)
        ours.step()
    held = {slot for state in ours.state.values() for slot in state}
    assert held == {"step", "exp_avg", "exp_avg_sq"}
    assert sum(s["exp_avg"].numel() for s in ours.state.values()) == sum(map(len, places)) < 0.4 * 508
    saved = copy.deepcopy(ours.state_dict())  # as one from the disk: nothing is shared
    with torch.no_grad():
        for one, weight in zip(copies, weights, strict=True):
            one.copy_(weight)
    again = SubnetworkAdamW([{"params": copies[:2]}, {"params": copies[2:], "weight_decay": 0.5}], places, lr=1e-2)
    again.load_state_dict(saved)
    for step in range(5, 10):
        for optimizer, those in ((ours, weights), (again, copies)):
            give_gradients(those, step)
            optimizer.step()
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(weights, copies, strict=True))
    moved = [*places[:2], (places[2] + 1) % 315, places[3]]
    other = SubnetworkAdamW(weights, moved, lr=1e-2)
    with pytest.raises(CheckpointError, match="another mask"):
        other.load_state_dict({**saved, "param_groups": other.state_dict()["param_groups"]})
    dense = torch.optim.AdamW(weights, lr=1e-2)
    dense.step()
    with pytest.raises(CheckpointError, match="another mask"):
        again.load_state_dict(dense.state_dict())


# Masks


def pair(folder):
    """Write a base and a tuned model whose differences are known."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    base = {"a.weight": 0.02 * torch.randn(64, 50, generator=generator), "b.bias": torch.ones(40)}
    tuned = {name: value.clone() for name, value in base.items()}
    tuned["a.weight"].view(-1)[::7] *= 1.5
    tuned["b.bias"][3] = 2.0
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    write_mask(folder / "base.safetensors", folder / "tuned.safetensors", folder / "run.mask")
    return base, tuned


def test_a_control_has_as_many_of_every_tensor_and_exponent(tmp_path):
    base, _ = pair(tmp_path / "m")
    folder = tmp_path / "m"
    given = read_mask(folder / "run.mask")
    for match in ("tensor", "magnitude"):
        drawn = write_control(folder / "run.mask", folder / "base.safetensors", folder / match, match=match, seed=1)
        control = read_mask(folder / match)
        assert drawn["chosen"] == 458 + 1 and drawn["parameters"] == 3240
        for name in ("a.weight", "b.bias"):
            assert len(control.chosen(name)) == len(given.chosen(name))
            assert np.array_equal(control.exponents(name)[1], given.exponents(name)[1]) == (
                match == "magnitude" or name == "b.bias"
            )
        assert 0.05 < drawn["common"] / 459 < 0.35  # 1 in 7 by chance
    small = base["a.weight"].view(-1).numpy()[read_mask(folder / "magnitude").chosen("a.weight")]
    exponents = np.bincount((small.view(np.uint32) >> 23).astype(int) & 255, minlength=256)
    assert np.array_equal(exponents, given.exponents("a.weight")[1])
    again = write_control(folder / "run.mask", folder / "base.safetensors", folder / "x", match="tensor", seed=1)
    assert (folder / "x").read_bytes() == (folder / "tensor").read_bytes() and again["chosen"] == 459
    with pytest.raises(DataError, match="another base"):
        write_control(folder / "run.mask", folder / "tuned.safetensors", folder / "y", match="tensor", seed=1)
    assert not (folder / "y").exists()


def test_places_follow_names_and_refuse_another_model(tmp_path):
    base, tuned = pair(tmp_path / "m")
    path = tmp_path / "m" / "run.mask"
    found = read_places(path, {f"module.{name}": weight for name, weight in base.items()})
    changed = (base["a.weight"] != tuned["a.weight"]).view(-1).nonzero()[:, 0]
    assert torch.equal(found["module.a.weight"].long(), changed) and found["module.b.bias"].tolist() == [3]
    for wrong in ({"a.weight": torch.zeros(5)}, {"c.weight": torch.zeros(3200)}):
        with pytest.raises(ConfigError, match="another model"):
            read_places(path, wrong)
    write_mask(tmp_path / "m" / "base.safetensors", tmp_path / "m" / "base.safetensors", tmp_path / "empty")
    with pytest.raises(ConfigError, match="names no weight"):
        read_places(tmp_path / "empty", base)


def test_equality_by_hand(tmp_path):
    def save(name, values):
        path = tmp_path / f"{name}.safetensors"
        save_file({"w": torch.tensor(values, dtype=torch.float32)}, path)
        return path

    init = save("init", [1.0] * 10)
    full = save("full", [1.0] * 5 + [1.5, 1.5, 1.00005, 2.0, 2.0])  # five moved
    write_mask(init, full, tmp_path / "mask")
    sub = save("sub", [1.0] * 5 + [1.5, 1.50005, 1.0, 2.0, 3.0])
    found = equality(full, sub, mask=tmp_path / "mask", init=init)
    rows = {row["tolerance"]: row for row in found["tolerances"]}
    assert (found["entries"], found["in_mask"]) == (10, 5)
    assert rows[0.0] == {
        "tolerance": 0.0, "agree": 0.7, "agree_in_mask": 0.4, "null": 0.5, "null_in_mask": 0.0, "low_power": False,
    }  # fmt: skip
    assert (rows[1e-4]["agree"], rows[1e-4]["agree_in_mask"]) == (0.9, 0.8)
    assert (rows[1e-4]["null"], rows[1e-4]["null_in_mask"]) == (0.6, 0.2)
    # agreement inside the mask = (agree - (1 - density)) / density
    assert rows[1e-4]["agree_in_mask"] == pytest.approx((0.9 - 0.5) / 0.5)
    blind = equality(init, full, mask=tmp_path / "mask", init=init, full=full)
    assert all(row["low_power"] for row in blind["tolerances"])  # it is the null itself


# While training


def test_shares_of_a_step_of_a_window_and_since_the_beginning_by_hand(tmp_path):
    base = torch.ones(8, dtype=torch.bfloat16)  # neighbours: 1 + 2^-7 above, 1 - 2^-8 below
    save_file({"w": base}, tmp_path / "model.safetensors")
    weight = base.float().clone()
    tracker = Tracker(tmp_path, lambda: live_source({"w": weight}), every=2, travelled=Travelled())
    rows = []
    for step, moves in enumerate([{0: 2**-7}, {1: 2**-9, 2: 2**-7}, {1: 2**-9}, {0: -(2**-7), 3: 2.0}], 1):
        tracker.before_update(step)
        for place, move in moves.items():
            weight[place] += move
        tracker.after_update(1e-3)
        rows.append(tracker.row())
    assert rows[0] == rows[2] == {}
    # step 2: entry 1 moved by a quarter of a step and shows nothing; entry 2 shows
    assert rows[1]["sparsity/step"] == 7 / 8 and rows[1]["sparsity/cumulative"] == 6 / 8
    assert "sparsity/window" not in rows[1]
    # before step 4 against before step 2: entry 2; entry 1 stands half-way, and half-way goes to even, which is 1
    assert rows[3]["sparsity/window"] == 7 / 8
    assert rows[3]["sparsity/step"] == 6 / 8 and rows[3]["sparsity/cumulative"] == 6 / 8  # entry 0 is back
    assert tracker.travelled.path == pytest.approx(4e-3) and tracker.travelled.spread == pytest.approx(2e-3)


def test_a_base_that_cannot_be_read_leaves_the_shares_of_steps(tmp_path):
    weight = torch.zeros(4)
    tracker = Tracker(tmp_path / "none", lambda: live_source({"w": weight}), every=1)
    assert "no such file" in tracker.why
    tracker.before_update(1)
    weight[0] = 1
    tracker.after_update(1e-3)
    assert set(tracker.row()) == {"sparsity/step", "sparsity/seconds"}


def test_predictions_are_those_of_the_closed_forms(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(200_000, generator=generator)).bfloat16()
    save_file({"w": base}, tmp_path / "model.safetensors")
    found = compare(tmp_path, live_source({"w": base.float()}))
    travelled = Travelled([{"lr": 1e-5, "updates": 9}])
    predicted = predictions(found.tensors, travelled, 1e-5)
    # one step of a float32 master seen in bf16, N(0, 0.02): 25 % show
    assert 1 - predicted["sparsity/predicted_step"] == pytest.approx(0.25, abs=0.01)
    # nine that cancel: N(0, (3e-5)^2), 31.9 %; nine that agree: +-9e-5
    assert 1 - predicted["sparsity/predicted_cancelling"] == pytest.approx(0.319, abs=0.005)
    moved = (base.float() + 9e-5).bfloat16() != base
    assert 1 - predicted["sparsity/predicted_agreeing"] == pytest.approx(float(moved.float().mean()), abs=0.01)
    assert visible_after_steps(0.0, 0.0, np.array([5]), np.array([0.1]), aligned=True) == (0.0, 0.0)


def test_a_model_in_memory_compares_like_its_file(tmp_path):
    _, tuned = pair(tmp_path / "m")
    one = compare(tmp_path / "m" / "base.safetensors", tmp_path / "m" / "tuned.safetensors").as_dict()
    two = compare(tmp_path / "m" / "base.safetensors", live_source(tuned)).as_dict()
    same = ("parameters", "bit_identical", "ulp_histogram", "sparsity_1e-5", "sign_flips", "norm")
    assert {k: one[k] for k in same} == {k: two[k] for k in same}
    held = live_source(tuned).entries["a.weight"].read(0, 4)
    tuned["a.weight"].view(-1)[0] = 0.0
    assert held[0] == 0  # no copy was made
    with pytest.raises(ModelError, match="no codes"):
        live_source({"w": torch.zeros(2, device="meta")})


@pytest.mark.parametrize(("base", "form"), [("float32", "BF16"), ("bfloat16", "F32"), ("float16", "BF16")])
def test_a_comparison_in_another_format_is_that_of_copies_stored_in_it(tmp_path, base, form):
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(5000, generator=generator).to(getattr(torch, base))
    two = one.float() + 1e-3 * torch.randn(5000, generator=generator)
    save_file({"w": one}, tmp_path / "one.safetensors")
    save_file({"w": two}, tmp_path / "two.safetensors")
    found = compare(tmp_path / "one.safetensors", tmp_path / "two.safetensors", form=form).as_dict()
    kind = {"BF16": torch.bfloat16, "F32": torch.float32}[form]
    assert found["bit_identical"] == float((one.to(kind) == two.to(kind)).double().mean())
    assert found["dtype"] == form == found["compared_in"]


# Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.sd3(tmp_path_factory.mktemp("models") / "sd3")


def visual(folder, out, *overrides):
    prompts = out.parent / "prompts.txt"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text("a red cat\na blue dog\ntwo dogs\na cat\n")
    config = {
        "name": "toy", "model": {"path": str(folder), "train": "full", "lora": {"rank": 2, "alpha": 4}},
        "prompts": {"path": str(prompts), "heldout_fraction": 0.4}, "rewards": [{"name": "jpeg"}], "steps": 3,
        "prompts_per_step": 2, "group_size": 3, "sampler": {"solver_steps": 3}, "optimizer": {"lr": 1e-4},
        "evaluation": {"every": 0, "samples": 2, "final_samples": 2, "solver_steps": 2},
        "checkpoint": {"every": 1, "keep": 9}, "tracking": {"samples_every": 0},
    }  # fmt: skip
    return DanceGRPO(load_config(config, overrides), out=out)


def stored(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def last(out, step=3):
    return load_file(out / "checkpoints" / f"step_{step:06d}" / "model.safetensors")


def shares(base, tuned):
    """Count equal entries by torch, in float32 and rounded to bfloat16."""
    n = sum(w.numel() for w in tuned.values())
    same = sum(int((base[k].view(torch.int32) == w.view(torch.int32)).sum()) for k, w in tuned.items())
    half = sum(int((base[k].bfloat16() == w.bfloat16()).sum()) for k, w in tuned.items())
    return same / n, half / n


def test_a_visual_run_ends_with_its_receipt_and_a_page_of_it(folder, tmp_path):
    run = visual(folder, tmp_path / "run", "sparsity.every=1", "sparsity.dtype=bf16")
    result = run.train()
    receipt = json.loads((tmp_path / "run" / "sparsity.json").read_text())
    exact, half = shares(stored(folder), last(tmp_path / "run"))
    assert [v["bit_identical"] for v in receipt["views"]] == [exact, half] and 0.1 < half < 0.95
    assert result.summary["sparsity"]["bit_identical"] == exact and receipt["trained"] == "weights"
    assert receipt["steps"]["updates"] == 6 and receipt["steps"]["path"] == pytest.approx(6e-4)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["sparsity/cumulative"] == half  # the callback says what the files say
    assert [("sparsity/window" in row) for row in rows] == [False, True, True]
    assert all(row["sparsity/step"] >= row["sparsity/cumulative"] for row in rows)
    page = write_report(tmp_path / "run").read_text()
    assert "Which weights moved" in page and "Weights that stand still" in page
    assert f"{100 * half:.2f}" in page


def test_adapters_are_measured_merged(folder, tmp_path):
    run = visual(folder, tmp_path / "run", "model.train=lora", "steps=2", "optimizer.lr=1e-2", "sparsity.every=2")
    run.train()
    receipt = json.loads((tmp_path / "run" / "sparsity.json").read_text())
    base, adapters = stored(folder), last(tmp_path / "run", 2)
    merged = {}
    for name in [n for n in adapters if ".lora_A." in n]:
        up = adapters[name.replace(".lora_A.", ".lora_B.")]
        key = name.partition(".lora_A.")[0] + ".weight"
        merged[key] = base[key] + 2.0 * (up @ adapters[name])
    n = sum(w.numel() for w in base.values())
    moved = sum(int((base[k] != w).sum()) for k, w in merged.items())
    assert receipt["views"][0]["bit_identical"] == pytest.approx(1 - moved / n, abs=2e-3) and moved > 100
    assert receipt["trained"] == "adapters" and "adapters merged" in receipt["sentence"] and "predicted" not in receipt
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["sparsity/cumulative"] == receipt["views"][0]["bit_identical"]


def test_a_receipt_that_cannot_be_made_says_why_and_costs_nothing_else(tmp_path):
    config = load_config({"trainer": "sft", "model": {"path": "x"}, "data": {"path": "toy"}})
    log = RunLog(tmp_path)

    def gone():
        raise ModelError("The weights before training are no longer on this machine", where="x")

    found = end_with_receipt(tmp_path, gone, [], config=config, log=log)
    assert found["status"] == "unknown" and "no longer on this machine" in found["sentence"]
    assert json.loads((tmp_path / "sparsity.json").read_text())["why"].startswith("The weights before")
    assert "no longer" in (tmp_path / "warnings.jsonl").read_text()
    log.close()


def test_a_masked_visual_run_moves_the_mask_alone_and_resumes_bit_for_bit(folder, tmp_path):
    base = stored(folder)
    generator = torch.Generator().manual_seed(5)
    tuned = {n: w + 0.01 * (torch.rand(w.shape, generator=generator) < 0.2) for n, w in base.items()}
    save_file(tuned, tmp_path / "tuned.safetensors")
    mask = tmp_path / "some.mask"
    write_mask(folder / "transformer", tmp_path / "tuned.safetensors", mask)
    told = (f"sparsity.mask={mask}", "optimizer.weight_decay=0.1", "optimizer.lr=1e-3")
    visual(folder, tmp_path / "whole", *told).train()
    after = last(tmp_path / "whole")
    for name, weight in after.items():
        chosen = base[name] != tuned[name]
        assert torch.equal(bits(weight)[~chosen], bits(base[name])[~chosen]), name
    moved = sum(int((base[n] != w).sum()) for n, w in after.items())
    chosen = sum(int((base[n] != tuned[n]).sum()) for n in after)
    assert 0.9 * chosen < moved <= chosen
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step_000003")
    visual(folder, tmp_path / "again", *told).train()
    again = last(tmp_path / "again")
    assert all(torch.equal(bits(w), bits(again[n])) for n, w in after.items())
    moments = load_file(tmp_path / "again" / "checkpoints" / "step_000003" / "optimizer.safetensors")
    assert sum(v.numel() for n, v in moments.items() if n.endswith("exp_avg")) == chosen


def language(model, out, trainer, *overrides):
    config = {
        "trainer": trainer, "name": "toy", "model": {"path": str(model), "train": "full"}, "data": {"path": "toy"},
        "batch_size": 16, "microbatch": 8, "steps": 3, "optimizer": {"lr": 1e-4, "weight_decay": 0.1},
        "evaluation": {"every": 0, "rows": 40, "prompts": 0}, "checkpoint": {"every": 1, "keep": 9},
    }  # fmt: skip
    return trainer_for(load_config(config, overrides), out=out, rows=toy_thumbs(60).split(0.2))


def test_a_language_run_measures_keeps_to_a_mask_and_resumes(tmp_path):
    model = build_tiny(tmp_path / "tiny")
    base = load_file(model / "model.safetensors")
    result = language(model, tmp_path / "full", "sft", "sparsity.every=1", "sparsity.dtype=bf16").train()
    receipt = json.loads((tmp_path / "full" / "sparsity.json").read_text())
    exact, half = shares(base, last(tmp_path / "full"))
    assert [v["bit_identical"] for v in receipt["views"]] == [exact, half]
    assert result.summary["sparsity"]["bit_identical"] == exact
    rows = [json.loads(line) for line in (tmp_path / "full" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["sparsity/cumulative"] == half and "sparsity/predicted_step" in rows[0]
    mask = tmp_path / "run.mask"
    write_mask(model, tmp_path / "full", mask, form="BF16")
    for place in ("a", "b"):
        language(model, tmp_path / place, "sft", f"sparsity.mask={mask}").train()
        after = last(tmp_path / place)
        found = read_places(mask, after)
        for name, weight in after.items():
            kept = torch.ones(weight.numel(), dtype=bool)
            kept[found[name].long()] = False
            assert torch.equal(bits(weight).view(-1)[kept], bits(base[name]).view(-1)[kept]), name
        if place == "a":
            whole = after
            shutil.copytree(tmp_path / "a", tmp_path / "b")
            shutil.rmtree(tmp_path / "b" / "checkpoints" / "step_000003")
    assert all(torch.equal(bits(w), bits(after[n])) for n, w in whole.items())
    assert any(not torch.equal(w, base[n]) for n, w in whole.items())
    assert str(mask) in write_report(tmp_path / "a").read_text()


def test_what_a_mask_does_not_go_with_is_said(folder, tmp_path, capsys):
    pair(tmp_path / "m")
    with pytest.raises(ConfigError, match="adapter moves every weight"):
        visual(folder, tmp_path / "run", "model.train=lora", "sparsity.mask=x")
    with pytest.raises(ConfigError, match="another model"):
        visual(folder, tmp_path / "other" / "run", f"sparsity.mask={tmp_path / 'm' / 'run.mask'}").train()
    config = tmp_path / "c.yaml"
    config.write_text("trainer: sft\nmodel: {path: tiny, train: full}\ndata: {path: toy}\nsparsity: {mask: gone}\n")
    assert main(["check", str(config)]) == 2 and "no mask file" in capsys.readouterr().out


def test_the_verbs_of_masks(tmp_path, capsys):
    pair(tmp_path / "m")
    base, tuned, mask = (str(tmp_path / "m" / name) for name in ("base.safetensors", "tuned.safetensors", "run.mask"))
    control = str(tmp_path / "control.mask")
    assert main(["sparsity", "compare", base, tuned, "--form", "bf16", "--mask", mask]) == 0
    assert main(["sparsity", "control", mask, "--base", base, "--match", "magnitude", "--out", control]) == 0
    assert main(["sparsity", "overlap", mask, control]) == 0
    assert main(["sparsity", "equal", tuned, base, "--mask", mask, "--init", base, "--full", tuned]) == 0
    assert "low power" in capsys.readouterr().out
    assert main(["sparsity", "equal", tuned, base, "--mask", base, "--init", base]) == 2


# What is delivered


def test_the_average_of_a_checkpoint_is_what_is_delivered(tmp_path):
    base = {"w": torch.zeros(10)}
    save_file(base, tmp_path / "base.safetensors")
    groups = {"model": {"w": torch.ones(10)}, "average": {"w": torch.tensor([1.0] * 3 + [0.0] * 7)}}
    checkpoint.save(tmp_path / "run" / "checkpoints", 1, groups, {})
    for place in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_000001"):
        assert compare(tmp_path / "base.safetensors", place).as_dict()["bit_identical"] == 0.7


def test_adapters_move_everything_and_their_rounding_hides_most_of_it(tmp_path):
    """A rank-2 product of rms 2e-5 on bf16 weights of N(0, 0.02): all of it in float32, little once it is rounded."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    base = (0.02 * normal(300, 200)).bfloat16()
    save_file({"up.weight": base}, tmp_path / "base.safetensors")
    down, up = normal(2, 200), 1e-5 * normal(300, 2)
    live = live_source({"up.lora_A.weight": down, "up.lora_B.weight": up}, {"lora_alpha": 4})
    raw = compare(tmp_path / "base.safetensors", live, form="F32").as_dict()
    stored = compare(tmp_path / "base.safetensors", live).as_dict()
    delta = 2.0 * (up @ down)
    assert raw["bit_identical"] == pytest.approx(
        float((base.float() + delta == base.float()).double().mean()), abs=1e-4
    )
    assert raw["bit_identical"] < 1e-3
    assert stored["bit_identical"] == pytest.approx(
        float(((base.float() + delta).bfloat16() == base).float().mean()), abs=1e-3
    )
    assert stored["bit_identical"] > 0.6 and stored["dtype"] == "BF16" and raw["dtype"] == "F32"
