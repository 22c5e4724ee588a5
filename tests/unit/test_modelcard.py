"""Model cards: of a real tiny run of images and of text, run as they say, under hostile names, and with gaps."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import BUILD, TAKES_IMAGE, VIDEOS, random_run

import tiny
from align.cli import main
from align.commands.export import export_model
from align.config import load_config
from align.errors import CheckpointError, ConfigError
from align.published import licence_of
from align.reports.markdown import code, plain
from align.reports.modelcard import model_card
from align.reports.page import open_sheet
from align.reports.runfiles import read_run
from align.weights import file_sha256
from trainers import trainer_for
from trainers.tiny_language import build_tiny, toy_thumbs

HOSTILE = "m `x` ``y <img src=x onerror=alert(1)> [a](javascript:b) |\n---\n# big"


def front(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def snippet(text: str) -> str:
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


def runs_as_it_says(folder: Path, monkeypatch, leave_out: int = 0) -> dict:
    """Run the lines under Use in the folder of the card, but for the last `leave_out`."""
    lines = snippet((folder / "README.md").read_text()).splitlines()
    monkeypatch.chdir(folder)
    names: dict = {}
    exec("\n".join(lines[: len(lines) - leave_out]), names)  # what a reader of the card would do
    return names


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A run on a model and prompts whose paths would act in Markdown, HTML or YAML."""
    root = tmp_path_factory.mktemp("cards") / HOSTILE
    root.mkdir()
    base = tiny.stable_diffusion(root / "base")
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: <b>mine</b>\n---\nA model.\n")
    (root / f"{HOSTILE}.txt").write_text("a red cat\ntwo dogs\na blue dog\ntwo cats\n")
    config = {
        "name": "cards", "steps": 2, "prompts_per_step": 2, "group_size": 2, "updates_per_step": 1,
        "model": {"path": str(base), "lora": {"rank": 2, "alpha": 4}},
        "prompts": {"path": str(root / f"{HOSTILE}.txt"), "heldout_fraction": 0.5},
        "sampler": {"kernel": "ddim", "eta": 1.0, "solver_steps": 2, "height": 16, "width": 16},
        "trained_steps": {"fraction": 1.0},
        "rewards": [{"name": "jpeg", "args": {"direction": "compressible"}}],
        "heldout_rewards": [{"name": "jpeg"}],
        "evaluation": {"every": 0, "samples": 4, "final_samples": 4, "solver_steps": 2},
        "tracking": {"samples_every": 1}, "checkpoint": {"every": 1, "keep": 2},
    }  # fmt: skip
    trainer_for(load_config(config), out=root / "run").train()
    return root


