"""Videos and first frames as files and as values: nothing is half written, guessed, or scored as something else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import tiny
from align.diffusion.families import Size
from align.diffusion.policy import Encodings, load_family, present
from align.errors import ConfigError, DataError
from align.images import MOST_PIXELS, decode_image, read_first_frame, require_first_frame
from align.prompts import load_prompts
from align.types import ImagePrompt, Samples, Video, join_samples, text_of
from align.videos import save_video, still_images
from rewards import get_reward
from rewards.base import score_safely
from rewards.meters import NAMES, measure_images, measure_pixels


def clip(frames=6, height=32, width=48, channels=3, fps=8.0, seed=0):
    """Smooth noise that changes from frame to frame."""
    coarse = torch.rand(1, channels, frames, 4, 4, generator=torch.Generator().manual_seed(seed))
    fine = nn.functional.interpolate(coarse, (frames, height, width), mode="trilinear", align_corners=True)
    return Video(fine[0].transpose(0, 1), fps)


def read_video(path):
    reader = imageio_ffmpeg.read_frames(str(path))
    about = next(reader)
    width, height = about["size"]
    frames = [np.frombuffer(raw, np.uint8).reshape(height, width, 3) for raw in reader]
    return torch.tensor(np.stack(frames)).permute(0, 3, 1, 2) / 255, about


@pytest.mark.parametrize("fps", [8.0, 12.5, 24000 / 1001])
def test_a_video_comes_back_from_its_file(tmp_path, fps):
    video = clip(fps=fps)
    save_video(tmp_path / "clip.mp4", video)
    frames, about = read_video(tmp_path / "clip.mp4")
    assert about["codec"] == "h264" and about["pix_fmt"].startswith("yuv420p")
    assert about["fps"] == pytest.approx(fps, abs=0.01)
    assert frames.shape == video.frames.shape
    assert (frames - video.frames).abs().mean() < 0.03  # colours are stored at half the size
    assert (frames.mean(1) - video.frames.mean(1)).abs().mean() < 0.015
    # A frame of its own at every place: the error to any other frame is larger.
    errors = (frames[:, None] - video.frames[None]).abs().mean((2, 3, 4))
    assert errors.argmin(1).tolist() == list(range(6))
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_odd_sides_lose_their_last_row_and_gray_is_gray(tmp_path):
    video = clip(2, 33, 49, channels=1)
    save_video(tmp_path / "odd.mp4", video)
    frames, _ = read_video(tmp_path / "odd.mp4")
    assert frames.shape == (2, 3, 32, 48)
    assert (frames - video.frames[:, :, :32, :48]).abs().mean() < 0.015
    save_video(tmp_path / "one.mp4", clip(1))
    assert len(read_video(tmp_path / "one.mp4")[0]) == 1


def test_pixels_that_are_no_numbers_are_black_not_noise(tmp_path):
    frames = torch.full((3, 3, 16, 16), 0.5)
    frames[1] = torch.nan
    save_video(tmp_path / "nan.mp4", Video(frames, 4))
    levels = read_video(tmp_path / "nan.mp4")[0].mean((1, 2, 3))
    assert levels.tolist() == pytest.approx([0.5, 0, 0.5], abs=0.03)


def test_a_video_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match="cannot be written"):
        save_video(tmp_path / "absent" / "clip.mp4", clip())
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_writing_does_not_reach_the_new_file(tmp_path):
    path, partial = tmp_path / "clip.mp4", tmp_path / "clip.writing.mp4"
    with partial.open("wb", buffering=0) as orphan:  # an encoder outlives the process that fed it
        save_video(path, clip())
        orphan.write(b"\xff" * 4096)
    assert len(read_video(path)[0]) == 6 and not partial.exists()


WRITER = """
import sys, torch
from align.types import Video
from align.videos import save_video
torch.manual_seed(0)
save_video(sys.argv[1], Video(torch.rand(400, 3, 256, 256), 8))
"""


@pytest.mark.slow  # another process has to import everything
def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    path, partial = tmp_path / "clip.mp4", tmp_path / "clip.writing.mp4"
    save_video(path, clip())
    before = path.read_bytes()
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
    deadline = time.monotonic() + 120
    while not partial.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    assert partial.exists() and process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert path.read_bytes() == before
    save_video(path, clip(4))
    assert len(read_video(path)[0]) == 4 and not partial.exists()


def test_frames_are_spread_from_the_first_to_the_last():
    video = Video(torch.arange(9.0).view(9, 1, 1, 1) / 10, 8)

    def picked(count):
        return (video.spread(count).flatten() * 10).round().int().tolist()

    assert picked(1) == [0] and picked(2) == [0, 8] and picked(3) == [0, 4, 8] and picked(5) == [0, 2, 4, 6, 8]
    assert picked(4) == [0, 3, 5, 8] and picked(9) == picked(20) == list(range(9))


def test_a_sheet_shows_images_or_strips_of_frames():
    images = torch.rand(2, 3, 8, 8)
    assert still_images(Samples(prompts=["a", "b"], images=images)) is images
    videos = [clip(9, 8, 10, seed=i) for i in range(2)]
    strips = still_images(Samples(prompts=["a", "b"], videos=videos), frames=3)
    assert strips.shape == (2, 3, 8, 30)
    assert torch.equal(strips[1][:, :, 10:20], videos[1].frames[4])
    short = still_images(Samples(prompts=["a"], videos=[clip(2, 8, 10)]))
    assert short.shape == (1, 3, 8, 20)


def test_meters_of_a_video_are_the_mean_over_its_frames():
    video = clip(9)
    found = measure_pixels(Samples(prompts=["a", "b"], videos=[video, clip(1, seed=3)]), frames=3)
    by_hand = measure_images(video.frames[[0, 4, 8]])
    assert set(found) == {*NAMES, "distance"}
    for name in NAMES:
        assert found[name][0] == pytest.approx(by_hand[name].mean(), rel=1e-12)
        assert found[name][1] == measure_images(clip(1, seed=3).frames)[name][0]
    images = torch.rand(2, 3, 8, 8)
    seen = measure_pixels(Samples(prompts=["a", "b"], images=images))
    assert all(seen[name].tolist() == value.tolist() for name, value in measure_images(images).items())
    assert np.isnan(seen["distance"]).all(), "each is its prompt's only sample"


def test_samples_are_joined_in_order_with_their_metadata():
    images = torch.rand(3, 3, 4, 4)
    whole = Samples(prompts=["a", "b", "c"], images=images, metadata=[{"i": i} for i in range(3)])
    joined = join_samples([whole.select([0]), whole.select([1, 2])])
    assert torch.equal(joined.images, images) and joined.prompts == whole.prompts
    assert list(joined.metadata) == list(whole.metadata)
    ragged = [Samples(prompts=[p], images=[torch.rand(3, s, s)]) for p, s in (("a", 4), ("b", 6))]
    assert [tuple(image.shape) for image in join_samples(ragged).images] == [(3, 4, 4), (3, 6, 6)]
    videos = [clip(2, seed=1), clip(3, seed=2)]
    joined = join_samples([Samples(prompts=[p], videos=[v]) for p, v in zip("ab", videos, strict=True)])
    assert joined.videos == videos and joined.media == "videos"
    texts = join_samples([Samples(prompts=["a"], texts=["x"]), Samples(prompts=["b"], texts=["y"])])
    assert texts.texts == ["x", "y"]


def picture(path, size=(48, 32), mode="RGB", colour=120):
    Image.new(mode, size, colour).save(path)
    return path


def test_what_is_asked_is_a_text_or_a_text_with_its_first_frame(tmp_path):
    image = picture(tmp_path / "a.png")
    (tmp_path / "p.jsonl").write_text('{"prompt": "one", "image": "a.png"}\n{"prompt": "two", "image": null}\n')
    given = load_prompts(tmp_path / "p.jsonl", image_column="image").asked
    assert given == (ImagePrompt("one", image), "two")
    assert [text_of(prompt) for prompt in given] == ["one", "two"] and "a.png" in str(given[0])
    assert load_prompts(["one", "two"]).asked == ("one", "two")
    assert len({ImagePrompt("one", image), ImagePrompt("one", image), ImagePrompt("one", tmp_path / "b.png")}) == 2


def test_first_frames_are_read_upright_and_in_their_own_size(tmp_path):
    path, exif = tmp_path / "phone.jpg", Image.Exif()
    exif[0x0112] = 6  # a picture lying on its side
    Image.new("RGB", (32, 48), (200, 10, 10)).save(path, exif=exif)
    frame = read_first_frame(path, 320, 480)
    assert frame.size == (48, 32) and frame.mode == "RGB"
    assert frame.getpixel((5, 5))[0] == pytest.approx(200, abs=3)
    assert read_first_frame(picture(tmp_path / "g.png", mode="L"), 32, 48).getpixel((0, 0)) == (120, 120, 120)
    opaque = picture(tmp_path / "o.png", mode="RGBA", colour=(1, 2, 3, 255))
    assert read_first_frame(opaque, 32, 48).getpixel((0, 0)) == (1, 2, 3)


def test_first_frames_that_cannot_be_used_are_named(tmp_path):
    def refused(path, problem, sides=(32, 48)):
        with pytest.raises(DataError, match=problem) as caught:
            read_first_frame(path, *sides)
        assert path.name in str(caught.value)

    refused(tmp_path / "absent.png", "cannot be read")
    (tmp_path / "text.png").write_text("no image")
    refused(tmp_path / "text.png", "cannot be read")
    whole = picture(tmp_path / "whole.png", (480, 320)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "cut.png", "cannot be read")
    refused(picture(tmp_path / "a.png", mode="RGBA", colour=(1, 2, 3, 128)), "transparent in parts")
    refused(picture(tmp_path / "i.png", mode="I;16"), "more than 8 bits")
    refused(picture(tmp_path / "wide.png", (64, 32)), r"2\.00 in its 64x32 pixels and 1\.50")
    refused(picture(tmp_path / "high.png", (48, 64)), "squeezed")
    for width in (44, 52):  # within a tenth
        require_first_frame(picture(tmp_path / "near.png", (width, 32)), 32, 48)
    huge = picture(tmp_path / "huge.png", (12_000, 8_000), "1", 0)
    assert MOST_PIXELS < 12_000 * 8_000
    refused(huge, "12000x8000 pixels, more than 64 million")
    assert decode_image(huge.read_bytes()) == (None, "the image has 12000x8000 pixels, more than 64 million")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.sd3(tmp_path_factory.mktemp("models") / "sd3")


def test_short_conditioning_is_filled_up_with_zeros_and_held_at_its_own_length(folder):
    family = load_family(folder)
    lengths = {"a": 2, "b": 5}

    def encode(prompts, size):
        rows = [torch.full((lengths[p], 3), float(lengths[p]), dtype=torch.bfloat16) for p in prompts]
        return {"text": rows, "mask": [torch.ones(len(row)) for row in rows], "pooled": torch.ones(len(rows), 4)}

    family.encode = encode
    encodings = Encodings(family, Size())
    stacked = encodings.stack(["a", "b", "a"])
    assert stacked["text"].shape == (3, 5, 3) and stacked["text"].dtype == torch.float32
    assert stacked["text"][0].sum() == 2 * 3 * 2 and not stacked["text"][0, 2:].any()
    assert stacked["mask"].tolist() == [[1, 1, 0, 0, 0], [1] * 5, [1, 1, 0, 0, 0]]
    assert stacked["pooled"].shape == (3, 4)
    assert encodings.stack(["a"])["text"].shape == (1, 2, 3)


def test_encodings_are_held_within_their_limit_and_do_not_depend_on_what_went_before(folder):
    """A training set of any size: what is left over is encoded when it is asked for, by itself."""
    family, calls = load_family(folder), []
    encode = family.encode
    family.encode = lambda prompts, size: calls.append(list(prompts)) or encode(prompts, size)
    prompts = [f"{a} {b}" for a in "abcdefghijklm" for b in "nopqrstuvw"]
    one = Encodings(family, Size()).stack(prompts[:1])
    each = sum(value.nbytes for value in one.values())
    encodings = Encodings(family, Size(), limit=100 * each)
    calls.clear()
    encodings.add(prompts)
    assert [len(call) for call in calls] == [64]  # half of the limit is full
    encodings.add(prompts[100:])
    later = encodings.stack(prompts[100:102])
    assert calls[1:] == [[prompts[100]], [prompts[101]]]
    for start in range(64, 130, 6):
        encodings.stack(prompts[start : start + 6])
    assert (len(encodings._held), len(encodings._passing)) == (64, 50)
    encodings.stack(prompts[:64])
    assert len(calls[-1]) == 1
    other = Encodings(family, Size(), limit=100 * each)  # as a resumed run has it
    other.add(prompts)
    again = other.stack([prompts[101], prompts[3], prompts[100]])
    for name, value in later.items():
        assert torch.equal(again[name][[2, 0]], value)
        assert torch.equal(again[name][1], encodings.stack([prompts[3]])[name][0])


class Moved(nn.Linear):
    """A module that remembers where it was sent."""

    def __init__(self):
        super().__init__(2, 2)
        self.sent = []

    def to(self, device):
        self.sent.append(str(device))
        return super().to_empty(device=device)


def test_components_are_where_the_denoiser_is_while_they_run(folder):
    """The meta device stands for an accelerator: it holds no numbers, but modules are on it or they are not."""
    family = load_family(folder)
    family.pipeline.text_encoder, family.pipeline.vae = Moved(), Moved()
    family.pipeline.transformer = nn.Linear(1, 1, device="meta")
    with pytest.raises(ZeroDivisionError), present(family, ("text_encoder", "text_encoder_3", "tokenizer")):
        assert family.pipeline.text_encoder.sent == ["meta"] and family.pipeline.vae.sent == []
        assert family.pipeline.text_encoder.weight.device.type == "meta"
        raise ZeroDivisionError
    assert family.pipeline.text_encoder.sent == ["meta", "cpu"]


def test_frames_are_scored_as_images(tmp_path):
    videos = [clip(9, seed=1), clip(9, seed=2), clip(3, 16, 16, seed=3)]
    samples = Samples(prompts=["a", "b", "c"], videos=videos)
    inner = get_reward("jpeg", direction="incompressible")
    found = get_reward("frames", reward="jpeg", args={"direction": "incompressible"}, count=3)
    scores = found.score(samples)
    assert scores.names == ("jpeg",) and scores.valid.all()
    for i, places in enumerate(([0, 4, 8], [0, 4, 8], [0, 1, 2])):
        frames = Samples(prompts=["x"] * 3, images=videos[i].frames[places])
        assert scores.values[i, 0] == pytest.approx(inner.score(frames).values.mean(), rel=1e-12)
    first = get_reward("frames", reward="jpeg", args={"direction": "incompressible"}, count=1)
    alone = inner.score(Samples(prompts=["x"], images=videos[1].frames[:1]))
    assert first.score(samples).values[1, 0] == alone.values[0, 0]
    assert first.identity() != found.identity() != get_reward("frames", reward="jpeg", count=3).identity()


def test_a_video_with_a_frame_that_cannot_be_scored_is_missing():
    broken = clip(9, seed=1)
    broken.frames[4, 0, 0, 0] = torch.nan
    samples = Samples(prompts=["a", "b"], videos=[broken, clip(9, seed=2)])
    scores = score_safely(get_reward("frames", reward="jpeg", count=3), samples)
    assert scores.valid.tolist() == [[False], [True]] and np.isnan(scores.values[0, 0])
    assert "not numbers" in scores.errors[0] and scores.errors[1] == ""
    assert score_safely(get_reward("frames", reward="jpeg", count=2), samples).valid.all()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"reward": "regex", "args": {"pattern": "a"}}, "scores texts"),
        ({"reward": "jpeg", "count": 0}, "1 or more"),
        ({"reward": "jpeg", "count": True}, "1 or more"),
        ({"reward": "jpg"}, "Did you mean"),
    ],
)
def test_rewards_that_score_no_frames_are_refused(arguments, problem):
    with pytest.raises(ConfigError, match=problem):
        get_reward("frames", **arguments)


def test_frames_of_images_are_refused():
    with pytest.raises(DataError, match="scores videos"):
        get_reward("frames", reward="jpeg").score(Samples(prompts=["a"], images=torch.rand(1, 3, 8, 8)))
