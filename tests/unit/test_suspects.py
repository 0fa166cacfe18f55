"""Likely wrong labels, shortcut features and shift: planted ones are found, chance is not reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFilter

from goodfit.core.errors import DataError
from goodfit.data.checks.logistic import SparseRows, fit_logistic, make_folds, predict_shares, reduce_features
from goodfit.data.checks.shift import class_shift, find_shift, picture_statistics
from goodfit.data.checks.shortcut import find_shortcuts
from goodfit.data.checks.suspects import find_suspects, plain_features, text_features
from pictures import draw, folder_hash

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def clusters(num: int, classes: int, seed: int, apart: float = 4.0, dims: int = 8) -> tuple[Floats, Ints]:
    """Normal clouds, one a class, with centres about `apart` * sqrt(2) from each other."""
    random = np.random.default_rng(seed)
    targets = random.integers(0, classes, num)
    centres = apart * np.eye(classes, dims)
    return (centres[targets] + random.normal(size=(num, dims))).astype(np.float32), targets


def flipped(targets: Ints, classes: int, share: float, seed: int) -> tuple[Ints, Ints]:
    """Labels with a share of them changed, and the changed rows."""
    random = np.random.default_rng(seed)
    rows = random.choice(len(targets), round(share * len(targets)), replace=False)
    made = targets.copy()
    made[rows] = (made[rows] + random.integers(1, classes, len(rows))) % classes
    return made, rows


# ---- logistic regression ----


def test_fit_is_the_optimum() -> None:
    """The gradient at the solution, computed here in float64, vanishes; the known answer of one feature is met."""
    x, targets = clusters(400, 3, 0, apart=1.0)
    x /= np.sqrt(np.square(x).sum(1).mean())
    weight = fit_logistic(x, targets, 3, 1e-2).astype(np.float64)
    logits = x @ weight[:-1] + weight[-1]
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    gap = shares - np.eye(3)[targets]
    assert np.abs(x.T @ gap / 400 + 1e-2 * weight[:-1]).max() < 1e-3
    assert np.abs(gap.mean(0)).max() < 1e-3
    assert (logits.argmax(1) == targets).mean() > 0.5
    only_bias = fit_logistic(np.zeros((10, 1), np.float32), np.array([0] * 9 + [1]), 2, 1e-2)
    assert predict_shares(np.zeros((1, 1), np.float32), only_bias)[0, 0] == pytest.approx(0.9, abs=2e-3)


def test_sparse_rows_are_the_matrix() -> None:
    """Products, selections and fits agree with the dense matrix, empty rows included."""
    random = np.random.default_rng(1)
    dense = (random.random((30, 12)) * (random.random((30, 12)) < 0.2)).astype(np.float32)
    dense[[0, 7, 29]] = 0
    rows, columns = np.nonzero(dense)
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=30))])
    sparse = SparseRows(starts, columns.astype(np.int32), dense[rows, columns], 12)
    weight = random.normal(size=(12, 3)).astype(np.float32)
    right = random.normal(size=(30, 3)).astype(np.float32)
    some = np.array([29, 3, 3, 0, 12])
    np.testing.assert_allclose(sparse @ weight, dense @ weight, atol=1e-5)
    np.testing.assert_allclose(sparse[some] @ weight, dense[some] @ weight, atol=1e-5)
    np.testing.assert_allclose(sparse.transposed_times(right), dense.T @ right, atol=1e-5)
    targets = random.integers(0, 2, 30)
    np.testing.assert_allclose(fit_logistic(sparse, targets, 2, 0.1), fit_logistic(dense, targets, 2, 0.1), atol=2e-3)


def test_reduction_keeps_the_geometry() -> None:
    """All components: distances of standardised rows up to scale; few: the variance of the exact largest ones."""
    random = np.random.default_rng(2)
    x = (random.normal(size=(300, 40)) @ random.normal(size=(40, 40))).astype(np.float32) * 7 + 100
    x[:, 5] = 3.0  # constant
    standard = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
    made = reduce_features(x)
    assert made.shape == (300, 39)
    assert np.square(made).sum(1).mean() == pytest.approx(1, rel=1e-3)
    np.testing.assert_allclose(made @ made.T * 39, standard @ standard.T, atol=0.05)
    wide = random.normal(size=(400, 300)) + 0.3 * random.normal(size=(400, 8)) @ random.normal(size=(8, 300))
    made = reduce_features(wide.astype(np.float32), max_dims=8)
    left, _, _ = np.linalg.svd((wide - wide.mean(0)) / wide.std(0), full_matrices=False)
    kept = np.linalg.norm(np.linalg.qr(made)[0].T @ left[:, :8], axis=0)  # 1: the exact component is within ours
    assert kept.min() > 0.9999


def test_folds_are_stratified_and_grouped() -> None:
    random = np.random.default_rng(3)
    targets = np.where(random.random(1000) < 0.05, 1, 0)
    groups = np.where(random.random(1000) < 0.5, random.integers(0, 100, 1000), -1)
    folds = make_folds(targets, groups, 5, seed=0)
    for group in np.unique(groups[groups >= 0]):
        assert len(np.unique(folds[groups == group])) == 1
    alone = make_folds(targets, np.full(1000, -1), 5, seed=0)
    for kind in (0, 1):
        counts = np.bincount(alone[targets == kind], minlength=5)
        assert counts.max() - counts.min() <= 1
    assert (alone != make_folds(targets, np.full(1000, -1), 5, seed=1)).any()


# ---- wrong labels ----


def test_planted_labels_are_found() -> None:
    x, targets = clusters(2000, 4, 4)
    given, rows = flipped(targets, 4, 0.05, 4)
    made = find_suspects(x, given, 4, seed=0)
    assert np.isin(rows, made.order[:200]).mean() > 0.95
    assert np.isin(made.flagged, rows).mean() > 0.8
    assert (made.proposed[rows] == targets[rows]).mean() > 0.9
    assert sorted(made.order.tolist()) == list(range(2000))
    assert (np.diff(made.scores[made.order]) <= 0).all()
    assert made.useful and 0.9 < made.accuracy < 0.97


def test_clean_labels_of_clear_classes_are_not_flagged() -> None:
    x, targets = clusters(1000, 3, 5, apart=8.0)
    assert len(find_suspects(x, targets, 3).flagged) <= 2


def test_flags_of_uneven_classes_are_few() -> None:
    """What the fit itself agrees with is not flagged, though a rare class's threshold is low."""
    random = np.random.default_rng(17)
    targets = random.choice(3, 2000, p=[0.85, 0.1, 0.05])
    x = (1.5 * np.eye(3, 8)[targets] + random.normal(size=(2000, 8))).astype(np.float32)
    given, rows = flipped(targets, 3, 0.05, 17)
    made = find_suspects(x, given, 3)
    assert (made.proposed[made.flagged] != given[made.flagged]).all()
    assert np.isin(made.flagged, rows).mean() > 0.42


