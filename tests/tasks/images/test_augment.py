"""Disturbed images: the same shape, still in 0..1, by torch's generator, and undone where nothing is disturbed."""

import pytest
import torch

from smidgen.tasks.images import augment
from smidgen.tasks.images.augment import disturbed, flip_is_safe


@pytest.fixture
def plain(monkeypatch):
    """No colour, so that places can be compared."""
    monkeypatch.setattr(augment, "_COLOUR", 0.0)


@pytest.mark.parametrize("place", ["crop", "shift"])
def test_the_generator_decides_and_the_range_stays(place):
    pixels = torch.rand(6, 3, 10, 12)
    torch.manual_seed(5)
    one = disturbed(pixels, place, flip=True)
    torch.manual_seed(5)
    assert torch.equal(one, disturbed(pixels, place, flip=True))
    assert not torch.equal(one, disturbed(pixels, place, flip=True))
    assert one.shape == pixels.shape
    assert 0 <= float(one.min()) <= float(one.max()) <= 1
    assert disturbed(torch.rand(2, 1, 8, 8), place, flip=False).shape == (2, 1, 8, 8)


def test_a_flip_exchanges_left_and_right_in_about_half_of_the_images(plain, monkeypatch):
    monkeypatch.setattr(augment, "_SHIFT", 0.0)
    pixels = torch.rand(40, 3, 6, 6)
    new = disturbed(pixels, "shift", flip=True)
    same = [torch.allclose(new[i], pixels[i], atol=1e-5) for i in range(40)]
    mirrored = [torch.allclose(new[i], pixels[i].flip(-1), atol=1e-5) for i in range(40)]
    assert all(a or b for a, b in zip(same, mirrored, strict=True))
    assert 8 < sum(mirrored) < 32
    assert torch.allclose(disturbed(pixels, "shift", flip=False), pixels, atol=1e-5)


def test_a_shift_moves_by_an_eighth_at_most_and_repeats_the_edge(plain):
    ramp = torch.arange(16.0).expand(50, 1, 16, 16) / 16  # every column has its number
    new = disturbed(ramp, "shift", flip=False) * 16
    moved = new[:, 0, 8, 8] - 8
    assert float(moved.abs().max()) <= 2.0001
    assert float(moved.std()) > 0.5
    assert float(new.max()) <= 15


def test_a_crop_sees_at_least_three_fifths_and_never_beyond_the_edge(plain):
    ramp = torch.arange(32.0).expand(200, 1, 32, 32) / 32
    new = disturbed(ramp, "crop", flip=False)
    step = (new[:, 0, 16, 17] - new[:, 0, 16, 16]) * 32  # how much of the source a pixel covers
    assert float(step.max()) <= 1.0001
    assert float(step.min()) >= (0.6 * 3 / 4) ** 0.5 - 1e-3


def test_colours_change_mildly_and_by_image():
    grey = torch.full((100, 3, 4, 4), 0.5)
    levels = disturbed(grey, "crop", flip=False)[:, 0, 0, 0]
    assert 0.4 <= float(levels.min()) < 0.44
    assert 0.56 < float(levels.max()) <= 0.6 + 1e-5


def test_flips_are_off_where_the_classes_say_that_sides_matter():
    assert flip_is_safe("multiclass", ["cat", "dog"])[0]
    for kind, names in (
        ("multiclass", [str(i) for i in range(10)]),
        ("multiclass", list("abc")),
        ("binary", ["turn left", "turn right"]),
        ("regression", []),
    ):
        safe, why = flip_is_safe(kind, names)
        assert not safe
        assert "task.flip" in why