def test_the_card_of_a_run_of_images(images, tmp_path, monkeypatch):
    record = export_model(images / "run", to="diffusers-lora", out=tmp_path / "lora")
    text = (tmp_path / "lora" / "README.md").read_text()
    assert front(text) == {
        "license": "other", "license_name": "<b>mine</b>", "library_name": "diffusers",
        "pipeline_tag": "text-to-image", "tags": ["align", "dance_grpo", "lora", "diffusers-lora"],
    }  # fmt: skip
    summary = json.loads((images / "run" / "summary.json").read_text())
    digest = hashlib.sha256((images / f"{HOSTILE}.txt").read_bytes()).hexdigest()
    values = (images / "run" / "config.yaml").read_text().splitlines()[0].split()[-1]
    assert f"sha256 `{digest}`" in text and f"values `{values}`" in text and "seed 0" in text
    assert plain(summary["sparsity"]["sentence"]) in text and "if a dense update of that norm were rounded" in text
    gain = summary["heldout_gain"]
    digits = max(0, 1 - math.floor(math.log10((gain["ci_high"] - gain["ci_low"]) / 2)))
    interval = f"95 % CI {gain['ci_low']:+.{digits}f} to {gain['ci_high']:+.{digits}f}"
    assert f"({gain['mean']:+.{digits}f}, {interval}".replace("-", "−") in text.replace("\u00a0", " ")
    flat = gain["ci_low"] <= 0 <= gain["ci_high"]
    assert ("did not change measurably: it went from" in text) == flat and ("**No clear change" in text) == flat
    assert '`jpeg`, weight 1, utility, with `{"direction": "compressible"}`' in text
    assert text.count("Licence: Apache-2.0") == 2, "of both rewards"
    layers = len(load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")) // 2
    assert "step 2 of 2" in text and f"rank 2, alpha 4, on {layers} layers" in text and record["base"]["sha256"] in text
    with Image.open(tmp_path / "lora" / "before_after.png") as picture:
        sheets = [open_sheet(images / "run" / "samples" / f"step_00000{step}.png")[0] for step in (0, 2)]
        edge, height = sheets[0].width * 4 // 6, sheets[0].height  # 4 of 6 columns, both rows
        assert picture.size == (2 * edge + 12, height)
        for x, sheet in ((0, sheets[0]), (edge + 12, sheets[1])):
            assert picture.crop((x, 0, x + edge, height)).tobytes() == sheet.crop((0, 0, edge, height)).tobytes()
        assert sheets[0].tobytes() != sheets[1].tobytes()
    shared = tmp_path / "lora" / "align_config.yaml"
    assert file_sha256(shared) == file_sha256(images / "run" / "config.yaml")
    assert load_config(shared) == load_config(images / "run" / "config.yaml")
    made = runs_as_it_says(tmp_path / "lora", monkeypatch)["made"].images[0]
    assert made.size == (16, 16) and (tmp_path / "lora" / "made.png").is_file()
    assert 'prompt = "a cat"  # or what you would ask for' in text
    assert "cat" not in text.replace('prompt = "a cat"', "").lower().replace("catch", ""), (
        "no prompt of the run is told"
    )


def test_the_card_of_an_embedded_model_asks_for_what_it_draws_and_says_what_it_needs(images, tmp_path):
    record = export_model(images / "run", to="diffusers-lora", out=tmp_path / "out")
    files, needs = read_run(images / "run"), "need align: `pip install 'align[diffusion]'`"
    ours = {**record, "base": {**record["base"], "model": "digits"}}
    text = model_card(ours, files, None)
    assert 'prompt = "a handwritten zero"\n' in text and "a cat" not in text and needs in text
    assert (
        "resolve_model('digits')" in text and "`align export RUN --to full --out FOLDER` writes loads without" in text
    )
    text = model_card({**ours, "to": "full"}, files, None)
    assert 'prompt = "a handwritten zero"\n' in text and needs not in text and "resolve_model" not in text
    trained = {**record, "trained": {**record["trained"], "data": "digits"}}
    text = model_card(trained, files, None)
    assert 'prompt = "a handwritten zero"\n' in text and needs not in text


def test_nothing_that_others_wrote_acts_in_a_card(images, tmp_path):
    markdown_it = pytest.importorskip("markdown_it")
    export_model(images / "run", to="peft", out=tmp_path / "peft")
    text = (tmp_path / "peft" / "README.md").read_text()
    body = text.split("\n---\n", 1)[1]
    tokens = markdown_it.MarkdownIt("commonmark").parse(body)
    flat = [*tokens, *(child for token in tokens for child in token.children or ())]
    kinds = [token.type for token in flat]
    assert not {"html_block", "html_inline", "link_open", "hr", "table_open"} & set(kinds)
    assert [token.attrs["src"] for token in flat if token.type == "image"] == ["before_after.png"]
    titles = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert titles == [
        "cards, step 2", "Use", "What changed", "What it was made of", "What is not known",
    ]  # fmt: skip
    spans = [token.content for token in flat if token.type == "code_inline"]
    assert f"{HOSTILE}.txt".replace("\n", "\\u000a") in spans, "shown as it is"
    assert not [span for span in spans if str(tmp_path.parent) in span], "where it lies is not told"


@pytest.mark.parametrize("text", [HOSTILE, "`", "``", "a`b``c", " `", "", "\x1b[31m", "\ud800", "a\\"])
def test_code_and_plain_text_come_back_as_they_were(text):
    markdown_it = pytest.importorskip("markdown_it")
    parser = markdown_it.MarkdownIt("commonmark")
    inline = parser.parse(f"x {code(text)} y")[0:3][1].children
    shown = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
    assert [token.content for token in inline if token.type == "code_inline"] == [shown or " "]
    inline = parser.parse(f"x {plain(text)} y")[1].children
    assert {token.type for token in inline} <= {"text", "text_special"}
    assert "".join(t.content for t in inline).split() == ["x", *text.split(), "y"]


def test_what_is_missing_is_said_to_be_missing(images, tmp_path):
    run = shutil.copytree(images / "run", tmp_path / "run")
    for name in ("summary.json", "evaluation.jsonl", "sparsity.json"):
        (run / name).unlink()
    shutil.rmtree(run / "samples")
    (run / "run.json").write_text("{}")
    export_model(run, to="comfyui", out=tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    for said in (
        "No verdict yet", "Which of them moved was not measured", "its sha256 was not recorded",
        "Versions: not recorded; made on not recorded", "step 2 of an unknown number", "engine `not recorded`",
    ):  # fmt: skip
        assert said in text, said
    assert "before_after.png" not in text and not (tmp_path / "out" / "before_after.png").exists()
    assert "library_name" not in front(text) and "```python" not in text


def test_an_earlier_checkpoint_is_not_given_the_measures_of_the_last(images, tmp_path):
    export_model(images / "run" / "checkpoints" / "step_000001", to="peft", out=tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "The last evaluation is of step 2; these are the weights of step 1." in text and "That is of step 2." in text
    assert "at step 0 (left) and step 1 (right)" in text


def test_hub_names_and_licences(images, tmp_path):
    record = export_model(images / "run", to="full", out=tmp_path / "out")
    for model, to, expected in (
        ("black-forest-labs/FLUX.1-schnell", "peft", {
            "license": "apache-2.0", "base_model": "black-forest-labs/FLUX.1-schnell",
            "base_model_relation": "adapter",
        }),
        ("black-forest-labs/FLUX.1-dev", "full", {
            "license": "other", "license_name": "flux-1-dev-non-commercial-license",
            "base_model": "black-forest-labs/FLUX.1-dev", "base_model_relation": "finetune",
        }),
        ("someone/unheard-of", "full", {
            "license": "unknown", "base_model": "someone/unheard-of", "base_model_relation": "finetune",
        }),
    ):  # fmt: skip
        base = {**record["base"], "model": model, "licence": licence_of(model, tmp_path)}
        text = model_card({**record, "base": base, "to": to}, read_run(images / "run"), None)
        assert expected.items() <= front(text).items() and len(front(text)) == len(expected) + 3
        assert ("unknown: neither a README.md" in text) == (model == "someone/unheard-of")


def test_data_that_changed_between_sittings_are_both_told(images, tmp_path):
    run = shutil.copytree(images / "run", tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    record["data_files"].append({**record["data_files"][0], "sha256": "0" * 64})
    (run / "run.json").write_text(json.dumps(record))
    export_model(run, to="peft", out=tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text().count("it changed between sittings of the run") == 2


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A run of adapters on a language model."""
    root = tmp_path_factory.mktemp("texts")
    build_tiny(root / "model")
    rows = [{"prompt": r.prompt, "completion": r.completion, "label": bool(r.label)} for r in toy_thumbs(30).rows]
    (root / "thumbs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "trainer": "kto", "name": "thumbs", "steps": 2, "batch_size": 16, "microbatch": 8,
        "model": {"path": str(root / "model"), "lora": {"rank": 2}},
        "data": {"path": str(root / "thumbs.jsonl"), "heldout_fraction": 0.2, "max_length": 64},
        "optimizer": {"lr": 1e-1, "schedule": "constant"}, "checkpoint": {"every": 2},
        "evaluation": {"every": 0, "rows": 20, "prompts": 2, "max_new_tokens": 3},
    }  # fmt: skip
    trainer_for(load_config(config), out=root / "run").train()
    return root


@pytest.mark.parametrize("to", ["peft", "full"])
def test_the_card_of_a_run_of_text(texts, tmp_path, monkeypatch, capsys, to):
    import torch

    out = tmp_path / to
    assert main(["export", str(texts / "run"), "--to", to, "--out", str(out), "--dtype", "bf16"]) == 0
    text = (out / "README.md").read_text()
    library = {"peft": "peft", "full": "transformers"}[to]
    assert front(text) == {
        "license": "unknown", "library_name": library, "pipeline_tag": "text-generation",
        "tags": ["align", "kto", *(["lora"] if to == "peft" else []), to],
    }  # fmt: skip
    assert f"sha256 `{file_sha256(texts / 'thumbs.jsonl')}`" in text and "objective `kto`" in text
    assert "Held-out" in text and "if a dense update of that norm were rounded" in text
    adapters = load_file(next((texts / "run").rglob("adapter_model.safetensors")))
    adapted = sum(tensor.numel() for tensor in adapters.values())
    about = json.loads((texts / "run" / "run.json").read_text())
    assert f"Trained parameters: {adapted:,} of {about['model']['parameters']:,}." in text
    rows = [json.loads(line) for line in (texts / "thumbs.jsonl").read_text().splitlines()]
    (found,) = re.findall(r"Rows: (\d+) trained on \((\d+) up, (\d+) down\), (\d+) held out; left out: none\.", text)
    trained, up, down, heldout = map(int, found)
    assert up + down == trained and trained + heldout == len(rows) and up <= sum(row["label"] for row in rows)
    assert "Learning rate: 0.1 at its highest, schedule constant" in text
    capsys.readouterr()
    names = runs_as_it_says(out, monkeypatch)
    assert "Once upon a time" in capsys.readouterr().out
    assert next(iter(names["model"].parameters())).dtype == torch.bfloat16
    rows = (json.loads(line) for line in (texts / "run" / "generations.jsonl").read_text().splitlines())
    assert not any(row["prompt"] in text for row in rows), "no prompt of the run is told"


def test_language_exports_are_the_run(texts, tmp_path):
    """The merged model and the adapters give the logits of the run's own checkpoint."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    from trainers.language_source import find_language, open_language

    export_model(texts / "run", to="full", out=tmp_path / "full")
    export_model(texts / "run", to="peft", out=tmp_path / "peft")
    ids = torch.arange(5)[None]
    with torch.no_grad():
        expected = open_language(find_language(texts / "run")).models.policy(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(texts / "model")(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "full")(input_ids=ids).logits
        adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft")(input_ids=ids).logits
    assert (expected - base).abs().max() > 1e-3, "training is seen"
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(adapted, expected, atol=1e-5, rtol=0)
    trained = {p.name for p in (tmp_path / "full").iterdir()}
    assert not {"optimizer.pt", "trainer_state.json", "manifest.json", "adapter_config.json"} & trained


def test_language_exports_refuse_what_they_cannot_hold(texts, tmp_path):
    with pytest.raises(ConfigError, match="layout of models of images(.|\n)*--to peft or --to full"):
        export_model(texts / "run", to="comfyui", out=tmp_path / "out")
    with pytest.raises(ConfigError, match="Did you mean 'peft'"):
        export_model(texts / "run", to="pefd", out=tmp_path / "out")
    with pytest.raises(CheckpointError, match="nothing trained here"):
        export_model(texts / "model", to="full", out=tmp_path / "out")
    copy = shutil.copytree(texts / "run", tmp_path / "run")
    (copy / "checkpoints" / "step_000002" / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="wrong size"):
        export_model(copy, to="peft", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BUILD))
def test_the_card_of_every_family_runs(name, tmp_path, monkeypatch):
    import tiny_videos

    base = BUILD[name](tmp_path / "base")
    run = random_run(tmp_path / "run", base, name, changed={"evaluation": {"solver_steps": 2, "guidance_scale": 2.0}})
    export_model(run, to="diffusers-lora", out=tmp_path / "out")
    tiny_videos.picture(tmp_path / "out" / "first_frame.png")
    text = (tmp_path / "out" / "README.md").read_text()
    made, takes = "video" if name in VIDEOS else "image", "image" if name in TAKES_IMAGE else "text"
    assert front(text)["pipeline_tag"] == f"{takes}-to-{made}"
    made = runs_as_it_says(tmp_path / "out", monkeypatch, leave_out=1)["made"]
    assert len(made.frames[0]) == 5 if name in VIDEOS else made.images[0].size == (16, 16)


def test_the_card_of_a_fitted_reward(tmp_path, monkeypatch, capsys):
    from align.reports.training import write_report
    from rewards.fit import fit_reward

    data = tmp_path / "thumbs <b>|`.jsonl"
    words = [("good", True), ("bad", False)] * 60
    rows = [
        {"prompt": f"p{i}", "completion": f"{w} {i}", "label": up, "annotator": f"u{i % 7}"}
        for i, (w, up) in enumerate(words)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "trainer": "fit", "name": "liked", "steps": 3, "batch_size": 32, "data": {"paths": [str(data)]},
        "split": {"by": ["prompt"], "heldout": 0.3, "calibration": 0.3}, "model": {"backbone": "words"},
    }  # fmt: skip
    result = fit_reward(load_config(config), tmp_path / "run")
    write_report(result.directory)
    text = (result.directory / "reward" / "README.md").read_text()
    assert front(text) == {"license": "unknown", "tags": ["align", "reward-model", "text"]}
    assert f"sha256 `{hashlib.sha256(data.read_bytes()).hexdigest()}`" in text and "<b>|" not in text.split("## Use")[0]
    thumbs = result.card["heldout"]["thumbs"]
    assert f"{thumbs['n']} held out" in text and f"AUROC {thumbs['auroc']:.3f}" in text
    assert all(plain(mode) in text for mode in result.card["known_failure_modes"])
    assert (
        "needs the Python package align" in text and f"Rows read: 120. Trained on: {result.card['trained_on']}." in text
    )
    runs_as_it_says(result.directory / "reward", monkeypatch)
    assert re.search(r"\[\[0\.\d+\]\]", capsys.readouterr().out), "a probability"


def test_rewards_of_lists_and_of_mappings_are_told_with_what_was_recorded():
    from align.reports.modelcard import _rewards

    config = load_config("rluf/smoke")
    lines = _rewards(config.rewards, {"love": {"identity": "abc"}, "safety": "spoilt"})
    assert len(lines) == len(config.rewards) and lines[0].endswith("Licence: Apache-2.0. Identity `abc`.")
    assert lines[0].startswith("- `toy/love` as `love`, weight 0.5, utility: share of an answer's words")
    mine = load_config("digits/smoke", ["rewards=[{name: 'mine:Reward', weight: 2}]"]).rewards
    assert _rewards(mine, [{"definition": "the <i>best</i>"}]) == [
        "- `mine:Reward`, weight 2, utility: the \\<i\\>best\\</i\\>. Licence: not stated."
    ]
    assert _rewards(mine, "spoilt") == ["- `mine:Reward`, weight 2, utility: not described. Licence: not stated."]
    assert _rewards((), None) == ["- none"]
