"""`align fit`: rewards recovered from what a known world says of texts and images, and what is refused."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from align.cli import main
from align.config import load_config
from align.errors import ConfigError, DataError, ModelError
from align.feedback.bias import spearman
from align.feedback.events import FeedbackEvent, Item
from align.feedback.exchange import import_file
from align.feedback.store import Store
from align.run import Run
from align.types import Samples
from rewards import embeddings, fit, get_reward
from rewards.base import score_safely
from rewards.fit_answers import Answers, batch_loss, pack
from rewards.fit_card import calibration_notes
from rewards.fit_data import Observation, load_data, occurrences, thin, warnings_on
from rewards.fit_latent import Latent
from rewards.fit_split import require_apart, split_rows
from tests.people import START, accounted, pairs, rankings, ratings, sigmoid, thumbs, world, write_rows

ITEMS, QUALITY = world()
TEXTS = Samples([i.prompt for i in ITEMS], texts=[i.response for i in ITEMS])


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "cache_directory", lambda: tmp_path / "cache")


def store(folder: Path, events, items=ITEMS, name: str = "feedback.db") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    with Store.open(folder / name) as opened:
        opened.add(items, events)
    return str(folder / name)


def config(path: str | list[str], *overrides: str, **sections):
    paths = [path] if isinstance(path, str) else path
    base = {"trainer": "fit", "steps": 80, "data": {"paths": paths}, "optimizer": {"lr": 1e-2, "weight_decay": 0.0}}
    return load_config({**base, **sections}, overrides)


def quality_of(folder: Path, **args) -> float:
    scores = get_reward("fitted", path=str(folder), **args).score(TEXTS)
    assert scores.valid.all()
    return spearman(scores.values[:, 0], QUALITY)


# --- every protocol alone, and all of them together -------------------------------------------------

SAID = {"thumbs": thumbs, "ratings": ratings, "pairs": pairs, "rankings": rankings}


@pytest.mark.parametrize("protocol", SAID)
def test_a_reward_of_one_protocol_knows_the_quality(tmp_path, protocol):
    result = fit.fit_reward(config(store(tmp_path, SAID[protocol](ITEMS, QUALITY))), tmp_path / "run")
    floor = {"thumbs": 0.93, "ratings": 0.88, "pairs": 0.88, "rankings": 0.83}[protocol]
    assert quality_of(tmp_path / "run", output="score") > floor
    heldout = result.card["heldout"]
    kind = {"thumbs": "thumbs", "ratings": "ratings", "pairs": "comparisons", "rankings": "rankings"}[protocol]
    assert set(heldout) == {kind}
    if protocol == "thumbs":
        assert heldout["thumbs"]["auroc"] > 0.7 and heldout["thumbs"]["brier"] < heldout["thumbs"]["brier_of_base_rate"]
    elif protocol == "ratings":
        assert heldout["ratings"]["spearman"] > 0.6
    else:
        assert heldout[kind]["ci"][0] > 0.6
    assert result.card["shared_with_heldout"]["prompt"] == 0


@pytest.mark.parametrize(("loss", "fitted"), [("squared", {"rating_log_scale"}), ("sigmoid", set())])
def test_ratings_may_be_squared_errors(tmp_path, loss, fitted):
    path = store(tmp_path, ratings(ITEMS, QUALITY))
    result = fit.fit_reward(config(path, f"objective.ratings={loss}"), tmp_path / "run")
    assert quality_of(tmp_path / "run", output="score") > 0.85
    assert set(result.card["observation_models"]) == fitted, "a sigmoid has a unit of its own"


def test_few_answers_of_each_protocol_make_one_better_reward(tmp_path):
    few = [
        thumbs(ITEMS, QUALITY, users=4, shown=60), ratings(ITEMS, QUALITY, raters=1),
        pairs(ITEMS, QUALITY, count=120), rankings(ITEMS, QUALITY),
    ]  # fmt: skip
    alone = []
    for n, events in enumerate(few):
        fit.fit_reward(config(store(tmp_path / str(n), events)), tmp_path / f"run{n}")
        alone.append(quality_of(tmp_path / f"run{n}", output="score"))
    result = fit.fit_reward(config(store(tmp_path, [event for events in few for event in events])), tmp_path / "all")
    assert quality_of(tmp_path / "all") > max(alone)
    thresholds = result.card["observation_models"]["rating_thresholds"]
    assert len(thresholds) == 4 and sorted(thresholds) == thresholds


@pytest.mark.parametrize("loss", ["pick", "davidson", pytest.param("rao_kupper", marks=pytest.mark.slow)])
def test_ties_are_observations_and_not_lost(tmp_path, loss):
    said = pairs(ITEMS, QUALITY, tie=0.8)
    assert sum(e.value == "tie" for e in said) > 100
    result = fit.fit_reward(config(store(tmp_path, said), objective={"comparisons": loss}), tmp_path / "run")
    assert result.card["heldout"]["comparisons"]["ties"] > 10 and quality_of(tmp_path / "run") > 0.85
    assert ("tie" in result.card["observation_models"]) == (loss != "pick")


def test_margins_weights_and_shares_of_a_file_are_read(tmp_path):
    rows = [
        {"prompt": f"p{i}", "chosen": f"good w{i}", "rejected": f"bad w{i}", "margin": 1.5, "weight": 2.0}
        for i in range(30)
    ]
    rows += [
        {"prompt": f"q{i}", "chosen": "good", "rejected": f"bad v{i}", "share": 0.9, "margin": None} for i in range(20)
    ]
    rows += [{"prompt": f"t{i}", "chosen": "same", "rejected": "alike", "tie": True, "margin": 0.0} for i in range(20)]
    found = load_data([str(write_rows(tmp_path / "pairs.jsonl", rows))], config("x").data)
    assert [(r.value, r.margin, r.weight) for r in (found.rows[0], found.rows[30], found.rows[50])] == [
        (1.0, 1.5, 2.0), (0.9, None, 1.0), (0.5, 0.0, 1.0)
    ]  # fmt: skip
    packed = pack(found.rows, {n: i for i, n in enumerate(found.items)}, {}, config("x", "objective.margin=0.3"))
    assert packed.margin_N[[0, 30, 50]].tolist() == pytest.approx([1.5, 0.3, 0.0])
    fit.fit_reward(config(str(tmp_path / "pairs.jsonl")), tmp_path / "run")
    scores = get_reward("fitted", path=str(tmp_path / "run")).score(Samples(["p", "p"], texts=["good", "bad"]))
    assert scores.values[0, 0] > scores.values[1, 0]
    write_rows(tmp_path / "bad.jsonl", [{**rows[0], "margin": "much"}])
    with pytest.raises(DataError, match="margin"):
        load_data([str(tmp_path / "bad.jsonl")], config("x").data)


# --- P[Love] ----------------------------------------------------------------------------------------


def test_love_is_calibrated_from_exposures_of_which_few_negatives_were_kept(tmp_path):
    items, quality = world(prompts=150, seed=5)
    said = thumbs(items, quality, users=80, shown=100, base=-2.0, reaction="love")
    love = {
        "paths": [store(tmp_path, said, items)],
        "key": None,
        "reaction": "love",
        "silence": "negative",
        "negative_share": 0.25,
    }
    result = fit.fit_reward(config("x", data=love, split={"by": ["prompt"]}), tmp_path / "run")
    thumbs_ = result.card["heldout"]["thumbs"]
    assert thumbs_.keys() >= {
        "base_rate",
        "auroc",
        "auprc",
        "brier",
        "ece",
        "debiased_ece",
        "debiased_ece_ci",
        "reliability",
    }
    assert result.card["data"]["hashes"]["feedback.db"] and len(result.card["known_failure_modes"]) > 2
    assert any("not looked for" in text for text in result.card["known_failure_modes"])
    assert result.card["left_out"]["negatives not drawn"] > 2000
    assert result.card["read"] == accounted(result.card) == 8000, "every exposure is a row: loved, or a negative"
    assert thumbs_["mean_probability"] == pytest.approx(thumbs_["base_rate"], abs=0.03), "subsampling is undone"
    assert thumbs_["debiased_ece"] < 0.05 and thumbs_["auroc"] > 0.75
    assert thumbs_["brier"] < thumbs_["brier_of_base_rate"]
    raw = fit.fit_reward(config("x", data=love, calibration="none"), tmp_path / "raw").card["heldout"]["thumbs"]
    assert raw["mean_probability"] == pytest.approx(raw["base_rate"], abs=0.04), "also without a calibration"


def both_buttons(thumb: str, love: str) -> list[FeedbackEvent]:
    """A thumb up alone, love alone, both, a thumb down, and silence; a thumb up that no exposure was logged for."""
    events = []
    said = [(True, ""), (None, "love"), (True, "love"), (False, ""), (None, ""), (True, "")]
    for n, (up, reaction) in enumerate(said):
        about = {"annotator": f"u{n}", "session": "s", "exposure": "shown", "ts": START + n, "items": (ITEMS[0].id,)}
        events += [FeedbackEvent("exposure", key="shown", **about)] * (n < 5)
        if up is not None:
            events.append(FeedbackEvent("binary", value=up, key=thumb, **about))
        if reaction:
            events.append(FeedbackEvent("reaction", value=reaction, key=love, **about))
    return events


@pytest.mark.parametrize(
    ("keys", "key", "ups", "downs"),
    [
        (("thumb", "love"), None, "12", "0345"),
        (("thumb", "love"), "love", "12", "0345"),
        (("quality", "quality"), "quality", "12", "0345"),
        (("thumb", "love"), "thumb", "025", "134"),
    ],
)
def test_a_thumb_is_no_love(tmp_path, keys, key, ups, downs):
    own = {"paths": [store(tmp_path, both_buttons(*keys))], "key": key, "reaction": "love", "silence": "negative"}
    data = load_data(own["paths"], config("x", data=own).data)
    said = {up: "".join(sorted(row.user[1:] for row in data.rows if row.value == up)) for up in (1, 0)}
    assert said == {1: ups, 0: downs}, "who was shown it and gave a thumb alone did not love it"
    left = {what: n for what, n in data.left_out.items() if n}
    other = {"of other signals": 2 if key == "thumb" else 4}
    assert left == (other if key in ("thumb", "love") else {"thumbs, which say nothing of love": 4})


def test_a_signal_that_fails_the_gates_is_warned_of_and_is_in_the_card(tmp_path, capsys):
    few, many = (thumbs(ITEMS, QUALITY, users=users, shown=40) for users in (4, 40))
    path = store(tmp_path, few)
    result = fit.fit_reward(config(path, "steps=2"), tmp_path / "few")
    (signal,) = result.card["signals"]
    assert signal["key"] == "thumb/binary" and signal["verdict"] == "fail" and signal["n_shown"] == 160
    (note,) = [text for text in result.card["warnings"] if "gates" in text]
    assert "thumb/binary" in note and "n_reacted is 160, asked >= 200" in note and "outcome" not in note
    assert main(["fit", "fit/thumbs", f"data.paths.0={path}", "--dry-run"]) == 0
    assert note in capsys.readouterr().out
    result = fit.fit_reward(config(store(tmp_path, many, name="many.db"), "steps=2"), tmp_path / "many")
    assert result.card["signals"][0]["verdict"] == "unproven" and result.card["warnings"] == []
    unlogged = [replace(e, exposure="unknown", id="") for e in few if e.kind != "exposure"]
    result = fit.fit_reward(config(store(tmp_path, unlogged, name="un.db"), "steps=2"), tmp_path / "un")
    assert result.card["signals"] == [] == [text for text in result.card["warnings"] if "gates" in text]


def test_effects_of_people_are_fitted_and_scored_at_nobody(tmp_path):
    said = thumbs(ITEMS, QUALITY, users=60, shown=50, spread=1.5)
    path = store(tmp_path, said)
    plain = fit.fit_reward(config(path, split={"by": ["user"]}), tmp_path / "plain")
    mixed = fit.fit_reward(config(path, split={"by": ["user"]}, users={"effects": True}), tmp_path / "mixed")
    variance = mixed.card["user_variance"]["given_the_reward"]
    assert variance == pytest.approx(2.25, rel=0.4) and "user_variance" not in plain.card
    assert mixed.card["shared_with_heldout"]["user"] == 0 < mixed.card["shared_with_heldout"]["prompt"]
    assert quality_of(tmp_path / "mixed") > quality_of(tmp_path / "plain") - 0.02


def test_rates_of_mistakes_are_fitted_and_in_the_card(tmp_path):
    path = store(tmp_path, thumbs(ITEMS, QUALITY, users=30, slope=4.0))
    result = fit.fit_reward(config(path, "objective.mistakes=fitted", "objective.rho_up=0.1"), tmp_path / "run")
    rates = result.card["observation_models"]["mistakes"]
    assert 0 < rates["rho_down"] < 0.05 and 0 < rates["rho_up"] < 0.1, "there are none, and the prior expects few"
    assert any("were fitted" in text for text in result.card["known_failure_modes"])
    given = fit.fit_reward(config(path, "objective.rho_up=0.1"), tmp_path / "given").card["observation_models"]
    assert given["mistakes"] == {"rho_up": 0.1, "rho_down": 0.0}


def test_a_calibration_of_one_class_is_warned_of_with_counts(tmp_path):
    rows = load_data([store(tmp_path, thumbs(ITEMS, QUALITY, users=8))], config("x").data).rows
    ups = [row for row in rows if row.value == 1]
    assert calibration_notes(ups, config("x"))[0].startswith(f"{len(ups)} of {len(ups)} thumbs")
    assert calibration_notes(rows, config("x")) == [] == calibration_notes(ups, config("x", "calibration=none"))


def test_silence_may_be_unlabelled(tmp_path):
    said = thumbs(ITEMS, QUALITY, users=60, shown=80, base=-1.0, slope=3.0, reaction="love")
    rng = np.random.default_rng(0)
    said = [e for e in said if e.kind == "exposure" or rng.random() < 0.5]  # half of those who love it say so
    data = {"paths": [store(tmp_path, said)], "reaction": "love", "silence": "unlabelled"}
    result = fit.fit_reward(config("x", data=data, objective={"prior": 0.3}), tmp_path / "run")
    assert quality_of(tmp_path / "run") > 0.8 and result.card["calibration"]["kind"] == "none"
    assert any("assumed" in text for text in result.card["known_failure_modes"])
    with pytest.raises(ConfigError, match="objective.prior"):
        fit.fit_reward(config("x", data=data), tmp_path / "no")


def test_liars_are_trimmed_by_name(tmp_path):
    honest = thumbs(ITEMS, QUALITY, users=50, shown=60, slope=3.0)
    liars = thumbs(ITEMS, -QUALITY, users=3, shown=60, slope=3.0, seed=9)
    liars = [FeedbackEvent(**{**vars(e), "annotator": "liar" + e.annotator, "identifier": "", "id": ""}) for e in liars]
    path = store(tmp_path, honest + liars)
    result = fit.fit_reward(config(path, users={"trim": 0.06}), tmp_path / "run")
    assert [row["account"] for row in result.card["trimmed_users"]] == ["liaruser000", "liaruser001", "liaruser002"]
    assert "cost" in result.card["trimmed_users"][0]["reason"] and "liaruser001" in result.card["warnings"][0]
    assert result.card["left_out"]["of trimmed people, in train"] > 60
    assert result.card["read"] == accounted(result.card) == sum(event.kind == "binary" for event in honest + liars)


# --- runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [pytest.param("linear", marks=pytest.mark.slow), "mlp"])
def test_a_fit_that_was_killed_goes_on_bit_for_bit(tmp_path, monkeypatch, head):
    path = store(tmp_path, thumbs(ITEMS, QUALITY, users=10))
    own = config(
        path, "steps=30", "checkpoint.every=7", f"model.head={head}", "batch_size=100", users={"effects": True}
    )
    fit.fit_reward(own, tmp_path / "whole")
    commit = Run.commit

    def killed(run, step, *rest):
        commit(run, step, *rest)
        if step == 17:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "commit", killed)
    with pytest.raises(KeyboardInterrupt):
        fit.fit_reward(own, tmp_path / "killed")
    monkeypatch.setattr(Run, "commit", commit)
    assert not (tmp_path / "killed" / "reward").exists()
    fit.fit_reward(own, tmp_path / "killed")
    files = [
        (tmp_path / run / "reward" / name).read_bytes()
        for name in ("head.safetensors", "reward.json")
        for run in ("whole", "killed")
    ]
    assert files[0] == files[1] and files[2] == files[3]
    with pytest.raises(ConfigError, match="another configuration"):
        fit.fit_reward(config(path, "steps=31"), tmp_path / "whole")


def test_embeddings_are_made_once(tmp_path, monkeypatch):
    path, asked = store(tmp_path, thumbs(ITEMS, QUALITY, users=6)), []
    words = embeddings._words
    monkeypatch.setattr(embeddings, "_words", lambda samples: asked.append(len(samples)) or words(samples))
    fit.fit_reward(config(path, "steps=2"), tmp_path / "a")
    made = sum(asked)
    fit.fit_reward(config(path, "steps=3"), tmp_path / "b")
    assert made > 100 and sum(asked) == made
    (cache,) = (tmp_path / "cache" / "embeddings").iterdir()
    cache.write_bytes(cache.read_bytes()[:100])  # torn: made again
    fit.fit_reward(config(path, "steps=4"), tmp_path / "c")
    assert sum(asked) == 2 * made


def test_the_verb_fits_shows_and_scores(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store(tmp_path, thumbs(ITEMS, QUALITY, users=20) + pairs(ITEMS, QUALITY))
    (tmp_path / "my.yaml").write_text("trainer: fit\nname: taste\nsteps: 40\ndata: {paths: [feedback.db]}\n")
    assert main(["fit", "my.yaml", "--dry-run"]) == 0
    assert "would fit words" in capsys.readouterr().out and not (tmp_path / "runs").exists()
    assert main(["check", "my.yaml"]) == 0 and "heldout" in capsys.readouterr().out, "what the data come to"
    assert main(["check", "my.yaml", "split.heldout=0.0001"]) == 2
    assert re.search(r"leaves no rows for heldout .*, \d+ different prompts", capsys.readouterr().err)
    assert main(["fit", "my.yaml", "--json", "card.json"]) == 0
    assert "AUROC" in capsys.readouterr().out
    assert json.loads(Path("card.json").read_text())["card"]["data"]["hashes"].keys() == {"feedback.db"}
    page = Path("runs/taste/report.html").read_text()
    assert "Where it fails" in page and "probability, %" in page
    assert Path("runs/taste/reward/reliability.svg").read_text().startswith("<svg xmlns")
    write_rows(
        Path("completions.jsonl"),
        [{"prompt": "question 1", "completion": text} for text in ("clear exact", "rude wrong")],
    )
    Path("rewards.yaml").write_text("rewards: [{name: fitted, args: {path: runs/taste}}]\n")
    assert main(["score", "--config", "rewards.yaml", "--prompts", "completions.jsonl", "--out", "s.jsonl"]) == 0
    good, bad = (json.loads(row)["taste"] for row in Path("s.jsonl").read_text().splitlines())
    assert 0 < bad < good < 1
    capsys.readouterr()
    assert main(["train", "my.yaml"]) == 2 and "align fit" in capsys.readouterr().err
    assert main(["resume", "runs/taste"]) == 0, "a finished fit is written again"
    assert main(["fit", "digits/smoke"]) == 2


# --- images -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["pixels", "digits"])
def test_a_taste_for_bold_digits_is_learned_from_thumbs(tmp_path, backbone):
    from align.diffusion.digits_data import load_split, prompt_for

    split = load_split("evaluator")
    rng = np.random.default_rng(0)
    rows = []
    ink = (split.ink - split.ink.mean()) / split.ink.std()
    (tmp_path / "images").mkdir()
    for i in range(300):
        Image.fromarray((split.images[i, 0] * 255).round().byte().numpy()).convert("RGB").save(
            tmp_path / f"images/{i}.png"
        )
        up = bool(rng.random() < sigmoid(2.5 * float(ink[i])))
        prompt = f"{prompt_for(int(split.labels[i]))}{'.' * (i % 4)}"
        rows.append({"prompt": prompt, "response": f"images/{i}.png", "label": up, "annotator": f"u{i % 20}"})
    path = write_rows(tmp_path / "thumbs.jsonl", rows)
    own = {"paths": [str(path)], "media": "image"}
    result = fit.fit_reward(
        config("x", data=own, split={"by": ["user"]}, model={"backbone": backbone}), tmp_path / "run"
    )
    assert result.card["heldout"]["thumbs"]["auroc"] > 0.75
    reward = get_reward("fitted", path=str(tmp_path / "run"))
    fresh = load_split("generator")
    samples = Samples([prompt_for(int(d)) for d in fresh.labels[:200]], images=fresh.images[:200])
    scores = reward.score(samples)
    assert scores.names == ("fit",) and spearman(scores.values[:, 0], fresh.ink[:200].numpy()) > 0.7
    nan = samples.images[:2].clone()
    nan[0, 0, 0, 0] = float("nan")
    half = reward.score(Samples(list(samples.prompts[:2]), images=nan))
    assert half.valid[:, 0].tolist() == [False, True] and "not numbers" in half.errors[0]
    if backbone == "digits":
        odd = score_safely(reward, Samples(["a cat", samples.prompts[0]], images=samples.images[:2]))
        assert odd.valid[:, 0].tolist() == [False, True]
    (tmp_path / "images/0.png").unlink()
    with pytest.raises(DataError, match="1 of 300"):
        fit.fit_reward(config("x", data=own, split={"by": ["user"]}, model={"backbone": backbone}), tmp_path / "gone")


@pytest.mark.parametrize("head", ["cos", pytest.param("linear", marks=pytest.mark.slow)])
def test_clip_towers_carry_a_head(tmp_path, head):
    from tests import tiny_clip as tc

    tc.register(tmp_path)
    weights = tc.save(tc.build(tc.GELU), tmp_path / "clip.pt")
    pixels = tc.images(80)
    bright = pixels.mean((1, 2, 3)) - pixels.mean()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(0, 80, 2):
        for j, image in enumerate((pixels[i], pixels[i + 1])):
            tc.pil(image).save(tmp_path / f"{i + j}.png")
        for n in range(4):
            first = rng.random() < sigmoid(60 * float(bright[i] - bright[i + 1]))
            a, b = (i, i + 1) if first else (i + 1, i)
            rows.append(
                {
                    "prompt": f"a cat number {i}",
                    "response_a": f"{a}.png",
                    "response_b": f"{b}.png",
                    "preference": "a",
                    "annotator": f"j{n}",
                }
            )
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    model = {"backbone": "clip", "path": str(weights), "architecture": tc.GELU, "head": head}
    data = {"paths": [str(path)], "media": "image"}
    result = fit.fit_reward(config("x", data=data, model=model, objective={"comparisons": "pick"}), tmp_path / "run")
    assert result.card["heldout"]["comparisons"]["n"] > 10
    reward = get_reward("fitted", path=str(tmp_path / "run"))
    assert reward.score(Samples(["a cat"] * 8, images=pixels[:8])).valid.all() and reward.output == "score"
    other = tc.save(tc.build(tc.GELU, seed=1), tmp_path / "other.pt")
    with pytest.raises(ModelError, match="not the one"):
        get_reward("fitted", path=str(tmp_path / "run"), backbone=str(other))


# --- a sequence classifier --------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_sequence_classifier_is_trained_resumed_and_read_back(tmp_path, monkeypatch, train):
    from tests.unit.test_text_rewards import save

    folder = save(tmp_path / "model", "causal" if train == "full" else "llama")
    items = [Item(f"question {p}", f"{'paris' if r else 'four'} {'a' * (p % 3)}") for p in range(30) for r in range(2)]
    said = [
        FeedbackEvent("pairwise", (items[i].id, items[i + 1].id), "b", annotator=f"j{n}", session=str(n), ts=START)
        for i in range(0, 60, 2)
        for n in range(2)
    ]
    path = store(tmp_path, said, items)
    own = config(path, "steps=12", "checkpoint.every=5", "batch_size=16", "optimizer.lr=5e-3", "optimizer.weight_decay=0",
                 model={"backbone": "classifier", "path": str(folder), "train": train, "lora": {"rank": 4, "alpha": 8}})  # fmt: skip
    result = fit.fit_reward(own, tmp_path / "whole")
    assert result.card["heldout"]["comparisons"]["without_ties"] == 1
    reward = get_reward("fitted", path=str(tmp_path / "whole"))
    scores = reward.score(Samples([i.prompt for i in items], texts=[i.response for i in items])).values[:, 0]
    assert (scores[1::2] > scores[::2]).all()
    commit = Run.commit

    def killed(run, step, *rest):
        commit(run, step, *rest)
        if step == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "commit", killed)
    with pytest.raises(KeyboardInterrupt):
        fit.fit_reward(own, tmp_path / "killed")
    monkeypatch.setattr(Run, "commit", commit)
    fit.fit_reward(own, tmp_path / "killed")
    moved = json.loads((tmp_path / "whole" / "sparsity.json").read_text())
    assert moved["status"] == "measured" and 0 <= moved["views"][0]["bit_identical"] < 1
    assert moved["trained"] == {"lora": "adapters", "full": "weights"}[train]
    one, two = ((tmp_path / run / "reward/classifier/model.safetensors").read_bytes() for run in ("whole", "killed"))
    assert one == two


def test_hidden_states_carry_a_head(tmp_path):
    from tests.unit.test_text_rewards import save

    folder = save(tmp_path / "model", "causal")
    items = [Item(f"question {p}", "paris" if r else "four") for p in range(30) for r in range(2)]
    said = [
        FeedbackEvent("binary", (i.id,), i.response == "paris", annotator=f"u{n}", ts=START + n)
        for n, i in enumerate(items)
    ]
    own = config(store(tmp_path, said, items), model={"backbone": "hidden", "path": str(folder)})
    assert fit.fit_reward(own, tmp_path / "run").card["heldout"]["thumbs"]["auroc"] > 0.9
    reward = get_reward("fitted", path=str(tmp_path / "run"))
    scores = reward.score(Samples(["question 99"] * 2, texts=["paris", [{"role": "assistant", "content": "four"}]]))
    assert scores.values[0, 0] > 0.7 > 0.3 > scores.values[1, 0]


# --- splits -----------------------------------------------------------------------------------------


def test_splits_share_nothing_of_what_they_are_by(tmp_path):
    data = load_data([store(tmp_path, thumbs(ITEMS, QUALITY))], config("x").data)
    for by in (("prompt",), ("user",), ("prompt", "user"), ("time",)):
        own = config("x", split={"by": list(by)})
        parts, dropped = split_rows(data.rows, own.split, 0)
        rows = {name: [data.rows[i] for i in places] for name, places in parts.items()}
        assert sum(map(len, parts.values())) + dropped == len(data.rows) and bool(dropped) == (len(by) > 1)
        for axis in by:
            seen = {name: {r.ts if axis == "time" else getattr(r, axis) for r in part} for name, part in rows.items()}
            assert not seen["train"] & seen["heldout"] and not seen["train"] & seen["calibration"]
            if axis == "time":
                assert max(seen["train"]) < min(seen["calibration"]) <= max(seen["calibration"]) < min(seen["heldout"])
    half = split_rows(data.rows[: len(data.rows) // 2], config("x").split, 0)[0]
    whole = split_rows(data.rows, config("x").split, 0)[0]
    assert set(half["heldout"]) <= set(whole["heldout"]), "more data moves nobody"


def test_leaks_are_refused_with_counts(tmp_path):
    items, quality = world(prompts=40, seed=7)
    said = thumbs(items, quality, users=30)
    path = store(tmp_path, said, items)
    with pytest.raises(DataError, match=r"leaks .*: \d+ of 1800 are rows whose prompt is in training too"):
        fit.fit_reward(config(path, split={"heldout_path": path}), tmp_path / "run")
    fresh_items = [Item(f"new {i.prompt}", i.response) for i in items]
    other = store(tmp_path / "other", thumbs(fresh_items, quality, users=5), fresh_items, "other.db")
    result = fit.fit_reward(config(path, split={"heldout_path": other}), tmp_path / "run")
    assert result.card["read"] == accounted(result.card) == 1800 + 300
    assert result.card["split"]["heldout"]["rows"] == 300 and set(result.card["data"]["hashes"]) == {
        "feedback.db",
        "other.db",
    }
    with pytest.raises(DataError, match="user is in training"):
        fit.fit_reward(config(path, split={"heldout_path": other, "by": ["user"]}), tmp_path / "run2")
    rows = load_data([path], config("x").data).rows
    with pytest.raises(DataError, match="older"):
        require_apart(rows[:900], rows[900:] + rows[:1], ("time",))
    for parts in (([replace(rows[0], ts=0)], rows[900:]), (rows[:900], [replace(rows[-1], ts=0)])):
        with pytest.raises(DataError, match="1 of 1 have no time|1 have no time"):
            require_apart(*parts, ("time",))


def test_rows_without_times_say_the_same_whenever_their_file_was_imported(tmp_path):
    """Of one file, imported twice: the stores, what is drawn of it and the data sets made of it are equal."""
    rows = [
        {"prompt": f"p{i % 40}", "response": f"w{i % 7}", "annotator": f"u{i % 13}", "session": f"s{i}",
         "source": "user", "exposure": "shown", **({"reaction": "love"} if i % 9 == 0 else {})}
        for i in range(900)
    ]  # fmt: skip
    log = str(write_rows(tmp_path / "log.jsonl", rows))
    own = config("x", data={"paths": ["x"], "key": None, "reaction": "love", "silence": "negative",
                            "negative_share": 0.3, "most_of_user": 40})  # fmt: skip
    drawn, files = [], []
    for n in range(2):
        path = tmp_path / f"{n}.db"
        with Store.open(path) as opened:
            import_file(opened, log)
            assert not any(event.ts for event in opened.current())
        drawn.append(thin(load_data([str(path)], own.data).rows, own))
        for verb in (["export", "--as", "plain"], ["convert", "--to", "unpaired", "--up", "love", "--one-class"]):
            out = tmp_path / f"{n}_{verb[0]}.jsonl"
            assert main(["feedback", verb[0], str(path), str(out), *verb[1:]]) == 0
            files.append(out.read_bytes())
        time.sleep(0.002)
    assert drawn[0] == drawn[1] and files[:2] == files[2:]
    assert drawn[0] == thin(load_data([log], own.data).rows, own), "a file is read as a store that imported it"
    with pytest.raises(DataError, match="900 of 900 have no time"):
        split_rows(load_data([log], own.data).rows, config("x", split={"by": ["time"]}).split, 0)


def test_every_answer_of_a_file_is_a_row_or_left_out_for_one_reason(tmp_path):
    about = {"annotator": "u", "key": "k"}
    rows = [{"prompt": f"p{i}", "response": "a", "label": i % 2 == 0, **about} for i in range(60)]
    rows += [rows[0], {**rows[1], "label": True}]  # repeated, and contradicting
    rows += [{**rows[2], "label": False, "ts": "2025-01-01"}]  # said anew
    rows += [{**rows[3], "key": "other"}, {"prompt": "p4", "response": "a", "text": "nice", **about}]
    rows += [{"prompt": "p5", "response_a": "a", "response_b": "b", "preference": "tie", **about}]
    rows += [{"prompt": "p6", "response": "a", "exposure": "shown", **about}]  # no answer, and no row
    path = str(write_rows(tmp_path / "log.jsonl", rows))
    data = load_data([path], config("x", data={"paths": ["x"], "key": "k", "protocols": ["thumb"]}).data)
    assert +data.left_out == {
        "repeated": 1, "contradicting": 1, "superseded or taken back": 1, "of other signals": 1, "of kind text": 1,
        "of other protocols": 1,
    }  # fmt: skip
    assert data.counts() == {"thumb": 60} and data.read == 66 == len(rows) - 1


def test_rows_that_say_the_same_are_drawn_one_by_one():
    same = [Observation("thumb", ("a",), 0.0, "p", "u", ts) for ts in range(2000)]
    own = config("x", data={"paths": ["x"], "negative_share": 0.5})
    kept = thin(same, own)[0]
    assert 900 < len(kept) < 1100 and len(thin([replace(row, ts=7) for row in same], own)[0]) == len(kept)
    assert occurrences("abacaba") == [0, 0, 1, 0, 2, 1, 3]


# --- what cannot be fitted --------------------------------------------------------------------------


def refused(tmp_path, events, match, items=ITEMS, **sections):
    sections.setdefault("data", {"paths": [store(tmp_path, events, items)]})
    sections["data"]["paths"] = [store(tmp_path, events, items)]
    with pytest.raises((DataError, ConfigError), match=match):
        fit.fit_reward(config("x", **sections), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "refused before anything is written"


def test_one_class_is_refused_with_counts(tmp_path):
    ups = [e for e in thumbs(ITEMS, QUALITY) if e.kind == "binary" and e.value]
    refused(tmp_path, ups, r"one class.*: \d+ of \d+ are up")


def test_reactions_without_exposures_are_refused(tmp_path):
    love = [
        FeedbackEvent("reaction", (i.id,), "love", key="love", annotator=f"u{n % 9}", ts=START)
        for n, i in enumerate(ITEMS)
    ]
    refused(tmp_path, love, "none of 240 events is an exposure", data={"reaction": "love", "silence": "negative"})
    refused(tmp_path, love, "240 reaction", data={})


def test_constant_and_mixed_ratings_are_refused(tmp_path):
    same = [FeedbackEvent("ordinal", (i.id,), 3, scale=(1, 5), annotator="r", ts=START) for i in ITEMS]
    refused(tmp_path, same, r"All ratings are the same.*\d+ ratings of level 2")
    other = [FeedbackEvent("ordinal", (i.id,), 6, scale=(1, 7), annotator="s", key="b", ts=START) for i in ITEMS[:40]]
    refused(tmp_path / "two", ratings(ITEMS, QUALITY) + other, "different scales")


def test_one_user_with_all_the_data_is_refused_or_warned_of(tmp_path):
    mine = thumbs(ITEMS, QUALITY, users=1, shown=240)
    refused(tmp_path, mine, "user000 with 240 of 240", split={"by": ["user"]})
    refused(tmp_path, mine, r"1 named in \d+ thumbs", users={"effects": True})
    rated = ratings(ITEMS, QUALITY)
    refused(tmp_path / "rated", rated, "0 named in 0 thumbs", users={"effects": True})
    both = load_data([store(tmp_path / "both", rated + thumbs(ITEMS, QUALITY, users=3))], config("x").data).rows
    (note,) = warnings_on(both, config("x", users={"effects": True}))
    assert f"{len(rated)} ratings are read as if" in note and warnings_on(both, config("x")) == []
    with pytest.raises(ConfigError, match=r"are of thumbs \(users.effects\): data.protocols takes rating alone"):
        fit.require_fit(config("x", data={"paths": ["x"], "protocols": ["rating"]}, users={"effects": True}))
    others = [
        FeedbackEvent(**{**vars(e), "annotator": f"o{n}", "identifier": "", "id": ""})
        for n, e in enumerate(mine[1:60:2])
    ]
    path = store(tmp_path / "more", mine + others)
    result = fit.fit_reward(config(path, "steps=2"), tmp_path / "run")
    assert "user000 gave" in result.card["warnings"][0]
    capped = config(path, "data.most_of_user=20", "steps=2")
    rows, _, left = thin(load_data([path], capped.data).rows, capped)
    assert sum(r.user == "user000" for r in rows) == 20 and left["beyond the most of a user"] == 220


def test_embeddings_that_are_no_numbers_are_refused(tmp_path, monkeypatch):
    words = embeddings._words

    def broken(samples):
        found = words(samples)
        found[0, 0] = float("nan")
        return found

    monkeypatch.setattr(embeddings, "_words", broken)
    path = store(tmp_path, thumbs(ITEMS, QUALITY, users=6))
    with pytest.raises(DataError, match=r"\d+ of \d+ outputs have NaN"):
        fit.fit_reward(config(path), tmp_path / "run")


def test_a_config_that_contradicts_itself_is_refused(tmp_path):
    for overrides, match in (
        (["model.head=cos"], "head cos"),
        (["model.backbone=pixels"], "reads images"),
        (["model.backbone=classifier"], "needs its weights"),
        (["split.calibration=0"], "rows of its own"),
        (["split.heldout=0.9"], "Nothing is left"),
        (["data.silence=unlabelled", "objective.prior=0.3", "objective.mistakes=fitted"], "no negatives"),
        (["objective.rho_up=0.6", "objective.rho_down=0.5"], "below 1"),
    ):
        with pytest.raises(ConfigError, match=match):
            fit.fit_reward(config("x", *overrides), tmp_path / "run")
    with pytest.raises(DataError, match="no such feedback"):
        fit.fit_reward(config(str(tmp_path / "none.db")), tmp_path / "run")
    with pytest.raises(ModelError, match="no fitted reward"):
        get_reward("fitted", path=str(tmp_path))


def test_a_kind_of_answer_without_a_loss_is_refused():
    """A comparison's loss would read its second output, and fit something else without a word."""
    own = config("x")
    packed = pack([Observation("choice", ("a", "b"), 1.0, "p")], {"a": 0, "b": 1}, {}, own)
    latent = Latent({}, lambda places: torch.zeros(len(places)), lambda folder: None)
    with pytest.raises(DataError, match="of kind 'choice'"):
        batch_loss(Answers(own, packed, 0, 1.0, None), latent, packed, [0])


