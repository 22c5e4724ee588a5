"""`align select`: candidates read and scored, rows mined that the trainers read, what goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from align.cli import main
from align.config import CombineConfig, PanelConfig, RewardConfig, load_panel
from align.errors import ConfigError, DataError, RewardError
from align.image_feedback import load_image_feedback
from align.offline_checks import is_image_feedback_file
from align.preferences import load_preferences
from align.tracking import read_jsonl
from align.types import Samples, Scores
from rewards.base import RewardCard
from rewards.compose import combine
from rewards.panel import Panel
from rewards.scoring import score_files
from tests.people import write_rows
from trainers import sample_completions
from trainers.best_of import Rule, combined
from trainers.candidates import read_candidates
from trainers.selection import Mining, panel_of, select

HERE = "tests.unit.test_selection"
CALLS: list[str] = []


def vowels(samples):
    """Vowels in an answer; none of one that says no."""
    CALLS.extend(samples.prompts)
    said = [t if isinstance(t, str) else t[-1]["content"] for t in samples.texts]
    return [None if "no" in t.split() else float(sum(c in "aeiou" for c in t)) for t in said]


def short(samples):
    """Minus the length."""
    return [-float(len(t if isinstance(t, str) else t[-1]["content"])) for t in samples.texts]


def bright(samples):
    """Mean pixel."""
    return [float(image.mean()) for image in samples.images]


def answers(folder: Path, prompts: int = 6, each: int = 5, chat: bool = False) -> Path:
    """Answers with 0, 1, 2, ... vowels in an order that differs from prompt to prompt."""
    rows = []
    for p in range(prompts):
        for r in range(each):
            text, prompt = "a" * ((r + p) % each) + "x", f"question {p}"
            if chat:
                prompt = [{"role": "system", "content": "be kind"}, {"role": "user", "content": prompt}]
                text = [{"role": "assistant", "content": text}]
            rows.append({"prompt": prompt, "completion": text, "member": r, "policy": "step 4"})
    return write_rows(folder / "candidates.jsonl", rows)


def panel(*rewards: str, judges: tuple[str, ...] = (), **combine_) -> PanelConfig:
    named = [tuple(RewardConfig(name=f"{HERE}:{n}") for n in names) for names in (rewards, judges)]
    return PanelConfig(rewards=named[0], heldout_rewards=named[1], combine=CombineConfig(**combine_))


def rows_of(path: Path) -> list[dict]:
    return read_jsonl(path)[0]


# --- texts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
def test_the_best_answers_and_rows_that_trainers_read(tmp_path, chat):
    candidates = read_candidates(answers(tmp_path, chat=chat))
    found = select(
        candidates, tmp_path / "out", panel=panel("vowels", judges=("short",)),
        mining=Mining(pairs="best-worst", up_from=3, down_to=1),
    )  # fmt: skip
    best = "aaaax"
    chosen = rows_of(tmp_path / "out" / "selected.jsonl")
    said = [row["completion"][0]["content"] if chat else row["completion"] for row in chosen]
    assert said == [best] * 6 and [row["score"] for row in chosen] == [4.0] * 6
    assert found["selected"] == 6 and found["missing"] == 0 and found["policies"] == ["step 4"]
    assert found["kl"] == {"bound": True, "nats": pytest.approx(np.log(5) - 0.8)}
    assert found["mean"]["score"]["candidates"]["mean"] == 2 and found["mean"]["short"]["selected"]["mean"] == -5
    assert found["curve"]["judges"]["short"]["over_optimised"], "longer is worse to the judge"

    pairs = load_preferences(tmp_path / "out" / "pairs.jsonl")
    assert pairs.counts() == {"up": 6, "down": 6, "unlabelled": 0, "scored": 0, "pairs": 6}
    prompt = candidates.rows[0].prompt
    assert pairs.rows[0].prompt == (tuple(prompt) if chat else prompt)
    row = rows_of(tmp_path / "out" / "pairs.jsonl")[0]
    assert list(row) == ["prompt", "chosen", "rejected", "margin"] and row["margin"] == 4
    thumbs = load_preferences(tmp_path / "out" / "thumbs.jsonl").require_both_classes().counts()
    assert (thumbs["up"], thumbs["down"]) == (12, 12) and found["thumbs"]["between"] == 6
    assert load_preferences(tmp_path / "out" / "selected.jsonl").counts()["scored"] == 6


def test_a_missing_score_is_neither_best_nor_worst(tmp_path):
    rows = [{"prompt": "p", "completion": c} for c in ("no aaaaaa", "a", "aa", "x")]
    rows += [{"prompt": "q", "completion": c} for c in ("no", "no no")]
    candidates = read_candidates(write_rows(tmp_path / "c.jsonl", rows))
    with pytest.raises(RewardError, match="vowels is missing for 3 of 6, 10% may be"):
        select(candidates, tmp_path / "out", panel=panel("vowels"))
    found = select(
        candidates, tmp_path / "out", panel=panel("vowels", max_fail_frac=0.6), mining=Mining(pairs="best-worst")
    )
    assert found["missing"] == 3 and found["prompts_without_scores"] == 1 and found["prompts_with_none"] == 1
    assert [r["completion"] for r in rows_of(tmp_path / "out" / "selected.jsonl")] == ["aa"]
    assert found["errors"] and "vowels" in found["errors"][0]


def test_an_empty_answer_makes_no_pair_for_trainers_refuse_it(tmp_path):
    rows = [{"prompt": p, "completion": c} for p in "pq" for c in ("aa", "" if p == "p" else "x")]
    candidates = read_candidates(write_rows(tmp_path / "c.jsonl", rows))
    found = select(candidates, tmp_path / "out", panel=panel("vowels"), mining=Mining(pairs="best-worst"))
    assert found["pairs"]["left_out"] == {"with an empty answer": 1}
    assert load_preferences(tmp_path / "out" / "pairs.jsonl").counts()["pairs"] == 1


def test_one_sided_thumbs_and_pairs_that_are_all_ties_are_refused(tmp_path):
    candidates = read_candidates(answers(tmp_path))
    with pytest.raises(DataError, match="no thumb up.*half above 2"):
        select(candidates, tmp_path / "out", panel=panel("vowels"), mining=Mining(up_from=50))
    with pytest.raises(DataError, match="No pair was found.*6 margins too small"):
        select(candidates, tmp_path / "out", panel=panel("vowels"), mining=Mining(pairs="best-worst", margin=9))
    with pytest.raises(DataError, match="Nothing was selected.*highest is 4"):
        select(candidates, tmp_path / "out", panel=panel("vowels"), rule=Rule(threshold=5))
    assert not (tmp_path / "out" / "selected.jsonl").exists()


def test_what_was_scored_is_kept(tmp_path):
    candidates = read_candidates(answers(tmp_path))
    CALLS.clear()
    first = select(candidates, tmp_path / "out", panel=panel("vowels"))
    assert len(CALLS) == 30
    journal = tmp_path / "out" / "scores.jsonl.journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])  # as a kill leaves it
    (tmp_path / "out" / "selected.jsonl").unlink()
    assert select(candidates, tmp_path / "out", panel=panel("vowels")) == first
    assert len(CALLS) == 31 and (tmp_path / "out" / "selected.jsonl").exists()
    select(candidates, tmp_path / "out", panel=panel("vowels"), overwrite=True)
    assert len(CALLS) == 61


# --- tables of scores -------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_table_of_scores_is_ranked_as_it_is(tmp_path, ending):
    table = tmp_path / f"scores.{ending}"
    score_files([f"{HERE}:vowels", f"{HERE}:short"], table, prompts=answers(tmp_path))
    candidates = read_candidates(table)
    with pytest.raises(ConfigError, match="vowels, short.*--by"):
        select(candidates, tmp_path / "out")
    found = select(candidates, tmp_path / "out", by="vowels", judges=["short"], mining=Mining(pairs="all", margin=3))
    assert found["mean"]["score"]["selected"]["mean"] == 4 and found["pairs"]["n"] == 6
    assert select(candidates, tmp_path / "out", judges=["short"])["by"] == "vowels"
    with pytest.raises(ConfigError, match="no score 'shrt'.*short"):
        select(candidates, tmp_path / "out", by="vowels", judges=["shrt"])
    with pytest.raises(ConfigError, match="nothing to rank"):
        select(read_candidates(answers(tmp_path)), tmp_path / "out")


def test_a_table_of_conversations_is_refused_for_its_answers_cannot_be_told(tmp_path):
    select(read_candidates(answers(tmp_path, chat=True)), tmp_path / "out", panel=panel("vowels"))
    with pytest.raises(DataError, match="conversations.*row 1"):
        read_candidates(tmp_path / "out" / "scores.jsonl")


# --- images -----------------------------------------------------------------------------------------


def images(folder: Path) -> Path:
    (folder / "made").mkdir(parents=True)
    rows = []
    for i in range(8):
        Image.new("RGB", (8, 8), (30 * i,) * 3).save(folder / "made" / f"{i}.png")
        rows.append({"image": f"{i}.png", "prompt": f"prompt {i // 4}", "member": i % 4})
    return write_rows(folder / "made" / "samples.jsonl", rows).parent


def test_images_become_rows_of_the_offline_trainer(tmp_path):
    candidates = read_candidates(images(tmp_path))
    out = tmp_path / "deep" / "out"
    found = select(candidates, out, panel=panel("bright"), mining=Mining(pairs="best-worst", up_from=0.3))
    chosen = rows_of(out / "selected.jsonl")
    assert [row["image"] for row in chosen] == ["../../made/3.png", "../../made/7.png"] and found["kind"] == "images"
    thumbs = load_image_feedback(out / "thumbs.jsonl").for_loss("kto")
    assert thumbs.counts() == {"up": 5, "down": 3, "pairs": 0}
    pairs = load_image_feedback(out / "pairs.jsonl").for_loss("dpo")
    assert pairs.counts()["pairs"] == 2
    assert is_image_feedback_file(out / "pairs.jsonl") and is_image_feedback_file(out / "thumbs.jsonl")
    assert pairs.rows[0].images[0].pixels().mean() == 90 and pairs.rows[0].images[1].pixels().mean() == 0


def test_images_of_a_table_that_are_gone_are_missing(tmp_path):
    folder = images(tmp_path)
    score_files([f"{HERE}:bright"], tmp_path / "s.csv", prompts=folder / "samples.jsonl", images=folder)
    (folder / "7.png").unlink()
    found = select(read_candidates(tmp_path / "s.csv"), tmp_path / "out")
    assert found["missing"] == 1 and "not there" in found["errors"][0]
    assert [Path(r["image"]).name for r in rows_of(tmp_path / "out" / "selected.jsonl")] == ["3.png", "6.png"]


# --- several rewards --------------------------------------------------------------------------------


class Two:
    """Two components that say different things, the second missing where the prompt says so."""

    names = ("one", "two")
    card = RewardCard("two", "two", "any", "text")

    def identity(self):
        return "two"

    def score(self, samples):
        values = np.array([[float(t), -100 * float(t) ** 2] for t in samples.texts])
        valid = np.array([[True, p != "half"] for p in samples.prompts])
        return Scores(values, valid, self.names)


def test_a_panel_ranks_as_training_would_and_short_prompts_change_nothing():
    texts, prompts = ["1", "2", "4", "3", "9", "5", "1"], ["a", "a", "a", "b", "b", "c", "half"]
    group = [0, 0, 0, 1, 1, 2, 3]
    scores = Two().score(Samples(prompts, texts=texts))
    both = Panel([Two()], [1.0], [RewardConfig(name="two", components={"one": 1.0, "two": 0.5})])
    found = combined(both, scores, group)

    def z(v):
        v = np.asarray(v, dtype=float)
        return (v - v.mean()) / (v.std(ddof=1) + 1e-4)

    assert found[:3] == pytest.approx(z([1, 2, 4]) + 0.5 * z([-100, -400, -1600]))
    assert found[3:5] == pytest.approx(z([3, 9]) + 0.5 * z([-900, -8100]))
    assert found[5] == 0 and np.isnan(found[6]), "alone: no better than itself; half of it missing: missing"
    summed = Panel([Two()], [1.0], None, CombineConfig(mode="weighted_sum"))
    assert combined(summed, scores, group)[:6] == pytest.approx([-99, -398, -1596, -897, -8091, -2495])
    centred = RewardConfig(name="two", components={"one": 2.0}, transform=({"zscore": {"over": "group"}},))
    one = Panel([Two()], [1.0], [centred])
    alone = combined(one, one.joined([scores]), group)
    assert alone[:3] == pytest.approx(2 * z([1, 2, 4])), "the filling of short prompts enters no statistic"


def test_a_gate_closes_whatever_its_prompt_holds():
    values = np.array([[5.0, 1], [9, 0], [1, 1], [4, 0], [3, 1]])
    both = Scores(values, np.ones_like(values, bool), ("one", "two"))
    configs = [RewardConfig(name="one"), RewardConfig(name="two", role="gate")]

    class Part(Two):
        def __init__(self, name):
            self.names, self.card = (name,), RewardCard(name, name, "any", "text")

    gated = Panel([Part("one"), Part("two")], [1, 1], configs, CombineConfig(mode="gate"))
    assert combined(gated, both, [0, 0, 0, 1, 1]).tolist() == [5, 1, 1, 3, 3]
    assert combine(both, 5, (1, 1), mode="gate", gates=[False, True]).scores.values[1, 0] == 1


def test_rewards_of_a_config_and_names_come_together(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "rewards: [{name: a, weight: 2}]\nheldout_rewards: [{name: j}]\ncombine: {mode: min}\ntrainer: whatever\n"
    )
    found = panel_of(["b"], ["k"], load_panel(tmp_path / "r.yaml"))
    assert [r.name for r in found.rewards] == ["b", "a"] and [r.name for r in found.heldout_rewards] == ["k", "j"]
    assert found.combine.mode == "min" and panel_of([], ["k"], None) is None
    with pytest.raises(ConfigError, match="combine.mode"):
        load_panel({"rewards": [{"name": "a"}], "combine": {"mode": "sum"}})


# --- bad candidates ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no candidate"),
        ([{"prompt": "p"}], "row 1|line 1"),
        ([{"prompt": "p", "completion": None}], "no completion.*line 1, field 'completion'.*is null"),
        (
            [{"prompt": "p", "response": "c"}],
            "the fields are prompt, response. Call the column of answers 'completion'",
        ),
        ([{"completion": "c"}], "no prompt.*line 1"),
        ([{"prompt": "p", "completion": "c"}, {"prompt": "p", "image": "a.png"}], "images and texts.*line 2"),
        ([{"prompt": "p", "video": "a.mp4"}], "a video"),
        ([{"prompt": "p", "image": "a.png", "completion": "c"}], "an image and a completion"),
        ([{"prompt": 3, "image": "a.png"}], "no prompt"),
        ([["p", "c"]], "not an object"),
    ],
)
def test_what_is_no_candidate_is_refused_with_its_place(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read_candidates(write_rows(tmp_path / "c.jsonl", rows))


def test_prompts_that_differ_by_spaces_and_case_are_one(tmp_path):
    rows = [{"prompt": p, "completion": "c"} for p in ("Why?", " why? ", "Who?")]
    assert read_candidates(write_rows(tmp_path / "c.jsonl", rows)).groups() == [0, 0, 1]


# --- the verb ---------------------------------------------------------------------------------------


def test_the_verb_says_and_writes_all_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    answers(tmp_path)
    call = ["select", "candidates.jsonl", "--reward", f"{HERE}:vowels", "--judge", f"{HERE}:short", "--pairs",
            "best-worst", "--up-from", "3", "--out", "best"]  # fmt: skip
    assert main([*call, "--dry-run"]) == 0 and not (tmp_path / "best").exists()
    assert "30 texts" in capsys.readouterr().out
    assert main([*call, "--json", "found.json"]) == 0
    shown = capsys.readouterr()
    assert "30 texts of 6 prompts, ranked by vowels" in shown.out and "short" in shown.out and "100%" in shown.err
    files = json.loads((tmp_path / "found.json").read_text())["files"]
    assert files == {"selected.jsonl": 6, "pairs.jsonl": 6, "thumbs.jsonl": 30}
    page = (tmp_path / "best" / "report.html").read_text()
    assert "short falls from one candidate to the best of 5" in page and "aaaax" in page and "<svg" in page
    for wrong, said in (
        (["--down-to", "1"], "--up-from"),
        (["--margin", "1"], "--pairs"),
        (["--threshold", "nan"], "not a number"),
        (["--reward", "x", "--by", "y"], "--by"),
        (["--best", "2", "--share", "0.5"], "best or share"),
    ):
        assert main(["select", "candidates.jsonl", *wrong]) == 2
        assert said in capsys.readouterr().err
    assert main(["select", "tiny", "--prompts", "candidates.jsonl"]) == 2
    assert "need a reward" in capsys.readouterr().err
    assert main([*call[:6], "--up-from", "3", "--out", "best", "--json", "found.json"]) == 0
    assert "removed" in (said_of_it := capsys.readouterr().out) and "pairs.jsonl of an earlier selection" in said_of_it
    assert json.loads((tmp_path / "found.json").read_text())["removed"] == ["pairs.jsonl"]
    assert not (tmp_path / "best" / "pairs.jsonl").exists() and (tmp_path / "best" / "thumbs.jsonl").exists()


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ("length", "needs low and high. Give args: {low: ..., high: ...} beside its name in a config (--config FILE"),
        ("jpeg", "'jpeg' scores images: the model makes texts"),
        ("{name: length, args: {low: 9, high: 1}}", "low"),
        ("{name: fitted, args: {path: nowhere}}", "nowhere"),
    ],
)
def test_rewards_that_cannot_be_had_are_refused_before_answers_are_drawn(tmp_path, monkeypatch, capsys, rewards, said):
    monkeypatch.setattr(
        "trainers.sample_completions", lambda *_, **__: pytest.fail("answers were drawn"), raising=False
    )
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "p"}])
    (tmp_path / "r.yaml").write_text(f"rewards: [{rewards}]\n")
    named = ["--config", str(tmp_path / "r.yaml")] if rewards[0] == "{" else ["--reward", rewards]
    call = ["select", "tiny", "--prompts", str(tmp_path / "prompts.jsonl"), *named, "--out", str(tmp_path / "out")]
    assert main(call) == 2 and said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_candidates_of_a_language_model_go_on_where_they_stopped(tmp_path):
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": f"Say: {w}\nAnswer:"} for w in ("red bee", "tea", "cow")])
    call = {"count": 4, "max_new_tokens": 6, "seed": 3}
    plain = sample_completions("tiny", prompts, out=tmp_path / "plain.jsonl", **call)
    out, journal = tmp_path / "c.jsonl", tmp_path / "c.jsonl.journal.jsonl"
    assert sample_completions("tiny", prompts, out=out, resume=True, **call) == plain
    kept = journal.read_text().splitlines()
    assert len(kept) == 13
    marked = json.loads(kept[1]) | {"completion": "kept"}
    journal.write_text("\n".join([kept[0], json.dumps(marked), *kept[2:7]]) + '\n{"torn')
    done = []
    again = sample_completions(
        "tiny", prompts, out=out, resume=True, **call, progress=lambda n, total: done.append((n, total))
    )
    assert again[0]["completion"] == "kept" and again[1:] == plain[1:] and done[0][0] > 4 and done[-1] == (12, 12)
    assert rows_of(out) == again and len(journal.read_text().splitlines()) == 13
    other = sample_completions("tiny", prompts, out=out, resume=True, **{**call, "seed": 4})
    assert other[0]["completion"] != "kept", "other draws are other answers"
