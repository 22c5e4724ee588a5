"""Files of thumbs and pairs on images: what is read, how an image becomes one of the model's size, what is refused."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from align.errors import DataError
from align.image_feedback import covering, fitted, load_image_feedback, training_and_heldout_rows
from align.images import image_file
from align.offline_checks import describe_image_feedback, is_image_feedback_file


def png(folder, name="a.png", size=(16, 16), colour=(255, 0, 0), mode="RGB"):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(folder / name)
    return name


def rows_file(folder, *rows, name="rows.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


@pytest.mark.parametrize(
    ("label", "up"),
    [(True, True), (1, True), ("up", True), ("+1", True), (1.0, True), ("TRUE", True),
     (False, False), (0, False), (-1, False), ("down", False), ("0", False), ("-1", False)],
)  # fmt: skip
def test_thumbs_are_read_in_every_form(tmp_path, label, up):
    file = rows_file(tmp_path, {"prompt": "a cat", "image": png(tmp_path), "label": label})
    assert [row.label for row in load_image_feedback(file).rows] == [up]


@pytest.mark.parametrize("label", [2, 0.5, "yes", "", None, [1], {"a": 1}, "5 stars"])
def test_other_labels_are_refused_and_the_row_is_named(tmp_path, label):
    good = {"prompt": "a cat", "image": png(tmp_path), "label": 1}
    file = rows_file(tmp_path, good, {**good, "label": label})
    with pytest.raises(DataError, match=r"rows.jsonl, line 2, field 'label'.*expected true or false"):
        load_image_feedback(file)


def test_csv_parquet_bytes_and_the_columns_of_an_export(tmp_path):
    import pyarrow
    from pyarrow import parquet

    name = png(tmp_path / "made")
    (tmp_path / "rows.csv").write_text(f"prompt,completion,label,annotator\na cat,{name},false,u-1\n")
    found = load_image_feedback(tmp_path / "rows.csv", root=tmp_path / "made")
    assert found.counts() == {"up": 0, "down": 1, "pairs": 0}
    data = (tmp_path / "made" / name).read_bytes()
    table = [{"prompt": "a", "chosen": {"bytes": data, "path": None}, "rejected": {"bytes": data, "path": "x.png"}}]
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "pairs.parquet")
    pair = load_image_feedback(tmp_path / "pairs.parquet").rows[0]
    assert pair.label is None and [image.data for image in pair.images] == [data, data]


def test_a_pair_is_two_thumbs_and_one_class_is_refused(tmp_path):
    name = png(tmp_path)
    pair, thumb = {"prompt": "a", "chosen": name, "rejected": name}, {"prompt": "b", "image": name, "label": 1}
    both = load_image_feedback(rows_file(tmp_path, pair, thumb))
    assert [row.label for row in both.for_loss("kto").rows] == [True, False, True]
    assert [row.prompt for row in both.for_loss("dpo").rows] == ["a"]
    thumbs = load_image_feedback(rows_file(tmp_path, thumb, thumb))
    with pytest.raises(DataError, match="no thumb down in the data.*found 2 up and 0 down"):
        thumbs.for_loss("kto")
    with pytest.raises(DataError, match="no pair in the data"):
        thumbs.for_loss("dpo")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "label": 1}, "A row has no image .*field 'image'"),
        ({"prompt": "a", "imgae": "x.png", "label": 1}, "Did you mean 'imgae'"),
        ({"prompt": "a", "chosen": "a.png"}, "A row has no image .*field 'rejected'"),
        ({"prompt": "a", "image": "none.png", "label": 1}, "There is no such image.*data.root"),
        ({"prompt": "a", "image": "a.mp4", "label": 1}, "A row has a video"),
        ({"prompt": "a", "video": "a.mp4", "label": 1}, "A row has a video"),
        ({"prompt": "a", "image": 3, "label": 1}, "An image is a path or bytes"),
        ({"image": "a.png", "label": 1}, "A row has no prompt"),
        ({"prompt": "  ", "image": "a.png", "label": 1}, "A row has no prompt"),
        ([1], "not an object"),
    ],
)
def test_rows_that_cannot_be_learnt_from_are_named(tmp_path, row, message):
    png(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        load_image_feedback(rows_file(tmp_path, row))
    assert "line 1" in str(caught.value)


def test_images_that_cannot_be_learnt_from_are_refused(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no image")
    Image.new("I;16", (16, 16)).save(tmp_path / "deep.png")
    frames = [Image.new("L", (16, 16), shade) for shade in (0, 99, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    for name, message in (("text.png", "cannot be read"), ("deep.png", "mode I;16"), ("moving.gif", "several frames")):
        with pytest.raises(DataError, match=message) as caught:
            load_image_feedback(rows_file(tmp_path, {"prompt": "a", "image": name, "label": 1}))
        assert "line 1, field 'image'" in str(caught.value)
    whole = (tmp_path / png(tmp_path, size=(64, 64))).read_bytes()
    with pytest.raises(DataError, match="cannot be read"):
        fitted(image_file(whole[:60], "row 3"), 16, 16)
    monkeypatch.setattr("align.images.MOST_PIXELS", 1000)
    with pytest.raises(DataError, match="64x64 pixels, more than"):
        image_file(whole, "row 3")


def test_the_crop_is_central_and_images_far_off_are_refused():
    assert covering(32, 16, 16, 16) == (8, 0, 24, 16)  # half of it is left
    assert covering(16, 24, 16, 16) == (0, 4, 16, 20)
    assert covering(8, 8, 16, 16) == (0, 0, 8, 8)
    for width, height, message in ((7, 8, "enlarged 2.29 times"), (33, 16, "leave 48%"), (16, 40, "leave 40%")):
        with pytest.raises(DataError, match=f"{width}x{height} is far from the model's 16x16.*{message}"):
            covering(width, height, 16, 16, "row 1")


def test_pixels_are_those_of_the_centre_upright():
    stripes = np.zeros((16, 32, 3), np.uint8)
    stripes[:, 8:24] = (255, 128, 0)
    file = io.BytesIO()
    Image.fromarray(stripes).save(file, "png")
    pixels = fitted(image_file(file.getvalue(), ""), 16, 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == np.float32
    assert np.allclose(pixels[:, :, 2:-2], np.array([1, 128 / 255, 0])[:, None, None])
    file = io.BytesIO()
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(file, "png")
    with pytest.raises(DataError, match="transparent in parts"):
        fitted(image_file(file.getvalue(), ""), 16, 16)
    file = io.BytesIO()
    Image.new("RGBA", (16, 16), (255, 0, 0, 255)).save(file, "png")
    assert fitted(image_file(file.getvalue(), ""), 16, 16)[:, 3, 3].tolist() == [1, 0, 0]
    turned = Image.fromarray(stripes)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    file = io.BytesIO()
    turned.save(file, "png", exif=exif)
    assert np.allclose(fitted(image_file(file.getvalue(), ""), 32, 16)[0, 8:24], 1)


def test_held_out_prompts_are_never_trained_on(tmp_path):
    name = png(tmp_path)
    rows = [{"prompt": f"prompt {i % 5}", "image": name, "label": i % 2} for i in range(20)]
    whole = load_image_feedback(rows_file(tmp_path, *rows))
    train, heldout = training_and_heldout_rows(whole, None, 0.4)
    prompts = [{row.prompt for row in side.rows} for side in (train, heldout)]
    assert not prompts[0] & prompts[1] and len(prompts[1]) == 2 and len(train) + len(heldout) == 20
    other = load_image_feedback(rows_file(tmp_path, {**rows[0], "prompt": "Prompt  3"}, name="other.jsonl"))
    with pytest.raises(DataError, match="1 held-out prompt is also trained on"):
        training_and_heldout_rows(whole, other, 0.0)


def test_check_says_what_a_file_holds(tmp_path):
    name = png(tmp_path)
    file = rows_file(tmp_path, *({"prompt": "a", "image": name, "label": up} for up in (1, 0, 0)))
    assert is_image_feedback_file(file)
    found = describe_image_feedback(file)
    assert (found["up"], found["down"], found["losses"]) == (1, 2, ["kto"])
    assert not is_image_feedback_file(rows_file(tmp_path, {"prompt": "a"}, name="prompts.jsonl"))
