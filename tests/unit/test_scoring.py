"""`align score`: pairing, resuming, kills, broken files, and the table and page that come out."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from align.cli import main
from align.errors import ConfigError, DataError, RewardError
from align.reports.scores import write_contact_sheet
from align.scoretable import components_of, read_scores, write_scores
from align.types import Scores
from rewards.base import RewardCard
from rewards.journal import Journal, Scored
from rewards.scoring import journal_of, score_files
from rewards.sources import Source, load, natural, read_sources

ROOT = Path(__file__).parents[2]


class Mean:
    """Mean pixel, and what it was asked to score."""

    names = ("mean",)
    card = RewardCard("mean", "mean pixel", "0 to 1")

    def __init__(self, version: str = "1", media: str = "image"):
        self.version, self.seen = version, []
        self.card = RewardCard("mean", "mean pixel", "0 to 1", media)

    def identity(self):
        return f"mean{self.version}"

    def score(self, samples):
        self.seen += list(samples.prompts)
        if samples.texts is not None:
            values = np.array([float(len(t)) for t in samples.texts])[:, None]
        else:
            values = samples.images.mean((1, 2, 3)).double().numpy()[:, None]
        errors = ["a red prompt" if p == "red" else "" for p in samples.prompts]
        valid = np.array([[not e] for e in errors])
        return Scores(values, valid, self.names, tuple(errors), {"truncated": [len(p) > 8 for p in samples.prompts]})


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Twelve images, each as bright as its number, and a prompt for each."""
    folder = tmp_path / "made"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (8 + 8 * (i % 2), 8), (20 * i,) * 3).save(folder / f"img_{i}.png")
    (folder / "notes.md").write_text("no image")
    (tmp_path / "p.txt").write_text("".join(f"p{i}\n" for i in range(12)))
    return tmp_path


def score(made: Path, reward, out: str = "s.parquet", **options):
    return score_files([reward], made / out, prompts=made / "p.txt", images=made / "made", **options)


# --- what is scored ---------------------------------------------------------------------------------


def test_images_pair_with_prompts_in_the_natural_order_of_their_names(made: Path):
    summary = score(made, Mean(), batch_size=5)
    rows = read_scores(made / "s.parquet")
    assert [Path(row["image"]).name for row in rows] == [f"img_{i}.png" for i in range(12)]
    assert [row["prompt"] for row in rows] == [f"p{i}" for i in range(12)]
    assert [row["mean"] for row in rows] == pytest.approx([20 * i / 255 for i in range(12)], abs=1e-6)
    assert all(row["valid"] and row["error"] is None and row["identity"] == "mean1" for row in rows)
    assert summary["rows"] == 12 and summary["missing"] == 0 and summary["new_scores"] == 12
    assert summary["components"]["mean"]["mean"] == pytest.approx(110 / 255, abs=1e-6)
    assert sorted(["b10", "b2", "a", "B1", "10", "9"], key=natural) == ["9", "10", "a", "B1", "b2", "b10"]


def test_a_table_names_its_images(made: Path):
    (made / "made" / "t.jsonl").write_text(
        '{"prompt": "x", "image": "img_3.png", "tag": 1}\n{"prompt": "y", "image": "img_1.png"}\n'
    )
    beside = read_sources("images", made / "made" / "t.jsonl")
    assert (
        beside[0] == Source("x", made / "made" / "img_3.png", None, {"tag": 1}) and beside[1].image.name == "img_1.png"
    )
    (made / "t.csv").write_text("prompt,file\nx,img_5.png\n")
    named = read_sources("images", made / "t.csv", made / "made", image_column="file")
    assert named[0].image == made / "made" / "img_5.png"


