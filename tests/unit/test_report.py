"""The report page: right numbers, nothing from the network, everything escaped, and a page of any half-written run."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from markupsafe import Markup

from align.errors import ConfigError
from align.reports.charts import HEIGHT, WIDTH, Series, line_chart, sheet, stacked_chart
from align.reports.page import brief, duration, estimate, moment, number, percent, signed
from align.reports.training import charts_of, read_run, write_report
from align.reports.verdict import change_text, judge, outcome
from align.tracking import RunLog, save_grid
from scripts.plot_runs import picture

EVIL = '<script>alert("x")</script> & <img src=x onerror=1>'
PROMPTS = ["a handwritten seven", "a bold handwritten three", "a thin handwritten zero", EVIL]
CONFIG = """\
# align config, resolved; values 0123456789abcdef
about: "DanceGRPO on handwritten digits: legible, and of the weight the prompt asks for"  # configs/digits/demo.yaml:1
trainer: dance_grpo  # configs/digits/demo.yaml:2
name: demo  # configs/digits/demo.yaml:3
seed: 7  # command line
steps: 60  # configs/digits/demo.yaml:5
prompts_per_step: 10  # configs/digits/demo.yaml:6
group_size: 16  # configs/digits/demo.yaml:7
model:
  path: digits  # configs/digits/demo.yaml:10
  train: lora  # default
  dtype: fp32  # default
  lora:
    rank: 16  # configs/digits/demo.yaml:12
sampler:
  kernel: dance_sde  # default
  eta: 0.3  # configs/digits/demo.yaml:14
  guidance: "off"  # default
objective:
  clip_range: 0.0001  # default
  logprob_reduction: mean  # default
rewards:
  - name: digits/legibility  # configs/digits/demo.yaml:20
    weight: 1.0  # default
  - name: digits/ink_band  # configs/digits/demo.yaml:21
    weight: 1.0  # default