def test_duplicates_do_not_vouch_for_each_other() -> None:
    """Copies of a wrongly labelled sample, known to be copies, do not hide it."""
    x, targets = clusters(400, 2, 6, apart=3.0, dims=300)
    x = np.concatenate([x, np.repeat(x[:20], 8, 0)])
    wrong = 1 - targets[:20]
    given = np.concatenate([wrong, targets[20:], np.repeat(wrong, 8)])
    groups = np.concatenate([np.arange(20), np.full(380, -1), np.repeat(np.arange(20), 8)])
    planted = np.flatnonzero(groups >= 0)
    with_groups = find_suspects(x, given, 2, groups=groups)
    without = find_suspects(x, given, 2)
    assert with_groups.scores[planted].mean() > without.scores[planted].mean() + 0.3


def test_features_that_say_nothing_flag_nothing() -> None:
    for seed in range(20):
        random = np.random.default_rng(seed)
        x, targets = random.normal(size=(200, 30)), random.choice(3, 200, p=[0.8, 0.15, 0.05])
        made = find_suspects(x, targets, 3, seed=seed)
        assert not made.useful and len(made.flagged) == 0
        assert len(made.order) == 200


def test_rare_classes_are_not_judged() -> None:
    x, targets = clusters(300, 3, 7)
    targets = np.where(targets == 2, 0, targets)
    targets[[3, 50, 120]] = 2
    made = find_suspects(x, targets, 4)  # class 3 has no row at all
    assert set(made.order[-3:].tolist()) == {3, 50, 120}
    assert not np.isin([3, 50, 120], made.flagged).any()
    assert set(np.unique(made.proposed).tolist()) <= {0, 1}


