"""Near duplicates: planted copies of every kind are found, pictures that only look alike are not."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from goodfit.data.checks import alignment, duplicates
from goodfit.data.checks.duplicates import SIDE, near_duplicates, thumbnail
from pictures import folder_hash

Pixels = npt.NDArray[np.uint8]
SIZE = (300, 240)
KINDS = ("encoded", "smaller", "larger", "squashed", "brighter", "darker", "cropped", "all")


def scene(random: np.random.Generator) -> Image.Image:
    """A slope of light, a dozen shapes, and the noise of a sensor."""
    width, height = SIZE
    y, x = np.mgrid[:height, :width]
    pixels = (120 + random.normal(0, 0.2) * (x - width / 2) + random.normal(0, 0.2) * (y - height / 2))[:, :, None]
    pixels = np.repeat(pixels, 3, axis=2)
    for _ in range(12):
        centre, radii = random.uniform(0, 1, 2) * SIZE, random.uniform(8, 50, 2)
        distance = np.stack([(x - centre[0]) / radii[0], (y - centre[1]) / radii[1]])
        inside = (distance**2).sum(0) < 1 if random.random() < 0.5 else np.abs(distance).max(0) < 1
        pixels[inside] = random.uniform(20, 230, 3)
    return picture(pixels + random.normal(0, 3, pixels.shape))


def picture(pixels: npt.NDArray[np.floating]) -> Image.Image:
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def changed(original: Image.Image, kind: str, random: np.random.Generator) -> Image.Image:
    """A copy as somebody else might have saved it."""
    out, (width, height) = original, original.size
    if kind in ("cropped", "all"):
        left, right, top, bottom = random.uniform(0.01, 0.05, 4)
        out = out.crop((round(left * width), round(top * height), round(width - right * width),
                        round(height - bottom * height)))  # fmt: skip
    factors = {"smaller": (0.8, 0.8), "larger": (1.2, 1.2), "squashed": (0.95, 1.05), "all": (0.84, 0.9)}
    if kind in factors:
        across, down = factors[kind]
        out = out.resize((round(out.width * across), round(out.height * down)), Image.Resampling.BICUBIC)
    gain = {"brighter": 1.1, "darker": 0.9, "all": 1.1}.get(kind, 1)
    out = picture(np.asarray(out).astype(np.float32) * gain)
    kept = io.BytesIO()
    out.save(kept, "JPEG", quality=50 if kind in ("encoded", "all") else 90)
    return Image.open(kept).convert("RGB")


def thumbnails(pictures: list[Image.Image]) -> Pixels:
    return np.stack([thumbnail(np.asarray(p)) for p in pictures])


def search(pictures: Pixels, known: npt.NDArray[np.int64] | None = None) -> list[tuple[int, int]]:
    found = near_duplicates(pictures, known=np.full(len(pictures), -1) if known is None else known)
    return [(a, b) for a, b, _ in found]


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    random = np.random.default_rng(1)
    return [scene(random) for _ in range(60)]


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_every_kind_are_found_and_nothing_else(kind: str, scenes: list[Image.Image]) -> None:
    random = np.random.default_rng(2)
    copies = [changed(original, kind, random) for original in scenes[:25]]
    assert search(thumbnails([*scenes, *copies])) == [(row, len(scenes) + row) for row in range(25)]


def test_scores_are_ordered_bounded_and_the_same_each_time(scenes: list[Image.Image]) -> None:
    random = np.random.default_rng(3)
    every = thumbnails([changed(original, "all", random) for original in scenes[:20]] + scenes)
    found = near_duplicates(every, known=np.full(len(every), -1))
    assert found == near_duplicates(every.copy(), known=np.full(len(every), -1))
    assert found == sorted(found)
    assert len(found) == 20
    assert all(a < b and duplicates.CONFIRMED <= score <= 1 for a, b, score in found)


def test_rows_of_a_known_group_are_searched_once(scenes: list[Image.Image]) -> None:
    random = np.random.default_rng(4)
    every = thumbnails([scenes[0], scenes[1], scenes[0], changed(scenes[0], "darker", random), *scenes[2:20]])
    known = np.full(len(every), -1)
    assert search(every, known) == [(0, 2), (0, 3), (2, 3)]
    known[[0, 2]] = 7
    assert search(every, known) == [(0, 3)]


def boards(random: np.random.Generator, count: int, contrast: float) -> Pixels:
    """Photos of a white board under one lamp, each with another faint thing on it, made of five shapes."""
    y, x = np.mgrid[:240, :300]
    out = []
    for _ in range(count):
        light = 238 - 40 * np.hypot((x - 140) / 300, (y - 110) / 240)
        for _ in range(5):
            across, down = random.uniform(90, 210), random.uniform(70, 170)
            shape = np.stack([(x - across) / random.uniform(6, 40), (y - down) / random.uniform(6, 40)])
            inside = (shape**2).sum(0) < 1 if random.random() < 0.5 else np.abs(shape).max(0) < 1
            light = light - contrast * random.uniform(-0.3, 1) * inside
        light = light + random.normal(0, 2, light.shape)
        out.append(picture(np.repeat(light[:, :, None], 3, axis=2)))
    return thumbnails(out)


@pytest.mark.parametrize("contrast", [4.0, 20.0])
def test_white_boards_with_other_things_on_them_are_no_twins(contrast: float) -> None:
    assert search(boards(np.random.default_rng(5), 150, contrast)) == []


def test_plain_correlation_would_call_those_boards_twins() -> None:
    """So that the test above tests something: without high-pass they correlate like copies."""
    pictures = boards(np.random.default_rng(5), 150, 4.0).reshape(150, -1).astype(np.float64)
    assert np.median(np.corrcoef(pictures)) > 0.9


def test_another_thing_before_the_same_background_is_no_twin(scenes: list[Image.Image]) -> None:
    pairs = []
    for number, background in enumerate(scenes[:20]):
        for place in (40, 200):
            pixels = np.asarray(background).astype(np.float32).copy()
            y, x = np.mgrid[: SIZE[1], : SIZE[0]]
            thing = np.hypot(x - place - number, y - 120) < 28
            pixels[thing] = 128 + 60 * np.sin(x / 5 + number)[thing][:, None]
            pairs.append(picture(pixels))
    assert search(thumbnails(pairs)) == []


def test_the_same_shape_in_another_contrast_is_no_twin() -> None:
    y, x = np.mgrid[:SIDE, :SIDE]
    ring = np.abs(np.hypot(x - 30, y - 33) - 12) < 3
    pictures = np.stack([np.rint(200 - depth * ring).astype(np.uint8) for depth in (8, 14, 40, 120)])
    assert search(pictures) == []
    assert search(np.stack([pictures[2], np.rint(pictures[2] * 0.9).astype(np.uint8)])) == [(0, 1)]


def test_lights_that_brightening_saturates_are_not_missed() -> None:
    """A dark thing on a mottled white ground: of the ground nothing is left in the brighter copy."""
    random = np.random.default_rng(6)
    pixels = random.uniform(236, 252, (12, 15, 1)).repeat(20, 0).repeat(20, 1).repeat(3, 2)
    pixels[100:150, 120:180] = random.uniform(40, 200, (5, 6, 3)).repeat(10, 0).repeat(10, 1)
    assert search(thumbnails([picture(pixels), picture(pixels * 1.1), picture(pixels * 0.9)])) == [
        (0, 1),
        (0, 2),
        (1, 2),
    ]


def test_pictures_without_detail_are_twins_only_by_their_pixels() -> None:
    random = np.random.default_rng(7)
    greys = np.repeat(np.arange(40, 240, 4), 2)  # each grey twice
    plain = np.repeat(greys, SIDE * SIDE).reshape(-1, SIDE, SIDE).astype(np.uint8)
    assert search(plain) == [(row, row + 1) for row in range(0, len(plain), 2)]
    slopes = (
        150 + 0.45 * np.cos(np.arange(SIDE) / 3) + 0.45 * np.sin(np.arange(SIDE) / 4)[:, None]
    )  # rounds to contours
    assert search(np.rint(np.stack([slopes, slopes * 1.1])).astype(np.uint8)) == []
    noisy = np.clip(plain + np.rint(random.normal(0, 1.2, plain.shape)), 0, 255).astype(np.uint8)
    assert search(noisy) == []


def test_thousands_of_copies_cost_no_more_than_their_number_and_hang_together(scenes: list[Image.Image]) -> None:
    count = 3000
    every = np.repeat(thumbnails(scenes[:2]), count // 2, axis=0)
    found = search(every)
    assert len(found) <= 4 * count
    group = np.arange(count)
    for _ in range(20):
        for a, b in found:
            group[a] = group[b] = min(group[a], group[b])
    assert set(group[: count // 2]) == {0}
    assert set(group[count // 2 :]) == {count // 2}


def test_the_work_grows_with_the_number_of_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket of flat, noisy pictures is the worst: all have the same description."""
    aligned: list[int] = []
    monkeypatch.setattr(duplicates, "agreement", lambda first, *_: aligned.append(len(first)) or np.zeros(len(first)))
    random = np.random.default_rng(8)
    counts = []
    for number in (1000, 4000):
        aligned.clear()
        search(np.rint(random.normal(240, 0.7, (number, SIDE, SIDE))).astype(np.uint8))
        counts.append(sum(aligned))
        assert counts[-1] <= 4 * number
    assert counts[1] < 5 * max(counts[0], 1000)


