"""The serving path: every form an image file can take, from its bytes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from goodfit.runtime.images import ImageError, Preprocessing, decode_image, to_rgb

PLAIN = Preprocessing(size=32, resize=36, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def encode(image, format="PNG", **more):
    buffer = io.BytesIO()
    image.save(buffer, format, **more)
    return buffer.getvalue()


def gradient(width=60, height=40):
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([4 * x, 6 * y, 0 * x + 77], axis=2).astype(np.uint8))


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode_image(encode(gradient(), "JPEG", quality=95, exif=exif.tobytes()))
    assert turned.size == (40, 60)
    expected = np.asarray(gradient().transpose(Image.Transpose.ROTATE_270), dtype=int)
    assert np.abs(np.asarray(turned, dtype=int) - expected).mean() < 3


def test_grey_and_palette_and_alpha_and_cmyk():
    image = gradient()
    grey = decode_image(encode(image.convert("L")))
    assert np.ptp(np.asarray(grey), axis=2).max() == 0
    palette = decode_image(encode(image.quantize(64)))
    assert np.abs(np.asarray(palette, int) - np.asarray(image, int)).mean() < 8
    rgba = image.convert("RGBA")
    rgba.putalpha(0)
    assert (np.asarray(decode_image(encode(rgba))) == 255).all(), "transparent is white"
    cmyk = decode_image(encode(image.convert("CMYK"), "JPEG", quality=95))
    assert cmyk.mode == "RGB" and np.abs(np.asarray(cmyk, int) - np.asarray(image, int)).mean() < 6


def test_sixteen_bits_keep_their_range():
    values = np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16)
    image = decode_image(encode(Image.fromarray(values)))
    pixels = np.asarray(image)[..., 0].astype(int)
    assert pixels.min() == 0 and pixels.max() == 255
    assert np.abs(pixels - values / 257).max() <= 1
    assert to_rgb(Image.fromarray(np.full((4, 4), 0.5, np.float32))).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 20_000), (20_000, 1), (32, 32), (4000, 3000)])
def test_any_shape_becomes_the_input(width, height):
    pixels = PLAIN.pixels(encode(Image.new("RGB", (width, height), (10, 20, 30)), "PNG"))
    assert pixels.shape == (3, 32, 32) and pixels.dtype == np.uint8
    assert (pixels == np.array([10, 20, 30]).reshape(3, 1, 1)).all()


def test_the_centre_is_cut_after_scaling():
    image = gradient(90, 60)
    scaled = image.resize((54, 36), Image.Resampling.BICUBIC)
    expected = np.asarray(scaled.crop((11, 2, 43, 34)), int).transpose(2, 0, 1)
    assert np.abs(PLAIN.pixels(encode(image)).astype(int) - expected).max() <= 3


@pytest.mark.parametrize(
    ("data", "kind"),
    [(b"", "unreadable"), (b"<html>not an image</html>", "wrong_type"), (b"\x89PNG\r\n\x1a\n", "wrong_type")],
)
def test_what_is_no_image(data, kind):
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert caught.value.kind in (kind, "unreadable")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_truncated(share, format):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8))
    data = encode(noise, format)
    with pytest.raises(ImageError) as caught:
        decode_image(data[: int(share * len(data))])
    assert caught.value.kind in ("truncated", "unreadable")


@pytest.mark.filterwarnings("default::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_by_its_header():
    bomb = encode(Image.new("1", (30_000, 30_000)))  # 900 million pixels in a file of some kilobytes
    with pytest.raises(ImageError) as caught:
        decode_image(bomb)
    assert caught.value.kind == "huge" and len(bomb) < 1_000_000


def test_mutated_files_never_raise_anything_else():
    random = np.random.default_rng(1)
    sources = [encode(gradient(), "JPEG"), encode(gradient(), "PNG"), encode(gradient().quantize(16), "GIF"),
               encode(gradient(), "WEBP"), encode(gradient(), "TIFF"), encode(gradient(), "BMP")]  # fmt: skip
    failed = 0
    for number in range(600):
        data = bytearray(sources[number % len(sources)])
        for position in random.integers(0, len(data), 4):
            data[position] = random.integers(0, 256)
        try:
            PLAIN.pixels(bytes(data))
        except ImageError:
            failed += 1
    assert 50 < failed < 600  # some mutants are still images; none raised another error


def test_the_description_survives_json_and_refuses_nonsense():
    assert Preprocessing.from_dict(PLAIN.to_dict()) == PLAIN
    for change in ({"size": 0}, {"resize": 8}, {"interpolation": "magic"}, {"std": (0, 1, 1)}, {"mean": None}):
        with pytest.raises(Exception, match="preprocessing"):
            Preprocessing.from_dict({**PLAIN.to_dict(), **change})
