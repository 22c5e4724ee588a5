"""Rows with images: what is read and refused, tokens, log-probs against the models' own logits, and whole runs."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import replace

import numpy as np
import processes
import pytest
import tiny_vl
import torch
from PIL import Image
from safetensors.torch import load_file

from align import checkpoint
from align.commands.export import export_model
from align.config import load_config
from align.errors import ConfigError, DataError
from align.language_config import LanguageModelConfig
from align.preferences import describe_preferences, load_preferences, prompt_key
from align.weights import file_sha256
from trainers import trainer_for
from trainers.language_images import model_inputs
from trainers.language_logps import completion_logps
from trainers.language_model import load_language_model, load_processor
from trainers.preference_data import collate, tokenise
from trainers.tiny_language import build_tiny

FAMILIES = ("qwen2", "qwen2_5", "llava")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "qwen2": tiny_vl.qwen_chat(folder / "qwen2"),
        "qwen2_5": tiny_vl.qwen_chat(folder / "qwen2_5", newer=True),
        "llava": tiny_vl.llava_chat(folder / "llava"),
    }


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three images of other sizes and colours: 56 x 84 red, 112 x 28 blue, 64 x 64 noise."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, (height, width), colour in (("red", (56, 84), (250, 10, 10)), ("blue", (112, 28), (10, 10, 250))):
        Image.new("RGB", (width, height), colour).save(folder / f"{name}.png")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    return folder


def user(text="what?", images=1):
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}]


def answer(text):
    return [{"role": "assistant", "content": text}]


def write(folder, rows, name="rows.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


@pytest.fixture(scope="module")
def mixed(pictures):
    """One image, another one, two of them, and none."""
    return load_preferences(write(pictures, [
        {"image": "red.png", "prompt": user(), "completion": answer("red"), "label": True},
        {"image": "blue.png", "prompt": user("which colour?"), "completion": answer("the sea"), "label": False},
        {"images": ["noise.png", "red.png"], "prompt": user(images=2), "completion": answer("two"), "label": True},
        {"prompt": [{"role": "user", "content": "hello"}], "completion": answer("hi there"), "label": False},
    ], "mixed.jsonl"))  # fmt: skip


# Rows


def test_images_are_paths_beside_the_file_or_bytes_of_parquet(pictures):
    import pyarrow as pa
    from pyarrow import parquet

    content = (pictures / "red.png").read_bytes()
    rows = [
        {"images": [{"bytes": content, "path": None}], "prompt": user(), "completion": answer("red"), "label": True},
        {"images": [{"bytes": None, "path": "red.png"}], "prompt": user(), "completion": answer("x"), "label": False},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), pictures / "rows.parquet")
    found = load_preferences(pictures / "rows.parquet").rows
    jsonl = load_preferences(write(pictures, [{**rows[0], "images": None, "image": "red.png"}])).rows
    assert found[0].prompt == jsonl[0].prompt == tuple(user())  # Parquet's null keys of parts are gone
    assert {row.images[0].digest for row in (*found, *jsonl)} == {found[0].images[0].digest}
    assert all((row.images[0].pixels() == [250, 10, 10]).all() for row in (*found, *jsonl))
    assert found[0].images[0].path is None and jsonl[0].images[0].data is None  # a file is read again when needed


def test_a_folder_of_datasets_keeps_images_as_they_are_stored(pictures):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({
        "image": datasets.Image(), "prompt": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        "completion": datasets.Value("string"), "label": datasets.Value("bool"),
    })  # fmt: skip
    content = {"bytes": (pictures / "blue.png").read_bytes(), "path": "gone.png"}
    row = {"image": content, "prompt": [{"role": "user", "content": "what?"}], "completion": "blue", "label": True}
    datasets.Dataset.from_list([row], features=features).save_to_disk(pictures / "saved")
    found = load_preferences(pictures / "saved").rows[0]
    assert (found.images[0].pixels() == [10, 10, 250]).all() and found.prompt == tuple(user())


def test_images_without_parts_stand_before_the_first_text_of_the_user(pictures):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "what?"}, *answer("it"),
              {"role": "user", "content": "why?"}]  # fmt: skip
    row = {"images": '["red.png", "blue.png"]', "prompt": prompt, "completion": answer("so"), "label": True}
    found = load_preferences(write(pictures, [row])).rows[0]
    assert found.prompt == (prompt[0], user(images=2)[0], *prompt[2:]) and len(found.images) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": ["red.png"] * 2}, "line 1, field 'images'.*found 2, expected 1, one for each part of type image"),
        ({}, "line 1, field 'images'.*found 0, expected 1"),
        ({"image": "gone.png"}, "no such image.*line 1, field 'image'.*gone.png"),
        ({"images": ["red.png", "torn.png"], "prompt": user(images=2)}, "field 'images', image 1.*cannot identify"),
        ({"image": "huge.png"}, "field 'image'.*exceeds limit of .* pixels"),
        ({"image": "red.png", "images": ["red.png"]}, "both image and images.*line 1"),
        ({"images": "red.png"}, "found 'red.png', expected a list of images"),
        ({"image": 3}, "found 3, expected a path or"),
        ({"image": "red.png", "prompt": "what?"}, "field 'prompt'.*found 'what\\?', expected a list of messages"),
        ({"image": "red.png", "prompt": answer("x")}, "expected a message of the user"),
        ({"image": "red.png", "completion": [{"role": "assistant", "content": [{"type": "image"}]}]},
         "field 'completion'.*found a part of type image, expected text"),
        ({"prompt": [{"role": "user", "content": [{"type": "image", "image": "red.png"}]}]},
         "field 'prompt', message 0, part 0.*in the column images"),
        ({"prompt": [{"role": "user", "content": [{"type": "video"}]}]}, "message 0, part 0.*expected {\"type\": \"image\"} or"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_row_is_named(pictures, change, said):
    (pictures / "torn.png").write_bytes(b"\x89PNG not one")
    header = bytearray((pictures / "red.png").read_bytes())
    header[16:24] = (40_000).to_bytes(4, "big") * 2  # 1.6 gigapixels, says the header
    import zlib

    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    (pictures / "huge.png").write_bytes(bytes(header))
    row = {"prompt": user(), "completion": answer("red"), "label": True, **change}
    with pytest.raises(DataError, match=said):
        load_preferences(write(pictures, [row]))


def test_a_check_reads_every_pixel_and_counts(pictures, capsys):
    from align.cli import main

    rows = [{"image": "red.png", "prompt": user(), "chosen": answer("red"), "rejected": answer("x")}]
    path = write(pictures, rows)
    assert describe_preferences(path)["rows_with_images"] == 2
    assert main(["check", str(path)]) == 0
    assert "rows_with_images" in capsys.readouterr().out
    whole = (pictures / "noise.png").read_bytes()
    (pictures / "cut.png").write_bytes(whole[: len(whole) // 2])  # its header is whole
    path = write(pictures, [{**rows[0], "image": "cut.png"}])
    assert len(load_preferences(path)) == 2
    with pytest.raises(DataError, match="line 1, field 'image'.*truncated"):
        describe_preferences(path)


def test_a_prompt_is_its_text_and_the_content_of_its_images(pictures):
    (pictures / "copy.png").write_bytes((pictures / "red.png").read_bytes())
    rows = load_preferences(write(pictures, [
        {"image": f"{name}.png", "prompt": user(), "completion": answer("x"), "label": True}
        for name in ("red", "blue", "noise", "copy")
    ]))  # fmt: skip
    keys = [prompt_key(row) for row in rows.rows]
    assert len(set(keys)) == 3 and keys[0] == keys[3]
    held = rows.split(0.3)[1]
    assert len(held) in (1, 2) and len({prompt_key(row) for row in held.rows}) == 1


# Tokens


@pytest.mark.parametrize(("family", "counts"), [("qwen2", (6, 4, 10, 0)), ("llava", (16, 16, 32, 0))])
def test_images_become_as_many_tokens_as_the_model_has_for_them(models, mixed, family, counts):
    """Qwen2-VL: a token for 28 x 28 pixels, 4 at least, so 2 x 3, 4 x 1 and 2 x 2; LLaVA: (32 / 8)^2."""
    processor = load_processor(str(models[family]))
    found = tokenise(mixed, processor, max_length=256)
    token = processor.image_token_id
    assert tuple(int((ids == token).sum()) for ids in found.prompts) == counts
    for i, row in enumerate(("red", "the sea", "two", "hi there")):
        end = "<|im_end|>\n" if family == "qwen2" else "<|endoftext|>"
        assert processor.tokenizer.decode(found.completions[i]) == row + end
    assert processor.tokenizer.decode(found.prompts[3]).count("hello") == 1


def test_images_are_never_cut(models, mixed):
    processor = load_processor(str(models["qwen2"]))
    lengths = [len(ids) for ids in tokenise(mixed, processor, max_length=256).prompts]
    found = tokenise(mixed, processor, max_length=256, max_prompt_length=min(lengths[0], lengths[3]) - 1)
    assert found.dropped == {"images would be cut, up": 2, "images would be cut, down": 1}
    assert len(found) == 1 and len(found.prompts[0]) < lengths[3]  # text is, at its beginning
    short = tokenise(mixed, processor, max_length=lengths[0] + 1)
    assert short.dropped["images would be cut, up"] == 1 and len(short.completions[0]) == 1
    assert (short.prompts[0] == processor.image_token_id).sum() == 6
    assert len(short.sequence(0, 1)[0]) == lengths[0]  # nor in a mismatched pair
    empty = mixed.__class__((mixed.rows[0], replace(mixed.rows[1], completion="")), "empty")
    assert tokenise(empty, processor, max_length=256).dropped == {"empty completion, down": 1}


def test_a_check_of_a_config_says_that_its_model_is_blind(models, pictures):
    from align.language_checks import check_language_config

    path = write(pictures, thumbs(pictures), "thumbs.jsonl")
    for model, blind in (("tiny", ["images"]), (models["llava"], [])):
        found = check_language_config(config(model, path, "kto"), files=True)
        assert [finding.code for finding in found if finding.level == "error"] == blind


@pytest.mark.parametrize("where", ["completion", "prompt"])
def test_text_that_spells_an_image_token_is_refused(models, pictures, where):
    row = {"prompt": [{"role": "user", "content": "hi"}], "completion": answer("yes"), "label": True}
    row[where] = [{**row[where][0], "content": "<|image_pad|>"}]
    processor = load_processor(str(models["qwen2"]))
    with pytest.raises(DataError, match="item 0.*token for an image|token for an image.*item 0"):
        tokenise(load_preferences([row]), processor, max_length=64)
    row |= {"prompt": user("<|image_pad|>"), "image": str(pictures / "red.png"), "completion": answer("yes")}
    with pytest.raises(DataError, match="Images do not fit.*item 0"):
        tokenise(load_preferences([row]), processor, max_length=64)


def test_a_model_of_text_refuses_images_and_a_thin_image_is_named(models, mixed, pictures, tmp_path):
    with pytest.raises(DataError, match="mixed.jsonl, line 1.*model of both"):
        tokenise(mixed, load_processor(str(build_tiny(tmp_path / "tiny"))), max_length=64)
    Image.new("RGB", (2000, 4)).save(pictures / "thin.png")
    row = {"image": str(pictures / "thin.png"), "prompt": user(), "completion": answer("x"), "label": True}
    with pytest.raises(DataError, match="Images do not fit.*item 0.*aspect ratio"):
        tokenise(load_preferences([row]), load_processor(str(models["qwen2"])), max_length=64)


def test_an_image_that_changes_meanwhile_is_refused(models, pictures):
    processor = load_processor(str(models["qwen2"]))
    Image.new("RGB", (56, 56), (0, 250, 0)).save(pictures / "moving.png")
    row = {"image": "moving.png", "prompt": user(), "completion": answer("green"), "label": True}
    found = tokenise(load_preferences(write(pictures, [row])), processor, max_length=64)
    before = found.digest(0, 0)
    Image.new("RGB", (56, 56), (0, 250, 250)).save(pictures / "moving.png")
    with pytest.raises(DataError, match="has changed.*line 1.*moving.png"):
        found.batch([(0, 0)], 0)
    again = tokenise(load_preferences(pictures / "rows.jsonl"), processor, max_length=64)
    assert np.array_equal(again.prompts[0], found.prompts[0]) and again.digest(0, 0) != before
    processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    other = tokenise(load_preferences(pictures / "rows.jsonl"), processor, max_length=64)
    assert np.array_equal(other.prompts[0], again.prompts[0]) and other.digest(0, 0) != again.digest(0, 0)


@pytest.mark.slow
def test_tokens_are_the_same_in_worker_processes(models, mixed):
    rows = mixed.__class__(mixed.rows[:2] + mixed.rows[3:] * 600 + mixed.rows[2:], "many")
    reload = Reload(str(models["qwen2"]))
    alone = tokenise(rows, reload(), max_length=128)
    shared = tokenise(rows, reload(), max_length=128, workers=2, reload=reload)
    assert all(np.array_equal(a, b) for a, b in zip(alone.prompts, shared.prompts, strict=True))
    assert [alone.digest(i, i) for i in range(len(alone))] == [shared.digest(i, i) for i in range(len(alone))]


class Reload:
    def __init__(self, path):
        self.path = path

    def __call__(self):
        return load_processor(self.path)


# Log-probs


def test_tensors_of_images_are_joined_and_padded_with_zeros():
    """Two tiles and one of a two-pixel image, as LLaVA-NeXT has them; the row of text adds nothing."""
    batch = {
        "input_ids": torch.ones(3, 2), "labels": torch.ones(3, 2),
        "images": [{"tiles": torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])}, {}, {"tiles": torch.tensor([[[5.0, 6.0]]])}],
    }  # fmt: skip
    found = model_inputs(batch)
    assert set(found) == {"input_ids", "tiles"}
    assert found["tiles"].tolist() == [[[1, 2], [3, 4]], [[5, 6], [0, 0]]]
    assert set(model_inputs({"input_ids": torch.ones(1, 2), "images": [{}]})) == {"input_ids"}


def loaded(models, family, **options):
    return load_language_model(LanguageModelConfig(path=str(models[family]), train="full", **options), seed=0).eval()


def by_the_book(model, processor, row):
    """One row through the model's own processor and logits, in double precision, nothing of ours in between."""
    texts = [
        processor.apply_chat_template(
            [{**m, "content": m["content"] if isinstance(m["content"], list) else [{"type": "text", "text": m["content"]}]}
             for m in messages],
            tokenize=False, add_generation_prompt=more,
        )
        for messages, more in ((row.prompt, True), ((*row.prompt, *row.completion), False))
    ]  # fmt: skip
    shown = [Image.fromarray(image.pixels()) for image in row.images] or None
    prompt, whole = (processor(text=[t], images=shown, add_special_tokens=False, return_tensors="pt") for t in texts)
    with torch.no_grad():
        logp = model(**whole).logits[0].double().log_softmax(-1)
    at = prompt["input_ids"].shape[1]
    return logp[at - 1 : -1].gather(-1, whole["input_ids"][0, at:, None]).sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_the_models_own_logits_padded_and_alone(models, mixed, family):
    model, processor = loaded(models, family), load_processor(str(models[family]))
    tokens = tokenise(mixed, processor, max_length=256)
    with torch.no_grad():
        together = completion_logps(model, tokens.batch([(i, i) for i in range(4)], 0)).per_row()
        alone = torch.cat([completion_logps(model, tokens.batch([(i, i)], 0)).per_row() for i in range(4)])
    expected = torch.stack([by_the_book(model, processor, row) for row in mixed.rows])
    torch.testing.assert_close(together.double(), expected, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(alone.double(), expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_see_the_image(models, mixed, family):
    """A completion after another picture of the same size is another one; without the picture the tokens are alike."""
    model, processor = loaded(models, family), load_processor(str(models[family]))
    tokens = tokenise(mixed, processor, max_length=256)
    batch = tokens.batch([(0, 0)], 0)
    other = {**batch, "images": [{**batch["images"][0], "pixel_values": -batch["images"][0]["pixel_values"]}]}
    with torch.no_grad():
        first, second = (float(completion_logps(model, made).per_row()) for made in (batch, other))
    assert abs(first - second) > 1e-3


def test_a_mismatched_pair_has_the_images_of_its_prompt(models, mixed):
    model, processor = loaded(models, "qwen2"), load_processor(str(models["qwen2"]))
    tokens = tokenise(mixed, processor, max_length=256)
    from trainers.language_objective import microbatch, part

    every = np.arange(4)
    made = microbatch(tokens, every, [0, 2, 3], [1, 0, 2], None, pad=0, mismatched=True)
    sequences = made["sequences"]
    assert sequences["images"][0] is sequences["images"][3] and sequences["images"][5] == {}  # read once
    crossed = [mixed.rows[i] for i in (0, 2, 3)]
    completions = [mixed.rows[i].completion for i in (1, 0, 2)]
    with torch.no_grad():
        found = completion_logps(model, part(sequences, 3, None)).per_row()
    expected = [
        by_the_book(model, processor, row.__class__(row.prompt, completion, images=row.images))
        for row, completion in zip(crossed, completions, strict=True)
    ]
    torch.testing.assert_close(found.double(), torch.stack(expected), atol=1e-5, rtol=1e-6)


def test_batches_of_text_alone_are_those_of_collate(models, tmp_path):
    rows = load_preferences([{"prompt": f"Say {i}", "completion": " dog", "label": i % 2} for i in range(4)])
    tokens = tokenise(rows, load_processor(str(build_tiny(tmp_path / "tiny"))), max_length=32)
    assert tokens.pictures is None
    made, expected = tokens.batch([(0, 0), (1, 3)], 9), collate([tokens.sequence(0, 0), tokens.sequence(1, 3)], 9)
    assert made.keys() == expected.keys() and all(torch.equal(made[k], expected[k]) for k in expected)


# What trains


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vision_tower_trains_when_asked_to(models, family):
    path = str(models[family])
    for train in ("lora", "full"):
        still, moving = (
            trained(load_language_model(LanguageModelConfig(path=path, train=train, train_vision=vision), seed=0))
            for vision in (False, True)
        )
        outside = {name for name in moving if "language_model" not in name and "lm_head" not in name}
        assert outside and still == moving - outside
        assert any("vision" in name or "visual" in name for name in outside)
    names = LanguageModelConfig(path=path, lora={"targets": ["q_proj"]})
    found = trained(load_language_model(names, seed=0))  # a CLIP tower has layers of that name too
    assert len(found) == 4 and all("language_model" in name and "q_proj" in name for name in found)


# Runs


def thumbs(pictures):
    """Naming the colour is liked; each picture and question comes with both."""
    rows = []
    for i in range(16):
        name, other = (("red", "blue"), ("blue", "red"))[i % 2]
        for said, label in ((name, True), (other, False)):
            rows.append(
                {"image": f"{name}.png", "prompt": user(f"q{i // 2}?"), "completion": answer(said), "label": label}
            )
    return rows


def config(model, path, trainer, *overrides):
    return load_config(
        {
            "trainer": trainer, "name": "seen", "model": {"path": str(model), "lora": {"rank": 2}},
            "data": {"path": str(path), "heldout_fraction": 0.25, "max_length": 128}, "batch_size": 8,
            "microbatch": 4, "steps": 2, "optimizer": {"lr": 1e-2}, "evaluation": {"every": 0},
            "checkpoint": {"every": 1, "keep": 2},
        },
        overrides,
    )  # fmt: skip


def metrics(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "seconds" not in k and "memory" not in k} for row in rows]


@pytest.mark.parametrize(
    ("trainer", "family", "overrides"),
    [
        ("kto", "qwen2", ()), ("bco", "llava", ("model.train=full",)),
        pytest.param("kto", "llava", ("reference.mode=precomputed",), marks=pytest.mark.slow),
        pytest.param("bco", "qwen2", ("model.train=full", "model.train_vision=true"), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_run_stops_goes_on_bit_for_bit_and_leaves_what_transformers_loads(
    models, pictures, tmp_path, monkeypatch, trainer, family, overrides
):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    path = write(pictures, thumbs(pictures), "thumbs.jsonl")
    made = config(models[family], path, trainer, *overrides, f"reference.cache={tmp_path / 'cache'}")
    assert trainer_for(made, out=tmp_path / "whole").train().status == "complete"
    stopped = trainer_for(made, out=tmp_path / "run")
    finish = stopped.objective.finish

    def interrupted(world):
        os.kill(os.getpid(), signal.SIGTERM)
        return finish(world)

    stopped.objective.finish = interrupted
    assert stopped.train().status == "stopped"
    assert max(checkpoint.checkpoints(tmp_path / "run" / "checkpoints")) == 1
    assert trainer_for(made, out=tmp_path / "run").train().status == "complete"
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "run")
    name = "model" if made.model.train == "full" else "adapter_model"
    folders = [tmp_path / run / "checkpoints" / "step_000002" for run in ("whole", "run")]
    whole, parts = (load_file(folder / f"{name}.safetensors") for folder in folders)
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())

    processor = AutoProcessor.from_pretrained(folders[0])
    if made.model.train == "full":
        model = AutoModelForImageTextToText.from_pretrained(folders[0])
        before = load_file(models[family] / "model.safetensors")
        moved = {key for key, value in load_file(folders[0] / "model.safetensors").items() if not torch.equal(value, before[key])}  # fmt: skip
        assert any("embed_tokens" in key for key in moved)
        assert any("vi" in key for key in moved) is made.model.train_vision
    else:
        model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(models[family]), folders[0])
    rows = load_preferences(path)
    trained_, first = (by_the_book(m.eval(), processor, rows.rows[0]) for m in (model, loaded(models, family)))
    assert abs(float(trained_ - first)) > 1e-3
    for to in ("full", "peft") if made.model.train == "lora" else ("full",):
        export_model(tmp_path / "whole", to=to, out=tmp_path / to)
        card = (tmp_path / to / "README.md").read_text()
        assert "pipeline_tag: image-text-to-text\n" in card and file_sha256(path) in card
        monkeypatch.chdir(tmp_path / to)
        names: dict = {}
        exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names)  # what a reader of the card would do
        exported = by_the_book(names["model"].eval(), names["reader"], rows.rows[0])
        torch.testing.assert_close(exported, trained_, atol=1e-4, rtol=0)


