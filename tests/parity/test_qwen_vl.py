"""HPSv3 and VideoAlign against transformers' own Qwen2-VL, its processors, and peft."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import tiny_vl
import torch
from torch import nn

from align.errors import ConfigError, DataError, ModelError
from align.types import Samples, Video
from align.weights import without_storage
from rewards import get_reward, hpsv3, qwen_vl, videoalign
from rewards.lora import merge_lora
from rewards.media import OPENAI_STD, normalise
from rewards.qwen_vl import patches, positions, rename, smart_resize
from rewards.videoalign import frame_indices

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "bias": "none", "task_type": "CAUSAL_LM"}


def pixels(*shape, seed=0):
    """Random 8-bit pixels, smooth enough that resizing does not overshoot everywhere."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((*shape[:-2], 6, 6), generator=generator)
    flat = nn.functional.interpolate(coarse.flatten(0, -4) if coarse.ndim > 4 else coarse, shape[-2:], mode="bilinear")
    return ((flat.view(shape) * 255).round() / 255).contiguous()


@pytest.fixture(scope="module")
def image_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "hpsv3"
    model, tokenizer = tiny_vl.qwen(["<|Reward|>"], hpsv3.reward_head(32), folder)
    from safetensors.torch import save_file

    save_file(tiny_vl.old_names(model.state_dict()), folder / "HPSv3.safetensors")
    return folder, model, tokenizer


@pytest.fixture(scope="module")
def image_reward(image_model):
    return get_reward("hpsv3", path=str(image_model[0]), template=tiny_vl.IMAGE_TEMPLATE, dtype="fp32")


