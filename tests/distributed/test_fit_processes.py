"""A fit of a classifier is the same in one process, in two that hold replicas, and under ZeRO; and it goes on."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import processes
import pytest
import torch

from align.cli import main
from align.config import load_config
from align.errors import ConfigError
from align.feedback.events import FeedbackEvent, Item
from align.feedback.store import Store
from align.launch import World
from align.weights import load_tensors
from rewards import embeddings, fit, get_reward
from rewards.fit_answers import Answers, batch_loss, pack
from rewards.fit_data import Observation
from rewards.fit_latent import Latent
from tests.people import START
from tests.unit import test_fit_towers as towers
from tests.unit.test_text_rewards import save

ENGINES = {None: "data_parallel", "zero1": "deepspeed_zero1", "zero2": "deepspeed_zero2"}
LONG = pytest.mark.timeout(600)


def said_of_everything(folder: Path) -> str:
    """Comparisons, thumbs and ratings of two answers to each of 30 questions."""
    items = [Item(f"question {p}", f"{'paris' if r else 'four'} {'a' * (p % 3)}") for p in range(30) for r in range(2)]
    events = []
    for i in range(0, 60, 2):
        about = {"annotator": f"j{i % 7}", "session": str(i), "ts": START + i}
        events.append(FeedbackEvent("pairwise", (items[i].id, items[i + 1].id), "tie" if i % 20 == 0 else "b", **about))
        events += [FeedbackEvent("binary", (items[i + r].id,), bool(r) ^ (i % 14 == 0), **about) for r in range(2)]
        events += [FeedbackEvent("ordinal", (items[i + r].id,), 2 + 2 * r, scale=(1, 5), **about) for r in range(2)]
    with Store.open(folder / "feedback.db") as opened:
        opened.add(items, events)
    return str(folder / "feedback.db")


def config(folder: Path, train: str, *overrides: str):
    if not (folder / "model").is_dir():
        save(folder / "model")
    path = folder / "feedback.db"
    return load_config(
        {
            "trainer": "fit", "steps": 6, "batch_size": 15, "data": {"paths": [str(path)]},
            "optimizer": {"lr": 2e-3, "weight_decay": 0.01, "eps": 1e-6, "ema_decay": 0.9},
            "checkpoint": {"every": 2}, "objective": {"comparisons": "davidson"}, "users": {"effects": True},
            "model": {"backbone": "classifier", "path": str(folder / "model"), "train": train,
                      "lora": {"rank": 4, "alpha": 8}},
        },
        overrides,
    )  # fmt: skip


def fitted(own, out: Path, deepspeed: str | None = None) -> dict:
    """Fit, and tell what really carried the updates out."""
    told: dict = {}

    class Told(fit.Run):
        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options)
            told.update(engine=type(self.engine).__name__, name=self.engine.name, world=self.world.size)
            if deepspeed is not None:
                import deepspeed as ds

                inner = self.engine.engine
                told.update(
                    inner=isinstance(inner, ds.DeepSpeedEngine), stage=inner.zero_optimization_stage(),
                    optimizer=type(inner.optimizer).__name__, splits=inner.optimizer.partition_gradients,
                )  # fmt: skip

    kept, fit.Run = fit.Run, Told
    try:
        result = fit.fit_reward(own, out, deepspeed=deepspeed)
    finally:
        fit.Run = kept
    return {**told, "status": result.status}


def require_equal(alone: Path, other: Path) -> None:
    for row, again in zip(processes.metrics(alone), processes.metrics(other), strict=True):
        assert row.keys() == again.keys()
        for name in [name for name in row if name.startswith("loss")] + ["grad_norm"]:
            assert again[name] == pytest.approx(row[name], abs=1e-5, rel=1e-5), (row["step"], name)  # norms reach 15
    one, two = (load_tensors(out / "reward" / "classifier") for out in (alone, other))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-5, msg=name)
    cards = [json.loads((out / "reward" / "reward.json").read_text())["card"] for out in (alone, other)]
    for name in ("calibration", "observation_models"):
        for key, value in cards[0][name].items():
            assert cards[1][name][key] == pytest.approx(value, abs=1e-5), (name, key)
    assert cards[1]["heldout"]["thumbs"]["log_loss"] == pytest.approx(
        cards[0]["heldout"]["thumbs"]["log_loss"], abs=1e-5
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process: the folder of the data, and a run of LoRA and one of all weights."""
    folder = tmp_path_factory.mktemp("alone")
    said_of_everything(folder)
    for train in ("lora", "full"):
        assert fitted(config(folder, train), folder / train)["name"] == "single"
    return folder


