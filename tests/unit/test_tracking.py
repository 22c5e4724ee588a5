"""The run's log survives crashes, resumes and NaN; the progress line says what it should; grids are the images."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from align import tracking
from align.errors import ConfigError, DataError
from align.tracking import (
    Progress,
    RunLog,
    counting,
    progress_line,
    read_jsonl,
    save_grid,
    save_image,
    short_number,
    short_time,
)

ROW = {
    "step": 12, "reward": -0.412, "reward_ci_low": -0.462, "reward_ci_high": -0.362, "valid_share": 1.0,
    "first_ratio_error": 0.0,
    "clip_share_low": 0.02, "clip_share_high": 0.011, "feq_total": 3912.0, "seconds": 2.1,
}  # fmt: skip


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_a_row_is_one_strict_json_line_and_what_is_not_finite_is_null(tmp_path: Path):
    log = RunLog(tmp_path / "new" / "run")
    log.metrics(
        {"step": 1, "a": float("nan"), "b": np.float64("inf"), "c": np.float32(0.5), "d": torch.tensor(3), "e": True}
    )
    (line,) = lines(tmp_path / "new" / "run" / "metrics.jsonl")
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "a": None,
        "b": None,
        "c": 0.5,
        "d": 3,
        "e": True,
    }


@pytest.mark.parametrize(
    "row", [{"a": 1}, {"step": 1.5}, {"step": 1, "a": {"b": 1}}, {"step": 1, "a": [1]}, {"step": 1, "a": object()}]
)
def test_bad_rows_are_refused_and_nothing_is_written(tmp_path: Path, row: dict[str, object]):
    with pytest.raises(DataError):
        RunLog(tmp_path).metrics(row)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_evaluations_nest_and_texts_with_line_separators_stay_one_line(tmp_path: Path):
    log, text = RunLog(tmp_path), "a\nb\u2028c\x85d \ud800 é"
    log.evaluation({"step": 0, "heldout": {"mean": np.float64(1.5), "ci_low": float("nan"), "n": 4}})
    log.warn(0, "note", "n", text)
    assert read_jsonl(tmp_path / "evaluation.jsonl") == (
        [{"step": 0, "heldout": {"mean": 1.5, "ci_low": None, "n": 4}}],
        0,
    )
    rows, bad = read_jsonl(tmp_path / "warnings.jsonl")
    assert (bad, rows[0]["message"]) == (0, text.replace("\ud800", "?"))
    assert rows[0].keys() == {"step", "level", "code", "message"}


@pytest.mark.parametrize("kept", [-1, 0, 3, 7, 99])
def test_truncation_drops_the_steps_a_resumed_run_repeats(tmp_path: Path, kept: int):
    log = RunLog(tmp_path)
    for step in range(8):
        log.metrics({"step": step, "x": step})
        log.warn(step, "warning", "w", "m")
        log.evaluation({"step": step})
    log.truncate_after(kept)
    expected = [s for s in range(8) if s <= kept]
    for name in ("metrics", "warnings", "evaluation"):
        assert [row["step"] for row in read_jsonl(tmp_path / f"{name}.jsonl")[0]] == expected
    log.metrics({"step": kept + 1})
    assert log.read_metrics()[-1] == {"step": kept + 1}
    assert not list(tmp_path.glob("*.writing"))


def test_every_cut_of_the_last_line_is_survived_by_truncation_and_by_appending(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1, "x": 1.5}\n{"step": 2, "x": "\xc3\xa9"}\n'
    first = whole.index(b"\n") + 1
    for cut in range(len(whole) + 1):
        complete = 2 if cut >= len(whole) - 1 else 1 if cut >= first - 1 else 0
        path.write_bytes(whole[:cut])
        RunLog(tmp_path).truncate_after(5)
        assert [r["step"] for r in RunLog(tmp_path).read_metrics()] == [1, 2][:complete], cut
        path.write_bytes(whole[:cut])
        RunLog(tmp_path).metrics({"step": 9})
        rows, bad = read_jsonl(path)
        assert ([r["step"] for r in rows], bad) == ([*[1, 2][:complete], 9], 0), cut


def test_a_broken_line_in_the_middle_is_named_not_dropped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    text = '{"step": 1}\n{"ste\n{"step": 3}\n'
    path.write_text(text)
    with pytest.raises(DataError, match="line 2"):
        RunLog(tmp_path).truncate_after(5)
    assert path.read_text() == text
    assert read_jsonl(path) == ([{"step": 1}, {"step": 3}], 1)


def test_missing_files_are_no_rows(tmp_path: Path):
    log = RunLog(tmp_path)
    log.truncate_after(0)
    assert log.read_metrics() == [] and list(tmp_path.iterdir()) == []


def test_run_json_is_replaced_as_a_whole(tmp_path: Path):
    log = RunLog(tmp_path)
    log.write_run({"status": "running", "long": "x" * 1000, "path": tmp_path, "nan": float("nan")})
    log.write_run({"status": "complete"})
    assert json.loads((tmp_path / "run.json").read_text()) == {"status": "complete"}
    with pytest.raises(DataError):
        log.write_run({"status": object()})
    assert json.loads((tmp_path / "run.json").read_text()) == {"status": "complete"}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_tensorboard_mirrors_numbers_and_forgets_repeated_steps(tmp_path: Path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps in (range(1, 6), range(4, 7)):  # killed after 5, resumed from 3
        log = RunLog(tmp_path, tensorboard=True)
        for step in steps:
            log.metrics({"step": step, "reward": 10.0 * step, "none": float("nan")})
        log.evaluation({"step": steps[-1], "sampler": "ode", "heldout": {"mean": 0.25}})
        log.close()
    found = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(found.Tags()["scalars"]) == {"reward", "evaluation/heldout/mean"}
    assert [(e.step, e.value) for e in found.Scalars("reward")] == [(s, 10.0 * s) for s in range(1, 7)]


def test_absent_tensorboard_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # what an import of an absent package sees
    with pytest.raises(ConfigError, match=r"TensorBoard is not installed.*pip install tensorboard"):
        RunLog(tmp_path, tensorboard=True)
    RunLog(tmp_path).metrics({"step": 1})


def test_grid_holds_the_images_in_order_and_its_geometry(tmp_path: Path):
    images = torch.arange(6, dtype=torch.float32).view(6, 1, 1, 1).expand(6, 1, 4, 5) / 5
    save_grid(tmp_path / "g.png", images, columns=4, scale=2, labels=["first", "second row " * 30])
    with Image.open(tmp_path / "g.png") as opened:
        geometry = json.loads(opened.info["align.grid"])
        pixels = np.asarray(opened)
    assert (geometry["columns"], geometry["rows"], geometry["count"]) == (4, 2, 6)
    body = pixels[:, geometry["left"] :]
    assert body.shape == (2 * 10 + 2, 4 * 12 + 2, 3) and (pixels[:, : geometry["left"]] < 128).any()
    for i in range(6):
        row, column = divmod(i, 4)
        cell = body[2 + row * 10 : 10 + row * 10, 2 + column * 12 : 12 + column * 12]
        assert (cell == 51 * i).all()
    assert (body[12:, 26:] == 255).all()  # no seventh image, and no label over the images


def test_grid_chooses_its_scale(tmp_path: Path):
    for size, expected in ((16, 64), (48, 96), (64, 64), (256, 256), (512, 256)):
        save_grid(tmp_path / "g.png", np.zeros((1, 3, size, size), np.float32), columns=1)
        with Image.open(tmp_path / "g.png") as opened:
            assert opened.size == (expected + 4, expected + 4)


def test_images_are_clipped_rounded_and_coloured(tmp_path: Path):
    image = np.array([[[-1.0, 2.0]], [[0.5, float("nan")]], [[0.1, 1.0]]])
    save_image(tmp_path / "i.png", image)
    with Image.open(tmp_path / "i.png") as opened:
        assert np.asarray(opened).tolist() == [[[0, 128, 26], [255, 0, 255]]]


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (np.zeros((2, 4, 8, 8)), None),
        (np.zeros((3, 8, 8)), None),
        (np.zeros((0, 3, 8, 8)), None),
        (np.zeros((3, 1, 8, 8)), ["a"]),
    ],
)
def test_bad_grids_are_refused(tmp_path: Path, images: np.ndarray, labels: list[str] | None):
    with pytest.raises(DataError):
        save_grid(tmp_path / "g.png", images, columns=2, labels=labels)
    assert list(tmp_path.iterdir()) == []


def test_progress_line_reads_as_documented():
    assert progress_line(ROW, 60, 2.125) == (
        "step 12/60  reward -0.412 ±0.050  valid 100%  ratio-1 0.0e+00  clip 3.1%  F_eq 3.9k  2.12 s/step  ETA 1m42s"
    )
    assert (
        progress_line({"step": 60, "reward": None, "valid_share": float("nan")}, 60, 2.0)
        == "step 60/60  2 s/step  ETA 0s"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_renewed_line_on_a_terminal_and_plain_lines_elsewhere(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "40")
    live, plain = Terminal(), io.StringIO()
    for stream in (live, plain):
        with Progress(60, initial=11, stream=stream) as progress:
            progress.update(ROW)
            progress.update({**ROW, "step": 13})
            progress.update({**ROW, "step": 60})
    assert live.getvalue().count("\n") == 1 and live.getvalue().endswith("\n") and live.getvalue().count("\r") == 3
    assert all(len(part.split("\x1b")[0]) <= 39 for part in live.getvalue().split("\r"))
    assert plain.getvalue().count("\n") == 2 and "\r" not in plain.getvalue() and "\x1b" not in plain.getvalue()
    first, last = plain.getvalue().splitlines()
    assert first.startswith("step 12/60  reward -0.412") and last.startswith("step 60/60"), "none 10 s after the first"
    monkeypatch.setattr(tracking, "PLAIN_SECONDS", 0.0)
    with Progress(60, initial=11, stream=(often := io.StringIO())) as progress:
        progress.update(ROW)
        progress.update({**ROW, "step": 13})
    assert often.getvalue().splitlines()[1].startswith("step 13/60  reward -0.412")


def test_long_work_beside_the_steps_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch):
    counting("evaluated", stream=(brief := io.StringIO()))(5, 10)
    assert brief.getvalue() == "", "nothing of what takes less than PLAIN_SECONDS"
    monkeypatch.setattr(tracking, "PLAIN_SECONDS", 0.0)
    live, plain, silent = Terminal(), io.StringIO(), io.StringIO()
    for stream in (live, plain, silent):
        tell = counting("evaluated", stream=stream, silent=stream is silent)
        tell(500, 2000), tell(2000, 2000)
    assert plain.getvalue().startswith("evaluated  500 of 2,000  ETA ") and plain.getvalue().count("\n") == 1
    assert live.getvalue().startswith("\revaluated  500") and live.getvalue().endswith("\r\x1b[K"), "the line is gone"
    assert silent.getvalue() == ""


def test_progress_of_no_steps_says_nothing():
    stream = Terminal()
    with Progress(5, initial=5, stream=stream):
        pass
    assert stream.getvalue() == ""


def test_short_numbers_and_times():
    assert [short_number(v) for v in (0, 950, 999.7, 3912, 9960, 211_200, 999_800, 1_234_567, 2e9)] == [
        "0", "950", "1.0k", "3.9k", "10k", "211k", "1.0M", "1.2M", "2.0G",
    ]  # fmt: skip
    assert [short_time(v) for v in (-3, 0.4, 59.6, 102, 3599.6, 7500, 277_300)] == [
        "0s",
        "0s",
        "1m00s",
        "1m42s",
        "1h00m",
        "2h05m",
        "3d05h",
    ]
