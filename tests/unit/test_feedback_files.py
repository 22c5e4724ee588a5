"""`align feedback import, export, convert, stats`: a newcomer's path, and one sentence for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.cli import main
from align.feedback.commands.store import EXAMPLES
from align.feedback.events import FeedbackEvent
from align.feedback.store import Store

RATINGS = "q1,,good,6.0,ann\nq1,,bad,2,ann\nq1,,fine,4,ann\nq2,in,only,5,bob\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ratings.csv").write_text(RATINGS, encoding="utf-8")
    return tmp_path


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["feedback", *arguments])
    return code, *capsys.readouterr()


HOW = ("--scale", "1-7", "--columns", "prompt,input,response,rating,annotator")


def test_from_ratings_to_pairs_and_thumbs(capsys, folder: Path):
    code, out, _ = run(capsys, "import", "f.db", "ratings.csv", *HOW, "--json", "i.json")
    assert code == 0 and json.loads(Path("i.json").read_text())["files"][0]["statuses"] == {"added": 4}
    assert "items" in out and "unchanged" in run(capsys, "import", "f.db", "ratings.csv", *HOW)[1]
    code, out, _ = run(capsys, "stats", "f.db", "--check", "--json", "-")
    found = json.loads(out)
    assert (found["items"], found["events"], found["log"], found["annotators"], found["checked"]) == (4, 4, 4, 2, True)
    assert found["kinds"] == {"ordinal": 4} and found["bytes"] > 10_000
    code, out, _ = run(capsys, "convert", "f.db", "pairs.jsonl", "--to", "pairs", "--json", "-")
    assert json.loads(out)["losses"] == {"seen": 4, "used": 3, "ratings alone under their prompt": 1}
    pairs = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    margins = {("good", "bad"): 4.0, ("good", "fine"): 2.0, ("fine", "bad"): 2.0}
    assert {(p["chosen"], p["rejected"]): p["margin"] for p in pairs} == margins
    with Store.open("f.db") as store:
        assert {i for p in pairs for i in p["events"]} == {e.id for e in store.current(annotator="ann")}
    code, out, _ = run(capsys, "convert", "ratings.csv", "thumbs.jsonl", "--to", "unpaired", *HOW, "--json", "-")
    assert json.loads(out)["up"] == 2 and json.loads(out)["down"] == 1
    thumbs = [json.loads(line) for line in Path("thumbs.jsonl").read_text().splitlines()]
    assert {(t["prompt"], t["completion"], t["label"]) for t in thumbs} == {
        ("q1", "good", True), ("q1", "bad", False), ("q2\n\nin", "only", True),
    }  # fmt: skip
    for form, count in (("scores", 4), ("rankings", 1)):
        assert (
            json.loads(run(capsys, "convert", "f.db", f"{form}.jsonl", "--to", form, "--json", "-")[1])["rows"] == count
        )


def test_a_bad_row_refuses_the_file_or_is_put_aside(capsys):
    Path("t.csv").write_text("prompt,response,label\nq,a,1\nq,b,maybe\n")
    code, _, err = run(capsys, "import", "f.db", "t.csv")
    assert code == 2 and err.startswith("align: A cell cannot be read (t.csv:3:label): expected true or false")
    code, out, _ = run(capsys, "import", "f.db", "t.csv", "--keep-going")
    aside = [json.loads(line) for line in Path("t.csv.refused.jsonl").read_text().splitlines()]
    assert (
        code == 0
        and "refused       1" in out
        and [(a["where"], a["row"]["label"]) for a in aside] == [("t.csv:3", "maybe")]
    )


def test_a_dry_run_reads_and_writes_nothing(capsys):
    code, out, _ = run(capsys, "import", "f.db", "ratings.csv", *HOW, "--dry-run", "--json", "-")
    assert code == 0 and json.loads(out)["files"][0]["events"] == 4 and not Path("f.db").exists()


def test_filters_of_exports(capsys):
    run(capsys, "import", "f.db", "ratings.csv", *HOW)
    assert json.loads(run(capsys, "export", "f.db", "a.jsonl", "--annotator", "ann,cid", "--json", "-")[1])["rows"] == 3
    assert run(capsys, "export", "f.db", "b.jsonl", "--since", "2100-01-01")[0] == 2
    assert "Did you mean 'ordinal'?" in run(capsys, "export", "f.db", "c.jsonl", "--kind", "ordinals")[2]


def test_one_sided_thumbs_are_refused_with_what_is_missing(capsys):
    Path("t.csv").write_text("prompt,response,label\nq,a,1\nq,b,up\n")
    code, _, err = run(capsys, "convert", "t.csv", "k.jsonl", "--to", "unpaired")
    assert code == 2 and "There are only thumbs up (t.csv): 2 of them, and none down" in err
    assert run(capsys, "convert", "t.csv", "k.jsonl", "--to", "unpaired", "--one-class")[0] == 0


def test_tombstones_are_counted(capsys):
    run(capsys, "import", "f.db", "ratings.csv", *HOW)
    with Store.open("f.db") as store:
        event = next(store.current())
        store.add(events=[FeedbackEvent("ordinal", event.items, tombstone=True, annotator="ann")])
    found = json.loads(run(capsys, "stats", "f.db", "--json", "-")[1])
    assert (found["events"], found["tombstones"], found["superseded"], found["log"]) == (3, 1, 1, 5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("stats", "none.db"), "There is no such feedback store (none.db)"),
        (("import", "f.db", "none.csv"), "There is no such file (none.csv)"),
        (("import", "ratings.csv", "ratings.csv", *HOW), "This is no feedback store (ratings.csv)"),
        (("import", "f.db", "ratings.csv", "--scale", "wide"), "A scale cannot be read (--scale wide)"),
        (("import", "f.db", "ratings.csv", "--columns", "prompt=a,b"), "A column map is one of two things"),
        (("import", "f.db", "ratings.csv", "--columns", "promt=a"), "Did you mean 'prompt'?"),
        (("import", "f.db", "ratings.csv", "--format", "trl"), "Unknown choice 'trl' for layout"),
        (("export", "f.db", "out.xyz", "--since", "soon"), "A time cannot be read (--since soon)"),
    ],
)
def test_mistakes(capsys, arguments: tuple[str, ...], sentence: str):
    code, _, err = run(capsys, *arguments)
    assert code == 2 and sentence in err


@pytest.mark.parametrize("verb", EXAMPLES)
def test_help_has_examples_that_parse(capsys, verb: str):
    import shlex

    from align.cli import _parse

    code, out, _ = run(capsys, verb, "--help")
    assert code == 0 and f"examples:\n  align feedback {verb}" in out
    for example in EXAMPLES[verb]:
        assert _parse(shlex.split(example)[1:]).run