def test_a_memory_map_in_parts_gives_the_same(
    tmp_path: Path, scenes: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(9)
    every = thumbnails(scenes[:30] + [changed(original, "cropped", random) for original in scenes[:10]])
    whole = search(every)
    np.save(tmp_path / "thumbnails.npy", every)
    monkeypatch.setattr(duplicates, "_CHUNK", 7)
    monkeypatch.setattr(alignment, "_BATCH", 3)
    assert search(np.load(tmp_path / "thumbnails.npy", mmap_mode="r")) == whole
    assert len(whole) == 10


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_pictures(count: int, scenes: list[Image.Image]) -> None:
    every = np.repeat(thumbnails(scenes[:1]), count, axis=0)
    assert search(every) == ([(0, 1)] if count == 2 else [])


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (5, 7), (63, 65), (2000, 3)])
def test_thumbnails_of_odd_shapes(shape: tuple[int, int]) -> None:
    made = thumbnail(np.full((*shape, 3), 77, np.uint8))
    assert made.shape == (SIDE, SIDE)
    assert made.dtype == np.uint8
    assert set(made.reshape(-1)) == {77}


def test_a_thumbnail_is_upright_and_keeps_its_sides() -> None:
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[:50, :100] = 200
    made = thumbnail(pixels)
    assert (made[4, 4], made[4, -4], made[-4, 4]) == (200, 0, 0)