def test_images_alone_and_texts(made: Path):
    score_files([Mean()], made / "s.csv", images=made / "made")
    assert [row["prompt"] for row in read_scores(made / "s.csv")][:2] == [None, None]
    chat = [{"role": "assistant", "content": "hi"}]
    (made / "t.jsonl").write_text(
        json.dumps({"prompt": "x", "completion": "four"})
        + "\n"
        + json.dumps({"prompt": "y", "completion": chat})
        + "\n"
    )
    score_files([Mean(media="text")], made / "t.parquet", prompts=made / "t.jsonl")
    rows = read_scores(made / "t.parquet")
    assert [row["mean"] for row in rows] == [4.0, 1.0] and json.loads(rows[1]["completion"]) == chat
    assert list(rows[0]) == ["completion", "prompt", "mean", "truncated", "valid", "error", "identity"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompts": "short.txt", "images": "made"}, r"short\.txt.*2 prompts but 12 images"),
        ({"prompts": "p.txt"}, "no images to score.*--images DIR"),
        ({"images": "nowhere"}, r"no such folder of images \(.*nowhere"),
        ({"images": "empty"}, "holds no images"),
        ({"prompts": "hole.jsonl"}, r"names no image in its field 'image' \(.*hole\.jsonl, row 2\)"),
        ({"prompts": "p.txt", "images": "made", "image_column": "file"}, r"field 'file' \(.*p\.txt, row 1\)"),
        ({"prompts": "none.txt", "images": "made"}, "no such"),
    ],
)
def test_bad_input_names_file_and_row(made: Path, options, sentence):
    (made / "short.txt").write_text("a\nb\n")
    (made / "empty").mkdir()
    (made / "hole.jsonl").write_text('{"prompt": "x", "image": "made/img_1.png"}\n{"prompt": "y"}\n')
    paths = {k: v if k == "image_column" else made / v for k, v in options.items()}
    with pytest.raises(DataError, match=sentence):
        score_files([Mean()], made / "s.csv", **paths)
    assert not (made / "s.csv").exists() and not journal_of(made / "s.csv").exists()


def test_texts_need_a_completion_in_every_row(made: Path):
    (made / "t.jsonl").write_text('{"prompt": "x", "completion": "a"}\n{"prompt": "y", "completion": 7}\n')
    with pytest.raises(DataError, match=r"t\.jsonl, row 2\).*7"):
        score_files(["exact_match"], made / "s.csv", prompts=made / "t.jsonl")
    with pytest.raises(DataError, match="no completion in a field 'answer'"):
        score_files(["exact_match"], made / "s.csv", prompts=made / "t.jsonl", completion_column="answer")


@pytest.mark.parametrize(
    ("rewards", "out", "sentence"),
    [
        ([], "s.csv", "nothing to score with"),
        (["jpegg"], "s.csv", "Did you mean 'jpeg'"),
        (["jpeg"], "s.xlsx", r"Parquet, CSV or JSONL.*\.xlsx"),
        (["jpeg", "exact_match"], "s.csv", "jpeg scores images, exact_match scores texts"),
        (["videoalign"], "s.csv", "Only images and texts"),
        (["jpeg", "jpeg"], "s.csv", "one column 'jpeg'"),
        (["jpeg"], "p.jsonl", "would replace the prompts"),
        (["jpeg"], "theirs.csv", "its journal does not"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_scored(made: Path, rewards, out, sentence):
    (made / "p.jsonl").write_text('{"prompt": "x", "image": "made/img_1.png"}\n')
    (made / "theirs.csv").write_text("precious\n")
    with pytest.raises(ConfigError, match=sentence):
        score_files(rewards, made / out, prompts=made / "p.jsonl")
    assert (made / "theirs.csv").read_text() == "precious\n"


# --- broken files -----------------------------------------------------------------------------------


def test_images_that_cannot_be_read_are_missing_with_the_reason(made: Path):
    folder = made / "made"
    (folder / "img_0.png").write_bytes(b"no image at all")
    whole = (folder / "img_1.png").read_bytes()
    (folder / "img_1.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGBA", (8, 8), (9, 9, 9, 40)).save(folder / "img_2.png")
    Image.new("I;16", (8, 8), 40_000).save(folder / "img_3.png")
    (folder / "img_4.png").write_bytes(b"")
    reward = Mean()
    summary = score(made, reward)
    rows = read_scores(made / "s.parquet")
    assert [row["valid"] for row in rows] == [False] * 5 + [True] * 7 and summary["missing"] == 5
    assert all(row["mean"] is None for row in rows[:5])
    reasons = ["cannot be read", "cannot be read", "transparent in parts", "more than 8 bits", "cannot be read"]
    assert all(reason in row["error"] and "0x" not in row["error"] for reason, row in zip(reasons, rows, strict=False))
    assert sorted(reward.seen) == sorted(f"p{i}" for i in range(5, 12))


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [("L", 102, 0.4), ("1", 1, 1.0), ("P", 0, 0.0), ("RGBA", (51, 51, 51, 255), 0.2), ("LA", (51, 255), 0.2), ("CMYK", (0, 0, 0, 0), 1.0)],
)  # fmt: skip
def test_images_of_other_modes_are_what_they_show(tmp_path, mode, colour, expected):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new(mode, (4, 6), colour).save(path)
    found = load(Source("p", path))
    assert found.problem == "" and found.pixels.shape == (6, 4, 3)
    assert found.pixels.mean() / 255 == pytest.approx(expected, abs=2e-3)


def test_a_photo_is_turned_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 6)).save(tmp_path / "x.jpg", exif=exif)
    assert load(Source("p", tmp_path / "x.jpg")).pixels.shape == (4, 6, 3)


