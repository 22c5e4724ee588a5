"""The whole loop, small: through the real page, endpoint, store, fit, training and judges."""

from __future__ import annotations

import json

import numpy as np
import pytest

from align.cli import main
from align.commands.demo import Demo, _answer, _go_on
from align.errors import DataError
from align.feedback.crowd import Visitor, served
from align.feedback.store import Store

SMALL = [
    "--users", "40", "--each", "4", "model.path=digits/smoke", "model.lora.rank=4", "steps=2", "prompts_per_step=4",
    "group_size=4", "sampler.solver_steps=4", "evaluation.solver_steps=6", "evaluation.every=1", "evaluation.samples=20",
    "evaluation.final_samples=40", "checkpoint.every=0", "tracking.samples_every=0", "monitor.action=warn",
]  # fmt: skip


def test_what_pleases_more_is_rated_higher_and_chosen():
    rng = np.random.default_rng(0)
    ratings = [int(_answer("rating", [x], 0.0, rng)["d0"]) for x in (-9.0, 0.0, 9.0)]
    assert ratings[0] == 1 and ratings[2] == 7 and 2 <= ratings[1] <= 6
    assert _answer("pairwise", [9.0, -9.0], 0.0, rng) == {"choice": "a"}
    assert _answer("ranking", [0.0, 40.0, -40.0], 0.0, rng) == {"r0": "2", "r1": "1", "r2": "3"}
    # Davidson at no gap: the tie has 0.6 of 2.6
    ties = sum(_answer("pairwise", [0.0, 0.0], 0.0, rng)["choice"] == "tie" for _ in range(4000))
    assert ties / 4000 == pytest.approx(0.6 / 2.6, abs=0.03)


def test_a_folder_that_holds_something_else_stays_as_it_is(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    for more in ([], ["--overwrite"], ["--dry-run"]):
        assert main(["demo", "--out", str(tmp_path), *more]) == 2
    assert "holds no demo" in capsys.readouterr().err and (tmp_path / "mine.txt").read_text() == "keep"
    assert main(["demo", "--out", str(tmp_path / "new"), "--dry-run"]) == 0 and not (tmp_path / "new").exists()


def test_a_visitor_is_told_when_the_page_refuses(tmp_path):
    (tmp_path / "task.yaml").write_text("{name: t, kind: rating, data: rows.jsonl, annotators_per_item: 2}")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": "d"}\n')
    with served(tmp_path / "task.yaml", tmp_path / "s.db") as address:
        visitor = Visitor(address, "ana")
        assert visitor.screen() == [], "a text is no medium to look at"
        with pytest.raises(DataError, match="POST /answer"):
            visitor.answer(d0="9")
        visitor.answer(d0="6")
        visitor.answer(d0="1")  # of a screen that was not looked at: it counts for nothing
        visitor.leave()
        scripted = Visitor(address, "bob", scripts=True)
        scripted.screen()
        for value in "53":  # the second screen came with the first answer
            scripted.answer(d0=value)
        scripted.leave()
    with Store.open(tmp_path / "s.db") as store:
        assert [event.value for event in store.current() if event.kind == "ordinal"] == [6, 5, 3]


def test_a_chapter_that_was_stopped_is_told_again(tmp_path, monkeypatch):
    def begin():
        return Demo(tmp_path, seed=0, users=1, images=1, overrides=[], say=lambda text: None)

    story = begin()
    monkeypatch.setattr(story, "collect", lambda: _go_on("stopped"))
    with pytest.raises(KeyboardInterrupt):
        story.tell()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(story, "collect", lambda: {"thumbs": 7})
    monkeypatch.setattr(story, "audit", lambda: _go_on("stopped"))
    with pytest.raises(KeyboardInterrupt):
        story.tell()
    assert [path.name for path in tmp_path.iterdir()] == ["story.json"]
    again = begin()
    monkeypatch.setattr(again, "collect", lambda: pytest.fail("it was told"))
    monkeypatch.setattr(again, "audit", lambda: {"heard": again.found["thumbs"]})
    monkeypatch.setattr(again, "fit", lambda: _go_on("stopped"))
    with pytest.raises(KeyboardInterrupt):
        again.tell()
    assert (again.found["heard"], json.loads((tmp_path / "story.json").read_text())["chapters"]) == (7, 2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_tells_its_story_and_goes_on_where_it_was(tmp_path, capsys):
    """Every part once, on a half-trained model; whether the taste rises at that size is not asked."""
    folder = tmp_path / "demo"
    assert main(["demo", "--out", str(folder), *SMALL]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    story = json.loads((folder / "story.json").read_text())
    assert summary["heldout_gain"]["n"] == summary["taste_gain"]["n"] == 40 and summary["cpu_seconds"] > 0
    with Store.open(folder / "feedback.db", create=False) as store:
        kinds = [event.kind for event in store.current()]
    assert kinds.count("binary") == story["thumbs"] and kinds.count("ordinal") == 3 * 40
    assert kinds.count("ranking") == 2 * 10 and story["shown"] == 40 * 40
    rewards = json.loads((folder / "run" / "run.json").read_text())["rewards"]
    assert [reward["name"] for reward in rewards] == ["fitted", "digits/legibility"], "the taste itself is no reward"
    page = (folder / "report.html").read_text()
    for target in ("feedback.html", "reward/report.html", "jury/report.html", "run/report.html", "run/sparsity.json"):
        assert f'href="{target}"' in page and (folder / target).is_file()
    kept = (folder / "feedback.db").stat().st_mtime_ns
    (folder / "story.json").write_text(json.dumps({**story, "chapters": 4}))
    assert main(["demo", "--out", str(folder), *SMALL]) == 0
    assert (folder / "feedback.db").stat().st_mtime_ns == kept, "nobody is asked twice"
    assert main(["demo", "--out", str(folder), "--seed", "1", *SMALL]) == 2
