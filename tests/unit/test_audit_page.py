"""The audit page, also in a real browser; the fixes that are saved from it; boxes and sheets drawn for people."""

from __future__ import annotations

import csv
import html
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from browser import Browser
from goodfit.core.errors import DataError
from goodfit.data.checks.draw import class_colour, contact_sheet, draw_objects, drawable
from goodfit.data.checks.fixes import Fix, apply_fixes, kept_paths, read_fixes, shown_path
from goodfit.data.index import LEFT_OUT, NO_GROUP, NO_SPLIT, DatasetIndex
from goodfit.outcome.audit_page import KINDS, split_item, write_audit_page
from pictures import draw, folder_hash

SCRIPT_CLASS = '</script><script>document.title = "ran"</script>'
IMAGE_NAME = 'a/<img src=x onerror="document.title = 1">.jpg'
ODD_NAMES = (
    IMAGE_NAME,
    'b/comma, "quoted".jpg',
    "c/line\nbreak\r.jpg",
    "d/ümläut 猫.jpg",
    "e/not-utf8-\udce7\udc8c.jpg",
    " f = g .jpg",
)


def jpeg(seed: int = 0, size: int = 128) -> bytes:
    text = io.BytesIO()
    draw(seed, seed % 3, size).save(text, "JPEG", quality=80)
    return text.getvalue()