def test_a_named_image_that_is_not_there_is_missing(made: Path):
    (made / "t.jsonl").write_text('{"prompt": "x", "image": "gone.png"}\n{"prompt": "y", "image": "made/img_1.png"}\n')
    score_files([Mean()], made / "s.jsonl", prompts=made / "t.jsonl")
    rows = read_scores(made / "s.jsonl")
    assert [row["valid"] for row in rows] == [False, True] and "No such file" in rows[0]["error"]


def test_nothing_scored_is_an_error_and_the_table_says_why(made: Path):
    (made / "p.txt").write_text("red\n" * 12)
    with pytest.raises(RewardError, match="Not one sample could be scored.*a red prompt"):
        score(made, Mean())
    assert all(not row["valid"] for row in read_scores(made / "s.parquet"))


# --- resuming ---------------------------------------------------------------------------------------


def test_what_is_unchanged_is_not_scored_again(made: Path):
    score(made, Mean())
    again = Mean()
    summary = score(made, again)
    assert again.seen == [] and summary["new_scores"] == 0 and summary["components"]["mean"]["n"] == 12
    Image.new("RGB", (8, 8), (255,) * 3).save(made / "made" / "img_4.png")
    changed = Mean()
    score(made, changed)
    assert changed.seen == ["p4"] and read_scores(made / "s.parquet")[4]["mean"] == 1.0
    (made / "p.txt").write_text((made / "p.txt").read_text().replace("p7\n", "q7\n"))
    asked = Mean()
    score(made, asked)
    assert asked.seen == ["q7"]
    other = Mean(version="2")
    score(made, other)
    assert len(other.seen) == 12 and {row["identity"] for row in read_scores(made / "s.parquet")} == {"mean2"}
    fresh = Mean()
    score(made, fresh, overwrite=True)
    assert len(fresh.seen) == 12


def test_a_second_reward_is_scored_alone(made: Path):
    score(made, Mean())
    again = Mean()
    score_files([again, "jpeg"], made / "s.parquet", prompts=made / "p.txt", images=made / "made")
    rows = read_scores(made / "s.parquet")
    assert again.seen == [] and components_of(rows) == ("mean", "jpeg") and rows[0]["identity"].startswith("mean1+")


def test_what_is_missing_is_tried_again_and_one_content_is_scored_once(made: Path):
    (made / "p.txt").write_text("red\n" + "".join(f"p{i}\n" for i in range(1, 12)))
    Image.open(made / "made" / "img_2.png").save(made / "made" / "img_4.png")
    (made / "p.txt").write_text((made / "p.txt").read_text().replace("p4\n", "p2\n"))
    first, second = Mean(), Mean()
    score(made, first)
    assert first.seen.count("p2") == 1
    score(made, second)
    assert second.seen == ["red"]
    rows = read_scores(made / "s.parquet")
    assert rows[0]["error"] == "a red prompt" and rows[2]["mean"] == rows[4]["mean"]


def test_order_and_batches_do_not_change_the_table(made: Path):
    tables = []
    for size in (1, 4, 32):
        score(made, Mean(), out=f"s{size}.jsonl", batch_size=size)
        tables.append((made / f"s{size}.jsonl").read_text())
    assert tables[0] == tables[1] == tables[2]


SLOW = '''
import os, time
import numpy as np
from align.types import Scores
from rewards.base import RewardCard

class Slow:
    """Mean pixel; notes each prompt it scores."""
    names = ("slow",)
    card = RewardCard("slow", "mean pixel", "0 to 1", components=("slow",))
    def identity(self):
        return "slow1"
    def score(self, samples):
        for prompt in samples.prompts:
            time.sleep(float(os.environ.get("SLOW", "0")))
            with open(os.environ["SEEN"], "a") as file:
                file.write(prompt + "\\n")
        values = samples.images.mean((1, 2, 3)).double().numpy()[:, None]
        return Scores(values, np.isfinite(values), self.names)
'''