def test_gradients_of_a_mixed_batch_are_those_of_finite_differences():
    """The assembled loss against its own numerical derivative, over all kinds of answers at once."""
    rows = [
        Observation("thumb", ("a",), 1.0, "p", "u"), Observation("rating", ("b",), (2, 4), "p", "u"),
        Observation("comparison", ("a", "b"), 1.0, "p", margin=0.2), Observation("ranking", ("a", "b", "c"), (2, 1, 3), "p"),
    ]  # fmt: skip
    own = config("x", "objective.centre=0.05")
    packed = pack(rows, {"a": 0, "b": 1, "c": 2}, {"u": 0}, own)
    answers = Answers(own, packed, 4, 0.5, (np.zeros(1), 0.7)).double()
    value = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    latent = Latent({}, lambda places: value[list(places)], lambda folder: None)
    loss, stats = batch_loss(answers, latent, packed, [0, 1, 2, 3])
    assert set(stats) == {"loss/thumb", "loss/rating", "loss/comparison", "loss/ranking"}
    loss.backward()
    for i in range(3):
        moved = []
        for sign in (1, -1):
            with torch.no_grad():
                value[i] += sign * 1e-5
                moved.append(batch_loss(answers, latent, packed, [0, 1, 2, 3])[0].item())
                value[i] -= sign * 1e-5
        assert value.grad[i].item() == pytest.approx((moved[0] - moved[1]) / 2e-5, abs=1e-6)