@pytest.fixture(scope="module")
def video_model(tmp_path_factory):
    """A peft model, its adapter unmerged, saved as the published file is."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("weights") / "videoalign"
    head = videoalign.reward_head(32)
    model, tokenizer = tiny_vl.qwen(list(videoalign.SPECIALS), head, folder, seed=1)
    sites = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(x in name for x in ("visual", "lm_head", "rm_head"))
    ]
    wrapped = get_peft_model(model, LoraConfig(target_modules=sites, **LORA)).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    torch.save({"model": tiny_vl.old_names(wrapped.state_dict())}, folder / "model.pth")
    settings = {"peft_lora_config": {"lora_r": 4, "lora_alpha": 8}, "model_config": {"output_dim": 1}}
    (folder / "model_config.json").write_text(json.dumps(settings))
    return folder, wrapped, tokenizer


@pytest.fixture(scope="module")
def video_reward(video_model):
    path = str(video_model[0])
    return get_reward("videoalign", path=path, template=tiny_vl.VIDEO_TEMPLATE, dtype="fp32", batch_size=4)


def chat(template, kind, prompt, count):
    """The conversation, written down by hand, with one pad token for every four patches."""
    pad = f"<|{kind}_pad|>" * count
    text = template.replace("{text_prompt}", prompt)
    return f"<|im_start|>user\n<|vision_start|>{pad}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"


# --- pixels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 1024), (448, 448)), ((512, 512), (448, 448)), ((256, 256), (448, 448)),
        ((480, 832), (336, 588)), ((720, 1280), (336, 588)),
    ],
)  # fmt: skip
def test_smart_resize_goldens(size, expected):
    assert smart_resize(*size) == expected
    assert smart_resize(*size[::-1]) == expected[::-1]


@pytest.mark.parametrize("low", [qwen_vl.PIXELS, videoalign.PIXELS[0]])
def test_smart_resize_equals_transformers(low):
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as theirs

    generator = np.random.default_rng(0)
    for height, width in generator.integers(30, 1500, (300, 2)).tolist():
        expected = theirs(height, width, 28, low, qwen_vl.PIXELS)
        assert smart_resize(height, width, low, qwen_vl.PIXELS) == expected


def test_a_sliver_is_refused():
    with pytest.raises(DataError, match="too narrow"):
        smart_resize(5, 1001)
    assert smart_resize(5, 1000) == (56, 6356)


def agree(ours, theirs):
    """Equal up to how each rounds to 8 bits: two levels at most, in 3 % of the pixels at most."""
    gap, level = (ours - torch.as_tensor(theirs)).abs(), 1 / 255 / min(OPENAI_STD)
    assert ours.shape == theirs.shape and gap.max() < 2.01 * level and (gap > 1e-4).float().mean() < 0.03
    return float(gap.max())


@pytest.mark.parametrize("size", [(512, 512), (480, 832), (300, 200), (448, 448)])
@pytest.mark.parametrize("kind", ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorPil"])
def test_patches_equal_transformers_own(size, kind):
    import transformers

    images = pixels(2, 3, *size)
    budget = {"shortest_edge": qwen_vl.PIXELS, "longest_edge": qwen_vl.PIXELS}
    processor = getattr(transformers, kind)(size=budget)
    theirs = processor([(i * 255).round().to(torch.uint8) for i in images], return_tensors="pt")
    values, grids = patches(images[:, None])
    assert grids.tolist() == theirs["image_grid_thw"].tolist()
    gap = agree(values, theirs["pixel_values"])
    assert values.shape == (2 * int(grids[0].prod()), 1176)
    assert gap < 1e-6 if size == (448, 448) else gap > 1e-6


def test_video_patches_equal_transformers_own():
    from transformers import Qwen2VLVideoProcessor

    clips = pixels(2, 4, 3, 128, 224)
    budget = {"shortest_edge": videoalign.PIXELS[0], "longest_edge": videoalign.PIXELS[1]}
    theirs = Qwen2VLVideoProcessor(size=budget, cap_pixels_per_frame=False)(
        [(c * 255).round().to(torch.uint8) for c in clips], return_tensors="pt", do_sample_frames=False
    )
    values, grids = patches(clips, *videoalign.PIXELS)
    assert grids.tolist() == theirs["video_grid_thw"].tolist() == [[2, 18, 30]] * 2
    agree(values, theirs["pixel_values_videos"])
    with pytest.raises(DataError, match="even number"):
        patches(clips[:, :3])


def test_a_patch_holds_the_pixels_it_names():
    """The 4 patches of a token lie together: patch 5 of a 448-pixel image is row 0, column 3 of its patches."""
    images = pixels(1, 3, 448, 448)
    values, _ = patches(images[:, None])
    assert values[5].view(3, 2, 14, 14)[:, 0] == pytest.approx(normalise(images)[0, :, 0:14, 42:56], abs=1e-6)
    assert values[6].view(3, 2, 14, 14)[:, 1] == pytest.approx(normalise(images)[0, :, 14:28, 28:42], abs=1e-6)


@pytest.mark.parametrize(
    ("count", "fps", "expected"),
    [((81), 16, 10), (25, 24, 4), (49, 8, 12), (53, 8, 14), (121, 24, 10), (3, 8, 2), (2, 1, 2), (4000, 2, 768)],
)
def test_frame_count_goldens(count, fps, expected):
    watched = frame_indices(count, fps)
    assert len(watched) == expected and watched[0] == 0 and watched[-1] == count - 1
    assert watched == sorted(set(watched))


def test_frame_selection_follows_the_true_rate():
    assert frame_indices(81, 16) == [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]
    assert frame_indices(81, 8) != frame_indices(81, 16) == frame_indices(81, 16.1)
    with pytest.raises(DataError, match="too short"):
        frame_indices(1, 8)
    with pytest.raises(DataError, match="frame rate"):
        Video(torch.zeros(4, 3, 8, 8), None)
    with pytest.raises(DataError, match="frame rate"):
        Samples(prompts=["x"], videos=[torch.zeros(4, 3, 8, 8)])


# --- positions ---------------------------------------------------------------------------------------


def test_positions_are_sequential_and_that_matters(image_model, image_reward):
    """Explicit positions are what the language model takes by itself from embeddings, and not M-RoPE."""
    _, model, _ = image_model
    network, reader = image_reward.network, image_reward.reader
    values, grids = patches(pixels(2, 3, 448, 448)[:, None])
    ids, mask = reader.batch(["a red cat", "the sea by night, and two moons"], grids[0].tolist(), torch.device("cpu"))
    assert ids.shape == mask.shape and mask.sum(1).tolist() == sorted(mask.sum(1).tolist())
    assert mask[0].tolist() == sorted(mask[0].tolist(), reverse=True), "padding is on the right"
    assert positions(ids).tolist() == [[list(range(ids.shape[1]))] * 2] * 3
    with torch.no_grad():
        ours = network.hidden(ids, mask, values, grids, reader.pad)
        embeddings = network.model.get_input_embeddings()(ids)
        seen = network.model.visual(values, grid_thw=grids).pooler_output
        embeddings[ids == reader.pad] = seen
        implicit = network.model.language_model(inputs_embeds=embeddings, attention_mask=mask, position_ids=None)
        kinds = (ids == reader.pad).int()
        mrope = model.model(
            input_ids=ids, attention_mask=mask, pixel_values=values, image_grid_thw=grids, mm_token_type_ids=kinds
        )
    assert torch.equal(ours, implicit.last_hidden_state)
    at = ids == reader.specials[0]
    assert (ours[at] - mrope.last_hidden_state[at]).abs().max() > 0.01


def test_rotary_frequencies_are_those_of_a_model_cast_to_bfloat16(image_reward, image_model):
    from transformers import Qwen2VLModel

    whole = Qwen2VLModel(image_model[1].config)
    for part in ("language_model.rotary_emb", "visual.rotary_pos_emb"):
        ours, exact = (m.get_submodule(part).inv_freq for m in (image_reward.network.model, whole))
        assert ours.dtype == torch.float32 and not torch.equal(ours, exact)
        assert torch.equal(ours, whole.get_submodule(part).to(torch.bfloat16).inv_freq.float())


# --- HPSv3 -------------------------------------------------------------------------------------------


def plain_hpsv3(model, tokenizer, images, prompts):
    """One image at a time through transformers' own processor and model, positions given, no padding."""
    from transformers import Qwen2VLImageProcessor

    found = []
    for image, prompt in zip(images, prompts, strict=True):
        budget = {"shortest_edge": qwen_vl.PIXELS, "longest_edge": qwen_vl.PIXELS}
        seen = Qwen2VLImageProcessor(size=budget)([(image * 255).round().to(torch.uint8)], return_tensors="pt")
        count = int(seen["image_grid_thw"].prod()) // 4
        ids = torch.tensor([tokenizer(chat(tiny_vl.IMAGE_TEMPLATE, "image", prompt, count))["input_ids"]])
        where = ids[0].tolist().index(tokenizer.convert_tokens_to_ids("<|Reward|>"))
        with torch.no_grad():
            states = model.model(input_ids=ids, **seen, position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1))
            found.append(model.rm_head(states.last_hidden_state[0, where]))
    return torch.stack(found)


