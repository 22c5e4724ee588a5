"""Dry runs of all that trains: what the run itself refuses is refused, and the same things are said."""

from __future__ import annotations

import json

import pytest
import torch

from align import checkpoint
from align.cli import main
from align.config import load_config, save_config
from align.sitting import data_files

TWO = ["--launch", "torchrun", "--nproc", "2"]
FIT = "trainer: fit\nname: taste\nsteps: 3\ndata: {{paths: [{data}]}}\nmodel: {model}\n"


@pytest.fixture
def fits(tmp_path):
    """A fit of a head on words, and one of a classifier's weights."""
    rows = [{"prompt": f"p{i // 2}", "completion": f"text {i}", "label": bool(i % 2)} for i in range(80)]
    data = tmp_path / "thumbs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, model in (("words", "{}"), ("classifier", f"{{backbone: classifier, path: {tmp_path}}}")):
        (tmp_path / f"{name}.yaml").write_text(FIT.format(data=data, model=model))
    return tmp_path


def folder(tmp_path, source):
    """The folder of a run that was only begun."""
    made = tmp_path / "begun"
    made.mkdir()
    save_config(load_config(source), made / "config.yaml")
    return str(made)


def refused(capsys, *arguments):
    capsys.readouterr()
    code = main([*arguments, "--dry-run"])
    return capsys.readouterr().err if code == 2 else f"code {code}"


def said(capsys, *arguments):
    capsys.readouterr()
    assert main([*arguments, "--dry-run", "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("recipe", ["digits/smoke", "kto/smoke"])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--deepspeed", "zero9"], "There are no DeepSpeed settings 'zero9'"),
        (["--deepspeed", "zero2"], "ZeRO needs a launcher"),
        (["--fsdp"], "FSDP2 needs several processes"),
    ],
)
def test_an_engine_that_cannot_be_is_refused_without_a_launcher_too(capsys, tmp_path, recipe, flags, words):
    assert words in refused(capsys, "train", recipe, "--out", str(tmp_path / "run"), *flags)
    assert words in refused(capsys, "resume", folder(tmp_path, recipe), *flags)


def test_settings_that_contradict_the_config_are_refused_before_a_launch(capsys, tmp_path):
    settings = tmp_path / "ds.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 7.5}))
    launch = ["--launch", "deepspeed", "--deepspeed", str(settings), "--out", str(tmp_path / "run")]
    assert "gradient_clipping is 7.5" in refused(capsys, "train", "kto/smoke", *launch)
    assert main(["train", "kto/smoke", *launch]) == 2 and not (tmp_path / "run").exists()


def test_a_fit_that_cannot_be_shared_is_refused_by_fit_and_by_resume(capsys, fits):
    words, classifier = str(fits / "words.yaml"), str(fits / "classifier.yaml")
    out, own = ["--out", str(fits / "run")], folder(fits, words)
    assert "Unknown launcher 'slurm'" in refused(capsys, "fit", classifier, *out, "--launch", "slurm")
    for verb in (["fit", words, *out], ["resume", own]):
        assert "Frozen embeddings are fitted in one process" in refused(capsys, *verb, *TWO)
        assert "ZeRO needs a launcher" in refused(capsys, *verb, "--deepspeed", "zero2")
    assert not (fits / "run").exists()


def test_protocols_are_compared_in_one_process(capsys, tmp_path):
    run = folder(tmp_path, "peering/simulated")
    assert "one process (--launch)" in refused(capsys, "resume", run, *TWO)
    assert main(["resume", run, "--deepspeed", "zero2"]) == 2


def test_a_folder_of_another_run_is_refused(capsys, tmp_path):
    run = folder(tmp_path, "digits/smoke")
    changed = ["train", "digits/smoke", "optimizer.lr=0.5", "--out", run]
    assert "0.5 now" in (said_of_it := refused(capsys, *changed)) and "--fork" in said_of_it
    assert said(capsys, *changed, "--fork")["command"].endswith("--fork --json -")


def test_all_that_trains_says_the_same_things(capsys, fits):
    out = str(fits / "run")
    runs = [
        ["train", "digits/smoke", "--out", out], ["train", "kto/smoke", "--out", out],
        ["train", "digits/nft", "--out", out], ["train", "rluf/moderate", "--out", out],
        ["fit", str(fits / "classifier.yaml"), "--out", out], ["resume", folder(fits, fits / "classifier.yaml")],
    ]  # fmt: skip
    for run in runs:
        alone, two = said(capsys, *run), said(capsys, *run, *TWO)
        assert {"kind", "name", "trainer", "steps", "findings", "valid", "out", "command"} <= set(alone) == set(two)
        assert alone["command"] == f"align {' '.join(run)} --json -"
        assert two["command"].endswith(f"--module align.cli {' '.join(run)} --json -")
    peering = said(capsys, "peering", "peering/simulated", "--out", out)
    assert (peering["out"], peering["trainer"], peering["answers"]) == (out, "peering", "simulated")
    fitted = said(capsys, *runs[-1])
    assert fitted["observations"] == {"thumb": 80} and sum(fitted["parts"].values()) == 80
    assert not (fits / "run").exists()


