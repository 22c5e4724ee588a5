"""Rows of preferences: the forms TRL documents are read as they are, anything else is refused with its place."""

from __future__ import annotations

import json
import re

import pytest

from align.errors import DataError
from align.preferences import (
    describe_preferences,
    is_preference_file,
    load_preferences,
    parse_row,
    prompt_key,
)

USER, SYSTEM = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be kind"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Hello", "No"))


def one(row):
    return parse_row(row, "rows.jsonl, line 1")


@pytest.mark.parametrize(
    ("row", "prompt", "completion", "label"),
    [
        ({"prompt": "Hi", "completion": "Hello", "label": True}, "Hi", "Hello", True),
        ({"prompt": [USER], "completion": [GOOD], "label": False}, (USER,), (GOOD,), False),
        ({"prompt": "Hi", "completion": "", "label": "down"}, "Hi", "", False),
        ({"prompt": "Hi", "completion": "Hello"}, "Hi", "Hello", None),
        ({"messages": [USER, GOOD], "label": 1}, (USER,), (GOOD,), True),
        ({"text": "Once upon a time"}, "", "Once upon a time", None),
        ({"prompt": json.dumps([USER]), "completion": json.dumps([GOOD]), "label": "1"}, (USER,), (GOOD,), True),
    ],
)
def test_single_completions_are_read_as_they_stand(row, prompt, completion, label):
    (found,) = one(row)
    assert (found.prompt, found.completion, found.label, found.pair) == (prompt, completion, label, -1)


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, "Hi", "Hello", "No"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, (USER,), (GOOD,), (BAD,)),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, (USER,), (GOOD,), (BAD,)),
        ({"chosen": "Say it: hello", "rejected": "Say it: help"}, "Say it: ", "hello", "help"),
        ({"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, (USER,), (GOOD,), (BAD,)),
        ({"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, GOOD]}, (USER,), (GOOD,), (GOOD,)),
        (
            {"prompt": "Hi", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
            (SYSTEM, USER),
            (GOOD,),
            (BAD,),
        ),
        ({"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]}, "Hi", (GOOD,), (BAD,)),
    ],
)
def test_pairs_become_two_rows_and_find_their_prompt(row, prompt, chosen, rejected):
    up, down = parse_row(row, "x", pair=3)
    assert (up.prompt, up.completion, up.label, up.pair) == (prompt, chosen, True, 3)
    assert (down.prompt, down.completion, down.label, down.pair) == (prompt, rejected, False, 3)


@pytest.mark.parametrize(
    ("value", "label"), [(True, True), (0, False), (1.0, True), (-1, False), ("up", True), ("FALSE", False)]
)
def test_labels_in_every_accepted_spelling(value, label):
    assert one({"prompt": "a", "completion": "b", "label": value})[0].label is label


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b", "label": "good"}, "field 'label'.*found 'good', expected true or false"),
        ({"prompt": "a", "completion": "b", "label": 0.7}, "field 'label'.*found 0.7"),
        ({"prompt": 3, "completion": "b"}, "field 'prompt'.*found 3, expected text or a list of messages"),
        (
            {"prompt": "a", "completion": [{"content": "b"}]},
            "field 'completion', message 0.*expected an object with role",
        ),
        ({"prompt": "a", "chosen": "b"}, "field 'rejected'.*found nothing"),
        ({"prompt": "a", "chosen": "b", "rejected": [GOOD]}, "field 'rejected'.*same form as chosen"),
        ({"chosen": "same", "rejected": "same"}, "field 'prompt'.*do not differ"),
        ({"messages": [GOOD, USER]}, "field 'messages'.*the last is the assistant's"),
        ({"prompt": "a", "completions": "b"}, "field 'completion'.*Did you mean 'completion'"),
        ({"prompt": "a", "completion": "b", "weight": -1}, "field 'weight'.*a finite number from 0"),
        ({"prompt": "a", "completion": "b", "tools": "no json"}, "field 'tools'.*a list of tool definitions"),
        (["a", "b"], "not an object"),
        (
            {"prompt": "Hi", "completion": [USER, GOOD], "label": True},
            "field 'completion'.*expected messages that begin with the assistant's",
        ),
        ({"prompt": "Other", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "field 'chosen'.*begin with the assis"),
        ({"prompt": "a", "completion": None, "label": True}, "no completion .*field 'completion'.*is null or empty"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "field 'rejected'.*found null"),
        ({"prompt": "a", "completion": "b", "label": "yes"}, "field 'label'.*`align feedback convert FILE .*reads yes"),
    ],
)
def test_what_is_wrong_is_named_with_row_field_found_and_expected(row, message):
    with pytest.raises(DataError, match=message) as caught:
        one(row)
    assert "rows.jsonl, line 1" in str(caught.value)


def test_weights_multiply_and_matching_weights_are_for_thumbs_down():
    row = {"prompt": "a", "completion": "b", "weight": 2, "udm_weight": 3.0}
    assert one({**row, "label": False})[0].weight == 6 and one({**row, "label": True})[0].weight == 2


ROWS = [{"prompt": f"p{i}", "completion": f"c{i}", "label": i % 3 == 0} for i in range(12)]


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "dataset"])
def test_every_file_form_gives_the_same_rows(tmp_path, form):
    path = tmp_path / f"rows.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif form == "csv":
        path.write_text(
            "prompt,completion,label\n" + "".join(f"{r['prompt']},{r['completion']},{r['label']}\n" for r in ROWS)
        )
    elif form == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        from datasets import Dataset

        Dataset.from_list(ROWS).save_to_disk(str(path))
    found = load_preferences(path)
    assert [(r.prompt, r.completion, r.label) for r in found.rows] == [tuple(row.values()) for row in ROWS]
    assert is_preference_file(path) and str(path) in found.rows[0].place


def test_prompt_files_are_not_taken_for_preferences(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat"}\n')
    (tmp_path / "t.jsonl").write_text('{"text": "a story", "id": 3}\n')
    assert is_preference_file(tmp_path / "t.jsonl")
    assert not is_preference_file(tmp_path / "p.jsonl") and not is_preference_file(tmp_path / "absent.jsonl")


def test_one_class_names_the_missing_side():
    rows = load_preferences([{"prompt": "a", "completion": "b", "label": True}] * 3)
    with pytest.raises(DataError, match="no thumb down.*found 3 up and 0 down.*Add rows people disliked"):
        rows.require_both_classes()
    with pytest.raises(DataError, match="no thumb up"):
        load_preferences([{"prompt": "a", "completion": "b", "label": False}]).require_both_classes()


def test_scores_are_labels_only_when_asked():
    rows = load_preferences([{"prompt": "a", "completion": "b", "score": s} for s in (0.2, 0.9)])
    with pytest.raises(DataError, match="item 0, field 'label'.*score 0.2.*Set data.score_threshold"):
        rows.require_labels()
    assert [r.label for r in rows.require_labels(threshold=0.9).rows] == [False, True]
    assert [r.label for r in rows.require_labels(soft=True).rows] == [False, True]
    with pytest.raises(DataError, match="score from 0 to 1.*found 4"):
        load_preferences([{"prompt": "a", "completion": "b", "score": 4}]).require_labels(soft=True)


def test_pairs_are_needed_for_dpo():
    with pytest.raises(DataError, match="no pair.*trainer: kto or bco"):
        load_preferences(ROWS).pairs()


def test_whole_prompts_are_held_out_whatever_the_order():
    rows = load_preferences([{"prompt": f" P{i % 10} ", "completion": str(i), "label": True} for i in range(40)])
    training, heldout = rows.split(0.3)
    sides = [{prompt_key(r) for r in side.rows} for side in (training, heldout)]
    assert not sides[0] & sides[1] and len(sides[1]) == 3 and len(heldout) == 12
    again = load_preferences([{"prompt": r.prompt, "completion": "x", "label": True} for r in reversed(rows.rows)])
    assert {prompt_key(r) for r in again.split(0.3)[1].rows} == sides[1]
    with pytest.raises(DataError, match="Too few prompts"):
        load_preferences(ROWS[:1]).split(0.5)


def test_describe_says_what_can_be_trained(tmp_path):
    path = tmp_path / "rows.jsonl"
    pairs = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    assert describe_preferences(path)["trainers"] == ["kto", "bco", "dpo", "sft"]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*pairs, ROWS[0]]))
    found = describe_preferences(path)
    assert found["trainers"] == ["kto", "bco", "sft"] and (found["up"], found["down"], found["pairs"]) == (4, 3, 3)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("rows", "warnings"),
    [
        (ROWS, []),
        ([{"prompt": "a", "completion": "b", "Label": True}], ["nothing reads the column 'Label'", "1 rows have no label"]),
        ([{"prompt": "a", "completion": "b", "rating": 4}], ["1 rows have no label.*convert ratings"]),
        ([*ROWS, {"prompt": "p0", "completion": "c0", "label": False}], ["1 answers have a thumb up and a thumb down"]),
        ([*ROWS, ROWS[0], {**ROWS[0], "prompt": " P0"}], ["2 rows repeat another one"]),
        ([*ROWS, {"completion": "", "label": True}], ["1 rows have an empty completion", "1 rows have no prompt"]),
        ([r for r in ROWS if r["label"]], ["all thumbs are up.*regenerated, edited or reported answers as down"]),
        ([r for r in ROWS if not r["label"]], ["all thumbs are down.*accepted or copied answers as up"]),
    ],
)  # fmt: skip
def test_what_is_likely_a_mistake_is_said(tmp_path, rows, warnings):
    found = describe_preferences(write(tmp_path / "rows.jsonl", rows))["warnings"]
    assert len(found) == len(warnings)
    for text, pattern in zip(sorted(found), sorted(warnings), strict=True):
        assert re.match(pattern, text), text


def test_files_sorted_by_label_are_told_from_mixed_ones(tmp_path):
    by_label = sorted(ROWS, key=lambda row: row["label"])
    assert describe_preferences(write(tmp_path / "a.jsonl", by_label))["sorted_by_label"] is True
    assert describe_preferences(write(tmp_path / "b.jsonl", ROWS))["sorted_by_label"] is False


def test_a_file_that_is_not_there_is_called_so(tmp_path):
    with pytest.raises(DataError, match="no such data file .*absent.jsonl"):
        load_preferences(tmp_path / "absent.jsonl")


def test_json_that_is_no_chat_is_an_answer():
    call = '[{"name": "get_weather", "arguments": {"town": "Oslo"}}]'
    (row,) = load_preferences([{"prompt": "weather?", "completion": call, "label": True}]).rows
    assert row.completion == call