def photo(seed: int) -> bytes:
    """A thumbnail that takes as much room as that of a photo: smooth shapes and a little noise."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 255, (16, 12, 3), np.uint8)).resize((96, 128), Image.Resampling.BICUBIC)
    pixels = np.clip(np.asarray(coarse) + random.normal(0, 5, (128, 96, 3)), 0, 255).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=80)
    return data.getvalue()


def make_index(paths, targets, names, *, offsets=None) -> DatasetIndex:
    num = len(paths)
    return DatasetIndex(
        root=Path("data"), paths=paths, targets=np.array(targets, np.int64), class_names=tuple(names),
        splits=np.full(num, NO_SPLIT, np.int8), groups=np.full(num, NO_GROUP, np.int64),
        offsets=None if offsets is None else np.array(offsets, np.int64),
    )  # fmt: skip


def finding(kind, items, severity="warning", **more):
    return {"kind": kind, "severity": severity, "count": len(items), "items": list(items), "action": f"done about {kind}",
            "override": f"override {kind}", **more}  # fmt: skip


def page(target: Path, findings=(), pictures=None, suspects=(), classes=("cat", "dog", SCRIPT_CLASS), **more) -> str:
    counts = {"train": [7] * len(classes), "val": [2] * len(classes), "test": [1] * len(classes)}
    data = {"task": "classify", "note": "one folder per class", "num_items": 10 * len(classes) + 5, "class_counts": counts,
            "classes": list(classes), "splits": {s: sum(c) for s, c in counts.items()}} | more.pop("data", {})  # fmt: skip
    write_audit_page(target, name=more.pop("name", "pets"), data=data, findings=findings, pictures=pictures or {},
                     suspects=suspects, **more)  # fmt: skip
    return target.read_text("utf-8")


def suspects_of(paths, label="cat", proposed="dog"):
    return [{"path": p, "label": label, "proposed": proposed, "confidence": 0.9} for p in paths]


# ---------------------------------------------------------------- fixes.csv


def test_fixes_are_read_and_applied(tmp_path):
    file = tmp_path / "fixes.csv"
    file.write_bytes(b"\xef\xbb\xbfpath,label,action\r\na.jpg,dog,relabel\r\n\"b, c.jpg\",,leave_out\r\nd.jpg,cat,keep\r\n\r\n"
                     b"gone.jpg,,leave_out\r\na.jpg,dog,relabel\r\n")  # fmt: skip
    before = folder_hash(tmp_path)
    fixes = read_fixes(file)
    assert [(f.path, f.label, f.action) for f in fixes] == [
        ("a.jpg", "dog", "relabel"), ("b, c.jpg", "", "leave_out"), ("d.jpg", "", "keep"), ("gone.jpg", "", "leave_out")
    ]  # fmt: skip
    assert fixes[1].where == f"{file}:3" and kept_paths(fixes) == {"a.jpg", "d.jpg"}
    index = make_index(["a.jpg", "b, c.jpg", "d.jpg", "e.jpg"], [0, 0, 0, 0], ["cat", "dog"])
    fixed, applied, unknown = apply_fixes(index, fixes)
    assert fixed.targets.tolist() == [1, 0, 0, 0]
    assert fixed.splits.tolist() == [NO_SPLIT, LEFT_OUT, NO_SPLIT, NO_SPLIT]
    assert applied == ["a.jpg", "b, c.jpg", "d.jpg"] and unknown == ["gone.jpg"]
    assert (
        index.targets.tolist() == [0, 0, 0, 0] and (index.splits == NO_SPLIT).all() and folder_hash(tmp_path) == before
    )


def test_without_an_action_the_label_decides(tmp_path):
    (file := tmp_path / "fixes.csv").write_text("label,path\ndog,a.jpg\n,b.jpg\n")
    assert [(f.path, f.label, f.action) for f in read_fixes(file)] == [
        ("a.jpg", "dog", "relabel"),
        ("b.jpg", "", "leave_out"),
    ]


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (b"", 0, "empty"),
        (b"path;label;action\na;b;relabel\n", 1, "columns"),
        (b"path,action\na,keep\n", 1, "columns"),
        (b"path,label,actions\na,b,keep\n", 1, "columns"),
        (b"path,path,label\na,b,c\n", 1, "columns"),
        (b"path,label,action\na.jpg,dog,relable\n", 2, "did you mean relabel"),
        (b"path,label,action\na.jpg,,relabel\n", 2, "no label"),
        (b"path,label,action\n,dog,relabel\n", 2, "no path"),
        (b"path,label,action\na,b.jpg,dog,relabel\n", 2, "4 fields"),
        (b"path,label,action\na.jpg,dog,relabel\n\nb.jpg,,\na.jpg,cat,relabel\n", 5, "different things"),
        (b'path,label,action\n"x\ny",dog,\na.jpg,dog,keep\na.jpg,dog,\n', 5, "different things"),
        (b'path,label,action\n"a.jpg,dog,relabel\n', 2, "CSV"),
        (b"path,label,action\nb.jpg,dog,\nk\xe4tzchen.jpg,dog,relabel\n", 3, "UTF-8"),
        ("path,label,action\na,b,keep\n".encode("utf-16"), 1, "UTF-8"),
        (b"path,label,action\n" + b"x" * 200_000 + b",dog,relabel\n", 2, "CSV"),
        (bytes(range(256)) * 40, 2, "UTF-8"),
    ],
)  # fmt: skip
def test_a_bad_file_of_fixes_is_refused_with_its_line(tmp_path, content, line, words):
    (file := tmp_path / "fixes.csv").write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_fixes(file)
    assert caught.value.where == (f"{file}:{line}" if line else str(file)) and caught.value.next


def test_a_file_of_fixes_that_is_none(tmp_path):
    import os

    os.mkfifo(tmp_path / "fifo")  # opening it would wait for ever
    for name in ("absent.csv", ".", "fifo"):
        with pytest.raises(DataError, match="no such file"):
            read_fixes(tmp_path / name)


def test_random_bytes_never_give_another_error(tmp_path):
    good = b'path,label,action\r\na.jpg,dog,relabel\r\n"b ""x"", c.jpg",,leave_out\r\nd.jpg,cat,keep\r\n'
    file = tmp_path / "fixes.csv"
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        data = np.frombuffer(good, np.uint8).copy()
        data[random.integers(0, len(data), 3)] = random.integers(0, 256, 3)
        file.write_bytes(data[: random.integers(1, len(data) + 1)].tobytes())
        try:
            read_fixes(file)
        except DataError:
            refused += 1
    assert 100 < refused < 400


def test_labels_must_be_classes_of_the_data():
    index = make_index(["a.jpg"], [0], ["cardboard", "glass", "metal"])
    with pytest.raises(DataError, match="no class 'glas'") as caught:
        apply_fixes(index, [Fix("a.jpg", "glas", "relabel", "fixes.csv:2")])
    assert "glass" in caught.value.next and caught.value.where == "fixes.csv:2"
    with pytest.raises(DataError) as caught:
        apply_fixes(index, [Fix("a.jpg", "猫", "relabel")])
    assert "cardboard, glass, metal" in caught.value.next
    nameless = make_index(["a.txt"], [-1], [])
    with pytest.raises(DataError, match="no single label"):
        apply_fixes(nameless, [Fix("a.txt", "x", "relabel")])


def test_paths_are_found_as_people_write_them():
    index = make_index(["x/a.jpg", "x/b.jpg", "x\\c.jpg", "x/c.jpg", "n-\udcff.jpg", "m-\udcfe.jpg", "m-\udcfd.jpg", "x/b.jpg"],
                       [0] * 8, ["cat", "dog"])  # fmt: skip
    whole = Path("data").absolute().as_posix() + "/x/b.jpg"
    fixes = [Fix(path, "dog", "relabel") for path in ("./x/a.jpg", whole, "x\\c.jpg", shown_path("n-\udcff.jpg"))]
    fixed, applied, unknown = apply_fixes(index, [*fixes, Fix(shown_path("m-\udcfe.jpg"), "dog", "relabel")])
    assert fixed.targets.tolist() == [1, 1, 1, 0, 1, 0, 0, 1]  # x/b.jpg stands twice; of m- nobody can say which
    assert len(applied) == 4 and unknown == [shown_path("m-\udcfe.jpg")]


def test_lines_of_a_text_file_go_by_their_offset():
    index = make_index(["t.csv"] * 3, [0, 0, 0], ["ham", "spam"], offsets=[0, 17, 40])
    fixed, applied, _ = apply_fixes(index, [Fix("t.csv@17", "spam", "relabel"), Fix("t.csv@40", "", "leave_out")])
    assert fixed.targets.tolist() == [0, 1, 0] and fixed.splits.tolist() == [NO_SPLIT, NO_SPLIT, LEFT_OUT]
    assert applied == ["t.csv@17", "t.csv@40"]


# ---------------------------------------------------------------- the page as text


def test_every_finding_is_shown_by_severity(tmp_path):
    severities = ("info", "warning", "error")
    findings = [
        finding(k, [f"{k}-{i}.jpg" for i in range(40)], severities[n % 3]) for n, k in enumerate((*KINDS, "a_new_kind"))
    ]
    text = page(tmp_path / "audit.html", findings)
    for f in findings:
        title = KINDS.get(f["kind"], ("A new kind", ""))[0]
        assert f"<h2>{html.escape(title)} <" in text and f"done about {f['kind']}." in text
        assert f"override {f['kind']}." in text
        assert all(f"<li>{item}</li>" in text for item in f["items"])
    found = re.findall(r'<span class="tag (\w+)">', text)
    assert len(found) == len(findings) and found == sorted(found, key=["error", "warning", "info"].index)
    assert "<b>30</b> of 35 pictures can be used; <b>5</b> are left out" in text


def test_nothing_from_the_data_becomes_markup(tmp_path):
    names = [*ODD_NAMES, "lone-\ud800.jpg"]
    pictures = {name: jpeg() for name in names}
    findings = [
        finding("label_conflict", [f"{IMAGE_NAME} = {ODD_NAMES[1]}"]),
        finding("bad_box", [f"{IMAGE_NAME}: <b>bold</b>"], action="<i>x</i>", override="<i>y</i>"),
        finding("<kind>", ["<u>item</u>"], severity="<sev>"),
    ]
    text = page(tmp_path / "audit.html", findings, pictures, suspects_of(names, "<s>", SCRIPT_CLASS), name="<title>",
                data={"note": "<note>"}, fixes=[{"path": "</script>", "label": "<", "action": "keep"}],
                labels={IMAGE_NAME: "<lab>"}, texts={"t": "<text>"})  # fmt: skip
    for tag in (
        "<img src=x",
        "<b>bold",
        "<i>",
        "<kind>",
        "<sev>",
        "<u>",
        "<s>",
        "<title><",
        "<note>",
        "<lab>",
        "<text>",
    ):
        assert tag not in text
    assert text.startswith("<!doctype html>")
    assert text.count("<script") == 2 and text.count("</script") == 2  # the marks, and the page's own
    assert "script-src 'sha256-" in text and "http:" not in text and "https:" not in text


def test_items_are_taken_apart():
    known = {"a.jpg", "b c.jpg", "x = y.jpg", "l.txt", "t.csv@5", "d", "d: e.jpg"}
    assert split_item("a.jpg = b c.jpg", known, pairs=True) == (["a.jpg", "b c.jpg"], "")
    assert split_item("a.jpg = x = y.jpg = b c.jpg: 0.98 = good", known, pairs=True) == (
        ["a.jpg", "x = y.jpg", "b c.jpg"], "0.98 = good")  # fmt: skip
    assert split_item("new.jpg = a.jpg", known, pairs=True) == (["new.jpg", "a.jpg"], "")
    assert split_item("d: e.jpg: is cut off", known, pairs=False) == (["d: e.jpg"], "is cut off")
    assert split_item("l.txt:12 box outside", known, pairs=False) == (["l.txt"], "12 box outside")
    assert split_item("t.csv@5 = t.csv@9", known, pairs=True) == (["t.csv@5", "t.csv@9"], "")
    assert split_item("brightness: 0.3", known, pairs=False) == (["brightness: 0.3"], "")


def test_pairs_stand_side_by_side_and_long_lists_are_short(tmp_path):
    pairs = [(f"a{i}.jpg", f"b{i}.jpg") for i in range(60)]
    pictures = {p: jpeg() for pair in pairs for p in pair}
    text = page(tmp_path / "audit.html", [finding("duplicate_near", [f"{a} = {b}" for a, b in pairs])], pictures)
    assert text.count("<img ") == 48 and text.count('type="checkbox"') == 48 and "36 more" in text
    assert all(f"<li>a{i}.jpg = b{i}.jpg</li>" in text for i in range(24, 60))


def test_two_hundred_pictures_take_less_than_three_megabytes(tmp_path):
    names = [f"class/photo-{i:04d}.jpg" for i in range(200)]
    text = page(tmp_path / "audit.html", [], {n: photo(i) for i, n in enumerate(names)}, suspects_of(names))
    assert text.count("data:image/jpeg") == 200
    assert 1.0 < len(text) / 1e6 < 3.0


def test_texts_stand_where_there_are_no_pictures(tmp_path):
    findings = [finding("label_conflict", ["t.csv@0 = t.csv@9"])]
    text = page(tmp_path / "audit.html", findings, suspects=suspects_of(["t.csv@0"]), data={"task": "text"},
                texts={"t.csv@0": "free entry " * 100, "t.csv@9": "call now"})  # fmt: skip
    assert "One text, two labels" in text and "<blockquote>call now</blockquote>" in text and "entry free…" in text
    assert "picture" not in re.sub(r"<(style|script).*?</\1>", "", text, flags=re.S)


def test_a_dataset_without_findings(tmp_path):
    text = page(tmp_path / "audit.html", classes=(), data={"splits": {"train": 0}, "num_items": 0, "class_counts": {}})
    assert "found nothing to report" in text and "<script" not in text and 'id="bar"' not in text


# ---------------------------------------------------------------- the page in a browser


@pytest.fixture
def browser(tmp_path):
    with Browser(tmp_path / "profile") as found:
        found.keep_downloads(tmp_path)
        yield found
        assert found.errors == []
        assert [a for a in found.requests if not a.startswith(("file://", "data:", "blob:"))] == []


def save(browser, folder: Path) -> Path:
    (folder / "fixes.csv").unlink(missing_ok=True)
    browser.click("#save")
    browser.wait_for("Browser.downloadProgress", state="completed")
    return folder / "fixes.csv"


def choose(browser, selector, letter, code) -> None:
    """Focus a select by the keyboard's means, and type the first letter of an option."""
    browser.run(f"document.querySelector('{selector}').focus()")
    browser.press(letter, code)