@pytest.mark.parametrize("trainer", ["dpo", "sft"])
def test_pairs_and_examples_are_learnt_by_looking(models, pictures, tmp_path, trainer):
    """Every question is asked of both pictures, so that a blind model gets half of the pairs right."""
    rows = [
        {"image": f"{name}.png", "prompt": user(f"q{i}?"), "chosen": answer(name), "rejected": answer(other)}
        for i in range(10)
        for name, other in (("red", "blue"), ("blue", "red"))
    ]
    path = write(pictures, rows, "pairs.jsonl")
    held = [row for row in load_preferences(path).split(0.25)[1].rows if row.label]
    assert {row.completion[0]["content"] for row in held} == {"red", "blue"}
    made = config(
        models["llava"], path, trainer, "model.train=full", "steps=16", "optimizer.schedule=constant",
        "checkpoint.every=0", *(("objective.beta=1",) if trainer == "dpo" else ()),
    )  # fmt: skip
    summary = trainer_for(made, out=tmp_path / "run").train().summary
    if trainer == "dpo":
        assert summary["pair_accuracy_before"]["mean"] == 0.5 and summary["pair_accuracy_after"]["mean"] == 1
    else:
        assert summary["nats_per_token_after"] < 0.5 * summary["nats_per_token_before"]