@LONG
@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "settings"), [("lora", None), ("lora", "zero2"), ("full", "zero1"), ("full", "zero2")]
)
def test_two_processes_fit_as_one_does(alone, tmp_path, train, settings):
    out = tmp_path / "run"
    ranks = processes.world(2, lambda: fitted(config(alone, train), out, settings), tmp_path / "world", within=400)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    for told in (rank.value for rank in ranks):
        assert told["status"] == "complete" and told["world"] == 2 and told["name"] == ENGINES[settings]
        if settings is None:
            assert told["engine"] == "ReplicaEngine"
        else:
            assert told["inner"] and told["stage"] == int(settings[-1]) and told["splits"] == (settings == "zero2")
            assert told["optimizer"] == "DeepSpeedZeroOptimizer"
    record = json.loads((out / "run.json").read_text())
    assert record["engine"] == ENGINES[settings] and record["processes"] == 2
    require_equal(alone / train, out)
    texts = [Item(f"question {p}", "paris") for p in range(3)]
    from align.types import Samples

    asked = Samples([i.prompt for i in texts], texts=[i.response for i in texts])
    scores = [get_reward("fitted", path=str(run)).score(asked).values for run in (alone / train, out)]
    assert scores[1] == pytest.approx(scores[0], abs=1e-5)


@LONG
@pytest.mark.slow
@pytest.mark.parametrize("settings", [None, "zero2"])
def test_blocks_of_towers_move_as_in_one_process(tmp_path, monkeypatch, settings):
    monkeypatch.setattr(embeddings, "cache_directory", lambda: tmp_path / "cache")
    # Biases of keys have no gradient but rounding's, which AdamW would blow up to whole steps.
    own = towers.config(towers.made(tmp_path), "batch_size=7", "optimizer.eps=1e-3")
    assert fitted(own, tmp_path / "alone")["name"] == "single"
    work = lambda: fitted(own, tmp_path / "run", settings)  # noqa: E731
    ranks = processes.world(2, work, tmp_path / "world", within=400)
    assert [rank.code for rank in ranks] == [0, 0] and ranks[1].value["name"] == ENGINES[settings], ranks
    for name in ("towers", "head"):
        one, two = (load_tensors(tmp_path / run / f"reward/{name}.safetensors") for run in ("alone", "run"))
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, atol=1e-5, rtol=1e-5, msg=key)


@LONG
@pytest.mark.slow
def test_the_comparison_sees_another_learning_rate(alone, tmp_path):
    fitted(config(alone, "lora", "optimizer.lr=2.2e-3"), tmp_path / "run")
    with pytest.raises(AssertionError):
        require_equal(alone / "lora", tmp_path / "run")