"""


def digit_images(rng: np.random.Generator, labels: list[int], noise: float) -> np.ndarray:
    """Real handwritten digits `[B, 1, 16, 16]` under some noise: what a sample grid looks like."""
    from sklearn.datasets import load_digits

    data = load_digits()
    picks = [rng.choice(np.flatnonzero(data.target == label)) for label in labels]
    images = np.kron(data.images[picks] / 16.0, np.ones((1, 2, 2)))
    return (images + noise * rng.standard_normal(images.shape)).clip(0, 1)[:, None]


def interval(mean: float, half: float, n: int) -> dict[str, float | int]:
    return {"mean": mean, "ci_low": mean - half, "ci_high": mean + half, "n": n}


def make_run(folder: Path, *, steps: int = 60, done: int | None = None, hacked: bool = False, seed: int = 0) -> Path:
    """Write the files a run of `steps` steps leaves when it ends after `done` of them; by None it completes."""
    rng, log, last = np.random.default_rng(seed), RunLog(folder), steps if done is None else done
    sign = -1.0 if hacked else 1.0
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "samples").mkdir()
    (folder / "samples" / "prompts.json").write_text(json.dumps({"prompts": PROMPTS, "columns": 6}))
    rewards = [
        {"name": name, "weight": 1.0, "identity": f"{i:016x}", "definition": text, "range": "(-inf, 0]"}
        for i, (name, text) in enumerate(
            [("digits/legibility", "log p(prompted digit | image)"), ("digits/ink_band", "-|ink - band| < .1")],
            start=171,
        )
    ]
    log.write_run(
        {
            "align_version": "0.1.0", "trainer": "dance_grpo", "name": "demo", "seed": 7,
            "started": "2026-11-24T10:00:00+00:00",
            "finished": None if done else "2026-11-24T10:04:12+00:00", "status": "running" if done else "complete",
            "steps_planned": steps, "rewards": rewards, "heldout_rewards": rewards,
            "model": {"path": "digits", "family": "sd3", "train": "lora", "parameters": 812_000,
            "trained_parameters": 36_864},
            "ledger": {
                "feq_per_sample": 22, "rollout_forwards": 10, "train_forwards": 6, "updates_per_step": 2,
                "trained_steps": 6,
                "solver_steps": 10, "latent_dim": 64, "clip_nats": 0.0064, "clip_range": 1e-4, "k": 2, "c": 1,
            },
            "versions": {"python": "3.11.2", "torch": "2.13.0", "diffusers": "0.42.1"},
            "machine": {"platform": "Linux", "device": "cpu", "cpus": "2"},
        }
    )  # fmt: skip

    def evaluate(step: int, n: int) -> None:
        rise = 1 - math.exp(-step / 18)
        heldout = -1.04 + sign * 0.62 * rise
        log.evaluation(
            {
                "step": step, "sampler": "ode, 20 steps", "n": n,
                "heldout": interval(heldout, 0.06, n), "reward": interval(-0.98 + 0.6 * rise, 0.05, n),
                "components": {
                    "heldout/digits/legibility": interval(0.8 * heldout, 0.05, n),
                    "heldout/digits/ink_band": interval(0.2 * heldout, 0.02, n),
                    "reward/digits/legibility": interval(-0.8 + 0.5 * rise, 0.05, n),
                },
                "heldout_accuracy": 0.871 + sign * 0.1 * rise, "diversity": 0.241 - 0.02 * rise,
            }
        )  # fmt: skip

    def grid(step: int) -> None:
        rise = 1 - math.exp(-step / 18)
        images = digit_images(np.random.default_rng(3), [d for d in (7, 3, 0, 1) for _ in range(6)], 0.35 * (1 - rise))
        save_grid(folder / "samples" / f"step_{step:06d}.png", images, columns=6, labels=PROMPTS)

    evaluate(0, 2000)
    grid(0)
    for step in range(1, last + 1):
        rise = 1 - math.exp(-step / 18)
        reward = -1.0 + 0.58 * rise + 0.03 * rng.standard_normal()
        seconds = {
            "time/rollout": 0.72,
            "time/decode": 0.05,
            "time/reward": 0.09,
            "time/train": 1.1,
            "time/optimizer": 0.03,
        }
        seconds = {name: value * (1 + 0.06 * rng.standard_normal()) for name, value in seconds.items()}
        seconds["time/log"] = 0.9 if step % 10 == 0 else 0.01
        log.metrics(
            {
                "step": step, "seconds": sum(seconds.values()) + 0.02, "cpu_seconds": 3.9, "seconds_total": 2.1 * step,
                "cpu_seconds_total": 3.9 * step, "samples": 160, "reward": reward, "reward_ci_low": reward - 0.05,
                "reward_ci_high": reward + 0.05, "reward/digits/legibility/mean": 0.8 * reward,
                "reward/digits/ink_band/mean": 0.2 * reward, "reward/digits/legibility/std": 0.4, "valid_share": 1.0,
                "zero_std_groups": 0, "invalid_members": 0, "dropped_groups": 0, "loss": -2e-6 * rng.standard_normal(),
                "grad_norm": abs(0.4 + 0.05 * rng.standard_normal()), "lr": 1e-3,
                "first_ratio_error": 0.0 if step % 3 else 6e-8,
                "ratio_mean": 1.0, "ratio_min": 0.9994, "ratio_max": 1.0007,
                "clip_share_low": 0.03 + 0.01 * rng.random(),
                "clip_share_high": 0.02 + 0.01 * rng.random(), "approx_kl": 3e-8 * rng.random(), "updates": 2,
                "feq": 3520,
                "feq_total": 3520 * step, "feq_per_sample": 22, "peak_memory_mb": 912.4, **seconds,
            }
        )  # fmt: skip
        if step % 10 == 0:
            grid(step)
            evaluate(step, 2000 if step == steps else 256)
            if hacked and step >= 30:
                log.warn(
                    step,
                    "alarm",
                    "drift",
                    "Reward hacking: the trained reward changed by +0.480 while the held-out reward fell",
                )
    log.warn(1, "note", "batch", f"Tiles of 96 were chosen for {EVIL}")
    if done is None:
        summary = {
            "reward_before": interval(-0.98, 0.05, 2000), "reward_after": interval(-0.4, 0.05, 2000),
            "heldout_before": interval(-1.042, 0.06, 2000),
            "heldout_after": interval(-1.042 + sign * 0.6213, 0.06, 2000),
            "heldout_gain": interval(sign * 0.6213, 0.041, 2000), "heldout_accuracy_before": 0.871,
            "heldout_accuracy_after": 0.871 + sign * 0.0931, "diversity_before": 0.241, "diversity_after": 0.2217,
            "first_ratio_error_max": 6e-8, "feq_per_sample": 22, "cpu_seconds": 412.0, "seconds": 252.0,
            "peak_memory_mb": 912.4,
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


VOID = {"meta", "img", "input", "br", "link", "hr"}


class Page(HTMLParser):
    """Collects tags, attributes and visible text, and refuses tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.words.append(data)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = make_run(tmp_path_factory.mktemp("runs") / "demo")
    return folder, write_report(folder).read_text(encoding="utf-8")


