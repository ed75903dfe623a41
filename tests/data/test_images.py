"""Images: what is read of which file, what is said of broken ones, and how they are fitted."""

import io

import pytest
import torch
from PIL import Image, ImageOps

from smidgen.core.errors import DataError
from smidgen.data.images import (
    Fit,
    content_key,
    decode,
    decode_all,
    image_name,
    image_problem,
    image_size,
    in_threads,
    is_image,
)

RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)


def as_it_is(image, channels=3):
    return Fit(height=image.height, width=image.width, channels=channels, resample=0)


def file_of(image, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def two_by_one() -> Image.Image:
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    return image


def pixel(pixels, x, y):
    return tuple(pixels[:, y, x].tolist())


def test_a_path_bytes_and_a_mapping_give_the_same_pixels(tmp_path):
    image = two_by_one()
    image.save(tmp_path / "a.png")
    values = [str(tmp_path / "a.png"), file_of(image), {"bytes": file_of(image), "path": "a.png"}]
    values.append({"bytes": None, "path": values[0]})
    for value in values:
        assert is_image(value)
        assert image_problem(value) is None
        assert image_size(value) == (1, 2)
        pixels = decode(value, as_it_is(image))
        assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 1, 2))
        assert (pixel(pixels, 0, 0), pixel(pixels, 1, 0)) == (RED, BLUE)
    assert len({content_key(value) for value in values[1:3]}) == 1
    assert content_key(values[0]) == content_key(values[3])


def test_images_are_turned_upright():
    image = two_by_one()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the picture has to be turned to the right
    turned = decode(file_of(image, exif=exif), Fit(height=2, width=1, resample=0))
    assert (pixel(turned, 0, 0), pixel(turned, 0, 1)) == (RED, BLUE)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_does_and_its_size_is_of_what_is_seen(orientation):
    image = Image.frombytes("RGB", (3, 2), bytes(range(0, 180, 10)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = file_of(image, exif=exif)
    seen = ImageOps.exif_transpose(Image.open(io.BytesIO(stored)))
    assert image_size(stored) == (seen.height, seen.width)
    pixels = decode(stored, Fit(height=seen.height, width=seen.width))
    assert bytes(pixels.permute(1, 2, 0).flatten().tolist()) == seen.tobytes()


def test_alpha_is_laid_on_white():
    image = Image.new("RGBA", (2, 1), (*RED, 255))
    image.putpixel((1, 0), (*BLACK, 0))
    for saved in (file_of(image), file_of(image.convert("P", palette=Image.Palette.ADAPTIVE), transparency=0)):
        pixels = decode(saved, as_it_is(image))
        assert (255, 255, 255) in (pixel(pixels, 0, 0), pixel(pixels, 1, 0))
    assert pixel(decode(file_of(image), as_it_is(image)), 1, 0) == (255, 255, 255)


def test_palettes_become_colours_and_grey_becomes_three_channels():
    image = two_by_one().convert("P", palette=Image.Palette.ADAPTIVE)
    assert pixel(decode(file_of(image), as_it_is(image)), 1, 0) == BLUE
    grey = Image.new("L", (2, 1), 100)
    assert pixel(decode(file_of(grey), as_it_is(grey)), 0, 0) == (100, 100, 100)
    assert decode(file_of(two_by_one()), as_it_is(grey, channels=1)).shape == (1, 1, 2)


def test_sixteen_bits_of_grey_are_scaled_and_not_cut_off():
    image = Image.new("I;16", (2, 1), 128 * 256)
    pixels = decode(file_of(image), as_it_is(image))
    assert pixel(pixels, 0, 0) == (128, 128, 128)


def test_an_image_is_squashed_or_its_middle_is_cut_out():
    image = Image.new("RGB", (8, 4), BLACK)
    image.paste(GREEN, (2, 0, 6, 4))
    cut = decode(file_of(image), Fit(height=2, width=2, shortest=2, resample=0))
    assert {pixel(cut, x, y) for x in range(2) for y in range(2)} == {GREEN}
    squashed = decode(file_of(image), Fit(height=2, width=4, resample=0))
    assert [pixel(squashed, x, 0) for x in range(4)] == [BLACK, GREEN, GREEN, BLACK]
    beyond = decode(file_of(image), Fit(height=6, width=6, shortest=2, resample=0))
    assert pixel(beyond, 0, 0) == BLACK
    assert pixel(beyond, 3, 3) == GREEN


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "text.png").write_text("this is text")
    (tmp_path / "empty.jpg").write_bytes(b"")
    assert "text.png is no image" in str(image_problem(str(tmp_path / "text.png")))
    assert "0 bytes" in str(image_problem(str(tmp_path / "empty.jpg")))
    assert f"there is no file {tmp_path / 'gone.png'}" == image_problem(str(tmp_path / "gone.png"))
    assert image_problem({"bytes": None, "path": None}) == "there is no image"
    assert image_problem(None) == "there is no image"
    assert "is no image" in str(image_problem(b"GIF8"))
    assert image_name(b"1234") == "an image of 4 bytes"
    assert not is_image("a sentence.")
    assert not is_image(7)


def test_damaged_images_are_named_all_together(tmp_path):
    whole = file_of(Image.effect_noise((64, 64), 60), "JPEG")
    cut = whole[: len(whole) // 2]
    assert image_problem(cut) is None  # its header is whole
    values = [whole, cut, whole, cut]
    with pytest.raises(DataError, match="2 of 4 images are damaged") as caught:
        decode_all(values, Fit(height=8, width=8), ["a:1", "a:2", "a:3", "a:4"])
    assert "a:2: it cannot be decoded" in str(caught.value)
    assert "a:4: it cannot be decoded" in str(caught.value)
    assert decode_all(values[::2], Fit(height=8, width=8), ["a", "b"]).shape == (2, 3, 8, 8)


def test_a_few_images_are_there_at_a_time_however_long_the_column_is():
    there, most = set(), 0

    def values():
        nonlocal most
        for i in range(500):
            there.add(i)
            most = max(most, len(there))
            yield i

    def done(i):
        there.discard(i)
        return 2 * i

    assert in_threads(done, values()) == list(range(0, 1000, 2))
    assert most <= 64


def test_floating_point_pixels_are_refused():
    with pytest.raises(DataError, match="floating-point"):
        decode(file_of(Image.new("F", (2, 2), 0.5), "TIFF"), Fit(height=2, width=2))


def test_large_files_are_told_apart_by_size_and_both_ends(tmp_path):
    for name, data in (("a", b"1" * 20000), ("b", b"1" * 20000), ("c", b"1" * 19999 + b"2"), ("d", b"1" * 20001)):
        (tmp_path / name).write_bytes(data)
    keys = [content_key(str(tmp_path / name)) for name in "abcd"]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
