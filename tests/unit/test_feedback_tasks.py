"""Task files: what they refuse and suggest, how data becomes units, gold, media, and the tokens of annotators."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from align.errors import AlignError, ConfigError, DataError
from align.feedback import task_data, tasks
from align.feedback.events import Item
from align.feedback.tasks import TaskConfig, Unit, describe_task, gold_right, load_task, read_tokens, shuffled

ROWS = [
    {"prompt": "p", "response": "one"},
    {"prompt": "q", "response": "alone, with another"},
    {"prompt": "p", "response": "two"},
    {"prompt": "q", "response": "x"},
    {"prompt": "p", "response": "three"},
]


def write(folder: Path, rows: list[Any], **task: Any) -> Path:
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    path = folder / "task.yaml"
    path.write_text(json.dumps({"name": "try", "kind": "rating", "data": "data.jsonl", **task}), encoding="utf-8")
    return path


def responses(units: tuple[Unit, ...]) -> list[tuple[Any, ...]]:
    return [tuple(item.response for item in unit.items) for unit in units]


def refused(path: Path, kind: type[AlignError] = DataError) -> str:
    with pytest.raises(kind) as caught:
        load_task(path)
    return str(caught.value).replace(str(path.parent) + "/", "")


# --- the file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: x\nknd: rating\ndata: d", "Unknown key 'knd' (task.yaml:2). Did you mean 'kind'?"),
        ("name: x\nkind: rating\ndata: d\nreservation: 5", "Unknown key 'reservation' (task.yaml:4). Did you mean 'reservation_minutes'?"),
        ("name: x\nkind: rating", "The key 'data' is missing (task.yaml). Meaning: JSONL, CSV or Parquet, relative to the task file."),
        ("name: x\nkind: stars\ndata: d", "The value of 'kind' is wrong (task.yaml:2): found 'stars'"),
        ("name: x\nkind: rating\ndata: d\nscale: [7, 1]", "A scale runs from low to high (task.yaml): scale is [7, 1]."),
        ("name: x\nkind: rating\ndata: d\nk: 3", "A rating task does not read 'k' (task.yaml): it belongs to ranking. Remove it, or change the kind."),
        ("name: x\nkind: pairwise\ndata: d\nreactions: [love]", "A pairwise task does not read 'reactions'"),
        ("name: x\nkind: ranking\ndata: d\ndimensions: [a, b]", "A ranking task judges one dimension (task.yaml): there are 2."),
        ("name: x\nkind: rating\ndata: d\ndimensions: [a, a]", "Two dimensions have one name"),
        ("name: x\nkind: rating\ndata: d\ndimensions: [{nam: a}]", "Unknown key 'dimensions.0.nam' (task.yaml:4). Did you mean 'name'?"),
        ("name: x\nkind: rating\ndata: d\ngold: {data: g, evry: 3}", "Unknown key 'gold.evry' (task.yaml:4). Did you mean 'every'?"),
        ("name: x\nkind: rating\ndata: d\ncolumns: {promt: x}", "Unknown column 'promt' (task.yaml, columns). Did you mean 'prompt'?"),
        ("name: x\nkind: rating\ndata: d\nannotators_per_item: 0", "The value of 'annotators_per_item' is wrong (task.yaml:4): found 0"),
        ("name: <b>\nkind: rating\ndata: d", "The value of 'name' is wrong (task.yaml:1)"),
        ("- a\n- b", "A task file is a list of `key: value` lines (task.yaml). Start with `name:`."),
        ("name: [", "A file is not YAML (task.yaml:1)"),
    ],
)  # fmt: skip
def test_a_wrong_task_is_refused_with_its_line(tmp_path: Path, text: str, said: str):
    (tmp_path / "task.yaml").write_text(text)
    assert refused(tmp_path / "task.yaml", ConfigError).startswith(said)


def test_every_option_is_read_by_some_code():
    folder = Path(tasks.__file__).parent
    sources = [folder / "tasks.py", folder / "task_data.py", *sorted((folder / "server").glob("*.py"))]
    read = {n.attr for path in sources for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
    templates = " ".join(path.read_text() for path in (folder / "server" / "templates").glob("*.html"))
    sections = (TaskConfig, tasks.DimensionConfig, tasks.ExampleConfig, tasks.GoldConfig)
    fields = [name for section in sections for name in section.model_fields]
    assert [name for name in fields if name not in read and f".{name}" not in templates] == []


# --- data ---------------------------------------------------------------------------------------------


def test_units_of_each_kind(tmp_path: Path):
    rating = load_task(write(tmp_path, ROWS))
    assert responses(rating.units) == [("one",), ("two",), ("three",), ("alone, with another",), ("x",)]
    pairs = load_task(write(tmp_path, ROWS, kind="pairwise"))
    assert responses(pairs.units) == [("one", "two"), ("one", "three"), ("two", "three"), ("alone, with another", "x")]
    assert not any(unit.fixed for unit in pairs.units)
    both = load_task(write(tmp_path, ROWS[:3:2], kind="pairwise", both_orders=True))
    assert responses(both.units) == [("one", "two"), ("two", "one")] and all(unit.fixed for unit in both.units)
    assert both.units[0].id != both.units[1].id
    ranking = load_task(write(tmp_path, ROWS, kind="ranking", k=3))
    assert responses(ranking.units) == [("one", "two", "three"), ("alone, with another", "x")]
    assert describe_task(ranking)["answers_wanted"] == 2


@given(count=st.integers(2, 25), k=st.integers(2, 9), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_ranking_sets_cover_all_outputs(count: int, k: int, seed: int):
    items = [Item("p", str(i)) for i in range(count)]
    sets = list(task_data._sets(items, k, seed))
    assert {item.id for chosen in sets for item in chosen} == {item.id for item in items}
    assert len(sets) == -(-count // k)
    assert all(len({item.id for item in chosen}) == len(chosen) == min(k, count) for chosen in sets)


def test_the_same_units_from_every_format_and_shape(tmp_path: Path):
    wanted = load_task(write(tmp_path, ROWS)).units
    csv = "prompt,response\n" + "\n".join(f'{row["prompt"]},"{row["response"]}"' for row in ROWS)
    (tmp_path / "data.csv").write_text(csv)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "data.parquet")
    lists = [
        {"prompt": "p", "responses": ["one", "two", "three"]},
        {"prompt": "q", "responses": ["alone, with another", "x"]},
    ]
    (tmp_path / "lists.jsonl").write_text("\n".join(map(json.dumps, lists)))
    (tmp_path / "named.jsonl").write_text(
        "\n".join(json.dumps({"ask": r["prompt"], "out": r["response"]}) for r in ROWS)
    )
    columns = {"named.jsonl": {"prompt": "ask", "response": "out"}}
    for name in ("data.csv", "data.parquet", "lists.jsonl", "named.jsonl"):
        found = load_task(write(tmp_path, ROWS, data=name, columns=columns.get(name, {}))).units
        assert [unit.id for unit in found] == [unit.id for unit in wanted], name


def test_repeated_rows_are_left_out_and_counted(tmp_path: Path):
    task = load_task(write(tmp_path, [*ROWS, ROWS[0], {**ROWS[1], "model": "other"}]))
    assert len(task.units) == 5 and task.duplicates == 2


CHAT = [{"role": "user", "content": "Hi"}]


def test_chats_and_inputs(tmp_path: Path):
    rows = [{"prompt": CHAT, "response": "Hello", "input": "shout"}, {"prompt": CHAT, "response": CHAT, "model": "m"}]
    task = load_task(write(tmp_path, rows))
    assert [unit.items[0] for unit in task.units] == [
        Item(CHAT, "Hello", "shout"), Item(CHAT, CHAT, "", "chat", {"model": "m"}),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"response": "x"}, "A text or a chat is needed (data.jsonl, line 2, field 'prompt'): found None"),
        ({"prompt": " ", "response": "x"}, "A text or a chat is needed (data.jsonl, line 2, field 'prompt'): found ' '"),
        ({"prompt": "p"}, "A row has no output (data.jsonl, line 2): its fields are prompt. Give one of response,"),
        ({"prompt": "p", "response": "x", "image": "a.png"}, "A row has outputs of two kinds (data.jsonl, line 2): response and image."),
        ({"prompt": "p", "response": 7}, "A text or a chat is needed (data.jsonl, line 2, field 'response'): found 7"),
        ({"prompt": "p", "response": [{"role": "user"}]}, "A text or a chat is needed (data.jsonl, line 2, field 'response')"),
        ({"prompt": "p", "responses": "x"}, "Several outputs are a list (data.jsonl, line 2, field 'responses'): found 'x'."),
        ({"prompt": "p", "responses": "[x"}, "A list in a table is not JSON (data.jsonl, line 2, field 'responses')"),
        ({"prompt": "p", "response": "x", "input": 5}, "An input is not text (data.jsonl, line 2, field 'input'): found 5."),
        ([1], "A row is not an object with named fields (data.jsonl, line 2): found [1]."),
    ],
)  # fmt: skip
def test_a_bad_row_is_refused_by_place(tmp_path: Path, row: Any, said: str):
    assert refused(write(tmp_path, [ROWS[0], row])).startswith(said)


def test_a_prompt_with_one_output_cannot_be_compared(tmp_path: Path):
    said = refused(write(tmp_path, [*ROWS, {"prompt": "r", "response": "x"}], kind="pairwise"))
    assert said.startswith("A pairwise task needs two outputs of every prompt (data.jsonl): there is one for 'r'.")
    assert "There is nothing to annotate" in refused(write(tmp_path, []))


def test_media_are_files_of_the_task_folder(tmp_path: Path):
    folder = tmp_path / "task"
    (folder / "in").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "in" / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "text.png").write_text("<svg onload=x>")
    (folder / "a.svg").write_text("<svg/>")
    (folder / "a.mp4").write_bytes(b"\0\0\0\x18ftypisom")
    task = load_task(write(folder, [{"prompt": "p", "images": ["in/a.png"]}, {"prompt": "p", "video": "a.mp4"}]))
    assert sorted(path.name for path in task.media.values()) == ["a.mp4", "a.png"]
    outside = "A media file lies outside the folder of its task"
    for value, said in {
        "../outside.png": outside, str(tmp_path / "outside.png"): outside, "link.png": outside, "/etc/passwd": outside,
        "gone.png": "A media file cannot be read", "text.png": "A media file is no image/png", "in": "Not a file of a known image",
        "a.svg": "Not a file of a known image format", "a.mp4": "Not a file of a known image format", "a.png\0": "An image is not given",
    }.items():  # fmt: skip
        assert refused(write(folder, [{"prompt": "p", "image": value}])).startswith(said), value


# --- gold and tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "row", "right", "wrong"),
    [
        ("rating", {"response": "a", "answer": 5}, [{"quality": 4}, {"quality": 6}], [{"quality": 7}, {"quality": 3}, {}]),
        ("rating", {"response": "a", "answer": {"quality": 1}}, [{"quality": 2}], [{"quality": 3}]),
        ("thumbs", {"response": "a", "answer": True}, [{"thumb": True}], [{"thumb": False}, {}]),
        ("pairwise", {"responses": ["a", "b"], "answer": "tie"}, [{"quality": "tie"}], [{"quality": "a"}]),
        ("ranking", {"responses": ["a", "b", "c"], "answer": [1, 2, 2]}, [{"quality": (1, 2, 2)}, {"quality": (1, 3, 3)}],
         [{"quality": (1, 2, 3)}, {"quality": (2, 1, 2)}]),
    ],
)  # fmt: skip
def test_gold_answers(tmp_path: Path, kind: str, row: dict[str, Any], right: list[Any], wrong: list[Any]):
    (tmp_path / "gold.jsonl").write_text(json.dumps({"prompt": "g", **row}))
    task = load_task(write(tmp_path, ROWS, kind=kind, gold={"data": "gold.jsonl"}))
    (unit,) = task.gold
    assert unit.fixed and unit.id not in {u.id for u in task.units}
    assert all(gold_right(task.config, unit, answer) for answer in right)
    assert not any(gold_right(task.config, unit, answer) for answer in wrong)


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ("rating", {"response": "a"}, "A gold row has no field 'answer'"),
        ("rating", {"response": "a", "answer": 9}, "whole numbers within 1..7, got 9"),
        ("rating", {"response": "a", "answer": {"tone": 3}}, "the dimensions are quality"),
        ("rating", {"response": "a", "answer": "five"}, "A gold answer cannot be read"),
        ("thumbs", {"response": "a", "answer": "up"}, "A gold answer cannot be read"),
        ("pairwise", {"responses": ["a", "b", "c"], "answer": "a"}, "a pairwise is about 2 outputs, the row has 3"),
        ("ranking", {"responses": ["a", "b"], "answer": [1]}, "one rank an output"),
    ],
)
def test_a_wrong_gold_row_is_refused(tmp_path: Path, kind: str, row: dict[str, Any], said: str):
    (tmp_path / "gold.jsonl").write_text(json.dumps({"prompt": "g", **row}))
    assert said in refused(write(tmp_path, ROWS, kind=kind, gold={"data": "gold.jsonl"}))


def test_gold_of_a_table_is_read_as_values(tmp_path: Path):
    (tmp_path / "gold.csv").write_text("prompt,response,answer\ng,h,5\n")
    assert load_task(write(tmp_path, ROWS, gold={"data": "gold.csv"})).gold[0].gold == 5


def test_tokens_by_line(tmp_path: Path):
    path = tmp_path / "t.txt"
    path.write_text("# who\nana 0123456789abcdef # first\n\nbea fedcba9876543210\n")
    assert read_tokens(path) == {"0123456789abcdef": "ana", "fedcba9876543210": "bea"}
    path.write_text("ana 0123456789abcdef\nbea 0123456789abcdef\n")
    with pytest.raises(ConfigError, match="given twice .*line 2"):
        read_tokens(path)


@given(count=st.integers(0, 200), seed=st.integers(0, 2**40))
def test_a_shuffle_is_an_order_that_repeats(count: int, seed: int):
    assert sorted(shuffled(count, "x", seed)) == list(range(count))
    assert shuffled(count, "x", seed) == shuffled(count, "x", seed)


def test_shuffles_stay_what_they_are():
    """The recorded seed must give the same order in every version."""
    assert shuffled(10, "queue", 0, "p-1") == [3, 1, 7, 4, 9, 5, 0, 2, 6, 8]


def test_the_page_documents_every_option():
    text = (Path(tasks.__file__).parents[2] / "docs" / "feedback_page.md").read_text(encoding="utf-8")
    rows = {row.split("`")[1]: row for row in text.splitlines() if row.startswith("| `")}
    for name, info in TaskConfig.model_fields.items():
        assert name in rows, name
        if isinstance(info.default, (bool, int, str)) and info.default != "":
            assert f"`{str(info.default).lower()}`" in rows[name], name