def test_marks_in_a_real_browser_become_fixes_that_apply(tmp_path, browser):
    paths = [*ODD_NAMES, "g.jpg", "h.jpg"]
    names = ["cat", "dog", "zebra", SCRIPT_CLASS, "odd-\udce7\udc8c"]
    findings = [
        finding("label_conflict", ["h.jpg = i.jpg"]),
        finding("duplicate_near", ["j.jpg = k.jpg", "j.jpg = g.jpg"]),
    ]
    pictures = {p: jpeg(i, 32) for i, p in enumerate([*paths, "i.jpg", "j.jpg", "k.jpg"])}
    suspects = suspects_of(paths)
    suspects[1]["proposed"], suspects[2]["proposed"] = names[3:]
    page(tmp_path / "audit.html", findings, pictures, suspects, classes=names,
         fixes=[{"path": "old.jpg", "label": "dog", "action": "relabel"}, {"path": "g.jpg", "label": "dog", "action": "relabel"}])  # fmt: skip
    browser.open((tmp_path / "audit.html").as_uri())
    card = [
        f".suspect[data-i='{i}']"
        for i in browser.run("[...document.querySelectorAll('.suspect')].map(e => e.dataset.i)")
    ]
    assert browser.run("document.getElementById('save').disabled") is True
    for k in range(3):  # Use proposed, by the mouse
        browser.click(f"{card[k]} button[value^='relabel:']")
    browser.click(f"{card[3]} button[value='leave_out']")
    browser.click(f"{card[4]} button[value='keep']")
    browser.run(f'document.querySelector("{card[5]}").focus()')
    browser.press("x", 88)  # leave out, by the keyboard
    browser.press("ArrowRight", 39)
    browser.press("r", 82)  # the next card: its label is right, thanks to the earlier fix, which must not be lost
    browser.run(f'document.querySelector("{card[7]} select").focus()')
    browser.press("z", 90)  # a class from the select
    browser.click("input[type=checkbox]")
    assert browser.run("document.getElementById('tally').textContent") == (
        "9 marked: 4 to relabel, 3 to leave out, 2 right as they are")  # fmt: skip

    fixes = read_fixes(save(browser, tmp_path))
    with open(tmp_path / "fixes.csv", encoding="utf-8", newline="") as handle:
        text = handle.read()
    assert text.startswith("path,label,action\r\n") and len(list(csv.reader(io.StringIO(text, newline="")))) == 11
    index = make_index([*paths, "i.jpg", "j.jpg", "k.jpg", "old.jpg"], [0] * 12, names)
    fixed, applied, unknown = apply_fixes(index, fixes)
    assert unknown == [] and len(applied) == 10
    assert [names[t] for t in fixed.targets] == [
        "dog",
        *names[3:],
        *["cat"] * 3,
        "dog",
        "zebra",
        *["cat"] * 3,
        "dog",
    ]
    assert np.flatnonzero(fixed.splits == LEFT_OUT).tolist() == [3, 5, 9]
    assert [f.path for f in fixes if f.action == "keep"] == [shown_path(paths[4])]

    browser.reload()  # marks are still there
    assert browser.run("document.getElementById('tally').textContent").startswith("9 marked")
    assert browser.run(f'document.querySelector("{card[7]} select").value') == "relabel:zebra"
    assert read_fixes(save(browser, tmp_path)) == fixes
    browser.click(f"{card[0]} button[value^='relabel:']")  # pressed again: unmarked
    assert browser.run("document.getElementById('tally').textContent").startswith("8 marked")
    assert browser.run("document.title") == "pets · goodfit audit"  # no script from the data ran