def test_hpsv3_equals_transformers(image_model, image_reward):
    _, model, tokenizer = image_model
    images = [pixels(1, 3, *size, seed=i)[0] for i, size in enumerate([(448, 448), (448, 448), (336, 588)])]
    prompts = ["a red cat", "the sea by night, and two moons", "x"]
    expected = plain_hpsv3(model, tokenizer, images, prompts)
    scores = image_reward.score(Samples(prompts=prompts, images=images))
    assert scores.names == ("hpsv3",) and scores.valid.all()
    assert scores.values[:, 0] == pytest.approx(expected[:, 0].double().numpy(), abs=1e-4)
    assert scores.extras["log_sigma"] == pytest.approx(expected[:, 1].tolist(), abs=1e-4)
    assert expected[:, 0].std() > 0.01, "the images must matter"


def test_hpsv3_batches_do_not_matter(image_model):
    """Prompts of different lengths are padded on the right, which a causal model does not see."""
    prompts = ["a", "a red cat on a blue moon over the sea", "two dogs"]
    samples = Samples(prompts=prompts, images=pixels(3, 3, 448, 448))
    many, one = (
        get_reward("hpsv3", path=str(image_model[0]), template=tiny_vl.IMAGE_TEMPLATE, dtype="fp32", batch_size=size)
        for size in (3, 1)
    )
    assert many.score(samples).values == pytest.approx(one.score(samples).values, abs=1e-5)


def test_hpsv3_gradient_reaches_the_pixels(image_reward):
    images = pixels(2, 3, 100, 140).requires_grad_()
    values = image_reward.differentiable(images, ["a red cat", "the sea"])
    expected = image_reward.score(Samples(prompts=["a red cat", "the sea"], images=images.detach())).values
    assert values.detach().double().numpy() == pytest.approx(expected, abs=1e-5)
    (gradient,) = torch.autograd.grad(values[1, 0], images)
    assert not gradient[0].any() and gradient[1].any() and bool(gradient.isfinite().all())


