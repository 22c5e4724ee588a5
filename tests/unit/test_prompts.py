"""Prompt files in four formats, their errors, the held-out split, and which prompts a step gets."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from align.config import PromptsConfig
from align.errors import DataError
from align.prompts import PromptSet, load_prompts, split_heldout, training_and_heldout

ROWS = [
    {"prompt": "a cat, asleep", "image": "one.png", "style": "oil"},
    {"prompt": 'a "dog"', "image": "", "style": "ink"},
    {"prompt": "eine Käse-Ecke 🙂", "image": "one.png", "style": ""},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "one.png")
    (tmp_path / "p.txt").write_text("".join(row["prompt"] + "\n" for row in ROWS), encoding="utf-8")
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    csv = 'prompt,image,style\n"a cat, asleep",one.png,oil\n"a ""dog""",,ink\neine Käse-Ecke 🙂,one.png,\n'
    (tmp_path / "p.csv").write_text(csv, encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "p.parquet")
    return tmp_path


def refused(path: Path, content: bytes, **options: str) -> str:
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_prompts(path, **options)
    return str(caught.value).replace(str(path), "FILE")


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv", "p.parquet"])
def test_four_formats_hold_the_same_prompts(folder: Path, name: str):
    assert list(load_prompts(folder / name)) == [row["prompt"] for row in ROWS]


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.parquet"])
def test_tables_bring_images_and_metadata(folder: Path, name: str):
    prompts = load_prompts(folder / name, image_column="image")
    assert prompts.images == (folder / "one.png", None, folder / "one.png")
    assert prompts.metadata == ({"style": "oil"}, {"style": "ink"}, {"style": ""})
    chosen = prompts.select([1])
    assert (chosen.prompts, chosen.images, chosen.metadata) == (('a "dog"',), (None,), ({"style": "ink"},))


def test_other_columns_by_name(folder: Path):
    (folder / "q.csv").write_text("caption,prompt\nx,y\n")
    prompts = load_prompts(folder / "q.csv", prompt_column="caption")
    assert prompts.prompts == ("x",) and prompts.metadata == ({"prompt": "y"},)


def test_windows_files(tmp_path: Path):
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbfa cat\r\na dog\r\n")
    assert load_prompts(path).prompts == ("a cat", "a dog")


def test_a_line_separator_inside_a_prompt_is_not_a_new_line(tmp_path: Path):
    path = tmp_path / "p.txt"
    path.write_text("a\u2028cat\na\x0bdog\n", encoding="utf-8")
    assert len(load_prompts(path)) == 2