def test_page_tells_the_outcome_in_numbers_of_the_files(complete: tuple[Path, str]):
    text = Page(complete[1]).text
    assert "Held-out reward rose from −1.042 to −0.421 (+0.621, 95 % CI +0.580 to +0.662, 2,000 paired samples)" in text
    assert "held-out accuracy went from 87.1 % to 96.4 %, diversity from 0.241 to 0.222 (92 % of the base)" in text
    assert (
        "22 F_eq a sample, 211,200 F_eq in all, 4 min 12 s, 6 min 52 s of processor" in text
        and "10 + 2 × 6 = 22 F_eq" in text
    )
    assert (
        "9,600" in text
        and 'title="configs/digits/demo.yaml:12">demo.yaml:12<' in complete[1]
        and "00000000000000ab" in text
        and "2.13.0" in text
    )


def test_page_needs_nothing_from_elsewhere(complete: tuple[Path, str]):
    page = Page(complete[1])
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "base")
        for name in ("src", "href", "data", "action", "poster"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp", complete[1])
    assert "default-src 'none'" in complete[1]


def test_prompts_and_messages_are_escaped(complete: tuple[Path, str]):
    page = Page(complete[1])
    assert "<script>alert" not in complete[1] and "<img src=x" not in complete[1]
    assert page.text.count('<script>alert("x")</script>') >= 3  # both prompt columns and the warning
    assert sum(tag == "script" for tag, _ in page.tags) == 1


def test_sheets_stand_side_by_side_without_their_painted_labels(complete: tuple[Path, str]):
    folder, text = complete
    images = [a for tag, a in Page(text).tags if tag == "img"]
    assert [a["data-step"] for a in images if "data-step" in a] == ["0", "10", "20", "30", "40", "50", "60"]
    assert {(a["width"], a["height"]) for a in images} == {(str(6 * 66 + 2), str(4 * 66 + 2))}
    sheet = read_run(folder).sheets[0]
    assert (sheet.rows, sheet.columns) == (4, 6)


def test_every_metric_is_explained(complete: tuple[Path, str]):
    from align.reports.glossary import explain

    for key in read_run(complete[0]).metrics[-1]:
        assert explain(key).endswith("."), key
        assert f">{key}</td>" in complete[1]


def test_charts_hold_the_points_of_the_files(complete: tuple[Path, str]):
    charts = [json.loads(a["data-chart"]) for _, a in Page(complete[1]).tags if "data-chart" in a]
    series = {s["name"]: s["p"] for chart in charts for s in chart["series"]}
    metrics = read_run(complete[0]).metrics
    assert [(p[0], p[2]) for p in series["rollouts"]] == [(r["step"], r["reward"]) for r in metrics]
    assert [p[0] for p in series["held-out reward"]] == [0, 10, 20, 30, 40, 50, 60]
    assert {"low", "high", "gradient norm", "approximate KL", "held-out accuracy", "rollout", "digits/ink_band"} <= set(
        series
    )


@pytest.mark.parametrize(("ends", "share", "text"), [
    ((0.1174, 0.2346), False, "X rose from 0.412 to 0.588 (+0.176, 95 % CI +0.117 to +0.235"),
    ((-0.004, 0.356), False, "X did not change measurably: it went from 0.41 to 0.59 (+0.18, 95 % CI −0.00 to +0.36"),
    ((-2.0, 22.0), False, "X did not change measurably: it went from 0 to 1 (+0, 95 % CI −2 to +22"),
    ((0.17599, 0.17601), False, "X rose from 0.412000 to 0.588000 (+0.176000, 95 % CI +0.175990 to +0.176010"),
    ((0.1174, 0.2346), True, "X rose from 41.2 % to 58.8 % (+17.6 points, 95 % CI +11.7 to +23.5 points"),
    ((0.0, 0.352), True, "X did not change measurably: it went from 41 % to 59 % (+18 points, 95 % CI +0 to +35 points"),
    ((None, None), True, "X went from 41.2 % to 58.8 % (+17.6 points"),
])  # fmt: skip
def test_a_change_is_told_as_far_as_its_interval_supports_it(ends, share: bool, text: str):
    gain = {"mean": 0.176, "ci_low": ends[0], "ci_high": ends[1]}
    said = change_text("X", {"mean": 0.412}, {"mean": 0.588}, gain, share=share)
    assert said.replace("\u00a0", " ") == text
    less = {"mean": -0.176, "ci_low": -0.2346, "ci_high": -0.1174}
    assert change_text("X", {"mean": 0.588}, {"mean": 0.412}, less).startswith("X fell from 0.588 to 0.412 (−0.176")


def test_hacked_run_is_called_so(tmp_path: Path):
    text = Page(write_report(make_run(tmp_path / "hacked", hacked=True)).read_text(encoding="utf-8")).text
    assert "Alarm: the reward was hacked" in text and "Held-out reward fell from −1.042 to −1.663" in text
    assert "Held-out accuracy fell by 9.3 points" in text


def test_run_killed_at_step_3_gives_a_page(tmp_path: Path):
    folder = make_run(tmp_path / "dead", done=3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    text = Page(write_report(folder).read_text(encoding="utf-8")).text
    assert "No verdict yet" in text and "step 3 of 60" in text and "1 line of metrics.jsonl could not be read" in text


def test_run_stopped_halfway_compares_its_evaluations(tmp_path: Path):
    files = read_run(make_run(tmp_path / "half", done=30))
    found = outcome(files.summary, files.evaluations)
    first, last = files.evaluations[0]["heldout"], files.evaluations[-1]["heldout"]
    assert found.change == pytest.approx(last["mean"] - first["mean"]) and not found.paired
    assert found.gain["ci_high"] - found.change == pytest.approx(0.06 * math.sqrt(2))
    assert judge(found, [], files.record, files.metrics[-1], has_heldout=True).kind == "good"


@pytest.mark.parametrize("kept", [["run.json"], ["config.yaml"], ["metrics.jsonl"], ["run.json", "evaluation.jsonl"]])
def test_any_part_of_a_run_gives_a_page(tmp_path: Path, kept: list[str]):
    folder = make_run(tmp_path / "whole", done=20)
    part = tmp_path / "part"
    part.mkdir()
    for name in kept:
        (part / name).write_bytes((folder / name).read_bytes())
    assert "part" in Page(write_report(part).read_text(encoding="utf-8")).text or "run.json" in kept


def test_broken_files_are_named_on_the_page(tmp_path: Path):
    folder = make_run(tmp_path / "broken", done=10)
    (folder / "run.json").write_text("[1, 2")
    (folder / "config.yaml").write_text("a: [")
    (folder / "samples" / "step_000010.png").write_bytes(b"not a picture")
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "reward": null, "time/train": "soon"}\n{"step": 2, "reward": 1.5}\n'
    )
    text = Page(write_report(folder).read_text(encoding="utf-8")).text
    for words in (
        "run.json is missing or cannot be read",
        "config.yaml is",
        "samples/step_000010.png is not a readable",
    ):
        assert words in text