@pytest.mark.parametrize(
    ("pictures", "known"),
    [
        (np.zeros((3, 32, 32), np.uint8), np.full(3, -1)),
        (np.zeros((3, SIDE, SIDE), np.float32), np.full(3, -1)),
        (np.zeros((3, SIDE, SIDE), np.uint8), np.full(2, -1)),
    ],
)
def test_other_shapes_are_refused(pictures: Pixels, known: npt.NDArray[np.int64]) -> None:
    with pytest.raises(ValueError, match="shape"):
        near_duplicates(pictures, known=known)


@pytest.mark.data
def test_planted_copies_of_real_photos(real_data: Path) -> None:
    """300 photos of things on a white board and 30 planted copies; whether the others are twins was looked at."""
    folder = real_data / "classify" / "trashnet"
    before = folder_hash(folder)
    files = sorted(folder.glob("**/*.jpg"))
    random = np.random.default_rng(10)
    files = [files[row] for row in np.sort(random.permutation(len(files))[:300])]
    photos = [Image.open(file).convert("RGB") for file in files]
    chosen = random.choice(300, 30, replace=False)
    copies = [changed(photos[row], KINDS[number % len(KINDS)], random) for number, row in enumerate(chosen)]
    found = set(search(thumbnails([*photos, *copies])))
    planted = {(int(row), 300 + number) for number, row in enumerate(chosen)}
    assert len(planted & found) >= 29
    natural = {"paper246 paper349", "paper68 paper74", "paper265 paper408", "trash130 trash131", "metal11 metal221",
               "glass115 metal91", "glass176 plastic152", "glass389 plastic332"}  # fmt: skip
    origin = [*range(300), *chosen]
    others = {" ".join(sorted(files[origin[row]].stem for row in pair)) for pair in found - planted}
    assert len({pair for pair in others if len(set(pair.split())) == 2} - natural) <= 1
    assert folder_hash(folder) == before