def test_hpsv3_gradient_is_the_slope(image_reward):
    """Along a direction, from normalised patches on: what rounding to 8 bits would hide."""
    network, reader = image_reward.network, image_reward.reader
    values, grids = patches(pixels(1, 3, 448, 448)[:, None])
    ids, mask = reader.batch(["a red cat"], grids[0].tolist(), torch.device("cpu"))
    direction = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))

    def mu(x):
        return network.head_at(network.hidden(ids, mask, x, grids, reader.pad), ids, reader.specials)[0, 0, 0]

    (gradient,) = torch.autograd.grad(mu(values.requires_grad_()), values)
    with torch.no_grad():
        slope = (mu(values + 0.01 * direction) - mu(values - 0.01 * direction)) / 0.02
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=0.02)


def test_hpsv3_in_half_precision_keeps_its_head(image_model, image_reward):
    half = get_reward("hpsv3", path=str(image_model[0]), template=tiny_vl.IMAGE_TEMPLATE)
    assert half.network.model.visual.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert {p.dtype for p in half.network.rm_head.parameters()} == {torch.float32}
    samples = Samples(prompts=["a red cat", "sea"], images=pixels(2, 3, 448, 448))
    assert half.score(samples).values == pytest.approx(image_reward.score(samples).values, abs=0.1)
    assert half.identity() != image_reward.identity()


def test_what_cannot_be_read_is_missing(image_reward):
    images = [*pixels(3, 3, 64, 64), torch.zeros(3, 4, 900), pixels(1, 3, 64, 64)[0]]
    images[1] = images[1] + 1
    prompts = ["a red cat", "a cat", "<|Reward|> 10 of 10", "a line", ""]
    scores = image_reward.score(Samples(prompts=prompts, images=images))
    assert scores.valid[:, 0].tolist() == [True, False, False, False, False]
    for message, part in zip(
        scores.errors[1:], ("pixels run", "<|Reward|>", "too narrow", "prompt is empty"), strict=True
    ):
        assert part in message


def test_what_is_longer_than_the_context_is_missing(image_reward, monkeypatch):
    """One token of the conversation stands for the picture, and 256 are it: 448 x 448 pixels."""
    reader = image_reward.reader
    plain = len(reader.tokens("a red cat")) - 1 + 256
    samples = Samples(prompts=["a red cat", "a red cats"], images=pixels(2, 3, 64, 64))
    monkeypatch.setattr(reader.tokenizer, "model_max_length", plain)
    scores = image_reward.score(samples)
    assert scores.valid[:, 0].tolist() == [True, False]
    assert f"are {plain + 1:,} tokens, the model reads {plain:,}" in scores.errors[1]
    assert qwen_vl.picture_tokens(10, 480, 832, *videoalign.PIXELS) == 5 * 252


# --- VideoAlign --------------------------------------------------------------------------------------


def videos(*shapes, seed=0):
    return [Video(pixels(*shape, seed=seed + i), fps) for i, (shape, fps) in enumerate(shapes)]


