"""`align evaluate` of rewards: measures worked by hand, probes on rewards that are known, fits on what they held out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import kendalltau

from align.cli import main
from align.config import load_config
from align.errors import ConfigError, DataError
from align.feedback.store import Store
from rewards import embeddings, on_feedback
from rewards import evaluate as ev
from rewards.base import FunctionReward, RewardCard
from rewards.fit import fit_reward
from rewards.fit_data import Observation, load_data
from tests.people import pairs, rankings, ratings, thumbs, world, write_rows

ITEMS, QUALITY = world(prompts=30)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "cache_directory", lambda: tmp_path / "cache")


def rating(item: str, level: int, prompt: str = "p", user: str = "u") -> Observation:
    return Observation("rating", (item,), (level, 5), prompt, user)


def comparison(a: str, b: str, share: float, prompt: str = "p") -> Observation:
    return Observation("comparison", (a, b), share, prompt)


def reward(name: str, function, media: str = "text") -> FunctionReward:
    return FunctionReward(RewardCard(name, "d", "any", media), function)


def store(path: Path, events, items=ITEMS) -> str:
    with Store.open(path) as opened:
        opened.add(items, events)
    return str(path)


# --- measures ---------------------------------------------------------------------------------------


def test_kendall_is_scipys():
    assert ev.kendall([3, 2, 1], [1, 2, 3]) == 1 and ev.kendall([1, 2, 3], [1, 2, 3]) == -1
    # Six pairs, one tied on each side: three right, one wrong, (3 - 1) / sqrt(5 * 5).
    assert ev.kendall([3, 1, 2, 2], [1, 2, 2, 3]) == pytest.approx(2 / 5)
    rng = np.random.default_rng(0)
    for _ in range(20):
        score, rank = rng.integers(0, 4, 7), rng.integers(1, 5, 7)
        assert ev.kendall(score, rank) == pytest.approx(kendalltau(score, -rank).statistic, nan_ok=True)
    assert np.isnan(ev.kendall([1, 1], [1, 2]))


def test_within_prompts_a_constant_of_the_prompt_does_not_count():
    level = np.array([0.0, 1, 2, 0, 1, 2])
    prompt = ["p"] * 3 + ["q"] * 3
    found = ev.rank_correlation(level + np.array([0.0] * 3 + [100.0] * 3), level, prompt, draws=20)
    assert found["spearman_within_prompts"] == pytest.approx(1) and found["spearman"] < 0.9
    alone = ev.rank_correlation(level[:3], level[:3], ["a", "b", "c"], draws=20)
    assert alone["spearman"] == 1 and np.isnan(alone["spearman_within_prompts"])


def test_no_row_calibrates_itself():
    rng = np.random.default_rng(0)
    score, cluster = rng.normal(size=400), [f"u{i % 40}" for i in range(400)]
    seen = (rng.random(400) < 1 / (1 + np.exp(-(3 * score - 1)))).astype(float)
    said = ev.cross_calibrated(score, seen, cluster)
    assert said.mean() == pytest.approx(seen.mean(), abs=0.05) and ev.debiased_calibration_error(said, seen) < 0.08
    turned = seen.copy()
    mine = np.array([c == "u0" for c in cluster])
    turned[mine] = 1 - turned[mine]
    again = ev.cross_calibrated(score, turned, cluster)
    assert (again[mine] == said[mine]).all() and (again != said).sum() > 100
    with pytest.raises(DataError, match="both classes"):
        ev.cross_calibrated(score, np.ones(400), cluster)


def test_pairs_of_both_protocols_are_worked_by_hand():
    rows = [
        rating("a", 4), rating("b", 2), rating("b", 4), rating("c", 3), rating("a", 1, user="v"), rating("d", 0, "q"),
        comparison("a", "b", 1.0), comparison("b", "a", 0.5), Observation("ranking", ("a", "b", "c"), (2, 1, 2), "p"),
    ]  # fmt: skip
    found = ev.signed_pairs(rows)
    # u rated b twice, 3 on average; v and q have one rating each.
    assert found["ratings"] == [("a", "b", 1, "p"), ("a", "c", 1, "p"), ("b", "c", 0, "p")]
    assert found["rankings"] == [
        ("a", "b", 1, "p"), ("b", "a", 0, "p"), ("a", "b", -1, "p"), ("a", "c", 0, "p"), ("b", "c", 1, "p")
    ]  # fmt: skip


def test_two_rewards_under_two_protocols_are_worked_by_hand():
    rows = [rating("a", 4), rating("b", 2), rating("c", 3), comparison("b", "a", 1.0), comparison("c", "a", 1.0)]
    rows += [comparison("c", "x", 1.0)]  # without a score
    scores = {"rated": {"a": 3.0, "b": 1.0, "c": 2.0}, "ranked": {"a": 1.0, "b": 2.0, "c": 3.0}}
    found = ev.compare_under_protocols(scores, rows, draws=50)
    table = {name: {p: m["without_ties"] for p, m in row.items()} for name, row in found["table"].items()}
    # Ratings say a > c > b: "ranked" has one pair of three, c > b. Rankings say b > a and c > a.
    assert table == {"rated": {"ratings": 1, "rankings": 0}, "ranked": {"ratings": pytest.approx(1 / 3), "rankings": 1}}
    against = found["against"]["ranked"]
    assert {p: d["mean"] for p, d in against["difference"].items()} == {"ratings": pytest.approx(2 / 3), "rankings": -1}
    assert against["interaction"]["mean"] == pytest.approx(5 / 3) and found["missing"] == 1
    # a > b and a > c by ratings, the other way round by rankings.
    assert found["shared"] == {"n": 2, "agree": 0, "flips": 2, "ties_on_one_side": 0}


def test_rewards_that_follow_a_protocol_win_under_it():
    """Ratings and rankings that follow two different tastes, eight prompts of each."""
    rng = np.random.default_rng(0)
    rows, rated, ranked = [], {}, {}
    for p in range(40):
        names = [f"{p}.{i}" for i in range(4)]
        one, other = rng.normal(size=(2, 4))
        rated |= dict(zip(names, one, strict=True))
        ranked |= dict(zip(names, other, strict=True))
        rows += [rating(n, int(np.sum(v > one)), f"p{p}") for n, v in zip(names, one, strict=True)]
        rows.append(Observation("ranking", tuple(names), tuple(int(1 + np.sum(other > v)) for v in other), f"p{p}"))
    found = ev.compare_under_protocols({"rated": rated, "ranked": ranked}, rows, draws=300)
    against = found["against"]["ranked"]
    assert against["difference"]["ratings"]["ci"][0] > 0.3 and against["difference"]["rankings"]["ci"][1] < -0.3
    assert against["interaction"]["ci"][0] > 0.7 and 0.35 < found["shared"]["agree"] < 0.65
    same = ev.compare_under_protocols({"a": rated, "b": rated}, rows, draws=50)["against"]["b"]
    assert same["interaction"] == {"mean": 0, "ci": [0, 0]}


def test_comparing_what_is_not_there_is_refused():
    with pytest.raises(DataError, match="two rewards"):
        ev.compare_under_protocols({"a": {}}, [])
    with pytest.raises(DataError, match="by rankings"):
        ev.compare_under_protocols({"a": {"x": 1, "y": 0}, "b": {"x": 1, "y": 0}}, [rating("x", 1), rating("y", 2)])
    with pytest.raises(DataError, match="1 pairs, none with scores"):
        ev.compare_under_protocols({"a": {"x": 1}, "b": {"x": 1}}, [rating("x", 1), rating("y", 2)])


def test_what_has_no_score_is_left_out_and_counted():
    rows = [Observation("thumb", (n,), v, n, n) for n, v in (("a", 1.0), ("b", 0.0), ("c", 1.0))]
    rows += [comparison("a", "b", 1.0), comparison("a", "c", 0.0), rating("c", 1)]
    found = on_feedback.by_protocol(rows, {"a": 2.0, "b": 1.0, "c": float("nan")})
    assert found["thumbs"]["n"] == 2 and found["thumbs"]["auroc"] == 1 and found["thumbs"]["without_score"] == 1
    assert "both classes" in found["thumbs"]["calibration"] and "brier" not in found["thumbs"]
    assert (found["comparisons"]["n"], found["comparisons"]["without_score"]) == (1, 1)
    assert found["ratings"] == {"n": 0, "without_score": 1}


# --- rewards ----------------------------------------------------------------------------------------


def test_rewards_that_are_known_are_seen_through(tmp_path):
    data = load_data([store(tmp_path / "f.db", pairs(ITEMS, QUALITY) + rankings(ITEMS, QUALITY))], _config("x").data)
    quality = {i.response: q for i, q in zip(ITEMS, QUALITY, strict=True)}
    prompt_of = {i.response: i.prompt for i in ITEMS}
    known = [
        reward("true", lambda samples: [quality[t] for t in samples.texts]),
        reward("long", lambda samples: [len(t) for t in samples.texts]),
        reward("reads", lambda samples: [
            quality[t] * (1 if prompt_of[t] == p else -1) for p, t in zip(samples.prompts, samples.texts, strict=True)
        ]),
        reward("half", lambda samples: [quality[t] if "clear" in t else None for t in samples.texts]),
    ]  # fmt: skip
    found = on_feedback.evaluate_rewards(known, data)
    true, long, reads, half = found["rewards"]
    assert (
        true["comparisons"]["ci"][0] > 0.75 > long["comparisons"]["without_ties"] and true["rankings"]["kendall"] > 0.5
    )
    assert long["probes"]["length"]["spearman"] == pytest.approx(1) and true["probes"]["prompts"]["changed"] == 0
    seen = reads["probes"]["prompts"]
    assert seen["accuracy_own"] == pytest.approx(1 - seen["accuracy_other"]) and seen["accuracy_own"] > 0.8
    assert half["missing"] == {"half: the function gave no number": found["data"]["outputs"] - half["scored"]}
    assert half["comparisons"]["n"] + half["comparisons"]["without_score"] == true["comparisons"]["n"]
    assert found["under_both_protocols"] is None, "nobody rated"
    with pytest.raises(ConfigError, match="Two rewards are called 'true'"):
        on_feedback.evaluate_rewards([known[0], known[0]], data)
    with pytest.raises(DataError, match="scored nothing"):
        on_feedback.evaluate_rewards([reward("none", lambda samples: [None] * len(samples))], data)
    with pytest.raises(ConfigError, match="scores images"):
        on_feedback.evaluate_rewards([reward("seen", lambda samples: [0.0] * len(samples), "image")], data)


def _config(path: str, *overrides: str):
    return load_config({"trainer": "fit", "steps": 40, "data": {"paths": [path]}}, overrides)


def test_a_fit_is_measured_on_what_it_held_out(tmp_path):
    path = store(tmp_path / "f.db", thumbs(ITEMS, QUALITY, users=12) + pairs(ITEMS, QUALITY))
    own = _config(path)
    result = fit_reward(own, tmp_path / "run")
    from rewards import get_reward

    fitted = get_reward("fitted", path=str(tmp_path / "run"))
    for given in (None, path):
        data, part = on_feedback.feedback_for_fit(own, result.card, given)
        found = on_feedback.evaluate_rewards([fitted], data, probed=False)["rewards"][0]
        assert part == "the rows that the fit held out" and found["thumbs"]["calibration"] == "its own"
        for kind, measures in result.card["heldout"].items():
            for name, value in measures.items():
                parts = (
                    zip(found[kind][name], value, strict=True)
                    if isinstance(value, list)
                    else [(found[kind][name], value)]
                )
                for now, then in parts:
                    assert now == pytest.approx(then, abs=1e-6), (kind, name)
    other = store(tmp_path / "g.db", thumbs(ITEMS, QUALITY, users=3, seed=9))
    data, part = on_feedback.feedback_for_fit(own, result.card, other)
    assert part == "all rows" and len(data.rows) == 180
    (tmp_path / "grown").mkdir()
    grown = store(tmp_path / "grown" / "f.db", thumbs(ITEMS, QUALITY, users=14) + pairs(ITEMS, QUALITY))
    data, part = on_feedback.feedback_for_fit(own, result.card, grown)
    first, _ = on_feedback.feedback_for_fit(own, result.card)
    assert part == "the held-out part of a file that changed since the fit"
    prompts = {data.items[name].prompt for row in data.rows for name in row.items}
    assert prompts == {first.items[name].prompt for row in first.rows for name in row.items}
    with pytest.raises(ConfigError, match="as the fit read them"):
        on_feedback.feedback_for_fit(own, result.card, None, {"key": "love"})
    with Store.open(path) as opened:
        opened.add(ITEMS, thumbs(ITEMS, QUALITY, users=1, seed=20))
    with pytest.raises(DataError, match="changed since"):
        on_feedback.feedback_for_fit(own, result.card)


def test_images_are_scored_from_their_folder_and_bad_ones_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):
        ink = rng.random()
        pixels = np.full((16, 16, 3), int(200 * ink), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"made/{i}.png")
        rows.append(
            {"prompt": f"a handwritten {'two' if i % 2 else 'six'}", "response": f"{i}.png", "label": bool(ink > 0.5)}
        )
    (tmp_path / "made/3.png").write_bytes(b"no image")
    write_rows(tmp_path / "thumbs.jsonl", rows)
    call = [
        "evaluate",
        "--reward",
        "digits/raw_ink",
        "--data",
        "thumbs.jsonl",
        "--images",
        "made",
        "--json",
        "found.json",
    ]
    assert main(call) == 0
    shown = capsys.readouterr()
    assert "AUROC 1.000" in shown.out and "1 outputs have no score" in shown.err
    found = json.loads(Path("found.json").read_text())["rewards"][0]
    assert found["scored"] == 39 and found["thumbs"]["without_score"] == 1
    assert found["probes"]["brightness"]["x0.8"] < 0 < found["probes"]["brightness"]["x1.25"]
    assert found["probes"]["prompts"]["changed"] == 0
    page = Path("evaluation.html").read_text()
    assert "does not read the prompt" in page and "an image that cannot be read" in page
    (tmp_path / "made/4.png").unlink()
    assert main(call) == 2 and "1 of 40 are missing" in capsys.readouterr().err


def test_the_verb_compares_fits_under_both_protocols(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, said in (("rated", ratings(ITEMS, QUALITY)), ("paired", pairs(ITEMS, QUALITY))):
        fit_reward(_config(store(tmp_path / f"{name}.db", said), f"name={name}"), tmp_path / "runs" / name)
    store(tmp_path / "new.db", ratings(ITEMS, QUALITY, seed=8) + pairs(ITEMS, QUALITY, seed=9))
    Path("rewards.yaml").write_text("rewards: [{name: fitted, args: {path: runs/paired}}]\n")
    call = ["evaluate", "runs/rated", "--config", "rewards.yaml", "--data", "new.db"]
    assert main([*call, "--dry-run"]) == 0 and not Path("evaluation.html").exists()
    assert "fitted runs/rated, fitted runs/paired" in capsys.readouterr().out
    assert main([*call, "--out", "both.html", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    table = found["under_both_protocols"]["table"]
    assert set(table) == {"rated", "paired"} and all(m["ci"][0] > 0.5 for row in table.values() for m in row.values())
    page = Path("both.html").read_text()
    assert "interaction" in page and not re.search(r"nan|None|Undefined", page)
    away = "rewards: [{name: fitted, args: {placement: remote, url: 'http://127.0.0.1:9'}}]\n"
    Path("away.yaml").write_text(away)
    assert main(["evaluate", "--config", "away.yaml", "--data", "new.db", "--dry-run"]) == 0
    for wrong, said in (
        (["evaluate"], "Nothing is named"),
        (["evaluate", "--config", "away.yaml"], "on the machine that serves it. Give --data FILE"),
        (["evaluate", "--reward", "jpeg"], "--data FILE"),
        ([*call, "--steps", "3"], "--steps"),
        ([*call, "--seed", "0"], "--seed"),
        ([*call, "--prompts", "p.txt"], "--prompts"),
        (["evaluate", "digits", "--key", "love"], "digits is a model, and no reward (--key)"),
        (["evaluate", "runs/rated", "--data", "none.db"], "no such feedback"),
        ([*call, "--key", "nothing"], "nothing to fit"),
    ):
        code = main(wrong)
        err = capsys.readouterr().err
        assert code == 2 and said in err, err


def test_probabilities_of_scores_are_those_of_the_other_half():
    rng = np.random.default_rng(0)
    score = rng.normal(size=600)
    rows = [
        Observation("thumb", (str(i),), float(rng.random() < 1 / (1 + np.exp(-2 * s))), f"p{i % 60}")
        for i, s in enumerate(score)
    ]
    found = on_feedback.by_protocol(rows, {str(i): 1000 - 5 * s for i, s in enumerate(score)})["thumbs"]
    assert found["auroc"] < 0.3 and found["calibration"] == "fitted on the other half"
    assert found["brier"] < found["brier_of_base_rate"] and found["debiased_ece"] < 0.08


def test_scoring_outputs_asks_a_reward_once_each():
    asked: list[int] = []
    items = {item.id: item for item in ITEMS}
    counts = reward("counts", lambda samples: asked.append(len(samples)) or torch.arange(len(samples)).float())
    (found,) = on_feedback.score_outputs(counts, items)
    assert sum(asked) == len(items) == len(found.value)
