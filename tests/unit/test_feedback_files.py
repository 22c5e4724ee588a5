"""`align feedback import, export, convert, stats`: a newcomer's path, and one sentence for each mistake."""

from __future__ import annotations

import csv
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


def test_every_form_that_a_table_can_hold_is_written_as_csv(capsys):
    Path("all.jsonl").write_text(
        '{"prompt": "q", "response": "a, b", "label": true, "annotator": "x"}\n'
        '{"prompt": "q", "response": "c", "label": false, "annotator": "x"}\n'
        '{"prompt": "q", "response_a": "a, b", "response_b": "c", "preference": "a"}\n'
        '{"prompt": "q", "responses": ["a, b", "c", "d"], "ranks": [1, 2, 3]}\n'
    )
    run(capsys, "import", "a.db", "all.jsonl")
    made = {
        **{f"to-{form}": ("convert", "--to", form) for form in ("pairs", "unpaired", "scores")},
        **{f"as-{form}": ("export", "--as", form) for form in ("events", "preference", "unpaired")},
    }
    for name, (verb, flag, form) in made.items():
        for path in (f"{name}.csv", f"{name}.jsonl"):
            code, _, err = run(capsys, verb, "a.db", path, flag, form)
            assert code == 0, err
        with Path(f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        whole = [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == len(whole) > 0
        if form != "events":
            assert [row["events"].split(" ") for row in rows] == [row["events"] for row in whole]
            assert [row["prompt"] for row in rows] == [row["prompt"] for row in whole]
    assert run(capsys, "export", "a.db", "plain.csv", "--as", "plain", "--kind", "binary,pairwise")[0] == 0
    assert "found a list, ['a, b', 'c', 'd']" in run(capsys, "export", "a.db", "p.csv", "--as", "plain")[2]
    for arguments in (("export", "a.db", "r.csv", "--as", "ranking"), ("convert", "a.db", "r.csv", "--to", "rankings")):
        code, _, err = run(capsys, *arguments)
        assert code == 2 and "CSV holds texts and numbers (r.csv:2:completions): found a list" in err
    code, _, err = run(capsys, "export", "a.db", "c.csv", "--as", "unpaired", "--chat")
    assert code == 2 and "(c.csv:2:prompt): found a chat" in err and "Name a .jsonl or .parquet file" in err


def test_each_verb_says_its_own_policies_for_duplicates_and_takes_no_other(capsys):
    Path("t.csv").write_text("prompt,response,label,annotator\nq,a,1,x\nq,a,0,x\nq,b,0,x\n")
    assert "say --duplicates first, last, all." in run(capsys, "import", "f.db", "t.csv")[2]
    assert "say --duplicates first, last, mean." in run(capsys, "convert", "t.csv", "k.jsonl", "--to", "unpaired")[2]
    code, _, err = run(capsys, "import", "f.db", "t.csv", "--duplicates", "mean")
    assert code == 2 and "mean" in err and "refuse" in err and not Path("f.db").exists()
    code, _, err = run(capsys, "convert", "t.csv", "k.jsonl", "--to", "unpaired", "--duplicates", "all")
    assert code == 2 and "all" in err and not Path("k.jsonl").exists()
    for policy, count in (("first", 2), ("last", 2), ("mean", 1)):
        found = run(
            capsys, "convert", "t.csv", f"{policy}.jsonl", "--to", "unpaired", "--one-class", "--duplicates", policy,
            "--json", "-",
        )  # fmt: skip
        assert json.loads(found[1])["rows"] == count


def test_a_failed_import_makes_no_store(capsys):
    Path("bad.csv").write_text("prompt,response,label\nq,a,maybe\n")
    Path("good.csv").write_text("prompt,response,label\nq,a,1\n")
    assert run(capsys, "import", "f.db", "bad.csv")[0] == 2 and not list(Path().glob("f.db*"))
    assert run(capsys, "import", "f.db", "good.csv", "bad.csv")[0] == 2 and not list(Path().glob("f.db*"))
    assert run(capsys, "import", "f.db", "good.csv")[0] == 0 and Path("f.db").exists()


def test_nothing_of_a_shape_names_the_conversion(capsys):
    run(capsys, "import", "f.db", "ratings.csv", *HOW)
    for shape, form in (("unpaired", "unpaired"), ("preference", "pairs"), ("ranking", "rankings")):
        code, _, err = run(capsys, "export", "f.db", "o.jsonl", "--as", shape)
        assert code == 2 and "4 of kind ordinal" in err and f"`align feedback convert --to {form}`" in err
    assert "at the filters" in run(capsys, "export", "f.db", "o.jsonl", "--as", "unpaired", "--kind", "text")[2]


def test_a_file_without_a_header_is_told_of_the_columns_option(capsys):
    Path("r.csv").write_text("p1,,x,5\np1,,y,3\n")
    Path("full.csv").write_text("p1,in,x,5\np1,in,y,3\n")
    assert "--columns prompt,response,rating" in run(capsys, "import", "f.db", "r.csv", "--scale", "1-7")[2]
    assert "--columns prompt,response,rating" in run(capsys, "import", "f.db", "full.csv", "--scale", "1-7")[2]
    code, _, err = run(capsys, "consistency", "--ratings", "r.csv", "--rankings", "r.csv")
    assert code == 2 and "Choose one of: 5, p1, x." in err and "--ratings-columns" in err


def test_win_rates_of_imported_policies(capsys):
    for word in ("model", "policy"):
        Path("r.csv").write_text(f"prompt,response,rating,{word}\nq,a,6,new\nq,b,2,old\n")
        Path("k.csv").write_text(f"prompt,response_a,response_b,preference,{word}_a,{word}_b,x\np,c,d,b,old,new,1\n")
        assert run(capsys, "import", f"{word}.db", "r.csv", "--scale", "1-7")[0] == 0
        found = json.loads(run(capsys, "import", f"{word}.db", "k.csv", "--json", "-")[1])
        assert found["files"][0]["ignored_columns"] == ["x"]
        verb = ("winrate", f"{word}.db", "--candidate", "new", "--baseline", "old", "--json", "-")
        found = json.loads(run(capsys, *verb)[1])
        assert found["ratings"]["win"] == found["rankings"]["win"] == 1
        with Store.open(f"{word}.db") as store:
            made = {item.response: item.metadata for item in store.items().values()}
        assert made == {r: {word: m} for r, m in (("a", "new"), ("b", "old"), ("c", "old"), ("d", "new"))}
    run(capsys, "import", "none.db", "ratings.csv", *HOW)
    assert "`model` or `policy`" in run(capsys, "winrate", "none.db")[1]


def test_an_audit_says_what_is_missing(capsys):
    Path("t.csv").write_text("prompt,response,label\nq,a,1\nq,b,0\n")
    run(capsys, "import", "f.db", "t.csv")
    code, out, _ = run(capsys, "audit", "f.db")
    assert code == 0 and "no exposures" in out and "no annotators" in out and "nothing to report" not in out
    assert "annotators" in out and "flagged 0, answers 2" in out
    for source in ("f.db", "t.csv"):
        code, _, err = run(capsys, "audit", source, "--key", "nope")
        assert code == 2 and f"Nothing has the key 'nope' ({source}): the keys are quality" in err


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