def plain_videoalign(wrapped, tokenizer, video, prompt):
    """The adapter unmerged in peft, transformers' own video processor, frames picked by hand."""
    from transformers import Qwen2VLVideoProcessor

    n = 2 * round(min(max(len(video.frames) / video.fps * 2, 4), len(video.frames) // 2 * 2) / 2)
    picked = video.frames[[round(i * (len(video.frames) - 1) / (n - 1)) for i in range(n)]]
    budget = {"shortest_edge": 100_352, "longest_edge": 200_704}
    seen = Qwen2VLVideoProcessor(size=budget, cap_pixels_per_frame=False)(
        [(picked * 255).round().to(torch.uint8)], return_tensors="pt", do_sample_frames=False
    )
    count = int(seen["video_grid_thw"].prod()) // 4
    ids = torch.tensor([tokenizer(chat(tiny_vl.VIDEO_TEMPLATE, "video", prompt, count))["input_ids"]])
    model = wrapped.base_model.model
    with torch.no_grad():
        states = model.model(input_ids=ids, **seen, position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1))
        logits = model.rm_head(states.last_hidden_state[0])[:, 0]
    raw = [float(logits[ids[0].tolist().index(tokenizer.convert_tokens_to_ids(s))]) for s in videoalign.SPECIALS]
    return [(raw[0] - 3.6757) / 2.2476, (raw[1] - 1.1646) / 1.3811, (raw[2] - 2.8105) / 2.5121]


def test_videoalign_equals_peft_and_transformers(video_model, video_reward):
    _, wrapped, tokenizer = video_model
    clips = videos(((17, 3, 252, 420), 8.0), ((9, 3, 336, 336), 24.0))
    prompts = ["a red cat runs", "the sea"]
    expected = [plain_videoalign(wrapped, tokenizer, v, p) for v, p in zip(clips, prompts, strict=True)]
    scores = video_reward.score(Samples(prompts=prompts, videos=clips))
    assert scores.names == ("vq", "mq", "ta") and scores.extras["frames"] == [4, 4]
    assert scores.values == pytest.approx(np.array(expected), abs=1e-4)
    assert np.std(expected, 0).min() > 1e-3


def test_merging_an_adapter_equals_peft(video_model):
    folder, wrapped, _ = video_model
    from align.weights import load_tensors

    merged = merge_lora(load_tensors(folder / "model.pth"), 8.0, "model.pth")
    import copy

    theirs = tiny_vl.old_names(copy.deepcopy(wrapped).merge_and_unload().state_dict())
    assert merged.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.allclose(merged[key], value, atol=1e-6), key
    plain = wrapped.base_model.model.model.language_model.layers[0].self_attn.q_proj.base_layer.weight
    assert (merged["model.layers.0.self_attn.q_proj.weight"] - plain).abs().max() > 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, site: s.pop(f"{site}.lora_B.default.weight"), "incomplete"),
        (lambda s, site: s.pop(f"{site}.base_layer.weight"), "incomplete"),
        (lambda s, site: s.update({f"{site}.lora_B.default.weight": torch.zeros(32, 3)}), "does not fit"),
        (lambda s, site: s.update({f"{site}.lora_magnitude_vector.default.weight": torch.zeros(32)}), "Another kind"),
    ],
)
def test_a_torn_adapter_is_refused(video_model, change, message):
    from align.weights import load_tensors

    state = load_tensors(video_model[0] / "model.pth")
    change(state, "base_model.model.model.layers.1.mlp.up_proj")
    with pytest.raises(ModelError, match=message):
        merge_lora(state, 8.0, "model.pth")


def test_videos_of_many_sizes_and_batches(video_model, video_reward):
    clips = videos(((6, 3, 40, 60), 4.0), ((9, 3, 64, 64), 8.0), ((6, 3, 40, 60), 4.0), ((6, 1, 40, 60), 12.0), ((1, 3, 40, 60), 4.0))  # fmt: skip
    prompts = ["a red cat runs", "the sea", "x", "two dogs", "a still"]
    scores = video_reward.score(Samples(prompts=prompts, videos=clips))
    assert scores.valid.all(1).tolist() == [True, True, True, True, False] and "too short" in scores.errors[4]
    one = get_reward(
        "videoalign", path=str(video_model[0]), template=tiny_vl.VIDEO_TEMPLATE, dtype="fp32", batch_size=1
    )
    assert one.score(Samples(prompts=prompts, videos=clips)).values[:4] == pytest.approx(scores.values[:4], abs=1e-4)


def test_the_frame_rate_changes_the_score(video_reward):
    frames = pixels(24, 3, 64, 64)
    values = video_reward.score(Samples(prompts=["x"] * 2, videos=[Video(frames, 4.0), Video(frames, 24.0)])).values
    assert np.abs(values[0] - values[1]).max() > 1e-3


def test_videoalign_gradient_reaches_the_watched_frames(video_reward):
    frames = pixels(7, 3, 64, 64).requires_grad_()
    values = video_reward.differentiable([Video(frames, 8.0)], ["a red cat runs"])
    assert values.shape == (1, 3)
    (gradient,) = torch.autograd.grad(values.sum(), frames)
    touched = [bool(frame.any()) for frame in gradient]
    assert touched == [i in frame_indices(7, 8.0) for i in range(7)]
    with pytest.raises(DataError, match="one frame rate"):
        video_reward.differentiable([Video(frames, 8.0), Video(frames, 9.0)], ["x", "x"])


def test_images_are_no_videos(video_reward, image_reward):
    with pytest.raises(DataError, match="scores videos"):
        video_reward.score(Samples(prompts=["x"], images=pixels(1, 3, 64, 64)))
    with pytest.raises(DataError, match="scores images"):
        image_reward.score(Samples(prompts=["x"], videos=videos(((6, 3, 40, 60), 4.0))))