def test_a_kill_loses_nothing_that_was_acknowledged(made: Path):
    """SIGKILL in the middle: what the bar counted is in the journal, and the next sitting scores only the rest."""
    (made / "slow_reward.py").write_text(SLOW)
    seen, out = made / "seen.txt", made / "s.jsonl"
    command = [sys.executable, "-m", "align.cli", "score", "--reward", "slow_reward:Slow", "--prompts", str(made / "p.txt"),
               "--images", str(made / "made"), "--out", str(out), "--batch-size", "2"]  # fmt: skip
    paths = os.pathsep.join([str(made), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "SEEN": str(seen), "SLOW": "0.3"}
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not seen.exists() or len(seen.read_text().splitlines()) < 5:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    shown = child.communicate()[1].decode()
    assert child.returncode == -signal.SIGKILL and not out.exists()
    counted = max(int(n) for n in re.findall(r"(\d+)/12", shown))
    kept = [json.loads(line) for line in journal_of(out).read_text().splitlines() if '"values"' in line]
    assert 2 <= counted <= len(kept) < 12
    before = seen.read_text().splitlines()
    with journal_of(out).open("a") as file:
        file.write('{"key": "torn')  # what a kill within a write leaves
    done = subprocess.run(command, env={**environment, "SLOW": "0"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    after = seen.read_text().splitlines()[len(before) :]
    assert not set(after) & set(before[: len(kept)]) and len(after) == 12 - len(kept)
    rows = read_scores(out)
    assert [row["slow"] for row in rows] == pytest.approx([20 * i / 255 for i in range(12)], abs=1e-6)
    third = subprocess.run(command, env={**environment, "SLOW": "0"}, capture_output=True, text=True, check=False)
    assert third.returncode == 0 and seen.read_text().splitlines()[len(before) :] == after


# --- the journal ------------------------------------------------------------------------------------


def test_a_journal_is_one_processs_and_no_other_file(tmp_path: Path):
    path = tmp_path / "x.journal.jsonl"
    entry = Scored("k", "i", (1.0, None), "b: no score")
    with Journal(path) as journal:
        journal.describe([{"identity": "i", "name": "x"}])
        journal.append([entry])
        with pytest.raises(ConfigError, match="Another process"):
            Journal(path)
    size = path.stat().st_size
    with Journal(path) as journal:
        assert journal.find("k", "i") == entry and not entry.complete and journal.find("k", "j") is None
        journal.describe([{"identity": "i", "name": "x"}])
    assert path.stat().st_size == size
    path.write_text('{"prompt": "mine"}\n')
    with pytest.raises(ConfigError, match="not the journal"):
        Journal(path)
    assert path.read_text() == '{"prompt": "mine"}\n'


@pytest.mark.parametrize("cut", range(2, 40, 3))
def test_a_journal_torn_anywhere_is_read_up_to_there(tmp_path: Path, cut: int):
    path = tmp_path / "x.journal.jsonl"
    with Journal(path) as journal:
        journal.describe([{"identity": "i"}])
        journal.append([Scored("a", "i", (1.0,)), Scored("b", "i", (2.0,))])
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(path) as journal:
        assert journal.find("a", "i") is not None and journal.find("b", "i") is None
        journal.append([Scored("c", "i", (3.0,))])
    with Journal(path) as journal:
        assert set(journal.scored) == {("a", "i"), ("c", "i")}


# --- the table --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_table_reads_back_as_it_was(tmp_path: Path, suffix):
    nasty = 'a "quoted", prompt\nof two lines \u2028 é'
    rows = [
        {"image": "a.png", "prompt": nasty, "x": 0.1 + 0.2, "y/z": -1e-9, "truncated": True, "valid": True, "error": None, "identity": "i"},
        {"image": "b.png", "prompt": None, "x": None, "y/z": 3.0, "truncated": False, "valid": False, "error": "x: no", "identity": "i"},
    ]  # fmt: skip
    write_scores(tmp_path / f"s{suffix}", rows)
    assert read_scores(tmp_path / f"s{suffix}") == rows and components_of(rows) == ("x", "y/z")
    assert [p.name for p in tmp_path.iterdir()] == [f"s{suffix}"]


# --- the page ---------------------------------------------------------------------------------------


def test_the_page_holds_everything_and_reaches_for_nothing(made: Path):
    (made / "p.txt").write_text("".join(f"<b>p{i}</b> & more\n" for i in range(11)) + "red\n")
    score_files([Mean(), "jpeg"], made / "s.parquet", prompts=made / "p.txt", images=made / "made")
    page = write_contact_sheet(made / "s.parquet", count=3).read_text()
    assert write_contact_sheet(made / "s.parquet") == made / "s.parquet.html"
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", page) and "http://" not in page and "https://" not in page
    assert "&lt;b&gt;p1&lt;/b&gt; &amp; more" in page and "<b>p1</b>" not in page
    best, worst = page.index(">Best<"), page.index(">Worst<")
    assert (
        best < page.index("img_10.png", best) < page.index("img_9.png", best) < worst < page.index("img_0.png", worst)
    )
    assert ">Highest<" in page  # of jpeg, which is no quality
    assert "a red prompt" in page[page.index(">Missing<") :] and "mean1" in page and page.count('class="hist"') == 2
    assert page.count("data:image/") == 2 * 6


def test_the_page_of_few_texts_and_of_nothing_scored(tmp_path: Path):
    row = {
        "completion": "x < y",
        "prompt": "p",
        "x": 1.0,
        "truncated": True,
        "valid": True,
        "error": None,
        "identity": "i",
    }
    write_scores(tmp_path / "s.csv", [row, {**row, "x": None, "valid": False, "error": "why not"}])
    page = write_contact_sheet(tmp_path / "s.csv").read_text()
    assert "All, the highest first" in page and "x &lt; y" in page and "cut short" in page and "why not" in page
    write_scores(tmp_path / "t.jsonl", [{**row, "x": None, "valid": False, "error": "why not"}])
    assert "why not" in write_contact_sheet(tmp_path / "t.jsonl").read_text()


# --- the command ------------------------------------------------------------------------------------


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["score", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_scores_and_says_what_it_did(made: Path, capsys):
    asked = ["--prompts", str(made / "p.txt"), "--images", str(made / "made"), "--out", str(made / "s.csv")]
    code, out, _ = run(capsys, "--reward", "jpeg", *asked, "--dry-run", "--json", str(made / "plan.json"))
    assert code == 0 and "12 images" in out and "img_0.png for 'p0'" in out and not (made / "s.csv").exists()
    assert json.loads((made / "plan.json").read_text())["resumes"] is False
    config = made / "c.yaml"
    config.write_text("name: whatever\nrewards:\n  - {name: jpeg, args: {direction: incompressible}}\n")
    code, out, err = run(capsys, "--config", str(config), *asked, "--json", str(made / "s.json"))
    found = json.loads((made / "s.json").read_text())
    assert code == 0 and "12/12" in err and found["rows"] == 12 and found["components"]["jpeg"]["min"] > 0
    assert Path(found["page"]).is_file() and f"{made / 's.csv'}.html" in out
    assert "resumes  True" in run(capsys, "--config", str(config), *asked, "--dry-run")[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "nothing to score with"),
        (["--reward", "jpeg"], "no images to score"),
        (["--reward", "jpg", "--images", "x"], "Unknown reward 'jpg'. Did you mean 'jpeg'?"),
        (["--reward", "length", "--prompts", "t.jsonl"], "needs low and high"),
        (["--config", "c.yaml", "--images", "x"], "Did you mean 'rewards.0.args'"),
        (["--config", "none.yaml", "--images", "x"], "no such file"),
        (["--reward", "jpeg", "--images", "made", "--prompts", "bad.jsonl"], "bad.jsonl, line 2"),
        (["--reward", "jpeg", "--images", "x", "--batch-size", "0"], "must be 1 or more"),
    ],
)
def test_mistakes_are_one_sentence_and_code_2(made: Path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(made)
    (made / "t.jsonl").write_text('{"prompt": "x", "completion": "y"}\n')
    (made / "bad.jsonl").write_text('{"prompt": "x"}\n{"prompt": \n')
    (made / "c.yaml").write_text("rewards:\n  - {name: jpeg, arg: {}}\n")
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and sentence in err and err.count("\n") == 1


def test_a_reward_named_by_its_place_scores_what_its_card_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "of_mine.py").write_text(
        "from rewards import RewardCard, register\n\n\n"
        "@register(RewardCard('dark', '1 minus mean pixel', '0 to 1', media='image'))\n"
        "def dark(samples):\n    return [1 - float(image.mean()) for image in samples.images]\n"
    )
    Image.new("RGB", (4, 4), (51, 51, 51)).save(tmp_path / "a.png")
    (tmp_path / "made.jsonl").write_text(json.dumps({"prompt": "a", "image": "a.png"}) + "\n")
    assert main(["score", "--reward", "of_mine:dark", "--prompts", "made.jsonl", "--out", "s.jsonl"]) == 0
    assert json.loads((tmp_path / "s.jsonl").read_text())["dark"] == pytest.approx(0.8)
    assert main(["rewards", "describe", "of_mine:dark"]) == 0
    assert "1 minus mean pixel" in capsys.readouterr().out
    assert main(["score", "--reward", "of_mine:drak", "--prompts", "made.jsonl", "--out", "t.jsonl"]) == 2
    assert "of_mine has no 'drak'. Did you mean 'dark'?" in capsys.readouterr().err
    assert main(["score", "--reward", "of_yours:dark", "--prompts", "made.jsonl", "--out", "t.jsonl"]) == 2
    assert "No module named 'of_yours'. Start in the folder of that file" in capsys.readouterr().err