@pytest.mark.parametrize("num", [0, 1, 4])
def test_hardly_any_rows(num: int) -> None:
    made = find_suspects(np.zeros((num, 3), np.float32), np.arange(num) % 2, 2)
    assert made.order.tolist() == list(range(num)) and not made.useful


def test_degenerate_features() -> None:
    targets = np.arange(100) % 2
    for x in (np.full((100, 5), 7.0), np.zeros((100, 0)), np.tile([1e29, -1e29], (50, 1)).reshape(100, 1)):
        made = find_suspects(x.astype(np.float32), targets, 2)
        assert np.isfinite(made.scores).all() and len(made.order) == 100


def test_bad_input_is_refused() -> None:
    x = np.zeros((10, 2), np.float32)
    bad = x.copy()
    bad[3, 1] = np.nan
    with pytest.raises(DataError, match="of 1 samples"):
        find_suspects(bad, np.zeros(10, np.int64), 2)
    bad[5, 0] = 1e38
    with pytest.raises(DataError, match="of 2 samples"):
        find_suspects(bad, np.zeros(10, np.int64), 2)
    with pytest.raises(DataError, match="10 rows of features, but 9 labels"):
        find_suspects(x, np.zeros(9, np.int64), 2)
    for labels in (np.full(10, 2), np.full(10, -1), np.zeros(10)):
        with pytest.raises(DataError, match="whole numbers from 0 to 1"):
            find_suspects(x, labels, 2)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="not numbers"):
        find_suspects(np.array([["a"]] * 10), np.zeros(10, np.int64), 2)
    with pytest.raises(DataError, match="one row per sample"):
        find_suspects(x[:, 0], np.zeros(10, np.int64), 2)