@LONG
@pytest.mark.slow
def test_a_launched_fit_is_stopped_and_goes_on_in_one_process(alone, tmp_path, capsys):
    """Two processes of DeepSpeed's launcher are stopped by a signal; one goes on, to the reward of one alone."""
    import yaml

    out = tmp_path / "run"
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(config(alone, "lora", "steps=400", "checkpoint.every=1").model_dump(mode="json")))
    command = [sys.executable, "-m", "align.cli", "fit", str(own), "--out", str(out), "--launch", "deepspeed"]
    with processes.launched(command, tmp_path / "log") as process:
        processes.wait_for_step(out, 2, within=300)
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=200)
    text = (tmp_path / "log").read_text()
    assert code == 130, text[-3000:]
    record = json.loads((out / "run.json").read_text())
    assert (record["engine"], record["processes"], record["status"]) == ("deepspeed_zero2", 2, "stopped"), text[-2000:]
    done = len(processes.metrics(out))
    assert 2 <= done < 400 and not (out / "reward").exists()
    steps = f"steps={done + 2}"
    for folder in (out, tmp_path / "alone"):  # the folder of a shorter run: that many steps, then two
        if folder == out:
            text = (out / "config.yaml").read_text()
            (out / "config.yaml").write_text(text.replace("steps: 400", steps.replace("=", ": ")))
        fitted(config(alone, "lora", steps, "checkpoint.every=1"), folder)
    assert json.loads((out / "run.json").read_text())["engine"] == "single"
    require_equal(tmp_path / "alone", out)
    capsys.readouterr()
    assert main(["resume", str(out), "--launch", "deepspeed", "--dry-run"]) == 0


def test_what_cannot_be_shared_is_refused(tmp_path):
    said_of_everything(tmp_path)
    own = config(tmp_path, "lora")
    for overrides, match in (
        (["model.backbone=words"], "Frozen embeddings"),
        (["data.silence=unlabelled", "objective.prior=0.2"], "one process"),
        (["batch_size=1"], "needs a row"),
    ):
        with pytest.raises(ConfigError, match=match):
            fit.require_launchable(config(tmp_path, "lora", *overrides), 2)
    fit.require_launchable(own, 2)
    with pytest.raises(ConfigError, match="needs a launcher"):
        fit.fit_reward(own, tmp_path / "run", deepspeed="zero2")
    assert not (tmp_path / "run").exists()
    call = ["fit", str(tmp_path / "own.yaml"), "--out", str(tmp_path / "run")]
    (tmp_path / "own.yaml").write_text("trainer: fit\ndata: {paths: [" + own.data.paths[0] + "]}\n")
    assert main([*call, "--launch", "deepspeed"]) == 2 and main([*call, "--launch", "slurm"]) == 2


def test_parts_of_a_batch_add_up_to_it():
    """The loss of two processes' parts, statistics included, is that of one, whatever the rows are."""
    rows = [Observation("thumb", ("a",), 1.0, "p", "u"), Observation("comparison", ("a", "b"), 1.0, "p"),
            Observation("rating", ("b",), (2, 4), "p"), Observation("thumb", ("b",), 0.0, "p", "u", weight=2.0),
            Observation("ranking", ("a", "b"), (2, 1), "p")]  # fmt: skip
    own = load_config({"trainer": "fit", "data": {"paths": ["x"]}, "users": {"effects": True}})
    packed = pack(rows, {"a": 0, "b": 1}, {"u": 0}, own)
    import numpy as np

    answers = Answers(own, packed, 4, 0.5, (np.ones(1), 0.7))
    value = torch.tensor([0.3, -0.2])
    latent = Latent({}, lambda places: value[list(places)], lambda folder: None)
    chosen = [4, 2, 0, 1, 3]
    whole, stats = batch_loss(answers, latent, packed, chosen)

    class Part(World):
        def add(self, tensor):  # the others' part is added below
            parts.append(tensor.clone())
            return tensor

    parts: list[torch.Tensor] = []
    losses = [batch_loss(answers, latent, packed, chosen, Part(rank, 2))[0] for rank in range(2)]
    assert sum(losses).item() == pytest.approx(whole.item(), abs=1e-6)
    kinds = ["ranking", "rating", "thumb", "comparison"]
    counts = torch.tensor([1.0, 1, 2, 1])
    assert (sum(parts) / counts).tolist() == pytest.approx([stats[f"loss/{kind}"] for kind in kinds], abs=1e-6)