def test_a_fit_is_not_told_of_a_flag_that_it_lacks(capsys, fits):
    begun = folder(fits, fits / "words.yaml")
    said_of_it = refused(capsys, "fit", str(fits / "words.yaml"), "steps=9", "--out", begun)
    assert "steps: 3 there, 9 now" in said_of_it and "--fork" not in said_of_it


def test_the_record_names_the_file_that_a_fit_is_measured_on(fits):
    """Beside the one that it learns from."""
    other = fits / "other.jsonl"
    other.write_text((fits / "thumbs.jsonl").read_text())
    config = load_config(fits / "words.yaml", [f"split.heldout_path={other}"])
    assert [row["file"] for row in data_files(config)] == [str(fits / "thumbs.jsonl"), str(other)]


@pytest.mark.parametrize(
    ("recipe", "builds"),
    [
        ("digits/smoke", "align.diffusion.digits.build_digits"),
        ("kto/smoke", "trainers.language_model.tiny_model"),
    ],
)
def test_the_plan_of_an_export_builds_no_embedded_model(capsys, tmp_path, monkeypatch, recipe, builds):
    """Of a base that align builds itself, the name is enough."""
    run = folder(tmp_path, recipe)
    (tmp_path / "begun" / "run.json").write_text("{}")
    checkpoint.save(f"{run}/checkpoints", 3, {"model": {"weight": torch.zeros(1)}}, {})
    monkeypatch.setattr(builds, lambda *_, **__: pytest.fail("the base model was built"))
    planned = said(capsys, "export", run, "--to", "full", "--out", str(tmp_path / "out"))
    assert (planned["base"], planned["step"]) == (load_config(recipe).model.path, 3)


def test_a_folder_of_runs_is_none_and_names_them(capsys, tmp_path):
    for i in range(7):
        (tmp_path / f"run{i}").mkdir()
        for name in ("config.yaml", "run.json"):
            (tmp_path / f"run{i}" / name).write_text("{}")
    (tmp_path / "notes").mkdir()
    for verb in ("sample", "evaluate", "resume", "report", "export"):
        more = ["--to", "peft", "--out", str(tmp_path / "out")] if verb == "export" else []
        text = refused(capsys, verb, str(tmp_path), *more)
        assert "This is not a run folder" in text and f"{tmp_path}/run0, " in text and "run4, or 2 more" in text, verb
        assert "run5" not in text and "notes" not in text


@pytest.mark.parametrize(
    ("recipe", "change", "words"),
    [
        ("digits/smoke", "rewards.0.name=nowhere:mine", "'nowhere:mine' cannot be loaded (nowhere:mine): No module"),
        ("digits/smoke", "rewards.0={name: regex, args: {pattern: a}}", "'regex' scores texts: the model makes images"),
        ("digits/smoke", "heldout_rewards.0={name: videoalign}", "'videoalign' scores videos: the model makes images"),
        ("digits/smoke", "rewards.0={name: threshold, args: {at: 1, reward: length}}", "'threshold' scores texts"),
        ("rluf/moderate", "rewards.love={name: jpeg}", "'jpeg' scores images: the model makes texts"),
    ],
)
def test_rewards_that_cannot_be_are_refused(capsys, tmp_path, recipe, change, words):
    out = tmp_path / "run"
    assert words in refused(capsys, "train", recipe, change, "--out", str(out))
    assert main(["check", recipe, change]) == 2 and words in capsys.readouterr().out
    if recipe == "rluf/moderate":
        assert main(["train", recipe, change, "--out", str(out)]) == 2 and "scores images" in capsys.readouterr().err


def test_images_that_are_not_there_are_named_before_a_fit(capsys, tmp_path):
    names = [f"{i}.png" for i in range(40)]
    rows = [{"prompt": f"p{i}", "response": name, "label": bool(i % 2)} for i, name in enumerate(names)]
    (tmp_path / "thumbs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "fit.yaml"
    config.write_text(
        f"trainer: fit\nname: taste\ndata: {{paths: [{tmp_path}/thumbs.jsonl], media: image}}\n"
        "model: {backbone: digits}\n"
    )
    assert "40 of 40 are missing. Say in which folder" in refused(capsys, "fit", str(config))
    for name in names[1:]:
        (tmp_path / name).touch()
    said_of_it = f"Some images are not there ({tmp_path}/0.png): 1 of 40 are missing. Put them back, or leave out"
    assert said_of_it in refused(capsys, "fit", str(config))
    assert main(["check", str(config)]) == 2 and said_of_it in capsys.readouterr().err