@pytest.mark.parametrize("value", [None, "x", [], {}, [1], True, -1, 1e300, [[1]], '"><script>'])
def test_a_value_of_the_wrong_kind_never_costs_the_page(tmp_path: Path, value: object):
    folder = make_run(tmp_path / "odd", done=2)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(dict.fromkeys(record, value)))
    for name in ("metrics", "evaluation", "warnings"):
        row = json.loads((folder / f"{name}.jsonl").read_text().splitlines()[-1])
        with (folder / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps({**dict.fromkeys(row, value), "step": 10}) + "\n")
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert sum(tag == "script" for tag, _ in page.tags) == 1


def test_not_a_run_folder(tmp_path: Path):
    with pytest.raises(ConfigError, match="there is no such folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no run\.json, config\.yaml or metrics\.jsonl"):
        write_report(tmp_path)


def summary(
    low: float, high: float, *, reward: float = 1.0, accuracy: float = 0.9, diversity: float = 0.2
) -> dict[str, object]:
    gain = {"mean": (low + high) / 2, "ci_low": low, "ci_high": high, "n": 100}
    return {
        "heldout_before": interval(0, 0.1, 100), "heldout_after": interval(gain["mean"], 0.1, 100),
        "heldout_gain": gain,
        "reward_before": interval(0, 0.1, 100), "reward_after": interval(reward, 0.1, 100),
        "heldout_accuracy_before": 0.9,
        "heldout_accuracy_after": accuracy, "diversity_before": 0.2, "diversity_after": diversity,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "warnings", "kind"),
    [
        (summary(0.1, 0.3), [], "good"),
        (summary(-0.01, 0.3), [], "flat"),
        (summary(-0.3, -0.1, reward=-1.0), [], "bad"),
        (summary(-0.3, -0.1, reward=1.0), [], "alarm"),
        (summary(0.1, 0.3, accuracy=0.885), [], "mixed"),
        (summary(0.1, 0.3, accuracy=0.895), [], "good"),
        (summary(0.1, 0.3, diversity=0.159), [], "mixed"),
        (summary(0.1, 0.3), [{"step": 60, "level": "alarm", "code": "drift", "message": "m"}], "alarm"),
        (summary(0.1, 0.3), [{"step": 50, "level": "alarm", "code": "drift", "message": "m"}], "good"),
        (summary(0.1, 0.3), [{"step": 60, "level": "warning", "code": "drift", "message": "m"}], "good"),
    ],
)
def test_verdict(found: dict[str, object], warnings: list[dict[str, object]], kind: str):
    result = outcome(found, [{"step": 0}, {"step": 60}])
    verdict = judge(result, warnings, {"status": "complete"}, {"step": 60}, has_heldout=True)
    assert verdict.kind == kind
    said = " ".join(verdict.caveats)
    assert ("fell" in said) == (kind == "mixed")
    assert ("m (step 60)" in said) == (kind == "alarm" and bool(warnings))
    assert ("An alarm went off at step 50 and not again" in said) == (bool(warnings) and warnings[0]["step"] == 50)