def test_model_config_is_obeyed(video_model, tmp_path):
    settings = videoalign.read_settings([video_model[0]])
    assert settings == {"alpha": 8.0, **videoalign.NORMS}
    assert videoalign.NORMS == {"vq": (3.6757, 2.2476), "mq": (1.1646, 1.3811), "ta": (2.8105, 2.5121)}
    assert videoalign.read_settings([tmp_path]) == {"alpha": 128.0, **videoalign.NORMS}
    file = tmp_path / "model_config.json"
    file.write_text(json.dumps({"inference_config": {"MQ_mean": 1.0, "MQ_std": 2.0}}))
    assert videoalign.read_settings([tmp_path / "checkpoint-1", tmp_path])["mq"] == (1.0, 2.0)
    for text, message in (
        ('{"model_config": {"output_dim": 3}}', "output_dim"),
        ('{"data_config": {"fps": 8}}', "fps"),
        ("[", "cannot be read"),
        ('{"peft_lora_config": 3}', "cannot be read"),
    ):
        file.write_text(text)
        with pytest.raises(ModelError, match=message):
            videoalign.read_settings([tmp_path])


# --- templates, names and structure -------------------------------------------------------------------


def test_a_template_is_known_by_its_hash(tmp_path):
    parts = ("Say {text_prompt}.\n", "Rate: <|Reward|>\n")
    known = qwen_vl.PromptTemplate(
        tuple((len(p), hashlib.sha256(p.encode()).hexdigest()) for p in parts), "INSTRUCTION of the package"
    )
    with pytest.raises(ModelError, match=f"not there .*prompt_template.txt.*INSTRUCTION.*{known.parts[0][1]}"):
        known.read([tmp_path])
    file = tmp_path / "prompt_template.txt"
    file.write_bytes("".join(parts).encode())
    assert known.read([tmp_path / "below", tmp_path]) == "".join(parts)
    for text, part in (
        ("Say {text_prompt}!\n" + parts[1], "part 1"),
        (parts[0] + "Rate: <|Rewards|>\n", "part 2"),
        ("".join(parts) + "\n", "part 2"),
        (parts[0], "part 2"),
    ):
        file.write_bytes(text.encode())
        with pytest.raises(ModelError, match=f"not the prompt template.*{part}"):
            known.read([tmp_path])


def test_published_templates_are_pinned():
    assert [count for count, _ in hpsv3.TEMPLATE.parts] == [2523, 68]
    assert [digest[:8] for _, digest in hpsv3.TEMPLATE.parts] == ["0393599d", "2471faca"]
    assert [(count, digest[:8]) for count, digest in videoalign.TEMPLATE.parts] == [(3997, "fdb6309b")]


@pytest.mark.parametrize(("name", "fixture"), [("hpsv3", "image_model"), ("videoalign", "video_model")])
def test_without_its_template_a_reward_says_what_it_needs(name, fixture, request):
    folder = request.getfixturevalue(fixture)[0]
    with pytest.raises(ModelError, match=r"bytes instead of|prompt_template\.txt"):
        get_reward(name, path=str(folder))


def test_a_template_must_hold_its_tokens_once(image_model):
    for template in ("{text_prompt}", "<|Reward|>", tiny_vl.IMAGE_TEMPLATE * 2):
        with pytest.raises(ConfigError, match="once"):
            get_reward("hpsv3", path=str(image_model[0]), template=template)


def test_another_template_is_another_reward(image_model, image_reward):
    again = get_reward("hpsv3", path=str(image_model[0]), template=tiny_vl.IMAGE_TEMPLATE, dtype="fp32", batch_size=1)
    other = get_reward("hpsv3", path=str(image_model[0]), template="Now. " + tiny_vl.IMAGE_TEMPLATE, dtype="fp32")
    assert again.identity() == image_reward.identity() != other.identity()


def test_the_conversation_as_text(image_reward, image_model):
    reader = image_reward.reader
    assert reader.text("a red cat") == chat(tiny_vl.IMAGE_TEMPLATE, "image", "a red cat", 1)
    ids, mask = reader.batch(["a red cat"], (1, 4, 6), torch.device("cpu"))
    whole = image_model[2](chat(tiny_vl.IMAGE_TEMPLATE, "image", "a red cat", 6))["input_ids"]
    assert ids[0].tolist() == whole and mask.all()


