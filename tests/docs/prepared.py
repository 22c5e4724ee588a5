"""The folder in which the commands of the documentation run: what their readers have, made by the library, tiny.

Models are random and small, but whole folders as `save_pretrained` writes them; runs have checkpoints that load.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import people
import tiny_videos
import tiny_vl
import torch
from PIL import Image
from safetensors.torch import save_file

import tiny
import tiny_images
from align import checkpoint
from align.config import load_config, save_config
from align.feedback.events import FeedbackEvent, Item
from align.feedback.simulate import SimulationConfig, simulate
from align.feedback.store import Store
from rewards.fit import fit_reward
from tests.docs.running import call

QUESTIONS = [f"question {i}" for i in range(40)]
WORDS = ("clear", "exact", "vague", "rude")


def prepare(folder: Path) -> Path:
    """Make everything; the folder's files go by the names that the pages use."""
    folder.mkdir()
    _files(folder)
    _stores(folder)
    _models(folder)
    _configs(folder)
    _runs(folder)
    return folder


def rows(path: Path, found: list[Any]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


def _thumbs(count: int, seed: int) -> list[dict[str, Any]]:
    rng, found = np.random.default_rng(seed), []
    for i in range(count):
        words = [*rng.choice(WORDS, 2, replace=False), f"word{i % 50}"]
        liked = 2 * (("clear" in words) + ("exact" in words)) - 2
        row = {"prompt": f"question {i % 150}", "completion": " ".join(words), "annotator": f"user{i % 40}"}
        found.append(row | {"label": bool(rng.random() < 1 / (1 + 2.7**-liked))})
    return found


def _files(folder: Path) -> None:
    rows(folder / "thumbs.jsonl", _thumbs(1200, 0))
    rows(folder / "more_thumbs.jsonl", _thumbs(300, 1))
    rows(folder / "prompts.jsonl", [{"prompt": f"question {i}"} for i in range(200)])
    rows(folder / "seen.jsonl", [
        {"image": "cat.png", "label": i % 2 == 0,
         "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"What is {i // 2}?"}]}],
         "completion": [{"role": "assistant", "content": f"A {('cat', 'dog')[i % 2]}."}]}
        for i in range(80)
    ])  # fmt: skip
    said = [{"prompt": f"new {q}", "completion": f"{w} answer {i}"} for q in QUESTIONS for i, w in enumerate(WORDS)]
    rows(folder / "completions.jsonl", said)
    rows(folder / "candidates.jsonl", said)
    for name in ("prompts.txt", "p.txt", "mine.txt"):
        (folder / name).write_text("".join(f"a bold handwritten {n}\n" for n in ("three", "seven", "one", "two") * 10))
    for name, size in (("cat", 40), ("dog", 48)):
        Image.new("RGB", (size, size), (size, 90, 30)).save(folder / f"{name}.png")
    (folder / "made").mkdir()
    shown = []
    for i in range(40):
        Image.new("RGB", (16, 16), (6 * i, 90, 30)).save(folder / "made" / f"{i:04d}.png")
        shown.append({"prompt": "a bold handwritten three", "image": f"{i:04d}.png"})
    rows(folder / "made" / "samples.jsonl", shown)
    shutil.copytree(folder / "made", folder / "baseline")
    (folder / "best").mkdir()
    pairs = [{"prompt": q, "chosen": f"clear {q}", "rejected": f"rude {q}"} for q in QUESTIONS]
    rows(folder / "best" / "pairs.jsonl", pairs)
    (folder / "best_digits").mkdir()
    shutil.copytree(folder / "made", folder / "best_digits" / "made")
    judged = [
        {"prompt": "a bold handwritten three", "chosen": f"made/{i:04d}.png", "rejected": f"made/{i + 1:04d}.png"}
        for i in range(39)
    ]
    rows(folder / "best_digits" / "pairs.jsonl", judged)
    votes = [{"idx": i, "ann1": i % 3, "ann2": i % 3, "ann3": (i + i // 9) % 3} for i in range(30)]
    (folder / "votes.json").write_text(json.dumps(votes))
    said_by_judge = [{"idx": i, "result": ["Tie", "1", "2", "garbage"][i % 4]} for i in range(30)]
    (folder / "judge.json").write_text(json.dumps(said_by_judge))
    (folder / "r.csv").write_text("".join(f"{q},,{w} {q},{r}\n" for q in QUESTIONS for w, r in (("a", 5), ("b", 2))))
    (folder / "k.csv").write_text(
        "".join(f"{q},,a {q},b {q},{'(a)' if i % 4 else '(b)'}\n" for i, q in enumerate(QUESTIONS))
    )
    panda = [
        {"idx": i, "instruction": q, "input": "", "response1": f"a {q}", "response2": f"b {q}",
         "annotator1": 1 + i % 2, "annotator2": 1 + i % 2, "annotator3": i % 3}
        for i, q in enumerate(QUESTIONS)
    ]  # fmt: skip
    (folder / "testset-v1.json").write_text(json.dumps(panda))
    rated = [{"prompt": q, "completion": f"{w} {q}", "label": w == "clear"} for q in QUESTIONS * 4 for w in WORDS[:3]]
    rows(folder / "helpsteer2.jsonl", rated)
    stars = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    asked = [
        {"prompt": q, "response": f"{w} {q}", **dict.fromkeys(stars, 4 - n)}
        for q in QUESTIONS * 4
        for n, w in enumerate(WORDS)
    ]
    rows(folder / "train.jsonl", asked)
    (folder / "zero3.yaml").write_text(
        "distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3}\nnum_processes: 8\n"
    )


def _stores(folder: Path) -> None:
    items, quality = people.world(prompts=30)
    named = [
        Item(item.prompt, item.response, metadata={**item.metadata, "model": ("old", "new")[i % 2]})
        for i, item in enumerate(items)
    ]
    compared = {(e.annotator, frozenset(e.items)): e for e in people.pairs(named, quality, count=120)}
    events = [
        *people.thumbs(named, quality, users=20, shown=30), *people.ratings(named, quality, raters=4),
        *compared.values(), *people.rankings(named, quality),
    ]  # fmt: skip
    for name in ("feedback.db", "later.db"):
        with Store.open(folder / name) as store:
            store.add(named, events)
    world = simulate(SimulationConfig(vocabulary=40, reaction_rate=0.3))
    with Store.open(folder / "taste.db") as store:
        store.add(list(world.items.values()), world.events)
    task = folder / "task_folder"
    task.mkdir()
    shutil.copytree(folder / "made", task / "made")
    images = [Item(f"a digit {i // 4}", f"made/{i:04d}.png", media="image") for i in range(40)]
    with Store.open(folder / "images.db") as store:
        store.add(images, [
            *(FeedbackEvent("binary", (item.id,), i % 3 > 0, key="thumb", annotator=f"u{i % 5}") for i, item in enumerate(images)),
            *(FeedbackEvent("pairwise", (a.id, b.id), "a", annotator="u1") for a, b in zip(images[::2], images[1::2], strict=True)),
        ])  # fmt: skip
    code, _, error = call(
        [
            "feedback",
            "export",
            str(folder / "images.db"),
            str(folder / "thumbs.parquet"),
            "--as",
            "unpaired",
            "--key",
            "thumb",
        ]
    )
    if code:
        raise RuntimeError(error)


def _models(folder: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    from trainers.tiny_language import build_tiny, tiny_tokenizer

    models = folder / "models"
    models.mkdir()
    tiny.stable_diffusion(models / "stable-diffusion-v1-4")
    tiny_images.flux(models / "flux")
    tiny_videos.wan(models / "Wan2.1-T2V-1.3B-Diffusers")
    build_tiny(folder / "my-model")
    shutil.copytree(folder / "my-model", models / "Llama-3.1-8B-Instruct")
    tiny_vl.qwen_chat(folder / "my-vision-model")
    for name in ("my-reward-model", "another-reward-model", "my-safety-classifier"):
        tokenizer = tiny_tokenizer()
        labels = {0: "safe", 1: "unsafe"} if "safety" in name else {0: "reward"}
        config = Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, id2label=labels, num_labels=len(labels),
        )  # fmt: skip
        Qwen2ForSequenceClassification(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    torch.manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(32, 48).bfloat16() for i in range(3)}
    for name, share in (("base", 0.0), ("tuned", 0.2), ("run-a", 0.2), ("run-b", 0.1)):
        (folder / name).mkdir()
        moved = {
            key: torch.where(torch.rand(t.shape) < share, (t.float() * 1.05).bfloat16(), t) for key, t in base.items()
        }
        save_file(moved, folder / name / "model.safetensors")
    for name, like in {"before": "base", "after": "tuned"}.items():
        shutil.copy(folder / like / "model.safetensors", folder / f"{name}.safetensors")
    for name, like in {"SFT": "base", "DPO": "tuned"}.items():
        shutil.copytree(folder / like, models / f"Llama-3.1-Tulu-3-8B-{name}")


def _configs(folder: Path) -> None:
    digits = "extends: digits/smoke\nname: mine\nsteps: 2\nmodel: {path: digits/random}\n"
    for name, text in {
        "my.yaml": digits,
        "my_run.yaml": digits,
        "mine.yaml": "extends: flux/hps_clip_lora\nname: mine\nmodel: {path: models/flux}\n",
        "my_images.yaml": "extends: digits/diffusion_kto\nname: images\nbatch_size: 16\nmodel: {path: digits/random}\n",
        "my_fit.yaml": "extends: fit/thumbs\nname: my_fit\nsteps: 20\ndata: {paths: [feedback.db]}\n",
        "my_kto.yaml": "extends: kto/smoke\nname: mine\nmodel: {path: my-model}\ndata: {path: thumbs.jsonl}\n",
        "rewards.yaml": "rewards: [{name: fitted, args: {path: runs/fit_thumbs}}]\n",
        "taste.yaml": "rewards: [{name: fitted, args: {path: runs/taste}}]\n",
        "digits.yaml": "rewards: [{name: digits/legibility}]\n",
        "task.yaml": "name: q\nkind: rating\ndata: answers.jsonl\nquestion: How good is it?\nannotators_per_item: 1\n",
        "hunyuan.yaml": "extends: presets/repo_hunyuan_video\nname: hunyuan\nprompts: {path: prompts.txt}\n",
    }.items():
        (folder / name).write_text(text)
    scale = folder / "pages" / "scale"
    scale.mkdir(parents=True)
    shutil.copy(folder / "my_kto.yaml", scale / "my.yaml")
    rows(folder / "answers.jsonl", [{"prompt": q, "response": f"{w} {q}"} for q in QUESTIONS[:3] for w in WORDS[:2]])


def _runs(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tests.unit.test_rluf_arms import arm
    from trainers.evaluation import load_policy

    runs = folder / "runs"
    small = {"train": "lora", "lora": {"rank": 2, "alpha": 4}}
    flux = {
        "name": "flux", "steps": 3, "rewards": [{"name": "jpeg"}], "prompts": {"path": str(folder / "prompts.txt")},
        "model": {"path": str(folder / "models" / "flux"), **small}, "sampler": {"height": 16, "width": 16},
    }  # fmt: skip
    for name, source in {"flux": flux, "flux_hps_clip_lora": flux, "mine": str(folder / "my.yaml")}.items():
        config = load_config(source)
        _run(runs / name, config, {"model": load_policy(config).trainable()})
    quick = load_config("digits/dance_grpo", ["model.path=digits/random"])  # which nobody pretrains
    _run(runs / "digits", quick, {"model": {"w": torch.zeros(1)}})
    model = AutoModelForCausalLM.from_pretrained(folder / "my-model")
    config = load_config({"extends": "kto/smoke", "model": {"path": "my-model"}, "data": {"path": "thumbs.jsonl"}})
    _run(runs / "kto", config, {"model": {n: p.clone() for n, p in model.named_parameters()}})
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder / "my-adapters")
    for name, like in {
        "sd14_hps": "mine", "hunyuan_videoalign": "flux", "bco_llama3_1_8b_helpsteer2": "kto",
        "kto_llama3_1_8b_helpsteer2": "kto", "smoke": "kto",
    }.items():  # fmt: skip
        shutil.copytree(runs / like, runs / name)
    for i, name in enumerate(("conservative", "moderate", "aggressive")):
        arm(runs / name, 0.9 - 0.1 * i, 0.2 + 0.1 * i, 1.0)
        save_config(load_config(f"rluf/{name}"), runs / name / "config.yaml")
        checkpoint.save(runs / name / "checkpoints", 100, {"model": {"w": torch.zeros(1)}}, {})
    fit_reward(
        load_config({"extends": "fit/thumbs", "steps": 20, "data": {"paths": [str(folder / "thumbs.jsonl")]}}),
        runs / "fit_thumbs",
    )
    for name in ("love", "my_fit", "taste"):
        shutil.copytree(runs / "fit_thumbs", runs / name)


def _run(folder: Path, config: Any, groups: dict[str, Any]) -> None:
    """Write a run folder with its hundredth checkpoint."""
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    (folder / "run.json").write_text("{}")
    checkpoint.save(folder / "checkpoints", 100, groups, {})