def test_plain_features_tell_pictures() -> None:
    shapes = [(1, 1), (1, 200), (300, 2), (64, 48), (3, 3)]
    made = [plain_features(np.random.default_rng(0).integers(0, 256, (*s, 3), np.uint8)) for s in shapes]
    assert {m.shape for m in made} == {(246,)} and all(np.isfinite(m).all() for m in made)
    pictures = np.stack([plain_features(np.asarray(draw(i, i % 3))) for i in range(300)])
    assert find_suspects(pictures, np.arange(300) % 3, 3).accuracy > 0.95
    for bad in (np.zeros((4, 4)), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(DataError):
            plain_features(bad)  # type: ignore[arg-type]


def test_text_features_find_wrong_labels() -> None:
    random = np.random.default_rng(8)
    words = [["good", "great", "fine", "lovely"], ["bad", "poor", "awful", "dull"]]
    filler = [f"word{i}" for i in range(50)]
    targets = random.integers(0, 2, 500)
    lines = [" ".join([*random.choice(filler, 8), *random.choice(words[t], 2)]) for t in targets]
    given, rows = flipped(targets, 2, 0.05, 8)
    made = find_suspects(text_features(lines), given, 2)
    assert np.isin(rows, made.order[:50]).mean() > 0.95


def test_text_features_of_odd_texts() -> None:
    made = text_features(["", "\ud800\x00", "a" * 100_000, "the same", "The same", "x " * 5000, "only here"])
    assert len(made) == 7 and np.isfinite(made.values).all()
    assert np.diff(made.starts)[[0, 6]].tolist() == [0, 0]  # a term of one text says nothing
    norms = [np.square(made.values[a:b]).sum() for a, b in zip(made.starts[3:5], made.starts[4:6], strict=True)]
    assert norms == pytest.approx([1, 1])
    assert text_features([]).shape[0] == 0 and text_features([""]).shape[0] == 1


def test_wrong_labels_of_face_masks(real_data: Path) -> None:
    """Without any network: over half of the planted labels in the top tenth."""
    folder = real_data / "classify" / "facemask_crops"
    before = folder_hash(folder)
    files = sorted(folder.glob("val/*/*.jpg"))
    names = sorted({f.parent.name for f in files})
    targets = np.array([names.index(f.parent.name) for f in files])
    features = []
    for file in files:
        with Image.open(file) as image:
            image.thumbnail((64, 64))
            features.append(plain_features(np.asarray(image.convert("RGB"))))
    given, rows = flipped(targets, len(names), 0.05, 0)
    made = find_suspects(np.stack(features), given, len(names))
    assert made.useful and np.isin(rows, made.order[: len(files) // 10]).mean() > 0.6
    assert folder_hash(folder) == before


# ---- shortcuts ----


def test_chance_is_no_shortcut() -> None:
    """1,000 random attributes of 2 to N values, balanced and unbalanced: at most nine alarms would be 1 %; none."""
    alarms = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        num, classes = int(random.choice([60, 300, 1500])), int(random.choice([2, 3, 10]))
        targets = random.choice(classes, num, p=random.dirichlet(np.full(classes, 2.0)))
        for values in (2, 5, max(2, num // 12), num, 0):
            column = random.integers(0, values, num) if values else random.zipf(1.3, num) % 9999
            alarms += len(find_shortcuts({"any": column}, targets, classes, seed=seed))
    assert alarms == 0


def test_planted_shortcut_is_found() -> None:
    random = np.random.default_rng(9)
    targets = random.integers(0, 3, 300)
    png = random.random(300) < np.where(targets == 0, 0.9, 0.1)
    columns = {"format": np.where(png, "PNG", "JPEG").tolist(), "mode": ["RGB"] * 300}
    made = find_shortcuts(columns, targets, 3, class_names=("ant", "bee", "cow"))
    assert [s.name for s in made] == ["format"]
    assert made[0].accuracy >= made[0].low > made[0].chance
    assert any(line.startswith("PNG: ") and "% ant (" in line for line in made[0].examples)


@pytest.mark.parametrize(("classes", "share"), [(100, None), (2, 0.03)])
def test_shortcut_to_one_class_among_many_or_few(classes: int, share: float | None) -> None:
    """Where the whole is hardly better predicted, the one class is reported."""
    random = np.random.default_rng(10)
    targets = random.integers(0, classes, 20000) if share is None else (random.random(20000) < share).astype(np.int64)
    kind = 7 if share is None else 1
    png = (targets == kind) | (random.random(20000) < 0.04)
    made = find_shortcuts({"format": np.where(png, "PNG", "JPEG").tolist()}, targets, classes)
    assert [(s.name, s.target) for s in made] == [("format", kind)]
    assert made[0].values[0][0] == "PNG"


def test_many_files_of_one_source_count_once() -> None:
    """Four videos, each of one size and class, are four facts, not 400."""
    source = np.repeat(np.arange(4), 100)
    columns = {"size": [f"{s}x{s}" for s in source.tolist()]}
    assert find_shortcuts(columns, source % 2, 2)
    assert not find_shortcuts(columns, source % 2, 2, groups=source)


def test_shortcut_input() -> None:
    assert find_shortcuts({"a": []}, np.zeros(0, np.int64), 2) == []
    assert find_shortcuts({"a": [None, 1.5, ("x",)]}, np.array([0, 1, -1]), 2) == []
    assert find_shortcuts({"a": [float("nan")] * 100}, np.arange(100) % 2, 2) == []
    with pytest.raises(DataError, match="'a' has 2 values for 3"):
        find_shortcuts({"a": [1, 2]}, np.arange(3), 3)
    with pytest.raises(DataError, match="below 2"):
        find_shortcuts({"a": [1, 2, 3]}, np.arange(3), 2)


# ---- shift ----


def pictures_of(num: int, seed: int) -> list[Image.Image]:
    """Smooth coloured pictures that differ in brightness, colour and detail."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(num):
        base = random.integers(30, 220, (6, 6, 3)).astype(np.uint8)
        large = np.asarray(Image.fromarray(base).resize((48, 48), Image.Resampling.BICUBIC)).astype(np.float64)
        noisy = large * random.uniform(0.6, 1) + random.normal(0, random.uniform(3, 12), large.shape)
        made.append(Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)))
    return made


def statistics(pictures: list[Image.Image]) -> dict[str, npt.NDArray[np.float64]]:
    rows = [picture_statistics(np.asarray(p)) for p in pictures]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def test_halves_of_one_set_do_not_shift() -> None:
    columns = statistics(pictures_of(400, 11))
    targets = np.random.default_rng(11).integers(0, 5, 400)
    alarms = 0
    for seed in range(200):
        order = np.random.default_rng(seed).permutation(400)
        a, b = order[:250], order[250:]
        alarms += len(find_shift({n: c[a] for n, c in columns.items()}, {n: c[b] for n, c in columns.items()}))
        if seed % 10 == 0:
            counts = (np.bincount(targets[rows], minlength=5) for rows in (a, b))
            alarms += class_shift(*counts, seed=seed).found
    assert alarms == 0


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("brightness", lambda p: p.point(lambda v: round(0.6 * v))),
        ("sharpness", lambda p: p.filter(ImageFilter.GaussianBlur(1.2))),
        ("saturation", lambda p: p.convert("L").convert("RGB")),
        ("aspect", lambda p: p.resize((60, 40))),
    ],
)
def test_changed_pictures_shift(name: str, change: object) -> None:
    before = pictures_of(200, 12)
    after = [change(p) for p in pictures_of(200, 13)]  # type: ignore[operator]
    found = {s.name: s for s in find_shift(statistics(before), statistics(after))}
    assert name in found and found[name].distance > 0.3 and found[name].p < 1e-3


def test_largest_gap_is_that_of_the_definition() -> None:
    """Against a count over all values, with ties; and the p value of a known case (n = m = 50, D = 0.4: 0.0005)."""
    random = np.random.default_rng(14)
    a, b = random.integers(0, 9, 200), random.integers(3, 12, 150)
    expected = max(abs((a <= v).mean() - (b <= v).mean()) for v in range(13))
    made = find_shift({"x": a}, {"x": b})
    assert made[0].distance == pytest.approx(expected)
    assert made[0].p == pytest.approx(0, abs=1e-8)
    assert find_shift({"x": np.arange(50.0)}, {"x": np.arange(50.0) + 20})[0].p == pytest.approx(5e-4, rel=0.2)


def test_shift_leaves_out_what_is_not_finite() -> None:
    odd = np.array([np.nan, np.inf] * 50)
    assert find_shift({"x": odd, "y": np.arange(100.0)}, {"x": np.zeros(100), "z": np.zeros(9)}) == []
    assert find_shift({}, {}) == []
    with pytest.raises(DataError, match="does not hold numbers"):
        find_shift({"x": np.array(["a"])}, {"x": np.zeros(3)})


def test_trifles_of_large_sets_are_no_shift() -> None:
    random = np.random.default_rng(15)
    a, b = random.normal(0, 1, 200_000), random.normal(0.05, 1, 200_000)
    assert find_shift({"x": a}, {"x": b}) == []


def test_class_shift() -> None:
    made = class_shift(np.array([500, 300, 200]), np.array([50, 30, 120]))
    assert made.found and made.classes[0] == 2
    assert made.distance == pytest.approx(0.4)
    assert not class_shift(np.array([500, 300, 200]), np.array([52, 29, 19])).found
    assert not class_shift(np.array([5_100_000, 4_900_000]), np.array([500_000, 500_000])).found  # sure, but a trifle
    assert not class_shift(np.zeros(3, np.int64), np.array([1, 2, 3])).found
    assert not class_shift(np.zeros(0, np.int64), np.zeros(0, np.int64)).found
    with pytest.raises(DataError):
        class_shift(np.array([1, 2]), np.array([1, 2, 3]))


def test_statistics_of_known_pictures() -> None:
    white = picture_statistics(np.full((20, 40, 3), 255, np.uint8))
    assert white["brightness"] == pytest.approx(1) and white["clipped"] == 1 and white["saturation"] == 0
    assert white["aspect"] == pytest.approx(np.log(2)) and white["contrast"] == pytest.approx(0, abs=1e-6)
    red = picture_statistics(np.full((1, 1, 3), [200, 0, 0], np.uint8))
    assert red["saturation"] == pytest.approx(1) and red["warmth"] == pytest.approx(200 / 255)
    assert all(np.isfinite(v) for v in red.values())
    with pytest.raises(DataError):
        picture_statistics(np.zeros((4, 4), np.uint8))
