"""Ratings against rankings from files and stores, and the traps of files that people write."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from align.cli import main
from align.errors import DataError
from align.feedback.columns import label_cell, number_cell, read_rows, text_cell
from align.feedback.consistency import (
    EQUAL,
    A,
    B,
    consistency,
    join_files,
    read_preference,
)
from align.feedback.events import FeedbackEvent, Item
from align.feedback.overview import overview
from align.feedback.store import Store
from align.feedback.views import joined_of
from align.reports.feedback import write_report

RATING_COLUMNS = ("prompt", "input", "response", "rating")
RANKING_COLUMNS = ("prompt", "input", "response_a", "response_b", "preference")
RATED = {"equal": (4, "4.0"), "a": (6, 3), "b": (2, "5")}
MATRIX = {"equal": (4, 2, 1), "a": (1, 5, 1), "b": (0, 2, 4)}


def rows(words: tuple[str, str, str]) -> tuple[list[list[Any]], list[list[Any]]]:
    """The worked matrix as two tables: texts with commas, quotes and line breaks, and an empty input now and then."""
    ratings, rankings = [], []
    for inferred, counts in MATRIX.items():
        for word, n in zip(words, counts, strict=True):
            for _ in range(n):
                i = len(rankings)
                prompt, given = f'Say "hi", nº {i}\n', "" if i % 2 else "in, put"
                a, b = (f"line one\r\nline two {side} {i}" for side in "ab")
                ratings += [[prompt, given, r, v] for r, v in zip((a, b), RATED[inferred], strict=True)]
                rankings.append([prompt, given, a, b, word])
    return ratings, rankings


def write(path: Path, names: tuple[str, ...], table: list[list[Any]], *, header: bool) -> Path:
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([list(names), *table] if header else table)
    elif path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in table]
        path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    else:
        columns = {name: [str(row[i]) for row in table] for i, name in enumerate(names)}
        parquet.write_table(pyarrow.table(columns), path)
    return path


def run(tmp_path: Path, *more: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    assert main(["feedback", "consistency", *more, "--json", str(out), "--draws", "50"]) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("words", [("equal", "(a)", "(b)"), ("tie", "a", "b"), ("0", "1", "2"), ("0.0", "1.0", "2.0")])
@pytest.mark.parametrize(("ending", "header"), [("csv", True), ("csv", False), ("jsonl", True), ("parquet", True)])
def test_the_worked_matrix_from_files(tmp_path: Path, words: tuple[str, str, str], ending: str, header: bool):
    ratings, rankings = rows(words)
    r = write(tmp_path / f"r.{ending}", RATING_COLUMNS, ratings, header=header)
    k = write(tmp_path / f"k.{ending}", RANKING_COLUMNS, rankings, header=header)
    maps = (
        []
        if header
        else ["--ratings-columns", ",".join(RATING_COLUMNS), "--rankings-columns", ",".join(RANKING_COLUMNS)]
    )
    found = run(tmp_path, "--ratings", str(r), "--rankings", str(k), *maps)
    assert {k: found[k] for k in ("n", "skipped", "consistent", "both_strict", "flips")} == {
        "n": 20, "skipped": 0, "consistent": 13, "both_strict": 12, "flips": 3,
    }  # fmt: skip
    assert found["matrix"] == [list(row) for row in MATRIX.values()]
    assert found["inconsistency"] == pytest.approx(0.35) and found["kappa"] == pytest.approx(0.4736842105, abs=5e-11)
    assert found["ci"] == pytest.approx([0.181192, 0.567146], abs=5e-7)


def csvs(tmp_path: Path, ratings: list[list[Any]], rankings: list[list[Any]]) -> tuple[Path, Path]:
    return (
        write(tmp_path / "r.csv", RATING_COLUMNS, ratings, header=True),
        write(tmp_path / "k.csv", RANKING_COLUMNS, rankings, header=True),
    )


def test_missing_ratings_are_skipped_and_counted(tmp_path: Path):
    ratings = [["p", "", "x", 5], ["p", "", "y", "nan"], ["p", "", "z", ""], ["p", "", "w", 3]]
    rankings = [
        ["p", "", "x", "y", "a"],
        ["p", "", "x", "z", "a"],
        ["p", "", "x", "unrated", "a"],
        ["p", "", "x", "w", "a"],
    ]
    found = consistency(join_files(*csvs(tmp_path, ratings, [*rankings, ["p", "", "w", "x", ""]])))
    assert (found["n"], found["skipped"], found["consistent"]) == (1, 3, 1)
    assert found["notes"]["ratings_missing"] == 2 and found["notes"]["preferences_missing"] == 1


def test_the_input_is_part_of_the_key_and_fields_do_not_run_together(tmp_path: Path):
    ratings = [
        ["p", "one", "x", 7],
        ["p", "one", "y", 1],
        ["p", "two", "x", 1],
        ["p", "two", "y", 7],
        ["pt", "wo", "x", 4],
    ]
    rankings = [["p", "one", "x", "y", "a"], ["p", "two", "x", "y", "b"]]
    found = consistency(join_files(*csvs(tmp_path, ratings, rankings)))
    assert found["matrix"] == [[0, 0, 0], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize(("policy", "cell", "n"), [("first", (A, A), 1), ("last", (B, B), 1), ("mean", (EQUAL, A), 1)])
def test_duplicates(tmp_path: Path, policy: str, cell: tuple[int, int], n: int):
    ratings = [["p", "", "x", 6], ["p", "", "y", 4], ["p", "", "x", 2], ["p", "", "y", 4.0], ["p", "", "x", 4]]
    rankings = [["p", "", "x", "y", w] for w in "aab"]
    joined = join_files(*csvs(tmp_path, ratings if policy == "mean" else ratings[:4], rankings), duplicates=policy)
    found = consistency(joined)
    assert found["n"] == n and found["matrix"][cell[0]][cell[1]] == 1
    notes = found["notes"]
    assert (notes["conflicting_ratings"], notes["conflicting_rankings"], notes["duplicate_rankings"]) == (1, 1, 2)
    assert [place.rpartition("/")[2] for place in notes["conflicts"]] == ["r.csv:4", "k.csv:4"]


def test_both_orders_are_two_comparisons_and_identical_responses_are_counted(tmp_path: Path):
    ratings = [["p", "", "x", 6], ["p", "", "y", 4]]
    rankings = [["p", "", "x", "y", "a"], ["p", "", "y", "x", "a"], ["p", "", "x", "x", "tie"]]
    joined = join_files(*csvs(tmp_path, ratings, rankings))
    found = consistency(joined)
    assert (found["n"], found["consistent"], found["flips"]) == (3, 2, 1)
    assert (found["notes"]["both_orders"], found["notes"]["orders_contradict"], found["notes"]["identical_pairs"]) == (
        1,
        1,
        1,
    )
    assert consistency(joined, drop_identical=True)["n"] == 2


def test_unicode_forms_of_a_prompt_are_one(tmp_path: Path):
    ratings = [["caf\u00e9", "", "x", 6], ["cafe\u0301", "", "y", 4]]
    found = consistency(join_files(*csvs(tmp_path, ratings, [["caf\u00e9", "", "x", "y", "(a)"]])))
    assert found["n"] == 1


def test_booleans_and_numbers_are_responses(tmp_path: Path):
    (tmp_path / "r.jsonl").write_text(
        '{"prompt": "p", "input": null, "response": true, "rating": 5}\n{"prompt": "p", "response": 6, "rating": 2}\n'
    )
    (tmp_path / "k.csv").write_text("prompt,input,response_a,response_b,preference\np,,true,6,1\n")
    assert consistency(join_files(tmp_path / "r.jsonl", tmp_path / "k.csv"))["n"] == 1


def test_nothing_in_common_is_said_and_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    r, k = csvs(tmp_path, [["p", "", "x", 6]], [["q", "", "x", "y", "a"]])
    found = run(tmp_path, "--ratings", str(r), "--rankings", str(k))
    assert (found["n"], found["skipped"], found["inconsistency"], found["kappa"], found["ci"]) == (
        0,
        1,
        None,
        None,
        [None] * 2,
    )
    assert "do prompt, input and response read the same?" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ratings", "rankings", "sentence"),
    [
        ("prompt,input,response,rating\np,,x,good\n", "", "A cell is not a number (r.csv:2:rating): found 'good'."),
        ("prompt,input,response,rating\np,,x,1e999\n", "", "A cell is not a number (r.csv:2:rating): found '1e999'."),
        ("prompt,response,score\np,x,1\n", "", "A row has no field 'rating' (r.csv:2). Choose one of"),
        ("prompt,response,rating\np,x\n", "", "A row does not fit the columns (r.csv:2): 2 cells for 3 columns"),
        ('prompt,response,rating\np,"x,1\n', "", "A file is not CSV (r.csv:2"),
        ("prompt,prompt\n", "", "A table names two columns alike (r.csv:1)"),
        ("", "p,,x,y,maybe\n", "A preference cannot be read (k.csv:2:preference): found 'maybe'. Write a, b or tie"),
        ("", "p,,x,y,3\n", "A preference cannot be read (k.csv:2:preference): found '3'"),
    ],
)
def test_bad_files_are_refused_by_row_and_field(tmp_path: Path, ratings: str, rankings: str, sentence: str):
    (tmp_path / "r.csv").write_text(ratings or "prompt,input,response,rating\np,,x,1\n")
    (tmp_path / "k.csv").write_text("prompt,input,response_a,response_b,preference\n" + rankings)
    with pytest.raises(DataError) as caught:
        join_files(tmp_path / "r.csv", tmp_path / "k.csv")
    assert sentence in str(caught.value).replace(f"{tmp_path}/", "")


def test_a_row_number_is_the_line_on_which_the_row_begins(tmp_path: Path):
    (tmp_path / "r.csv").write_text('prompt,response,rating\n"a\nb",x,1\n\np,x,bad\n')
    with pytest.raises(DataError, match=r"r\.csv:5:rating"):
        [number_cell(row["rating"], "rating", place) for place, row in read_rows(tmp_path / "r.csv")]


def test_bytes_that_are_no_text(tmp_path: Path):
    (tmp_path / "r.csv").write_bytes(b"prompt,response,rating\np,caf\xe9,1\n")
    with pytest.raises(DataError, match="not UTF-8"):
        list(read_rows(tmp_path / "r.csv"))


def test_preferences_in_every_spelling():
    assert [read_preference(v, "f") for v in ("a", "(A)", 1, 1.0, " Output (a) ")] == [A] * 5
    assert [read_preference(v, "f") for v in ("b", "(b)", "2", 2)] == [B] * 4
    assert [read_preference(v, "f") for v in ("tie", "equal", 0, "0", "both_bad")] == [EQUAL] * 5
    assert [read_preference(v, "f") for v in (None, "", "nan", math.nan, "invalid")] == [None] * 5
    with pytest.raises(DataError):
        read_preference(True, "f")


def test_cells():
    assert (text_cell(None), text_cell(math.nan), text_cell(True), text_cell("nan")) == ("", "", "true", "nan")
    assert [label_cell(v) for v in ("1", 1.0, 1, "Tie", "nan", True)] == [1, 1, 1, "Tie", None, 1]


def test_command_line_refuses_half_a_question(capsys: pytest.CaptureFixture[str]):
    assert main(["feedback", "consistency", "--ratings", "r.csv"]) == 2
    assert "Give --ratings and --rankings" in capsys.readouterr().err


# --- stores ---------------------------------------------------------------------------------------------------


def said(*annotators: str) -> tuple[dict[str, Item], list[FeedbackEvent]]:
    items = [Item("p", word) for word in ("x", "y", "z")]
    events = []
    for name in annotators:
        events += [
            FeedbackEvent("ordinal", (i.id,), v, scale=(1, 7), annotator=name)
            for i, v in zip(items, (6, 4, 4), strict=True)
        ]
    return {item.id: item for item in items}, events


def test_answers_are_joined_within_an_annotator_where_one_gave_both(tmp_path: Path):
    items, events = said("ann", "bob")
    x, y, z = items
    events.append(FeedbackEvent("ranking", (x, y, z), (1, 3, 2), annotator="ann"))
    joined = joined_of(events, items)
    found = consistency(joined)
    assert found["matrix"] == [[0, 0, 1], [0, 2, 0], [0, 0, 0]] and joined.notes["joined_by"] == "annotator"
    other = [*events[:-1], FeedbackEvent("pairwise", (z, x), "a", annotator="cid", tie_origin="")]
    assert joined_of(other, items).notes["joined_by"] == "mean rating of each item"
    assert consistency(joined_of(other, items))["flips"] == 1
    with Store.open(tmp_path / "s.db") as store:
        store.add(items=items.values(), events=events)
    assert run(tmp_path, str(tmp_path / "s.db"))["matrix"] == found["matrix"]


def two_ratings(folder: Path) -> tuple[Path, dict[str, Item], list[FeedbackEvent]]:
    """Ratings of accuracy, then of kindness, which turn x and y round; a comparison of quality."""
    items = {item.id: item for item in (Item("p", side, metadata={"model": side}) for side in ("x", "y"))}
    x, y = items
    events = [
        FeedbackEvent("ordinal", (item,), value, scale=(1, 7), annotator="ann", key=key, ts=ts, id=f"{key}{item}")
        for ts, (key, values) in enumerate((("accuracy", (6, 2)), ("kindness", (3, 5))), start=1)
        for item, value in zip((x, y), values, strict=True)
    ]
    events.append(FeedbackEvent("pairwise", (x, y), "a", annotator="ann", ts=9))
    with Store.open(folder / "two.db") as store:
        store.add(items.values(), events)
    return folder / "two.db", items, events


def test_ratings_of_several_keys_are_refused_until_one_is_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, items, events = two_ratings(tmp_path)
    winrate = ["feedback", "winrate", str(path), "--candidate", "x", "--baseline", "y"]
    for verb in (["feedback", "consistency", str(path)], winrate):
        assert main(verb) == 2
        told = capsys.readouterr().err
        assert (
            "2 have the key accuracy, 2 have the key kindness" in told and "--key" in told and "--ratings-key" in told
        )
    assert run(tmp_path, str(path), "--key", "accuracy")["n"] == 0, "the comparison has another key"
    assert run(tmp_path, str(path), "--ratings-key", "accuracy")["matrix"][1] == [0, 1, 0]
    assert run(tmp_path, str(path), "--key", "quality", "--ratings-key", "kindness")["flips"] == 1
    out = tmp_path / "out.json"
    assert main([*winrate, "--ratings-key", "kindness", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (found["ratings"]["loss"], found["rankings"]["win"], "items" in found["strengths"]) == (1, 1, False)
    assert main([*winrate, "--ratings-key", "quality"]) == 2, "nothing is rated under that key"
    scales = [*events[:2], replace(events[3], key="accuracy", scale=(1, 5), identifier="", id="")]
    with pytest.raises(DataError, match=r"different scales.*accuracy.*\(1, 5\), \(1, 7\).*--key"):
        joined_of(scales, items)


def test_a_report_shows_the_ratings_of_each_key(tmp_path: Path):
    path, items, events = two_ratings(tmp_path)
    page, found = write_report(path, draws=20)
    assert found["consistency"] == {} and list(found["consistency_by_key"]) == ["accuracy", "kindness"]
    assert [c["flips"] for c in found["consistency_by_key"].values()] == [0, 1]
    text = page.read_text(encoding="utf-8")
    assert "Ratings of accuracy" in text and "Ratings of kindness and rankings differ on 100" in text
    own = overview([*events, FeedbackEvent("pairwise", events[-1].items, "b", key="kindness", annotator="ann")], items)
    assert [c["n"] for c in own["consistency_by_key"].values()] == [2, 1], "a key's own rankings, or all of them"
    told = overview(events, items, outcome="kindness")
    assert told["consistency"]["consistent"] == 1 and told["consistency_by_key"] == {}


@pytest.mark.parametrize(
    ("policy", "matrix", "swaps"),
    [
        ("first", [[0, 0, 0], [0, 1, 0], [0, 0, 0]], 0),
        ("last", [[0, 0, 0], [0, 0, 0], [1, 0, 0]], 1),
        ("mean", [[0, 1, 0], [0, 0, 0], [0, 0, 0]], 0),
    ],
)
def test_repeats_of_another_session_count_once(tmp_path: Path, policy: str, matrix: list[list[int]], swaps: int):
    items = {item.id: item for item in (Item("p", side) for side in ("x", "y"))}
    x, y = items
    about = {"annotator": "ann", "key": "quality"}
    events = [
        FeedbackEvent("ordinal", (item,), value, scale=(1, 7), session=session, ts=ts, **about)
        for ts, session, values in ((1, "s1", (6, 2)), (2, "s2", (2, 6)))
        for item, value in zip((x, y), values, strict=True)
    ]
    events.append(FeedbackEvent("pairwise", (x, y), "a", session="s1", ts=1, **about))
    events.append(FeedbackEvent("pairwise", (x, y), "tie", session="s2", ts=2, tie_origin="position_swap", **about))
    with Store.open(tmp_path / "s.db") as store:
        store.add(items.values(), events)
    found = run(tmp_path, str(tmp_path / "s.db"), "--duplicates", policy)
    assert (found["matrix"], found["ranking_ties_by_position_swap"]) == (matrix, swaps)
    notes = found["notes"]
    assert [notes[f"conflicting_{what}"] for what in ("ratings", "rankings")] == [2, 1] and len(notes["conflicts"]) == 3
    assert [notes[f"duplicate_{what}"] for what in ("ratings", "rankings")] == [2, 1]
    assert notes["duplicates_policy"] == policy
    anyone = [replace(e, annotator="", identifier="", id="") for e in events if e.kind == "pairwise"]
    assert len(joined_of(anyone, items).a_N) == 2, "two answers of nobody named are two"


def test_winrate_under_both_protocols(tmp_path: Path):
    items = [Item(f"p{i}", side, metadata={"model": side}) for i in range(5) for side in ("new", "old")]
    events = []
    for i, (r, ranked) in enumerate([(6, "a"), (5, "a"), (4, "a"), (4, "tie"), (2, "b")]):
        new, old = items[2 * i : 2 * i + 2]
        events += [FeedbackEvent("ordinal", (item.id,), v, scale=(1, 7)) for item, v in ((new, r), (old, 4))]
        events.append(FeedbackEvent("pairwise", (new.id, old.id), ranked))
    with Store.open(tmp_path / "s.db") as store:
        store.add(items=items, events=events)
    out = tmp_path / "out.json"
    verb = [
        "feedback",
        "winrate",
        str(tmp_path / "s.db"),
        "--candidate",
        "new",
        "--baseline",
        "old",
        "--json",
        str(out),
    ]
    assert main(verb) == 0
    found = json.loads(out.read_text())
    assert (found["rankings"]["rate"], found["rankings"]["half"]) == pytest.approx((0.7, 0.392), abs=5e-4)
    assert [found["ratings"][k] for k in ("win", "tie", "loss")] == [2, 2, 1]
    assert found["shared"]["matrix"] == [[2, 0, 0], [1, 1, 0], [0, 0, 1]] and found["shared"]["n"] == 5
    assert found["strengths"]["model"] == "davidson"
    table = [["p0", "q", "new", "6"], ["p0", "q", "old", "5"], ["p0", "other", "old", "7"]]
    ratings = write(tmp_path / "r.csv", ("prompt", "input", "model", "rating"), table, header=True)
    names = ("prompt", "input", "model_a", "model_b", "preference")
    rankings = write(
        tmp_path / "k.csv", names, [["p0", "q", "old", "new", "b"], ["p0", "q", "old", "third", "a"]], header=True
    )
    files = ["--ratings", str(ratings), "--rankings", str(rankings), "--candidate", "new", "--baseline"]
    assert main(["feedback", "winrate", *files, "old", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (found["ratings"]["n"], found["rankings"]["rate"], found["notes"]["other_models"]) == (1, 1.0, 1)
    assert main(["feedback", "winrate", *files, "odl"]) == 2
