"""`align feedback match-prompts`: a file in, the same file with weights out, which a run reads."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict

import numpy as np
import pytest

from align.cli import main
from align.errors import ConfigError, DataError, ModelError
from align.seeding import permutation
from trainers.prompt_embedding import embed_with_model, embed_words
from trainers.prompt_matching import match_file, match_prompts

TOPICS = {
    "food": ["recipe", "cook", "bake", "bread", "salt", "oven", "soup", "flour", "dinner", "taste"],
    "code": ["python", "function", "error", "loop", "class", "compile", "string", "bug", "array", "stack"],
}
COMMON = ["please", "how", "can", "the", "my", "with", "about", "make", "fix", "now"]


def topic_rows(count=800, share_up=0.8, share_down=0.2):
    """Thumbs up are about food with probability .8, thumbs down with .2: the density ratio is 4 and 1/4."""
    for i in range(count):
        up = i % 2 == 0
        part = permutation(100, "topic", i)[0] / 100
        topic = "food" if part < (share_up if up else share_down) else "code"
        words = [(TOPICS[topic] if j % 2 else COMMON)[permutation(10, "word", i, j)[0]] for j in range(10)]
        yield {"prompt": " ".join(words), "completion": f" {topic}", "label": up, "topic": topic, "big": 2**60 + i}


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_file_gets_the_density_ratio_as_a_column_and_a_run_reads_it(tmp_path, monkeypatch, capsys):
    rows = list(topic_rows())
    source, out = save(tmp_path / "thumbs.jsonl", rows), tmp_path / "made" / "matched.jsonl"
    assert main(["feedback", "match-prompts", str(source), "--out", str(out), "--json", str(tmp_path / "j.json")]) == 0
    text = capsys.readouterr().out
    found = load(out)
    assert [{k: v for k, v in row.items() if k != "udm_weight"} for row in found] == rows
    weights = defaultdict(list)
    for row in found:
        weights[row["topic"], row["label"]].append(row["udm_weight"])
    assert set(weights["food", True] + weights["code", True]) == {1.0}
    assert 2.5 < np.mean(weights["food", False]) < 6 and 0.5 <= np.mean(weights["code", False]) < 0.6

    receipt = json.loads((tmp_path / "made" / "matched.jsonl.matching.json").read_text())
    assert json.loads((tmp_path / "j.json").read_text()) == {**receipt, "receipt": f"{out}.matching.json"}
    down = np.array(weights["food", False] + weights["code", False])
    assert receipt["effective_rows"] == pytest.approx(down.sum() ** 2 / (down**2).sum())
    assert receipt["clamped"] == ((down == 0.5) | (down == 10)).mean()
    counts = {"rows": 800, "up": 400, "down": 400, "fitted_on": {"up": 400, "down": 400}, "seed": 0}
    assert {k: receipt[k] for k in counts} == counts
    # of two rows of different classes 64 % differ in topic the right way round and 4 % the wrong way
    assert receipt["auc_heldout"] == pytest.approx(0.8, abs=0.06) and f"{receipt['auc_heldout']:.3f}" in text
    # the classifier in the receipt gives the weights again
    logit = embed_words([row["prompt"] for row in rows]) @ np.array(receipt["coefficients"]) + receipt["intercept"]
    again = np.where([row["label"] for row in rows], 1, np.clip(np.exp(logit), 0.5, 10))
    np.testing.assert_allclose([row["udm_weight"] for row in found], again, rtol=1e-5)

    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    changes = [f"data.path={out}", "steps=2", "batch_size=8", "microbatch=8", "evaluation.rows=8", "evaluation.every=0"]
    assert main(["train", "bco/smoke", *changes, "--out", str(run)]) == 0
    about = json.loads((run / "run.json").read_text())["tokens"]["row_weights"]
    assert about["up"] == {"mean": 1, "least": 1, "largest": 1, "effective_rows": pytest.approx(360, abs=40)}
    assert about["down"]["least"] == 0.5 and about["down"]["largest"] == pytest.approx(down.max())


def test_the_same_bytes_come_out_again_and_shuffled_rows_keep_their_weights(tmp_path):
    rows = list(topic_rows(200))
    first, again, other = (tmp_path / f"{name}.jsonl" for name in ("first", "again", "other"))
    match_file(save(tmp_path / "a.jsonl", rows), first)
    match_file(tmp_path / "a.jsonl", again)
    assert first.read_bytes() == again.read_bytes()
    match_file(save(tmp_path / "b.jsonl", rows[::-1]), other)
    pairs = zip(load(first), load(other)[::-1], strict=True)
    assert all(a["big"] == b["big"] and a["udm_weight"] == pytest.approx(b["udm_weight"], abs=1e-6) for a, b in pairs)
    match_file(first, first, overwrite=True)  # what was written before is no input
    assert first.read_bytes() == again.read_bytes()


def test_parquet_keeps_its_types_and_csv_its_cells(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in topic_rows(40)]
    table = pyarrow.Table.from_pylist(rows).set_column(
        4, "big", pyarrow.array([i % 100 for i in range(40)], type=pyarrow.int8())
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    match_file(tmp_path / "a.parquet", tmp_path / "b.parquet")
    found = parquet.read_table(tmp_path / "b.parquet")
    assert found.drop_columns(["udm_weight"]).equals(table) and found["udm_weight"].type == pyarrow.float64()

    (tmp_path / "a.csv").write_text("prompt,completion,label\nbake bread,x,1\nfix code,y,0\n")
    match_file(tmp_path / "a.csv", tmp_path / "b.csv")
    with (tmp_path / "b.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [(row["label"], row["prompt"]) for row in found] == [("1", "bake bread"), ("0", "fix code")]
    assert found[0]["udm_weight"] == "1.0" and float(found[1]["udm_weight"]) < 1


def test_pairs_share_their_prompts_and_need_no_matching(tmp_path):
    rows = [{"prompt": row["prompt"], "chosen": "a", "rejected": "b"} for row in topic_rows(60)]
    found = match_file(save(tmp_path / "a.jsonl", rows), tmp_path / "b.jsonl")
    assert (found["up"], found["down"], found["rows"]) == (60, 60, 60)
    weights = [row["udm_weight"] for row in load(tmp_path / "b.jsonl")]
    assert found["auc"] == 0.5 and weights == pytest.approx([0.99999998] * 60, abs=1e-9)


def test_the_heldout_auc_sees_through_a_classifier_that_has_learned_its_rows_by_heart():
    draw = np.random.default_rng(0)
    found = match_prompts(draw.normal(size=(60, 40)), np.arange(60) % 2 == 0)
    assert found.auc > 0.9 and found.auc_heldout < 0.65


def test_rows_of_one_prompt_are_held_out_together():
    """Ten prompts with a label each, told apart by their own dimension: nothing is learned of one from the others."""
    x = np.repeat(np.eye(10), 20, axis=0)
    label = np.repeat(np.arange(10) % 2 == 0, 20)
    together = match_prompts(x, label, prompt=np.repeat(np.arange(10), 20))
    assert match_prompts(x, label).auc_heldout == 1 and together.auc_heldout <= 0.5


def test_a_bag_of_words():
    a, b, ab, aab = embed_words(["Apple", "pear", "pear, APPLE!", "apple pear apple"])
    assert sorted(np.abs(a))[-2:] == [0, 1] and a @ b == 0
    np.testing.assert_allclose(ab, (a + b) / math.sqrt(2))
    twice = 1 + math.log(2)
    np.testing.assert_allclose(aab, (twice * a + b) / math.hypot(twice, 1))
    assert not embed_words(["?!"]).any() and embed_words([]).shape == (0, 512)


def test_a_models_embedding_is_the_mean_hidden_state_whatever_the_batch(tmp_path, monkeypatch):
    import torch
    from transformers import AutoModel, AutoTokenizer

    from trainers.tiny_language import build_tiny

    folder = build_tiny(tmp_path / "model")
    texts = ["Say: red blue", "Say", "cat dog fox owl bee ant cow hen one two"]
    found = embed_with_model(texts, folder, batch=2)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    for row, text in zip(found, texts, strict=True):
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-6)
    source = save(tmp_path / "a.jsonl", topic_rows(200))
    made = match_file(source, tmp_path / "b.jsonl", model=folder)
    assert made["auc_heldout"] > 0.65 and made["embedding"] == str(folder) and len(made["coefficients"]) == 64
    with pytest.raises(ModelError, match="no folder of a transformers model.*bags of words"):
        match_file(source, tmp_path / "c.jsonl", model=tmp_path)


GOOD = [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "c", "completion": "d", "label": False}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD[0]] * 2, "no thumb down.*2 up and 0 down"),
        ([*GOOD, {"completion": "d", "label": False}], "no prompt to match .*line 3, field 'prompt'"),
        ([*GOOD, {"prompt": "a", "completion": "d"}], "no label .*line 3"),
        ([*GOOD, {"prompt": "a", "label": True}], "no completion"),
    ],
)
def test_what_cannot_be_matched_is_refused_and_nothing_written(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        match_file(save(tmp_path / "a.jsonl", rows), tmp_path / "b.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_mistakes_in_the_call_are_refused(tmp_path):
    source = save(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(DataError, match="keeps its format.*Name a .jsonl file"):
        match_file(source, tmp_path / "b.parquet")
    with pytest.raises(DataError, match="a file already.*--overwrite"):
        match_file(source, source)
    with pytest.raises(DataError, match="this is a folder.*to_parquet"):
        match_file(tmp_path, tmp_path / "b.jsonl")
    with pytest.raises(ConfigError, match="both sides of 1.*got 2 and 10"):
        match_file(source, tmp_path / "b.jsonl", low=2)
    scored = save(tmp_path / "s.jsonl", [{"prompt": p, "completion": "b", "score": s} for p, s in (("a", 1), ("c", 5))])
    assert match_file(scored, tmp_path / "t.jsonl", score_threshold=3)["down"] == 1


def test_a_dry_run_counts_and_writes_nothing(tmp_path, capsys):
    source, out = save(tmp_path / "a.jsonl", GOOD), tmp_path / "b.jsonl"
    assert main(["feedback", "match-prompts", str(source), "--out", str(out), "--dry-run"]) == 0
    assert "would match" in capsys.readouterr().out and not out.exists()
