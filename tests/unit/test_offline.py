"""The offline trainer end to end on tiny folders: it learns thumbs and pairs, resumes bit for bit, stops before harm."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from align import checkpoint, guards
from align.checks import check_config
from align.commands.dry import config_findings
from align.commands.export import export_model
from align.config import load_config
from align.diffusion.families import FAMILIES, TextToImage
from align.diffusion.families.sd3 import SD3
from align.diffusion.latents import Latents
from align.diffusion.policy import Policy
from align.errors import ConfigError, DataError, GuardError, ModelError
from align.image_feedback import fitted
from align.reports.training import write_report
from align.run import Run
from align.types import StepStats
from align.weights import file_sha256
from trainers import Offline, evaluate, sample_images, trainer_for

PROMPTS = ["a red cat", "a blue dog", "two dogs", "a cat", "four cats", "a red dog", "bold cat", "seven"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    found = {
        "flow": tiny.sd3(place / "sd3"),
        "epsilon": tiny.stable_diffusion(place / "sd"),
        "v_prediction": tiny.stable_diffusion(place / "sd_v", prediction="v_prediction"),
    }
    for folder in found.values():  # random autoencoders make faint latents; a scale is there to make them unit ones
        config = folder / "vae" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 8.0}))
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noisy red images are liked and noisy blue ones are not: thumbs, and the same as pairs."""
    place, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    thumbs, pairs = [], []
    for p, prompt in enumerate(PROMPTS):
        for i in range(6):
            names = []
            for colour in ((150, 20, 20), (20, 20, 150)):
                pixels = (draw.integers(0, 105, (16, 16, 3)) + np.array(colour)).astype(np.uint8)
                names.append(f"{p}_{i}_{colour[0]}.png")
                Image.fromarray(pixels).save(place / names[-1])
            pairs.append({"prompt": prompt, "chosen": names[0], "rejected": names[1]})
            if i < 4:
                thumbs.append({"prompt": prompt, "image": names[0], "label": "up"})
            thumbs.append({"prompt": prompt, "image": names[1], "label": "down"})
    for name, rows in (("thumbs", thumbs), ("pairs", pairs)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def trainer(model, data, out, *overrides, loss="kto", **options):
    config = {
        "trainer": "offline", "name": "toy", "model": {"path": str(model), "lora": {"rank": 4, "alpha": 8}},
        "data": {"path": str(data / ("pairs.jsonl" if loss == "dpo" else "thumbs.jsonl")), "heldout_fraction": 0.25},
        "objective": {"loss": loss, "beta": 30.0}, "steps": 6, "batch_size": 8, "optimizer": {"lr": 1e-2},
        "evaluation": {"every": 2, "samples": 4, "final_samples": 4, "solver_steps": 3},
        "checkpoint": {"every": 2}, "tracking": {"samples_every": 0},
    }  # fmt: skip
    return Offline(load_config(config, overrides), out=out, **options)


def metrics(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "time/", "memory")
    return [{k: v for k, v in row.items() if not any(t in k for t in timed)} for row in rows]


def weights(run):
    return {n: p.detach().clone() for n, p in run.policy.trainable().items()}


@pytest.mark.parametrize(
    ("kind", "loss", "train"),
    [
        ("flow", "kto", "lora"), ("epsilon", "dpo", "lora"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (
            ("flow", "dpo", "full"), ("epsilon", "kto", "full"), ("v_prediction", "kto", "lora"),
        )),
    ],
)  # fmt: skip
def test_held_out_rows_are_told_apart_after_training(folders, data, tmp_path, kind, loss, train):
    lr = 1e-2 if train == "lora" else 1e-3
    run = trainer(
        folders[kind], data, tmp_path / "run", f"model.train={train}", "steps=25", "batch_size=16", f"optimizer.lr={lr}",
        "evaluation.every=0", "checkpoint.every=0", loss=loss,
    )  # fmt: skip
    result = run.train()
    rows, summary = metrics(tmp_path / "run"), result.summary
    first = math.log(2)
    if loss == "kto":
        first = 0.5 * np.mean([run.weights[0] if run.rows.rows[r].label else run.weights[1] for r in run.rows_at(1)])
    assert rows[0]["loss"] == pytest.approx(first, abs=1e-6) and rows[0]["correct"] == 0.5
    assert summary["first_ratio_error_max"] == 0
    assert np.mean([row["loss"] for row in rows[-5:]]) < rows[0]["loss"]
    assert summary["implicit_after"]["mean"] > 0.65 and summary["heldout_gain"] == summary["implicit_gain"]
    k = 2 if train == "lora" else 3
    assert summary["feq_per_sample"] == k + 1
    assert rows[-1]["feq_total"] == 25 * 16 * (2 if loss == "dpo" else 1) * (k + 1)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["heldout"]["prompts"] == 2 and record["beta"] == 30
    page = write_report(tmp_path / "run").read_text()
    assert "Held-out accuracy of the implicit reward rose from" in page and "No held-out reward was" not in page
    assert "Held-out rows told apart" in page and "irst ratio error" not in page.replace("first_ratio_error", "")


def first_gradient(run, monkeypatch):
    """Train, and return what the first update was taken with."""
    found, update = {}, Run.update

    def kept(self, **options):
        if not found:
            found.update({n: p.grad.clone() for n, p in self.parameters.items() if p.grad is not None})
        return update(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "update", kept)
        run.train()
    assert any(bool(value.any()) for value in found.values())
    return found


ONE_UPDATE = ["steps=1", "evaluation.every=0", "evaluation.final_samples=2", "optimizer.max_grad_norm=null"]


def test_thumbs_turned_round_teach_the_opposite(folders, data, tmp_path, monkeypatch):
    rows = [json.loads(line) for line in (data / "thumbs.jsonl").read_text().splitlines()]
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(json.dumps({**r, "label": "down" if r["label"] == "up" else "up"}) + "\n" for r in rows))
    even = ["batch_size=60", "objective.weight_desirable=1", "objective.weight_undesirable=1"]
    gradients = []
    for i, path in enumerate((data / "thumbs.jsonl", turned)):
        run = trainer(
            folders["flow"], data, tmp_path / str(i), *ONE_UPDATE, *even, f"data.path={path}", f"data.root={data}"
        )
        monkeypatch.setattr(run, "rows_at", lambda step: list(range(60)))
        gradients.append(first_gradient(run, monkeypatch))
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], -value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("loss", ["kto", "dpo"])
def test_tiles_do_not_change_an_update(folders, data, tmp_path, monkeypatch, loss):
    gradients = [
        first_gradient(
            trainer(
                folders["flow"], data, tmp_path / str(i), *ONE_UPDATE, f"batch.tile={tile}", "objective.draws=2",
                loss=loss,
            ),
            monkeypatch,
        )
        for i, tile in enumerate((64, 5))
    ]  # fmt: skip
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, atol=1e-5, rtol=1e-4)
    (row,), (again,) = (metrics(tmp_path / str(i)) for i in range(2))
    assert again["loss"] == pytest.approx(row["loss"], abs=1e-6)
    assert again["feq"] == row["feq"] + (16 if loss == "kto" else 0)  # a forward of every draw for the reference point