def test_a_sample_in_two_places_has_one_mark(tmp_path, browser):
    pictures = {p: jpeg(i, 32) for i, p in enumerate(["a.jpg", "b.jpg"])}
    page(tmp_path / "audit.html", [finding("leak", ["a.jpg = b.jpg"])], pictures, suspects_of(["a.jpg"]))
    browser.open((tmp_path / "audit.html").as_uri())
    browser.click("input[type=checkbox]")
    assert browser.run("document.querySelector('.suspect select').value") == "leave_out"
    browser.click(".suspect button[value='keep']")
    assert browser.run("document.querySelector('input[type=checkbox]').checked") is False
    assert [(f.path, f.action) for f in read_fixes(save(browser, tmp_path))] == [("a.jpg", "keep")]


def test_the_page_fits_a_telephone_and_a_hundred_and_fifty_classes(tmp_path, browser):
    paths = ["long_folder_name" * 12 + f"/{i}.jpg" for i in range(6)]
    classes = [f"{'class' * 12}-{i}" for i in range(150)]
    findings = [finding("duplicate_near", [" = ".join(paths[:3])]), finding("truncated", ["x" * 900 + ".jpg: cut"])]
    page(tmp_path / "audit.html", findings, {p: jpeg(0, 32) for p in paths}, suspects_of(paths, *classes[:2]), classes=classes,
         name="n" * 300)  # fmt: skip
    for width in (360, 1200):
        browser.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        browser.open((tmp_path / "audit.html").as_uri())
        assert browser.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        assert browser.run(
            "[...document.querySelectorAll('.tile, .group, h1, h2, p')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
        ) == 0  # fmt: skip
    browser.run("document.querySelector('.suspect select').focus()")
    assert browser.run("document.querySelector('.suspect select').length") == 3 + 150 - 1