def test_a_run_without_a_heldout_reward_says_so():
    verdict = judge(outcome(summary(0.1, 0.3), []), [], {"status": "complete"}, {"step": 60}, has_heldout=False)
    assert "cannot show that it is being gamed" in verdict.caveats[0]


def test_few_heldout_prompts_are_told():
    for prompts, told in ((9, True), (10, False)):
        found = outcome(summary(0.1, 0.3), [{"step": 0, "prompts": prompts}, {"step": 60, "prompts": prompts}])
        caveats = judge(found, [], {"status": "complete"}, {"step": 60}, has_heldout=True).caveats
        assert any("Only 9 held-out prompts stand behind this" in caveat for caveat in caveats) == told


def test_numbers_are_set_alike():
    assert [number(v) for v in (0, -0.5, 1234.5, 6e-8, None, float("nan"), -3e9)] == [
        "0.000",
        "−0.500",
        "1,234.500",
        "6.0e−8",
        "–",
        "–",
        "−3.0e9",
    ]
    assert [brief(v) for v in (22, 0.0001, 0.9, 126.04, 1234567.0, 7.3067e-9, -0.00253)] == [
        "22", "0.0001", "0.9", "126", "1,234,567", "7.307e−9", "−0.00253",
    ]  # fmt: skip
    assert (signed(0.25), signed(-0.25), percent(0.0312), signed(None)) == ("+0.250", "−0.250", "3.1\u00a0%", "–")
    assert [duration(v).replace("\u00a0", " ") for v in (4.25, 192.7, 7500)] == ["4.2 s", "3 min 12 s", "2 h 05 min"]
    assert moment("2026-11-24T10:04:12+00:00") == "2026-11-24 10:04 UTC" and moment("yesterday") == "yesterday"
    assert (
        estimate({"mean": 1.0, "ci_low": 0.5, "ci_high": 1.5}, 1) == "1.0 [0.5, 1.5]"
        and estimate({"mean": 1.0}, 1) == "1.0"
    )


def path_points(svg: str, kind: str) -> list[list[tuple[float, float]]]:
    d = re.search(rf'<path class="{kind} c0" d="([^"]*)"', svg)
    assert d is not None
    return [[tuple(map(float, p.split())) for p in run.split("L")] for run in d[1].split("M")[1:]]


def test_line_chart_maps_equal_steps_to_equal_pixels_and_breaks_at_gaps():
    svg = line_chart([Series("a", [0, 1, 2, 3, 4], [0.0, 1.0, 2.0, None, 4.0])], from_zero=True)
    (first, second, third), (last,) = path_points(svg, "line")
    assert second[0] - first[0] == pytest.approx(third[0] - second[0], abs=0.11)
    assert first[1] - second[1] == pytest.approx(second[1] - third[1], abs=0.11) and first[1] == 212
    assert last[1] - first[1] == pytest.approx(4 * (second[1] - first[1]), abs=0.5)