def test_stop_and_resume_equal_one_go_bit_for_bit(folders, data, tmp_path, monkeypatch):
    settings = ["optimizer.ema_decay=0.9", "objective.draws=2"]
    whole = trainer(folders["epsilon"], data, tmp_path / "a", *settings)
    whole.train()
    first = trainer(folders["epsilon"], data, tmp_path / "b", *settings)
    learn = first.learn

    def stop_in_step_3(run, rows, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(run, rows, step)

    monkeypatch.setattr(first, "learn", stop_in_step_3)
    assert first.train().status == "stopped"
    assert checkpoint.load_latest(tmp_path / "b" / "checkpoints").step == 3
    second = Offline.resume(tmp_path / "b")
    assert second.train().status == "complete"
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    summaries = [json.loads((tmp_path / n / "summary.json").read_text()) for n in "ab"]
    assert summaries[0]["heldout_gain"] == summaries[1]["heldout_gain"]


def test_every_epoch_deals_the_classes_evenly_in_another_order(folders, data, tmp_path):
    run = trainer(folders["flow"], data, tmp_path / "run")
    up = np.array([bool(row.label) for row in run.rows.rows])
    assert len(up) == 60 and up.sum() == 24
    epochs = [[run.rows_at(step) for step in range(1 + 7 * e, 8 + 7 * e)] for e in range(2)]
    for updates in epochs:
        assert len({row for rows in updates for row in rows}) == 56  # no row twice
        assert {int(up[rows].sum()) for rows in updates} <= {3, 4}
    assert epochs[0] != epochs[1] and [run.rows_at(s) for s in range(1, 8)] == epochs[0]


def test_held_out_rewards_are_measured_on_samples(folders, data, tmp_path):
    out = tmp_path / "run"
    run = trainer(folders["flow"], data, out, "heldout_rewards=[{name: jpeg}]", "steps=2", "tracking.samples_every=1")
    summary = run.train().summary
    evaluation = [json.loads(line) for line in (out / "evaluation.jsonl").read_text().splitlines()]
    assert summary["heldout_after"] == evaluation[-1]["heldout"] and "heldout/jpeg" in evaluation[-1]["components"]
    assert "reward_before" not in summary and "heldout_measure" not in summary
    assert summary["implicit_before"]["mean"] == 0.5 and evaluation[0]["implicit"]["mean"] == 0.5
    assert (out / "samples" / "step_000002.png").is_file()
    assert "Held-out reward" in write_report(out).read_text()
    assert len(list(sample_images(out, count=2, out=tmp_path / "made").glob("*_*.png"))) == 4  # two held-out prompts
    assert evaluate(out, samples=4)["rewards"]["reward/jpeg"]["n"] == 4
    export_model(out, to="diffusers-lora", out=tmp_path / "lora")
    card = (tmp_path / "lora" / "README.md").read_text()
    assert file_sha256(data / "thumbs.jsonl") in card and "objective `kto`" in card
    assert "Rewards it was trained on" not in card  # it learned from thumbs alone
    assert "Rewards that only measured it:\n\n- `jpeg`" in card


def test_what_is_not_finite_never_reaches_the_optimizer(folders, data, tmp_path):
    run = trainer(folders["flow"], data, tmp_path / "run")
    before, predict = weights(run), run.policy.family.predict
    run.policy.family.predict = lambda *a: predict(*a) * (float("nan") if torch.is_grad_enabled() else 1.0)
    with pytest.raises(GuardError, match="finite"):
        run.train()
    assert all(torch.equal(value, weights(run)[name]) for name, value in before.items())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_a_policy_that_is_not_its_reference_before_training_is_refused(folders, data, tmp_path):
    run = trainer(folders["flow"], data, tmp_path / "run")
    with torch.no_grad():
        for name, parameter in run.policy.trainable().items():
            if "lora_B" in name:
                parameter.fill_(1e-2)
    with pytest.raises(GuardError, match="The model and its reference differ before any update"):
        run.train()
    guards.require_reference(9e-7, 1e-6, "")


def test_errors_that_grow_are_warned_of_once(folders, data, tmp_path):
    run = trainer(folders["flow"], data, tmp_path / "run")
    with run.open_run() as opened:
        for step, now in ((1, 0.5), (2, 0.51), (3, 0.8), (4, 0.9)):  # the reference's is .4: 1.25, 1.275, 2, 2.25 times
            stats = StepStats()
            stats.add(2, sums={"matching_error": 2 * now, "error_gain": 2 * (0.4 - now)})
            run._watch_errors(stats, opened, step)
    rows = [json.loads(line) for line in (tmp_path / "run" / "warnings.jsonl").read_text().splitlines()]
    assert [(row["step"], row["code"]) for row in rows] == [(3, "errors_grow")] and "2.00 times" in rows[0]["message"]


def test_rows_that_cannot_be_learnt_from_stop_the_run_before_it_begins(folders, data, tmp_path):
    rows = [json.loads(line) for line in (data / "thumbs.jsonl").read_text().splitlines()]
    for i, (wrong, message) in enumerate(
        [
            ([r for r in rows if r["label"] == "up"], "no thumb down"),
            ([*rows, {"prompt": "x", "label": 1}], "line 81, field 'image'"),
            ([*rows, {**rows[0], "label": "love"}], "line 81, field 'label'"),
            (rows[:10] + rows[20:24], "fewer rows than one update takes"),
        ]
    ):
        path = tmp_path / f"{i}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in wrong))
        with pytest.raises(DataError, match=message):
            trainer(folders["flow"], data, tmp_path / "run", f"data.path={path}", f"data.root={data}", "batch_size=16")
    Image.new("RGB", (64, 16)).save(data / "long.png")
    path.write_text("".join(json.dumps(r) + "\n" for r in [*rows, *[{**r, "image": "long.png"} for r in rows[:60]]]))
    run = trainer(folders["flow"], data, tmp_path / "run", f"data.path={path}", f"data.root={data}")
    with pytest.raises(DataError, match=r"64x16 is far from the model's 16x16 \(.*line \d+, field 'image'\)"):
        run.train()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_image_is_encoded_once(folders, data, tmp_path, monkeypatch):
    run = trainer(folders["flow"], data, tmp_path / "run")
    calls, encode = [], Policy.to_latents
    monkeypatch.setattr(Policy, "to_latents", lambda self, pixels: calls.append(len(pixels)) or encode(self, pixels))
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    run._encode()
    given = [image for row in run.rows.rows for image in row.images]
    keys = list(dict.fromkeys(image.digest for image in given + [i for row in run._measured for i in row.images]))
    distinct = len(keys)
    assert sum(calls) == distinct == 80
    kept = run.latents.stack(keys[:5])
    again = Latents(run.policy, tmp_path / "cache")
    assert again.add([(image.digest, partial(fitted, image)) for image in given]) == 0
    assert torch.equal(again.stack(keys[:5]), kept)
    file = again._file(keys[0])
    file.write_bytes(b"torn")
    with pytest.raises(DataError, match="A kept latent cannot be read"):
        Latents(run.policy, tmp_path / "cache").stack(keys[:1])


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
def test_latents_are_what_diffusers_would_noise(folders, kind):
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_img2img import retrieve_latents

    run_policy = Policy.load(folders[kind], load_config("digits/smoke").model, seed=0)
    vae, pixels = run_policy.family.pipeline.vae, torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        theirs = retrieve_latents(vae.encode(VaeImageProcessor().preprocess(pixels)), sample_mode="argmax")
    theirs = (theirs - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    torch.testing.assert_close(run_policy.to_latents(pixels), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("overrides", "code", "level"),
    [
        (["objective.loss=dpo", "objective.utility=loss_averse"], "kto_only", "error"),
        (["objective.loss=dpo", "objective.weight_desirable=2"], "kto_only", "error"),
        (["objective.weight_desirable=0"], "zero_weight", "error"),
        (["objective.levels=solver", "objective.draws=30"], "draws", "error"),
        (["model.path=sd3", "batch_size=4"], "small_batch", "warning"),
        (["model.path=sd3", "model.train=full", "optimizer.lr=1e-4"], "lr_high", "warning"),
        (["data.heldout_fraction=0"], "no_heldout_rows", "warning"),
        (["heldout_rewards=[]"], "no_rewards", "note"),
        (["heldout_rewards=[{name: legible}]"], "unknown_reward", "error"),
        (["data.path=none.jsonl"], "data", "error"),
        (["model.path=none"], "model", "error"),
    ],
)
def test_findings(overrides, code, level):
    recipe = load_config("digits/diffusion_kto")
    names = {"digits/legibility", "digits/ink_band"}
    assert [f.level for f in check_config(recipe, reward_names=names, files=True) if f.level != "note"] == []
    found = check_config(load_config("digits/diffusion_kto", overrides), reward_names=names, files=True)
    assert (code, level) in [(f.code, f.level) for f in found]


def test_a_family_that_this_run_cannot_use_is_found_before_it_begins(folders, data, tmp_path, monkeypatch):
    def found(family, *, model=folders["flow"], recipe="digits/diffusion_kto"):
        config = load_config(recipe, [f"model.path={model}", f"model.family={family}"])
        return [f.message for f in config_findings(config) if (f.code, f.level) == ("family", "error")]

    blind = type("Blind", (TextToImage,), {
        name: value for name, value in vars(SD3).items() if name not in ("to_latents", "__dict__", "__weakref__")
    })  # fmt: skip
    monkeypatch.setitem(FAMILIES._entries, "BlindPipeline", blind)
    assert found("StableDiffusion3Pipeline") == found("BlindPipeline", recipe="digits/dance_grpo") == []
    assert "no method to_latents" in found("BlindPipeline")[0]
    other = shutil.copytree(folders["flow"], tmp_path / "other")
    (other / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    for recipe in ("digits/diffusion_kto", "digits/dance_grpo"):
        message = found("null", model=other, recipe=recipe)[0]
        assert "No model family runs 'OtherPipeline'" in message and "align.families" in message
    monkeypatch.setitem(FAMILIES._entries, "StableDiffusion3Pipeline", blind)
    with pytest.raises(ModelError, match="no method to_latents"):
        trainer(folders["flow"], data, tmp_path / "run")


def test_configs_name_the_trainer_and_refuse_what_it_does_not_know(folders, data, tmp_path):
    run = trainer(folders["flow"], data, tmp_path / "run")
    assert type(trainer_for(run.config, out=tmp_path / "other")) is Offline
    with pytest.raises(ConfigError, match="Unknown key 'group_size'"):
        load_config("digits/diffusion_kto", ["group_size=4"])
    with pytest.raises(ConfigError, match="There is no run to resume"):
        Offline.resume(tmp_path / "nowhere")


def test_thumbs_and_pairs_of_a_feedback_store_train(folders, data, tmp_path, capsys):
    """Two people look at images of a task in `data`; what `export` and `convert` write is learnt from as it is."""
    from align.cli import main
    from align.feedback.events import FeedbackEvent, Item
    from align.feedback.store import Store

    pairs = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]
    with Store.open(tmp_path / "feedback.db") as store:
        for i, pair in enumerate(pairs):
            liked, other = (Item(pair["prompt"], pair[side], media="image") for side in ("chosen", "rejected"))
            about = {"annotator": f"u-{i % 2}", "source": "human"}
            events = [
                FeedbackEvent("binary", (liked.id,), True, key="thumb", **about),
                FeedbackEvent("binary", (other.id,), False, key="thumb", **about),
                FeedbackEvent("pairwise", (other.id, liked.id), "b", key="better", **about),
            ]
            store.add([liked, other], events)
    thumbs, compared = (str(tmp_path / name) for name in ("thumbs.parquet", "pairs.jsonl"))
    store = str(tmp_path / "feedback.db")
    assert main(["feedback", "export", store, thumbs, "--as", "unpaired"]) == 0
    assert main(["feedback", "convert", store, compared, "--to", "pairs", "--key", "better"]) == 0
    for loss, path, first in (("kto", thumbs, 0.5), ("dpo", compared, math.log(2))):
        run = trainer(
            folders["flow"], data, tmp_path / loss, "steps=2", f"data.path={path}", f"data.root={data}", loss=loss
        )
        assert run.rows.counts()["pairs" if loss == "dpo" else "up"] == 36
        run.train()
        assert metrics(tmp_path / loss)[0]["loss"] == pytest.approx(first, abs=1e-6)
    capsys.readouterr()
    (tmp_path / "config.yaml").write_text((tmp_path / "kto" / "config.yaml").read_text())
    assert main(["check", str(tmp_path / "config.yaml"), f"data.root={tmp_path}"]) == 2
    assert "set data.root where they are relative to another folder" in capsys.readouterr().out