def test_foreign_folders_are_refused(image_model, tmp_path):
    folder, *_ = image_model
    path = str(folder / "HPSv3.safetensors")
    with pytest.raises(ModelError, match="tokenizer cannot be read"):
        get_reward("hpsv3", path=path, base=str(tmp_path / "nowhere"), template=tiny_vl.IMAGE_TEMPLATE)
    bare = tiny_vl.qwen_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="configuration"):
        get_reward("hpsv3", path=path, base=str(tmp_path), template=tiny_vl.IMAGE_TEMPLATE)
    tiny_vl.qwen_config(300).save_pretrained(tmp_path)
    bare.add_tokens(["<|more|>"], special_tokens=True)
    bare.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="shape"):
        get_reward("hpsv3", path=path, base=str(tmp_path), template=tiny_vl.IMAGE_TEMPLATE)
    bare.chat_template = "{{ messages[0].role }}"
    bare.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="another model's"):
        get_reward("hpsv3", path=path, base=str(tmp_path), template=tiny_vl.IMAGE_TEMPLATE)


def test_names_are_those_transformers_saves(image_model, tmp_path):
    """transformers 5 itself still writes the layout of 4.45; renamed, it is the module's own."""
    from safetensors.torch import load_file

    _, model, _ = image_model
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    own = {k for k in model.state_dict() if k != "lm_head.weight"}
    assert {rename(key) for key in saved if key != "lm_head.weight"} == own
    assert {rename(key) for key in own} == own


SIZES = {
    "hpsv3": {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4},
    "videoalign": {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2},
}


def published(name, tokens, head):
    """The published model, its language head included, without any memory: shapes in the layout of the file."""
    from transformers import Qwen2VLConfig

    mrope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = {**SIZES[name], "num_hidden_layers": 28, "vocab_size": tokens, "rope_parameters": mrope}
    config = Qwen2VLConfig(text_config=text, vision_config={"hidden_size": SIZES[name]["hidden_size"]})
    with without_storage():
        network = qwen_vl.Network(config, head(SIZES[name]["hidden_size"]))
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    old = {
        k.replace("model.language_model.", "model.").replace("model.visual.", "visual."): s for k, s in shapes.items()
    }
    assert {rename(key) for key in old} == shapes.keys()
    return {**old, "lm_head.weight": (tokens, SIZES[name]["hidden_size"])}


def test_structure_of_hpsv3():
    shapes = published("hpsv3", 151_658, hpsv3.reward_head)
    heads = {key: shape for key, shape in shapes.items() if key.startswith("rm_head.")}
    assert heads == {
        "rm_head.0.weight": (1024, 3584), "rm_head.0.bias": (1024,), "rm_head.3.weight": (16, 1024),
        "rm_head.3.bias": (16,), "rm_head.5.weight": (2, 16), "rm_head.5.bias": (2,),
    }  # fmt: skip
    assert shapes["model.embed_tokens.weight"] == (151_658, 3584) and len(shapes) == 736
    assert sum(np.prod(s) for s in shapes.values()) / 1e9 == pytest.approx(8.29, abs=0.01)
    assert 2 * sum(np.prod(s) for s in shapes.values()) / 1e9 == pytest.approx(16.6, abs=0.05)


def test_structure_of_videoalign():
    """1,123 tensors with the adapter, and in bfloat16 the bytes of the published file but for its directory."""
    shapes = published("videoalign", 151_660, videoalign.reward_head)
    assert shapes["rm_head.weight"] == (1, 1536) and shapes["model.embed_tokens.weight"] == (151_660, 1536)
    sites = [k for k in shapes if k.endswith("_proj.weight") and k.startswith("model.layers.")]
    adapter = [shape for key in sites for shape in ((64, shapes[key][1]), (shapes[key][0], 64))]
    assert len(shapes) + len(adapter) == 1123
    size = 2 * sum(int(np.prod(shape)) for shape in [*shapes.values(), *adapter])
    assert 0 < 5_031_072_529 - size < 1_000_000


def test_special_tokens_follow_the_base_vocabulary(image_reward, video_reward):
    """With 151,657 tokens before them they are 151657, and 151657 to 151659: the last ones, in their order."""
    assert image_reward.reader.specials == [len(image_reward.reader.tokenizer) - 1]
    count = len(video_reward.reader.tokenizer)
    assert video_reward.reader.specials == [count - 3, count - 2, count - 1]
    assert image_reward.network.model.get_input_embeddings().num_embeddings == len(image_reward.reader.tokenizer)