def test_log_chart_spaces_decades_evenly_and_sets_zero_on_its_foot():
    svg = line_chart([Series("a", [0, 1, 2, 3], [1e-8, 1e-7, 1e-6, 0.0])], log=True)
    ((a, b, c, zero),) = path_points(svg, "line")
    assert a[1] - b[1] == pytest.approx(b[1] - c[1], abs=0.11) and a[1] - b[1] > 10 and zero[1] == 212
    assert ">0</text>" in svg


def test_charts_of_nothing_are_empty_and_of_one_point_or_constants_are_drawn():
    nothing = Series("a", [1, 2], [None, float("nan")])
    assert line_chart([nothing]) == "" and stacked_chart([nothing]) == ""
    for y in ([3.0], [0.0], [-1e-30], [1e12]):
        assert "<circle" in line_chart([Series("a", [5], y)]) and "nan" not in line_chart([Series("a", [5], y)])
    assert "<circle" in line_chart([Series("a", [5], [0.0])], log=True)


def test_a_sheet_stands_alone_row_by_row_with_the_curves_and_colours_of_its_charts():
    names = ["first & best", "second", *(f"a long name of curve {i}" for i in range(3))]
    many = line_chart([Series(name, [0, 1], [0.0, 1.0], [0.0, 0.9], [0.1, 1.1]) for name in names])
    one = line_chart([Series("only", [0, 1], [2.0, 1.0], colour=6)])
    root = ElementTree.fromstring(sheet([("many", many), ("one", one), ("<none>", Markup())]))
    space = "{http://www.w3.org/2000/svg}"
    panels = root.findall(f"{space}g")
    heads = [panel.find(f"{space}text").text for panel in panels]
    assert heads == ["many", "one", "<none>"]
    at = [tuple(map(float, re.findall(r"[\d.]+", panel.get("transform")))) for panel in panels]
    assert at[0] == (0, 0) and at[1] == (WIDTH + 20, 0) and at[2][0] == 0 and at[2][1] > HEIGHT
    keys = [text for text in root.iter(f"{space}text") if text.get("class").startswith("key ")]
    assert [(key.text, key.get("class")) for key in keys] == [(name, f"key c{i}") for i, name in enumerate(names)]
    ends = [float(key.get("x")) + 5 * len(key.text) for key in keys]
    assert max(ends) < WIDTH and len({key.get("y") for key in keys}) == 2  # the long ones go on in a second line
    lines = [path.get("class") for path in root.iter(f"{space}path") if path.get("class").startswith("line")]
    style = root.find(f"{space}style").text
    assert lines == [f"line c{i}" for i in (*range(5), 6)] and all(
        f".{name.replace(' ', '.')}" in style for name in lines
    )


def test_the_charts_of_a_run_are_those_of_its_page(complete: tuple[Path, str]):
    run, page = complete
    found = charts_of(read_run(run))
    assert {"Reward in training", "Diversity"} <= {chart["title"] for chart in found}
    assert all(chart["svg"] in page for chart in found)
    beside = picture([run, run], ["Diversity", "Held-out reward"])
    assert beside.count(f"{run.name}: Diversity</text>") == beside.count(f"{run.name}: Held-out reward</text>") == 2
    with pytest.raises(SystemExit, match="No run has a chart 'Beauty'; there are: Reward in training"):
        picture([run], ["Beauty"])


def test_stacked_chart_adds_up():
    svg = stacked_chart([Series("a", [0, 1], [1.0, 1.0]), Series("b", [0, 1], [1.0, 3.0])])
    a, b = (
        [tuple(map(float, p.split(","))) for p in found.split()]
        for found in re.findall(r'<polygon class="area c\d" points="([^"]*)"', svg)
    )
    assert b[2:] == a[1::-1]  # the foot of b is the top of a, drawn back
    assert (212 - b[1][1]) == pytest.approx(4 * (212 - a[1][1]), abs=0.3)


def test_chart_texts_are_escaped():
    svg = line_chart([Series('"><b>', [1, 2], [1.0, 2.0]), Series("c", [1], [1.0])], reference=(1.5, "<u>"))
    assert "<b>" not in svg and "<u>" not in svg
    assert Page(svg).open == []