@pytest.mark.slow
def test_precomputed_log_probs_of_images_train_as_live_ones(models, pictures, tmp_path):
    path = write(pictures, thumbs(pictures), "thumbs.jsonl")
    for mode in ("lora_off", "precomputed"):
        made = config(models["qwen2"], path, "kto", f"reference.mode={mode}", f"reference.cache={tmp_path / 'cache'}")
        trainer_for(made, out=tmp_path / mode).train()
    for a, b in zip(metrics(tmp_path / "lora_off"), metrics(tmp_path / "precomputed"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)


@pytest.mark.slow
def test_under_zero_3_all_rows_have_images_or_none(models, mixed, tmp_path):
    made = config(models["qwen2"], "unused", "bco", "batch_size=4", "data.heldout_fraction=0")

    def work():
        with pytest.raises(ConfigError, match="either all rows have images or none.*zero2"):
            trainer_for(made, out=tmp_path / "run", rows=(mixed, None), deepspeed="zero3")
        return "refused"

    ended = processes.world(1, work, tmp_path / "world")
    assert ended[0].value == "refused", ended[0].output[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "family", "vision"), [(None, "llava", True), ("zero2", "qwen2", False), ("zero3", "qwen2", False)]
)
def test_two_processes_are_one(models, pictures, tmp_path, settings, family, vision):
    """Where vision trains, some rows have no image, and a process may see none in a microbatch."""
    rows = thumbs(pictures)
    rows = [
        {k: v for k, v in row.items() if k != "image"} | {"prompt": user(images=0)} for row in rows[:8]
    ] * vision + rows
    path = write(pictures, rows, "some.jsonl")
    made = config(models[family], path, "kto", "model.train=full", f"model.train_vision={vision}", "optimizer.lr=1e-3")

    from transformers import AutoModelForImageTextToText

    def train(out, deepspeed=None):
        def work():
            from align.launch import leave_world

            status = trainer_for(made, out=out, deepspeed=deepspeed).train().status
            leave_world()
            return status

        return work

    for size, engine in ((1, None), (2, settings)):
        ended = processes.world(size, train(tmp_path / str(size), engine), tmp_path / f"w{size}", within=300)
        assert [e.value for e in ended] == ["complete"] * size, "\n".join(e.output for e in ended)
    # Under ZeRO 3 transformers writes its present names instead of those the folder was published with.
    one, two = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / n / "checkpoints" / "step_000002", dtype=torch.float32)
        for n in ("1", "2")
    )
    trained = one.state_dict()
    assert trained.keys() == two.state_dict().keys()
    for name, value in two.state_dict().items():
        torch.testing.assert_close(value, trained[name], atol=2e-5, rtol=1e-4, msg=name)
    before = AutoModelForImageTextToText.from_pretrained(models[family], dtype=torch.float32).state_dict()
    assert any((before[name] - value).abs().max() > 1e-4 for name, value in trained.items())
    assert metrics(tmp_path / "1")[1]["loss"] == pytest.approx(metrics(tmp_path / "2")[1]["loss"], abs=1e-5)