# ---------------------------------------------------------------- pictures for people


def test_boxes_and_masks_are_drawn_in_the_colours_of_their_classes():
    image = Image.new("RGB", (200, 150), "white")
    mask = np.zeros((150, 200), bool)
    mask[100:140, 20:60] = True
    boxes = np.array([[20, 100, 60, 140], [100, 30, 180, 90]], np.float32)
    drawn = draw_objects(image, boxes, [1, 0], ["cat", "dog"], [mask, ~mask & False])
    pixels = np.asarray(drawn)
    assert tuple(pixels[60, 100]) == class_colour(0) and tuple(pixels[120, 20]) == class_colour(1)
    inside, colour = pixels[120, 40].astype(int), np.array(class_colour(1))
    assert (np.abs(inside - (255 + (colour - 255) * 115 / 255)) <= 2).all()  # half transparent
    assert tuple(pixels[10, 190]) == (255, 255, 255) and np.asarray(image).min() == 255  # the original is untouched
    assert (pixels[13:29, 100:130] == class_colour(0)).all(axis=2).any()  # a label above its box
    alone = np.asarray(draw_objects(image, boxes[1:], [0], ["cat"]))
    assert tuple(alone[30, 100]) == class_colour(0) and alone[:30].min() == 255  # one class needs no label
    assert len({class_colour(k) for k in range(200)}) == 200


