"""Files of feedback, in and out: each layout by an example, and every trap of parsing that is known."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from align.errors import DataError
from align.feedback.events import FeedbackEvent, Item
from align.feedback.exchange import export_events, import_file, read_feedback, values, write_table
from align.feedback.exchange.layouts import FIELDS
from align.feedback.exchange.rows import Reading
from align.feedback.store import Store
from rewards.fit_data import read_said


def table(folder: Path, rows: list[dict], name: str = "f.jsonl") -> Path:
    path = folder / name
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def text(folder: Path, content: str, name: str = "f.csv") -> Path:
    (folder / name).write_bytes(content.encode())
    return folder / name


def said(path: Path, keep_going: bool = False, **how) -> list[tuple]:
    """(kind, value, responses) of each event of a file."""
    found = read_feedback(path, Reading(**how), keep_going=keep_going)
    return [(e.kind, e.value, *(found.items[i].response for i in e.items)) for e, _ in found.events]


def refused(path: Path, **how) -> str:
    with pytest.raises(DataError) as caught:
        read_feedback(path, Reading(**how))
    return str(caught.value).replace(str(path), "FILE")


# --- layouts ------------------------------------------------------------------------------------------


def test_trl_columns_with_texts_and_chats(tmp_path: Path):
    user, good, bad = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "g"), ("assistant", "b")))
    for name in ("f.jsonl", "f.parquet"):
        pairs = table(tmp_path, [{"prompt": "q", "chosen": "good", "rejected": "bad", "margin": 2.0}], name)
        ((kind, value, *shown),) = said(pairs)
        assert kind == "pairwise" and shown["ab".index(value)] == "good" and sorted(shown) == ["bad", "good"]
        assert read_feedback(pairs).ignored == {"margin"}
        chats = table(tmp_path, [{"prompt": [user], "chosen": [good], "rejected": [bad]}], name)
        ((_, value, *shown),) = said(chats)
        assert shown["ab".index(value)] == [good]
        whole = read_feedback(table(tmp_path, [{"chosen": [user, good], "rejected": [user, bad]}], name))
        assert {i.prompt_id for i in whole.items.values()} == {Item([user], "x").prompt_id} and len(whole.items) == 2
        thumbs = table(tmp_path, [{"prompt": "q", "completion": "c", "label": True}], name)
        assert said(thumbs) == [("binary", True, "c")]
        ranks = table(tmp_path, [{"prompt": "q", "completions": ["x", "y", "z"], "ranks": [2, 1, 2]}], name)
        ((_, value, *shown),) = said(ranks)
        assert dict(zip(shown, value, strict=True)) == {"x": 2, "y": 1, "z": 2}


def test_a_preference_without_an_order_shown_does_not_favour_a_place(tmp_path: Path):
    path = table(tmp_path, [{"prompt": f"{n}", "chosen": "good", "rejected": "bad"} for n in range(200)])
    first = sum(event.value == "a" for event, _ in read_feedback(path).events)
    assert 60 < first < 140 and {event.exposure for event, _ in read_feedback(path).events} == {"unknown"}


def test_an_implicit_prompt_of_texts_ends_where_trl_ends_it(tmp_path: Path):
    path = table(tmp_path, [{"chosen": "The sky is blue.", "rejected": "The sky is green."}])
    found = read_feedback(path)
    assert {(i.prompt, i.response) for i in found.items.values()} == {
        ("The sky is", " blue."),
        ("The sky is", " green."),
    }


def test_sharegpt(tmp_path: Path):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    path = table(tmp_path, [{"conversations": turns, "kto_tag": False, "system": "s"}], "f.json")
    found = read_feedback(path)
    (item,) = found.items.values()
    assert (item.media, item.response) == ("chat", [{"role": "assistant", "content": "a"}])
    assert item.prompt == [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    assert [event.value for event, _ in found.events] == [False]
    pair = {
        "conversations": turns[:1],
        "chosen": {"from": "gpt", "value": "g"},
        "rejected": {"from": "gpt", "value": "b"},
    }
    ((kind, value, *shown),) = said(table(tmp_path, [pair]))
    assert kind == "pairwise" and shown["ab".index(value)][0]["content"] == "g"
    assert "FILE:1:conversations" in refused(table(tmp_path, [{"conversations": turns}]))
    stranger = [{"from": "alien", "value": "q"}]
    assert "turn 1 is from 'alien'" in refused(table(tmp_path, [{"conversations": stranger, "kto_tag": True}]))


def test_llama_factory(tmp_path: Path):
    rows = [
        {"instruction": "i", "input": "on this", "output": "o", "kto_tag": True},
        {"instruction": "i", "input": "", "output": "o", "kto_tag": False, "history": [["q", "a"]], "system": "s"},
        {"instruction": "i", "input": "", "output": "silent", "kto_tag": None},
    ]
    found = read_feedback(table(tmp_path, rows))
    items = list(found.items.values())
    assert (items[0].prompt, items[0].input, items[0].response) == ("i", "on this", "o")
    assert [turn["content"] for turn in items[1].prompt] == ["s", "q", "a", "i"]
    assert [(e.kind, e.value) for e, _ in found.events] == [("binary", True), ("binary", False), ("exposure", None)]
    said = refused(table(tmp_path, [{**rows[0], "kto_tag": "perhaps"}]))
    assert "A cell cannot be read (FILE:1:kto_tag)" in said and "--columns rating=label --scale" in said


def test_label_studio(tmp_path: Path):
    def result(kind: str, **value) -> dict:
        return {"type": kind, "from_name": f"my {kind}", "value": value, "id": kind}

    rows = [
        {"id": 1, "data": {"prompt": "p", "response": "r"}, "annotations": [
            {"id": 7, "completed_by": {"id": 3, "email": "x@y.z"}, "created_at": "2025-01-02T03:04:05Z", "lead_time": 1.5,
             "result": [result("rating", rating=4), result("choices", choices=["❤️"]), result("textarea", text=["why"])]},
            {"id": 8, "completed_by": 4, "was_cancelled": True, "result": [result("rating", rating=1)]},
        ]},
        {"id": 2, "data": {"question": "p", "answer1": "x", "answer2": "y"}, "annotations": [
            {"id": 9, "completed_by": 3, "result": [result("pairwise", selected="right")]}]},
    ]  # fmt: skip
    found = read_feedback(table(tmp_path, rows, "f.json"), Reading(scale=(1, 5)))
    events = [event for event, _ in found.events]
    assert [(e.kind, e.value, e.key, e.annotator) for e in sorted(events, key=lambda e: (e.ts, e.kind))] == [
        ("exposure", None, "quality", "4"), ("pairwise", "b", "my pairwise", "3"), ("ordinal", 4, "my rating", "3"),
        ("reaction", "love", "my choices", "3"), ("text", "why", "my textarea", "3"),
    ]  # fmt: skip
    timed = next(e for e in events if e.kind == "ordinal")
    assert (timed.ts, timed.latency_ms, timed.identifier) == (1735787045000, 1500, "label-studio:7:rating")
    odd = [{"data": {"prompt": "p", "response": "r"}, "annotations": [{"result": [result("brush", rle=[1])]}]}]
    assert "Results of type 'brush' have no meaning as feedback" in refused(table(tmp_path, odd))


def test_langfuse(tmp_path: Path):
    score = {"id": "s1", "name": "thumb", "value": 1, "dataType": "BOOLEAN", "source": "API", "comment": "ok",
             "timestamp": "2025-01-02T03:04:05.678Z"}  # fmt: skip
    trace = {"id": "t", "input": {"messages": [{"role": "user", "content": "q"}]}, "output": "a", "userId": "u",
             "sessionId": "x", "scores": [score, {**score, "id": "s2", "name": "tone", "dataType": "CATEGORICAL",
             "stringValue": "Warm"}]}  # fmt: skip
    silent = {**trace, "id": "t2", "output": "b", "scores": []}
    path = tmp_path / "f.json"
    path.write_text(json.dumps({"data": [trace, silent], "meta": {"page": 1}}))
    found = read_feedback(path)
    events = {e.key: e for e, _ in found.events}
    assert [(e.kind, e.value) for e in events.values()] == [("exposure", None), ("binary", True), ("reaction", "warm")]
    thumb = events["thumb"]
    assert (thumb.annotator, thumb.source, thumb.session, thumb.reply) == ("u", "user", "x", "ok")
    assert (thumb.identifier, thumb.ts) == ("langfuse:s1", 1735787045678)
    flat = table(tmp_path, [{**score, "dataType": "NUMERIC", "value": 4.0, "input": "q", "output": "a"}])
    assert said(flat, scale=(1, 5)) == [("ordinal", 4, "a")]
    assert "A prompt is empty (FILE:1:input)" in refused(table(tmp_path, [score]))


def test_a_column_map_with_and_without_a_header(tmp_path: Path):
    headed = text(tmp_path, "frage,antwort,sterne,wer\nq,a,5,ann\n", "a.csv")
    renamed = {"prompt": "frage", "response": "antwort", "rating": "sterne", "annotator": "wer"}
    assert said(headed, renamed=renamed, scale=(1, 5)) == [("ordinal", 5, "a")]
    bare = text(tmp_path, "x,q,a,5\n", "b.tsv".replace("tsv", "csv"))
    assert said(bare, columns=("-", "prompt", "response", "rating"), scale=(1, 5)) == [("ordinal", 5, "a")]
    tabs = text(tmp_path, "prompt\tresponse\tlabel\nq\ta,b\tup\n", "c.tsv")
    assert said(tabs) == [("binary", True, "a,b")]
    half = text(tmp_path, "prompt;response;label\nq;a;up\n", "d.csv")
    assert said(half, delimiter=";") == [("binary", True, "a")]


def test_rows_that_a_spreadsheet_left_empty_are_no_rows(tmp_path: Path):
    path = text(tmp_path, "\ufeffprompt,response,label\r\nq,a,1\r\n,,\r\n\r\n  \r\nq,b,0\r\n,,\r\n")
    assert said(path) == [("binary", True, "a"), ("binary", False, "b")]


def test_several_columns_are_several_annotators(tmp_path: Path):
    row = {"q": "p", "one": "x", "two": "y", "ann1": 1, "ann2": "Tie", "ann3": 2}
    renamed = {"prompt": "q", "response_a": "one", "response_b": "two", "preference": "ann1|ann2|ann3"}
    found = read_feedback(table(tmp_path, [row]), Reading(renamed=renamed))
    assert [(e.annotator, e.value) for e, _ in found.events] == [("ann1", "a"), ("ann2", "tie"), ("ann3", "b")]


def test_several_answers_in_one_row_are_several_events(tmp_path: Path):
    rows = [{"prompt": "q", "response": "r", "rating": 5, "label": 0, "text": None, "event_id": "e", "identifier": "i"}]
    events = [event for event, _ in read_feedback(table(tmp_path, rows), Reading(scale=(1, 7))).events]
    assert [(e.kind, e.id, e.identifier) for e in events] == [
        ("ordinal", "e:rating", "i:rating"),
        ("binary", "e:label", "i:label"),
    ]
    twice = table(tmp_path, [{"prompt": "q", "response": r, "label": 1, "event_id": "e"} for r in "xy"])
    assert "Two rows have one event id (FILE:2:label): the other is FILE:1:label" in refused(twice)


def test_nested_columns(tmp_path: Path):
    path = table(tmp_path, [{"data": {"q": "p", "r": "x"}, "feedback": {"thumb": "down"}}])
    renamed = {"prompt": "data.q", "response": "data.r", "label": "feedback.thumb"}
    assert said(path, renamed=renamed) == [("binary", False, "x")]
    assert "A row has no such column (FILE:1:data.nope)" in refused(path, renamed={**renamed, "response": "data.nope"})


# --- traps (facts, section 12) --------------------------------------------------------------------------


def test_quoted_cells_of_several_lines_keep_the_line_they_begin_on(tmp_path: Path):
    path = text(tmp_path, 'prompt,response,label\n"two\nlines","a ""b"", c",1\nq,r,x\n')
    assert "(FILE:4:label)" in refused(path)
    found = read_feedback(path, keep_going=True)
    assert [(i.prompt, i.response) for i in found.items.values()] == [("two\nlines", 'a "b", c')]


def test_missing_is_not_nan_is_not_empty(tmp_path: Path):
    path = text(tmp_path, "prompt,input,response,rating\nq,,nan,5\nq,nan,,5\nq,,r,\n")
    assert "There is no answer (FILE:4:rating)" in refused(path, scale=(1, 7))
    found = read_feedback(path, Reading(scale=(1, 7), missing="skip"))
    assert [(i.input, i.response) for i in found.items.values()] == [("", "nan"), ("nan", ""), ("", "r")]
    assert found.skipped == {"no answer": 1}
    nan = text(tmp_path, "prompt,response,rating\nq,r,nan\n", "n.csv")
    assert "A cell cannot be read (FILE:2:rating): expected a number, found 'nan'" in refused(nan, scale=(1, 7))
    null = table(tmp_path, [{"prompt": "q", "response": None, "label": True}])
    assert "A response is missing (FILE:1:response)" in refused(null)


@pytest.mark.parametrize(("cell", "value"), [("6", 6), ("6.0", 6), (" 6 ", 6), (6.0, 6), (6, 6), ("-2", -2)])
def test_whole_numbers_however_written(cell, value):
    assert values.whole(cell) == value


@pytest.mark.parametrize("cell", ["6.5", 6.5, True, "six", "٦", "1e999", "0x6", [6], "1_000", float("inf"), "²"])
def test_other_numbers_are_refused(cell):
    with pytest.raises(ValueError, match="expected a"):
        values.whole(cell)


def test_responses_that_a_parser_takes_for_values(tmp_path: Path):
    path = text(tmp_path, "prompt,response,label\nq,true,1\nq,1.0,1\nq,null,1\n")
    assert [row[2] for row in said(path)] == ["true", "1.0", "null"]
    typed = table(tmp_path, [{"prompt": 7, "response": r, "label": 1} for r in (True, False, 1, 1.0, 2.5)])
    assert [row[2] for row in said(typed)] == ["true", "false", "1", "1.0", "2.5"]


@pytest.mark.parametrize(
    ("cell", "value"),
    [(c, True) for c in (True, "true", "TRUE", 1, 1.0, "1", "1.0", "up", "Yes", " thumbs up ", "desirable")]
    + [(c, False) for c in (False, "False", 0, "0", -1, "-1", -1.0, "down", "no", "undesirable")],
)
def test_labels(cell, value):
    assert values.binary(cell) is value


@pytest.mark.parametrize("cell", ["2", 2, "maybe", "truee", 0.5, [True], "love"])
def test_other_labels_are_refused(cell):
    with pytest.raises(ValueError, match="expected"):
        values.binary(cell)


def test_zero_and_minus_one_cannot_both_be_down(tmp_path: Path):
    path = text(tmp_path, "prompt,response,label\nq,a,1\nq,b,0\nq,c,-1\n")
    assert "The labels 0 and -1 stand in one file (FILE:4:label): the other is at FILE:3" in refused(path)


def test_a_null_label_is_shown_and_not_down(tmp_path: Path):
    path = text(tmp_path, "prompt,response,label\nq,a,0\nq,b,\n")
    assert said(path) == [("binary", False, "a"), ("exposure", None, "b")]
    found = read_feedback(path)
    assert found.events[1][0].exposure == "shown"
    assert "There is no answer (FILE:3:label)" in refused(path, missing="refuse")


@pytest.mark.parametrize(
    ("cell", "value"),
    [("a", "a"), ("(a)", "a"), ("Output (a)", "a"), (1, "a"), ("1", "a"), ("left", "a"), ("model_a", "a"), (1.0, "a")]
    + [("B", "b"), ("(b)", "b"), (2, "b"), ("2.0", "b"), ("right", "b"), ("response_b", "b")]
    + [(c, "tie") for c in ("Tie", "equal", 0, "0", "1.5", 1.5, "TIE")]
    + [("both_bad", "both_bad"), ("tie (bothbad)", "both_bad"), ("bothbad", "both_bad")],
)
def test_preferences(cell, value):
    assert values.preference(cell) == value


@pytest.mark.parametrize("cell", ["garbage", "a or b", "Output (a) is better than Output (b)", 3, True, ["a"], "c"])
def test_a_reply_that_only_mentions_an_option_is_refused(cell):
    with pytest.raises(ValueError, match="expected"):
        values.preference(cell)


@pytest.mark.parametrize("cell", ["❤️", "❤", "♥︎", ":heart:", "Love", "LOVED", " heart ", "💖"])
def test_variants_of_one_reaction(cell):
    assert values.reaction(cell) == "love"


def test_reactions_keep_what_they_do_not_know():
    assert values.reaction("👍🏽") == values.reaction("+1") == "like" and values.reaction("🦄") == "🦄"
    assert values.reaction("So True") == "so_true" and not values.reaction("")


@pytest.mark.parametrize(
    ("given", "ranks"),
    [([1, 2, 3], [1, 2, 3]), ([1, 1, 2], [1, 1, 2]), (["1.5", 1.5, 3], [1, 1, 3]), ([2, 2, 9], [1, 1, 3]),
     ([1.0, "2"], [1, 2]), ([3, 3], [1, 1]), ([3, None, 1], [2, None, 1]), ([2, "", 3], [1, None, 2])],
)  # fmt: skip
def test_ranks(given, ranks):
    assert values.ranks(given) == ranks


@pytest.mark.parametrize("name", ["f.jsonl", "f.parquet"])
def test_of_a_partial_ranking_the_ranked_are_kept_and_the_rest_is_counted(tmp_path: Path, name: str):
    words = ["x", "y", "z"]
    rows = [
        {"prompt": f"p{i}", "responses": words, "ranks": ranks} for i, ranks in enumerate([[3, None, 1], [1, 2, 3]])
    ]
    path = table(tmp_path, rows, name)
    assert [(v, *shown) for _, v, *shown in said(path)] == [((2, 1), "x", "z"), ((1, 2, 3), "x", "y", "z")]
    assert read_feedback(path).skipped == {"responses without a rank": 1}
    read, _, left_out = read_said(path, "text")
    assert len(read) == 6 and not +left_out, "a response without a rank is no answer that was left out"
    none = {"prompt": "q", "responses": words, "ranks": [None] * 3}
    assert "There is no answer" in refused(table(tmp_path, [*rows, none], f"none_{name}"))
    assert len(read_feedback(tmp_path / f"none_{name}", Reading(missing="skip")).events) == 2
    one = {"prompt": "q", "responses": words, "ranks": [None, 1, None]}
    assert "expected ranks of two responses or more" in refused(table(tmp_path, [*rows, one], f"one_{name}"))


def test_ranks_from_the_other_end_and_ranks_that_are_none():
    assert values.ranks([0.1, 0.9, 0.9], best_is_high=True) == [3, 1, 1]
    for wrong in ([0, 1], ["x", 1], [None, 1], [None, 3, None], [True, 2]):
        with pytest.raises(ValueError, match="expected"):
            values.ranks(wrong)


@pytest.mark.parametrize(
    "cell",
    [1735787045, 1735787045.0, "1735787045", 1735787045000, "2025-01-02T03:04:05Z", "2025-01-02 03:04:05",
     "2025-01-02T04:04:05+01:00"],
)  # fmt: skip
def test_times(cell):
    assert values.milliseconds(cell) == 1735787045000


@pytest.mark.parametrize("cell", ["yesterday", 5, 1e18, "2025-13-01", True, "NaT"])
def test_other_times_are_refused(cell):
    with pytest.raises(ValueError, match="expected a time|expected a number"):
        values.milliseconds(cell)


def test_comparing_a_response_with_itself(tmp_path: Path):
    rows = [{"prompt": "q", "chosen": "same", "rejected": "same"}, {"prompt": "q", "chosen": "x", "rejected": "y"}]
    path = table(tmp_path, rows)
    assert "Two of the compared responses are identical (FILE:1:rejected)" in refused(path)
    found = read_feedback(path, Reading(identical="skip"))
    assert len(found.events) == 1 and found.skipped == {"identical responses": 1}


CONFLICT = "prompt,response,rating,annotator\nq,a,5,x\nq,a,5,x\nq,a,2,x\nq,a,1,y\n"


def test_contradictions_are_not_guessed(tmp_path: Path):
    path = text(tmp_path, CONFLICT)
    message = refused(path, scale=(1, 7))
    assert "Two rows contradict each other (FILE:4:rating)" in message and "answers 5 and this one 2" in message

    def values_of(**how) -> list:
        return [value for _, value, _ in said(path, scale=(1, 7), **how)]

    assert values_of(duplicates="first") == [5, 1] and values_of(duplicates="last") == [2, 1]
    assert values_of(duplicates="all") == [5, 5, 2, 1]
    assert values_of(keep_going=True) == [5, 1]


def test_a_contradiction_in_swapped_order_says_so(tmp_path: Path):
    path = text(tmp_path, "prompt,response_a,response_b,preference\nq,x,y,a\nq,y,x,a\n")
    assert "answers 'a' and this one 'a', with the order of the responses swapped" in refused(path)
    path = text(tmp_path, "prompt,response_a,response_b,preference\nq,x,y,a\nq,x,y,b\n")
    assert "swapped" not in refused(path)


def test_a_table_of_the_fields_is_in_the_docs():
    page = (Path(__file__).parents[2] / "docs/feedback.md").read_text(encoding="utf-8")
    assert [name for name in FIELDS if f"`{name}`" not in page] == []


def test_an_id_with_a_space_is_not_joined(tmp_path: Path):
    assert write_table(tmp_path / "f.csv", [{"events": ["a", "b"]}, {"events": []}]) == 2
    assert (tmp_path / "f.csv").read_text() == '"events"\n"a b"\n""\n'
    with pytest.raises(DataError, match=r"found a list, \['a b'\]"):
        write_table(tmp_path / "g.csv", [{"events": ["a b"]}])


def test_every_answer_kept_apart_stays_so_and_is_imported_once(tmp_path: Path):
    path, how = text(tmp_path, CONFLICT), Reading(scale=(1, 7), duplicates="all")
    with Store.open(tmp_path / "f.db") as store:
        assert import_file(store, path, how).statuses == {"added": 4}
        assert import_file(store, path, how).statuses == {"unchanged": 4}
        assert sorted(e.value for e in store.current()) == [1, 2, 5, 5]


def test_the_newest_counts_where_there_are_times_whatever_the_order_of_rows(tmp_path: Path):
    path = text(tmp_path, "prompt,response,rating,ts\nq,a,2,2025-01-03\nq,a,5,2025-01-01\nq,a,3,2025-01-02\n")
    with Store.open(tmp_path / "f.db") as store:
        done = import_file(store, path, Reading(scale=(1, 7)))
        assert done.statuses == {"added": 1, "superseded": 2} and [e.value for e in store.current()] == [2]
        assert import_file(store, path, Reading(scale=(1, 7))).statuses == {"past": 2, "unchanged": 1}


def test_one_prompt_in_two_unicode_forms_is_one_prompt(tmp_path: Path):
    found = read_feedback(text(tmp_path, "prompt,response,label\nKäse,a,1\nKa\u0308se,b,0\nKa\u0308se,a,1\n"))
    assert len({i.prompt_id for i in found.items.values()}) == 1 and len(found.items) == 2
    assert found.skipped == {"repeated": 1}


def test_a_chat_in_a_cell_of_csv_is_the_text_it_is(tmp_path: Path):
    chat = '[{"role": "user", "content": "x"}]'
    found = read_feedback(text(tmp_path, 'prompt,response,label\n"{}",a,1\n'.format(chat.replace('"', '""'))))
    assert next(iter(found.items.values())).prompt == chat


def test_other_columns_stay_with_the_item(tmp_path: Path):
    found = read_feedback(table(tmp_path, [{"prompt": "p", "response": "r", "label": 1, "seed": 7, "x": float("nan")}]))
    assert next(iter(found.items.values())).metadata == {"seed": 7, "x": None}


def test_annotators_become_pseudonyms(tmp_path: Path):
    path = text(tmp_path, "prompt,response,label,annotator\nq,a,1,ann@example.org\nq,b,1,ann@example.org\n")
    (one, two), (other, _) = (
        [e.annotator for e, _ in read_feedback(path, Reading(salt=salt)).events] for salt in ("x", "y")
    )
    assert one == two != other and "ann" not in one and len(one) == 16


# --- files that are wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("f.csv", "prompt,prompt\n", "A table names two columns alike (FILE:1:prompt)"),
        ("f.csv", "prompt,,label\n", "A column has no name (FILE:1:2)"),
        ("f.csv", "prompt,response,label\nq,a\n", "A row does not fit the columns (FILE:2:label): 2 cells for 3"),
        ("f.csv", "prompt,response,label\nq,a,1,2\n", "A row does not fit the columns (FILE:2:4): 4 cells for 3"),
        ("f.csv", 'prompt,response,label\nq,"a,1\n', "A file is not CSV (FILE:2:prompt): unexpected end of data"),
        ("f.csv", "prompt,response,label\n", "There is no feedback (FILE:1:1): the file has no rows"),
        ("f.csv", "prompt,response\nq,a\n", "The columns say nothing about feedback (FILE:2:prompt)"),
        ("f.csv", "prompt,response,raiting\nq,a,3\n", "Rename 'raiting' to 'rating'. Or map them"),
        ("f.csv", "prompt;response;label\nq;a;1\n", "separated otherwise (FILE:1): its one column is"),
        ("f.jsonl", '{"prompt": "q", "response": "r", "rating": 5, "scale": "7-1"}', "the lowest first, found '7-1'"),
        ("f.jsonl", '{"prompt": "q"\n', "This is not JSON (FILE:1:15)"),
        ("f.jsonl", '{"label": 1, "label": 0}\n', "This is not JSON (FILE:1:1): the field 'label' is given twice"),
        ("f.jsonl", "\n[1]\n", "A row is not an object with named fields (FILE:2:1)"),
        ("f.jsonl", "[" * 100_000, "This is not JSON (FILE:1:1)"),
        ("f.jsonl", '{"prompt": "\\ud800", "response": "r", "label": 1}', "half of a character"),
        ("f.jsonl", '{"prompt": ["x"], "response": "r", "label": 1}', "(FILE:1:prompt): expected turns with role"),
        ("f.jsonl", '{"prompt": "q", "chosen": "x"}', "The columns say nothing about feedback (FILE:1:prompt)"),
        ("f.jsonl", '{"prompt": "q", "response": "r", "rating": 9, "scale": "1-7"}', "(FILE:1:rating): ordinal is a"),
        ("f.jsonl", '{"prompt": "q", "response": "r", "rating": 5}', "A rating needs its scale (FILE:1:rating)"),
        ("f.jsonl", '{"prompt": "q", "response": "r", "label": 1, "source": "cat"}', "(FILE:1:source): source is 'cat'"),
        ("f.jsonl", '{"prompt": "q", "response": "r", "label": 1, "propensity": 2}', "(FILE:1:propensity)"),
        ("f.jsonl", '{"prompt": "q", "response": "r", "preference": "a"}', "A comparison needs several responses"),
        ("f.jsonl", '{"prompt": "q", "responses": ["a", "b"], "ranks": [1]}', "Ranks are not one for every response"),
        ("f.parquet", "PAR1 nonsense", "A file is not Parquet, or is damaged (FILE:1:1)"),
        ("f.xlsx", "", "A file of an unknown format (FILE)"),
    ],
)  # fmt: skip
def test_what_is_wrong_and_where(tmp_path: Path, name: str, content: str, sentence: str):
    assert sentence in refused(text(tmp_path, content, name))


def test_bytes_that_are_no_text(tmp_path: Path):
    path = tmp_path / "f.csv"
    path.write_bytes(b"prompt,response,label\nq,\xff,1\n")
    assert "A file is not UTF-8 text (FILE:2:3): byte 0xff" in refused(path)


def test_a_choice_that_is_none(tmp_path: Path):
    path = text(tmp_path, "prompt,response,label\nq,a,1\n")
    assert "Did you mean 'first'?" in refused(path, duplicates="frist")
    assert "Did you mean 'label-studio'?" in refused(path, layout="labelstudio")
    assert "Did you mean 'rating'?" in refused(path, renamed={"ratings": "x"})
    assert "names the columns itself (FILE:1:prompt). Leave --columns out" in refused(
        path, columns=("prompt", "response", "label")
    )


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_column_of_images_or_videos_holds_the_responses(tmp_path: Path, kind: str):
    path = text(tmp_path, f"prompt,{kind},label,seed\nq,made/1.png,1,7\n", "f.csv")
    (item,) = read_feedback(path).items.values()
    assert (item.response, item.media, item.metadata) == ("made/1.png", kind, {"seed": "7"})
    beside = text(tmp_path, f'{{"prompt": "q", "{kind}": "seen.png", "response": "a fox", "label": 1}}', "g.jsonl")
    (item,) = read_feedback(beside).items.values()
    assert (item.response, item.media) == ("a fox", "text")


def test_an_import_is_whole_or_none_and_can_leave_out_what_is_wrong(tmp_path: Path):
    path = text(tmp_path, "prompt,response,label\nq,a,1\nq,b,maybe\nq,c,0\nq,d\n")
    with Store.open(tmp_path / "f.db") as store:
        with pytest.raises(DataError, match=":3:label"):
            import_file(store, path)
        assert store.counts()["items"] == store.counts()["events"] == 0
        done = import_file(store, path, keep_going=True)
        assert done.statuses == {"added": 2} and [r.place for r in done.refused] == [f"{path}:3", f"{path}:5"]
        assert done.refused[0].fields == {"prompt": "q", "response": "b", "label": "maybe"}


# --- out ------------------------------------------------------------------------------------------------

A, B, C = (Item("q", text, "on this") for text in ("a", "b", "c"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    with Store.open(tmp_path / "s.db") as opened:
        opened.add([A, B, C], [
            FeedbackEvent("pairwise", (A.id, B.id), "b", annotator="x", id="one"),
            FeedbackEvent("pairwise", (A.id, C.id), "tie", annotator="x", id="two"),
            FeedbackEvent("binary", (A.id,), False, annotator="x", id="three"),
            FeedbackEvent("ranking", (C.id, A.id), (1, 2), annotator="x", id="four"),
            FeedbackEvent("ordinal", (C.id,), 3, scale=(-5, 5), annotator="x", id="five"),
        ])  # fmt: skip
        yield opened


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_trl_columns_with_the_ids_of_their_events(store: Store, tmp_path: Path):
    done = export_events(store, tmp_path / "p.jsonl", "preference")
    about = {"annotator": "x", "key": "quality"}
    assert lines(tmp_path / "p.jsonl") == [
        {"prompt": "q\n\non this", "chosen": "b", "rejected": "a", "events": ["one"], **about}
    ]
    assert done.rows == 1 and done.left_out == {
        "without a winner": 1, "of kind binary": 1, "of kind ranking": 1, "of kind ordinal": 1,
    }  # fmt: skip
    export_events(store, tmp_path / "u.parquet", "unpaired")
    assert parquet.read_table(tmp_path / "u.parquet").to_pylist() == [
        {"prompt": "q\n\non this", "completion": "a", "label": False, "events": ["three"], **about}
    ]
    export_events(store, tmp_path / "r.jsonl", "ranking", chat=True)
    (row,) = lines(tmp_path / "r.jsonl")
    assert row["ranks"] == [1, 2] and row["prompt"] == [{"role": "user", "content": "q\n\non this"}]
    assert row["completions"] == [[{"role": "assistant", "content": r}] for r in ("c", "a")]


def test_hugging_face_data_sets(store: Store, tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    export_events(store, tmp_path / "thumbs", "unpaired")
    assert datasets.load_from_disk(str(tmp_path / "thumbs"))[0]["completion"] == "a"
    with pytest.raises(DataError, match="There is a folder already"):
        export_events(store, tmp_path / "thumbs", "unpaired")


def test_writing_is_whole_or_none_and_replaces_only_when_told(store: Store, tmp_path: Path):
    path = tmp_path / "e.csv"
    export_events(store, path)
    before = path.read_bytes()
    with pytest.raises(DataError, match="There is a file already"):
        export_events(store, path)
    with pytest.raises(DataError, match=r"CSV holds texts and numbers \(.*e.csv:2:completions\)"):
        export_events(store, path, "ranking", overwrite=True)
    with pytest.raises(DataError, match=r"There is nothing to write .*5 .*|no event is left"):
        export_events(store, path, "preference", kind="text", overwrite=True)
    assert path.read_bytes() == before and [p.name for p in tmp_path.glob("*.partial")] == []
    with pytest.raises(DataError, match="Did you mean 'preference'"):
        export_events(store, path, "preferences")


def test_texts_and_chats_in_one_column_of_parquet(tmp_path: Path):
    rows = [{"prompt": "x"}, {"prompt": [{"role": "user", "content": "x"}]}]
    with pytest.raises(DataError, match="A column holds values of several types .*:prompt"):
        write_table(tmp_path / "f.parquet", rows)
    assert not (tmp_path / "f.parquet").exists()
