"""Image meters by hand, and the two alarms that read them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from align import guards
from align.types import Samples
from rewards.meters import NAMES, measure_images, measure_pixels


def one(image):
    return {name: float(value[0]) for name, value in measure_images([image]).items()}


def test_a_flat_gray_image_moves_no_meter_and_a_red_one_is_saturated():
    flat = one(torch.full((1, 6, 6), 0.5))
    assert flat == pytest.approx({**dict.fromkeys(NAMES, 0.0), "brightness": 0.5}, abs=1e-12)
    red = torch.zeros(3, 6, 6)
    red[0] = 1.0
    assert one(red)["saturation"] == 1.0 and one(red)["clipped"] == 1.0 and one(red)["contrast"] == pytest.approx(0)


def test_a_checkerboard_by_hand():
    board = ((torch.arange(6)[:, None] + torch.arange(6)) % 2).float().expand(1, 6, 6)
    found = one(board)
    assert found["edges"] == pytest.approx(1.0) and found["sharpness"] == pytest.approx(16.0)
    assert found["contrast"] == pytest.approx(0.5) and found["border"] == pytest.approx(1.0)


def test_a_frame_shows_at_the_border_only():
    framed = torch.full((1, 8, 8), 0.4)
    framed[:, 0] = framed[:, -1] = 0.9
    framed[:, :, 0] = framed[:, :, -1] = 0.9
    assert one(framed)["border"] == pytest.approx(0.5 * 24 / 32)


def test_pixels_that_are_not_numbers_are_missing():
    broken = torch.full((1, 4, 4), 0.5)
    broken[0, 0, 0] = float("nan")
    assert all(np.isnan(v) for v in one(broken).values())


def test_duplicates_of_a_prompt_have_no_distance_and_a_lone_sample_has_none():
    images = torch.stack([torch.full((1, 4, 4), v) for v in (0.2, 0.2, 0.5, 0.9)])
    found = measure_pixels(Samples(["a", "a", "a", "b"], images=images))
    assert found["distance"][:3] == pytest.approx([0.0, 0.3, 0.3]) and np.isnan(found["distance"][3])
    assert found["brightness"] == pytest.approx([0.2, 0.2, 0.5, 0.9])
    assert found["distance"].dtype == np.float64 and len(found["edges"]) == 4


def test_a_quarter_of_near_duplicates_is_told():
    base = np.linspace(0.1, 1.1, 1001)
    assert guards.repeated(np.r_[np.full(25, 0.05), np.full(75, 0.5)], base) == ""
    assert "26% of the samples are within 0.11" in guards.repeated(np.r_[np.full(26, 0.05), np.full(74, 0.5)], base)
    assert guards.repeated(base, base) == "" and guards.repeated(np.full(5, np.nan), base) == ""


def test_saturation_needs_a_quarter_above_the_calibration_set():
    calibration = np.linspace(0, 1, 1000)
    assert guards.saturated(np.r_[np.full(24, 2.0), np.full(76, 0.5)], calibration) == ""
    assert "26% of the samples score above 0.999" in guards.saturated(
        np.r_[np.full(26, 2.0), np.full(74, 0.5)], calibration
    )
    assert guards.saturated(np.full(100, 1.0), np.full(1000, 1.0)) == ""  # at the top of its range is not beyond it
    assert guards.saturated(np.full(5, np.nan), calibration) == ""


def test_a_meter_is_displaced_when_its_mean_leaves_what_single_samples_showed():
    base = np.linspace(0, 1, 1001)
    assert guards.displaced(np.full(50, 0.9), base) == ""
    assert "its mean is 1.2" in guards.displaced(np.full(50, 1.2), base)