def test_boxes_that_are_wrong_are_drawn_as_far_as_they_go():
    image = draw(0, 0, 64)
    boxes = np.array([[np.nan, 0, 5, 5], [40, 40, 10, 10], [-1e30, -1e30, 1e30, 1e30], [90, 90, 95, 95], [5, 5, 5, 5],
                      [0, 0, np.inf, 3], [0, 0, 1e-9, 1e-9]])  # fmt: skip
    drawn = draw_objects(image, boxes, [0, 1, 99, 0, 0, 0, -7], ["猫", "b" * 100_000])
    assert drawn.size == image.size and tuple(np.asarray(drawn)[40, 25]) == class_colour(1)
    assert (
        draw_objects(image, boxes[[0, 3, 5]], [0] * 3, ["a", "b"]).tobytes() == image.tobytes()
    )  # nothing to be drawn
    assert draw_objects(image, np.zeros((0, 4)), [], []).tobytes() == image.tobytes()
    draw_objects(Image.new("RGB", (1, 1)), np.array([[0, 0, 1, 1]]), [0], ["a", "b"])
    many = np.random.default_rng(0).uniform(0, 64, (3000, 4))
    draw_objects(image, many, np.arange(3000) % 7, ["x"] * 7)
    with pytest.raises(ValueError, match="each box"):
        draw_objects(image, boxes, [0], ["a"])
    with pytest.raises(ValueError, match="shape"):
        draw_objects(image, boxes[:1], [0], ["a"], [np.zeros((2, 2), bool)])


def test_text_that_the_font_cannot_draw_is_replaced():
    assert drawable("Überfluß Ångström") == "Uberflu? Angstrom"
    assert drawable("猫と犬 a\tb\n\u202e\ud800🙂") == "? a b ?"
    assert len(drawable("x" * 10**6)) <= 200


def test_a_sheet_holds_each_picture_as_it_is_with_its_caption():
    random = np.random.default_rng(0)
    batch = random.integers(0, 200, (5, 3, 32, 32), np.uint8)
    sheet = contact_sheet(batch, ["cat", "dog\n(val)", "猫", "", "a very long caption " * 50], 3)
    pixels = np.asarray(sheet)
    assert sheet.mode == "RGB" and sheet.width == 3 * 136 + 8
    for number in range(5):
        big = batch[number].transpose(1, 2, 0).repeat(4, 0).repeat(4, 1)
        windows = np.lib.stride_tricks.sliding_window_view(
            pixels[:, 8 + number % 3 * 136 : 136 + number % 3 * 136], 128, 0
        )
        assert any(np.array_equal(windows[top].transpose(2, 0, 1), big) for top in range(len(windows)))
    high = sheet.height // 2
    dark = (pixels < 100).all(axis=2)
    assert dark[140:high, 8:136].any()  # a caption below the first picture
    assert not dark[high + 136 : high * 2, 8:136].any()  # none below the fourth
    pictures = [Image.new("L", (900, 300), 7), Image.new("RGBA", (10, 40)), draw(0, 0)]
    assert contact_sheet(pictures, ["a", "b", "c"], 9).width <= 3 * (640 + 8) + 8
    for images, captions, columns in (([], [], 2), (pictures, ["a"], 2), (pictures, ["a", "b", "c"], 0)):
        with pytest.raises(ValueError, match="a sheet needs"):
            contact_sheet(images, captions, columns)
