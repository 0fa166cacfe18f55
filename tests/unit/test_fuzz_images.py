"""2,000 damaged images: each is named in a finding or still decodes; nothing escapes, hangs or is changed."""

from __future__ import annotations

import time
from io import BytesIO

import numpy as np
import pytest

from goodfit.data.checks.audit import audit_dataset
from goodfit.data.checks.scan import scan_file
from goodfit.data.formats.readers import read_dataset
from goodfit.runtime.images import ImageError, decode_image
from pictures import draw, folder_hash

NUM = 2000
FORMATS = {"jpg": "JPEG", "png": "PNG", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "webp": "WEBP", "ppm": "PPM"}
DAMAGES = ("flip", "flips", "cut", "head", "zeros", "swap", "insert", "other", "empty")


def encoded(seed: int, suffix: str) -> bytes:
    image = draw(seed, seed % 3, size=48)
    if suffix == "jpg" and seed % 3 == 0:
        image = image.convert("CMYK" if seed % 2 else "L")
    if suffix == "png" and seed % 3 == 0:
        image = image.convert("P" if seed % 2 else "RGBA")
    out = BytesIO()
    image.save(out, FORMATS[suffix])
    return out.getvalue()


def damage(data: bytes, kind: str, random: np.random.Generator) -> bytes:
    made = bytearray(data)
    place = int(random.integers(len(made)))
    if kind == "flip":
        made[place] ^= 1 << int(random.integers(8))
    elif kind == "flips":
        for at in random.integers(len(made), size=20):
            made[at] = int(random.integers(256))
    elif kind == "cut":
        del made[max(1, place) :]
    elif kind == "head":
        made[: int(random.integers(1, 16))] = random.bytes(8)
    elif kind == "zeros":
        made[place : place + 200] = bytes(min(200, len(made) - place))
    elif kind == "swap":
        half = len(made) // 2
        made = made[half:] + made[:half]
    elif kind == "insert":
        made[place:place] = random.bytes(64)
    elif kind == "other":
        made = bytearray(
            random.choice([b"<html><body>not found</body></html>", b"%PDF-1.7 ", b"PK\x03\x04" + random.bytes(90)])
        )
    else:
        made = bytearray()
    return bytes(made)


def decoded(path):
    """Kind and message of the error, or the shape of the pixels."""
    try:
        return "", "", np.asarray(decode_image(path)).shape
    except ImageError as error:
        return error.kind, error.message, ()


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz") / "data"
    random = np.random.default_rng(7)
    for kind in range(2):
        (root / f"class{kind}").mkdir(parents=True)
        for number in range(40):
            draw(5000 + 100 * kind + number, kind, size=48).save(root / f"class{kind}" / f"good{number}.png")
    for number in range(NUM):
        suffix = list(FORMATS)[number % len(FORMATS)]
        data = damage(encoded(number, suffix), DAMAGES[number // len(FORMATS) % len(DAMAGES)], random)
        (root / f"class{number % 2}" / f"bad{number}.{suffix}").write_bytes(data)
    return root


def test_every_damaged_image_is_named_or_decodes(damaged):
    before = folder_hash(damaged)
    start = time.monotonic()
    audit = audit_dataset(read_dataset(damaged), max_bad=1.0)
    assert time.monotonic() - start < 60
    named = {kind for f in audit.findings for kind in [f.kind]}
    assert {"unreadable", "truncated", "wrong_type"} <= named
    accepted = {p for p, s in zip(audit.index.paths, audit.index.splits, strict=True) if s != -2}
    assert sum("good" in p for p in accepted) == 80, "a sound picture was lost"
    errors = audit.scan.errors
    for row, path in enumerate(audit.index.paths):
        if "bad" not in path:
            continue
        kind, message, shape = decoded(audit.index.file(row))
        if kind:
            assert errors[row] == (kind, message) and path not in accepted
        else:
            assert row not in errors and shape == (*audit.index.sizes[row][::-1], 3)
    counted = sum(
        f.count for f in audit.findings if "left out" in f.action and f.kind in ("unreadable", "truncated", "huge")
    )
    assert counted > NUM / 3
    assert folder_hash(damaged) == before


def test_damage_that_still_decodes_is_said(tmp_path):
    """A JPEG with a flipped bit in its data decodes, but libjpeg complains: the finding says so, and it is kept."""
    pytest.importorskip("simplejpeg")
    out = BytesIO()
    draw(1, 1, size=200).save(out, "JPEG", quality=95)
    said = 0
    for place in range(800, 2000, 40):
        data = bytearray(out.getvalue())
        data[place] ^= 0x10
        (tmp_path / "x.jpg").write_bytes(data)
        scan = scan_file(tmp_path / "x.jpg")
        said += bool(scan.damaged and not scan.error and scan.width)
    assert said >= 3
    (tmp_path / "x.jpg").write_bytes(out.getvalue())
    assert scan_file(tmp_path / "x.jpg").damaged == ""


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path):
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    (tmp_path / "b.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))
    )
    start = time.monotonic()
    scan = scan_file(tmp_path / "b.png")
    assert scan.error == "huge" and time.monotonic() - start < 1


@pytest.mark.parametrize("suffix", list(FORMATS))
@pytest.mark.parametrize("seed", range(6))
def test_sound_images_raise_no_alarm(tmp_path, suffix, seed):
    (tmp_path / f"a.{suffix}").write_bytes(encoded(seed, suffix))
    scan = scan_file(tmp_path / f"a.{suffix}")
    assert (scan.error, scan.damaged, scan.wrong_suffix) == ("", "", "") and (scan.width, scan.height) == (48, 48)