def test_iterables_are_prompts_too():
    assert load_prompts(["a", "b"]).prompts == ("a", "b")
    assert load_prompts({"prompt": f"{i}", "n": i} for i in range(2)).metadata == ({"n": 0}, {"n": 1})
    with pytest.raises(DataError, match=r"A prompt is empty \(given prompts, item 1"):
        load_prompts(["a", "  "])
    with pytest.raises(DataError, match="There is no prompt"):
        load_prompts([])


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("p.txt", b"a cat\n\na dog\n", "A line is empty (FILE, line 2)"),
        ("p.txt", b"a cat\n   \n", "A line is empty (FILE, line 2)"),
        ("p.txt", b"a cat\n\n", "A line is empty (FILE, line 2)"),
        ("p.txt", b"", "There is no prompt (FILE)"),
        ("p.txt", b"a cat\na caf\xe9\n", "not UTF-8 text (FILE, line 2): byte 0xe9 at offset 11"),
        ("p.txt", b"\xef\xbb\xbfa\n\xff", "line 2): byte 0xff at offset 5"),
        ("p.txt", "a cat".encode("utf-16"), "it starts like UTF-16. Save the file as UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "A line is not JSON (FILE, line 2)"),
        ("p.jsonl", b'{"prompt": "a"}\n"b"\n', "not an object with named fields (FILE, line 2): found 'b'"),
        ("p.jsonl", b'{"promt": "a"}\n', "has no field 'prompt' (FILE, line 1). Did you mean 'promt'?"),
        ("p.jsonl", b'{"prompt": 3}\n', "A prompt is not text (FILE, line 1, field 'prompt'): found 3"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": ""}\n', "A prompt is empty (FILE, line 2, field 'prompt')"),
        ("p.jsonl", b'{"prompt": null}\n', "A prompt is empty (FILE, line 1, field 'prompt')"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b"}\n', "A line is empty (FILE, line 2)"),
        ("p.csv", b"caption\na cat\n", "has no field 'prompt' (FILE, line 2). Choose one of: caption"),
        (
            "p.csv",
            b"prompt,style\na cat, asleep,oil\n",
            "does not fit the header (FILE, line 2): 3 cells for 2 columns",
        ),
        ("p.csv", b"prompt,prompt\na,b\n", "names two columns alike (FILE, line 1)"),
        ("p.csv", b"prompt,x\na,b\n\n", "A line is empty (FILE, line 3)"),
        ("p.csv", b'prompt\n"a cat\n', "A file is not CSV (FILE, line 2)"),
        ("p.csv", b"prompt\n", "There is no prompt (FILE)"),
        ("p.parquet", b"PAR1 not really", "A file is not Parquet, or is damaged (FILE)"),
        ("p.docx", b"x", "unknown format (FILE): it ends in '.docx'"),
        ("p", b"x", "its name has no ending"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path: Path, name: str, content: bytes, sentence: str):
    message = refused(tmp_path / name, content)
    assert sentence in message and "\n" not in message


def test_bad_images_are_refused(folder: Path):
    path = folder / "q.jsonl"
    assert "no such image (FILE, line 1, field 'image')" in refused(
        path, b'{"prompt": "a", "image": "two.png"}', image_column="image"
    )
    (folder / "two.png").write_bytes((folder / "one.png").read_bytes()[:-20])
    assert "An image cannot be read" in refused(path, b'{"prompt": "a", "image": "two.png"}', image_column="image")
    (folder / "two.png").write_text("no image")
    assert "An image cannot be read" in refused(path, b'{"prompt": "a", "image": "two.png"}', image_column="image")
    assert "not given as a path" in refused(path, b'{"prompt": "a", "image": 3}', image_column="image")
    assert "no field 'imag'" in refused(path, b'{"prompt": "a", "image": 3}', image_column="imag")


def test_files_that_are_not_there(tmp_path: Path):
    for name in ("no.txt", "no.parquet", "digits"):
        with pytest.raises(DataError, match="There is no such"):
            load_prompts(tmp_path / name)
    with pytest.raises(DataError, match="folder"):
        load_prompts(tmp_path)


def test_duplicates_are_counted_up_to_case_and_spaces():
    assert load_prompts(["a cat", "A  cat ", "a dog", "a cat"]).duplicates == 2


# --- the held-out split -----------------------------------------------------------------------------

words = st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=30)


@settings(max_examples=200, deadline=None)
@given(words, st.floats(0.01, 0.6), st.integers(0, 3))
def test_no_prompt_is_on_both_sides_and_none_is_lost(texts: list[str], fraction: float, seed: int):
    prompts = load_prompts(texts)
    distinct = len(texts) - prompts.duplicates
    if max(1, round(fraction * distinct)) >= distinct:
        with pytest.raises(DataError, match="Too few prompts"):
            split_heldout(prompts, fraction, seed)
        return
    train, heldout = split_heldout(prompts, fraction, seed)
    assert Counter(train) + Counter(heldout) == Counter(texts)
    assert not {" ".join(t.split()).casefold() for t in train} & {" ".join(t.split()).casefold() for t in heldout}
    assert len(heldout) - heldout.duplicates == max(1, round(fraction * distinct))


@settings(max_examples=50, deadline=None)
@given(st.permutations([f"prompt {i}" for i in range(12)]))
def test_the_split_does_not_depend_on_order_but_on_the_seed(texts: list[str]):
    reference = split_heldout(load_prompts([f"prompt {i}" for i in range(12)]), 0.25, 1)
    assert [set(part) for part in split_heldout(load_prompts(texts), 0.25, 1)] == [set(part) for part in reference]
    assert any(set(split_heldout(load_prompts(texts), 0.25, s)[1]) != set(reference[1]) for s in range(2, 6))


def test_training_and_heldout_follow_the_config(folder: Path):
    (folder / "held.txt").write_text("a bird\n")
    files = PromptsConfig(path=str(folder / "p.txt"), heldout_path=str(folder / "held.txt"))
    train, heldout = training_and_heldout(files)
    assert (len(train), heldout.prompts) == (3, ("a bird",))
    (folder / "held.txt").write_text("a bird\nA CAT,  asleep\n")
    with pytest.raises(DataError, match="1 held-out prompt is also trained on"):
        training_and_heldout(files)
    builtin = {"digits": lambda: [f"{i}" for i in range(10)]}
    train, heldout = training_and_heldout(PromptsConfig(path="digits", heldout_fraction=0.2), builtin=builtin)
    assert (len(train), len(heldout)) == (8, 2)
    train, heldout = training_and_heldout(PromptsConfig(path="digits", heldout_fraction=0.0), builtin=builtin)
    assert train == heldout
    table = PromptsConfig(path=str(folder / "p.csv"), prompt_column="style", image_column="image")
    with pytest.raises(DataError, match="line 4, field 'style'"):
        training_and_heldout(table)


# --- which prompts a step gets ----------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20), st.integers(1, 25), st.integers(0, 5), st.integers(0, 40))
def test_steps_are_full_distinct_and_reproducible(size: int, count: int, seed: int, step: int):
    prompts = PromptSet(tuple(f"p{i}" for i in range(size)))
    batch = prompts.at(step, count, seed)
    assert batch == prompts.at(step, count, seed) and len(batch) == count
    repeats = Counter(batch).values()
    assert max(repeats) <= -(-count // size)
    if count >= size:
        assert set(batch) == set(prompts) and max(repeats) - min(repeats) <= 1


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 30), st.integers(1, 10), st.integers(0, 3), st.integers(0, 4))
def test_an_epoch_visits_no_prompt_twice(size: int, count: int, seed: int, epoch: int):
    prompts = PromptSet(tuple(f"p{i}" for i in range(size)))
    per_epoch = max(1, size // count)
    seen = [
        p
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)
        for p in prompts.at(step, min(count, size), seed)
    ]
    assert len(seen) == len(set(seen))


def test_epochs_and_seeds_shuffle_anew_and_favour_no_prompt():
    prompts = PromptSet(tuple(f"p{i}" for i in range(24)))
    assert prompts.at(0, 10, 0) != prompts.at(2, 10, 0) and prompts.at(0, 10, 0) != prompts.at(0, 10, 1)
    counts = Counter(p for step in range(2400) for p in prompts.at(step, 10, 0))
    assert len(counts) == 24 and max(abs(n - 1000) for n in counts.values()) < 5 * (1200 * (20 / 24) * (4 / 24)) ** 0.5


@pytest.mark.parametrize(("step", "count"), [(-1, 1), (0, 0)])
def test_impossible_steps_are_refused(step: int, count: int):
    with pytest.raises(DataError, match="A step needs"):
        PromptSet(("a",)).at(step, count, 0)
