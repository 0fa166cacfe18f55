"""Tables of images and texts of every layout: guessed and named columns, encodings, real data, hostile files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from goodfit.core.errors import DataError
from goodfit.data.formats import read_table, read_text
from goodfit.data.formats.encoding import text_content
from goodfit.data.formats.records import TextRecords
from goodfit.data.reading import How, Reading
from pictures import folder_hash

HOW = How()


def read_texts(data: Path, **how: object) -> tuple[Reading, TextRecords]:
    """A reading, with every text of it read again and found to be what was hashed."""
    reading, layouts = read_text.read_texts(data, How(**how))
    texts = TextRecords(reading.index, json.loads(json.dumps(layouts)))
    for row in range(len(reading.index)):
        assert text_content(texts.text(row)) == reading.index.contents[row].tobytes(), reading.index.name(row)
    return reading, texts


def counts(reading: Reading) -> dict[str, int]:
    index = reading.index
    return dict(zip(index.class_names, np.bincount(index.targets).tolist(), strict=True))


@pytest.fixture
def pictures(tmp_path):
    """A folder with ten files that are named as images; readers open none."""
    (tmp_path / "im").mkdir()
    for number in range(10):
        (tmp_path / "im" / f"{number}.png").write_bytes(b"picture")
    return tmp_path


def rows_of(number=10, **extra):
    return [{"path": f"im/{n}.png", "label": "cat" if n % 2 else "dog", **extra} for n in range(number)]


def write(path: Path, rows: list[dict[str, object]], delimiter: str = ",", header: bool = True) -> Path:
    if path.suffix == ".jsonl":
        lines = [json.dumps(row) for row in rows]
    else:
        lines = [delimiter.join(rows[0])] if header else []
        lines += [delimiter.join(str(value) for value in row.values()) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t"), ("a.csv", "|"),
                                                 ("a.jsonl", "")])  # fmt: skip
def test_a_table_of_images_in_every_spelling(pictures, name, delimiter):
    before = folder_hash(pictures)
    table = write(pictures / name, rows_of(split="Training"), delimiter)
    assert read_table.recognise(table) and read_text.recognise(table) is None
    for data in (table, pictures):
        reading = read_table.read(data, HOW)
        assert counts(reading) == {"cat": 5, "dog": 5} and reading.given_splits == ("train",)
        assert list(reading.index.paths) == [f"im/{n}.png" for n in range(10)] and not reading.problems
    table.unlink()
    assert folder_hash(pictures) == before


def test_columns_by_content_and_without_a_header(pictures):
    rows = [{"a": n, "b": f"im/{n}.png", "c": "xy"[n % 2], "d": ("train", "dev", "test")[n % 3]} for n in range(10)]
    for header in (True, False):
        reading = read_table.read(write(pictures / "a.csv", rows, header=header), HOW)
        assert counts(reading) == {"x": 5, "y": 5} and reading.given_splits == ("train", "val", "test")
        assert np.bincount(reading.index.splits).tolist() == [4, 3, 3]
    resplit = read_table.read(pictures / "a.csv", How(resplit=True))
    assert resplit.given_splits == () and set(resplit.index.splits.tolist()) == {-1}


def test_columns_that_are_asked_for_by_name_and_number(pictures):
    rows = [{"p": f"im/{n}.png", "u": "xy"[n % 2], "v": "abc"[n % 3], "w": n // 2} for n in range(10)]
    table = write(pictures / "a.csv", rows)
    with pytest.raises(DataError, match="u, v, w") as caught:
        read_table.read(table, HOW)
    assert "label_column=COLUMN" in caught.value.next
    assert counts(read_table.read(table, How(label_column="v"))) == {"a": 4, "b": 3, "c": 3}
    reading = read_table.read(table, How(label_column="2", image_column="1", group="w"))
    assert counts(reading) == {"x": 5, "y": 5} and reading.index.groups.tolist() == [n // 2 for n in range(10)]
    with pytest.raises(DataError, match="the columns are p, u, v, w"):
        read_table.read(table, How(label_column="9"))


def test_what_a_row_can_lack(pictures):
    lines = ["file,class,split", "im/0.png,cat,train", "im/1.png,dog,valid", "im/0.png,cat,train", "./im/0.png,cat,train",
             "im/2.png,,train", "gone.png,cat,", "im/3.png,cat,test", "im/3.png,dog,test", "too,many,columns,here",
             "im/4.png,dog,TST"]  # fmt: skip
    table = pictures / "list.csv"
    table.write_text("\n".join(lines))
    reading = read_table.read(table, HOW)
    found = [(p.kind, p.item, p.lost) for p in reading.problems]
    assert found == [("missing_label", "im/2.png", True), ("missing_image", "gone.png", True),
                     ("unreadable", "list.csv:10", True), ("label_conflict", "im/3.png", True)]  # fmt: skip
    assert "cat and dog" in reading.problems[-1].message and "2 repeated rows" in reading.note
    assert list(reading.index.paths) == ["im/0.png", "im/1.png", "im/4.png"]
    assert reading.index.splits.tolist() == [0, 1, 2]
    table.write_text("file,class,split\nim/0.png,cat,train\nim/1.png,dog,final\n")
    with pytest.raises(DataError, match="'final' of line 3 is none of train, val, test") as caught:
        read_table.read(table, HOW)
    assert "resplit=true" in caught.value.next
    assert len(read_table.read(table, How(resplit=True)).index) == 2
    table.write_text("file,class\nim/0.png,cat\n" + "im/1.png,dog,1,2\n" * 3)
    with pytest.raises(DataError, match="3 of 4 rows cannot be read"):
        read_table.read(table, HOW)
    table.write_text("file,class\nim/0.png,cat\nim/1.png,cat\n")
    with pytest.raises(DataError, match="one class only: cat"):
        read_table.read(table, HOW)


def test_where_image_names_start_from(pictures):
    rows = [{"id": n, "label": "ab"[n % 2]} for n in range(10)]
    reading = read_table.read(write(pictures / "a.csv", rows), How(image_column="id"))
    assert reading.index.paths[3] == "im/3.png" and "files in im" in reading.note
    (pictures / "more").mkdir()
    for number in range(10):
        (pictures / "more" / f"{number}.png").touch()
    with pytest.raises(DataError, match="several folders: im, more") as caught:
        read_table.read(pictures / "a.csv", How(image_column="id"))
    assert "images=im" in caught.value.next
    assert read_table.read(pictures / "a.csv", How(image_column="id", images="more")).index.paths[0] == "more/0.png"
    (pictures / "odd.csv").write_text("a,b\nx.png,1\n")
    with pytest.raises(DataError, match="image_column=COLUMN"):
        read_table.read(pictures / "odd.csv", HOW)


def test_tables_that_are_splits_of_one_another(pictures):
    write(pictures / "train.csv", rows_of(6))
    write(pictures / "test.csv", rows_of(10)[6:])
    reading = read_table.read(pictures, HOW)
    assert reading.given_splits == ("train", "test") and np.bincount(reading.index.splits).tolist() == [6, 0, 4]
    (pictures / "test.csv").write_text("path\nim/9.png\nim/8.png,\n")
    with pytest.raises(DataError):
        read_table.read(pictures / "test.csv", HOW)
    write(pictures / "other.csv", rows_of())
    (pictures / "test.csv").unlink()
    with pytest.raises(DataError, match=r"2 files that could be the data: other\.csv, train\.csv"):
        read_table.read(pictures, HOW)
    assert len(read_table.read(pictures, How(annotations="other")).index) == 10


def test_boxes_and_lists_are_no_class_list(pictures):
    rows = [{**row, "xmin": 1, "ymin": 2, "xmax": 3, "ymax": 4} for row in rows_of()]
    table = write(pictures / "a.csv", rows)
    assert read_table.recognise(table) is None and read_text.recognise(table) is None
    with pytest.raises(DataError, match="boxes") as caught:
        read_table.read(table, HOW)
    assert "COCO, YOLO or VOC" in caught.value.next
    several = write(pictures / "a.jsonl", [{**row, "label": ["a", "b"]} for row in rows_of()])
    with pytest.raises(DataError, match="lists or objects"):
        read_table.read(several, HOW)


def test_a_list_beside_class_folders_that_say_the_same_is_left_to_them(tmp_path):
    for number in range(10):
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[number % 2] / f"{number}.png").touch()
    rows = [{"path": f"{'ab'[n % 2]}/{n}.png", "label": "ab"[n % 2]} for n in range(10)]
    write(tmp_path / "a.csv", rows)
    assert read_table.recognise(tmp_path) is None and read_table.recognise(tmp_path / "a.csv") is not None


def test_parquet(pictures):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows_of()), pictures / "a.parquet")
    assert counts(read_table.read(pictures / "a.parquet", HOW)) == {"cat": 5, "dog": 5}
    rows = [{"text": f"this is the sentence number {n}", "label": n % 3, "b": b"\0"} for n in range(1000)]
    (pictures / "texts").mkdir()
    file = pictures / "texts" / "t.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=300)
    reading, texts = read_texts(file)
    assert counts(reading) == {"0": 334, "1": 333, "2": 333} and texts.text(700) == rows[700]["text"]
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(DataError, match="Parquet"):
        read_table.read(file, HOW)


def test_parquet_without_pyarrow(pictures, monkeypatch):
    (pictures / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        read_table.read(pictures / "a.parquet", HOW)
    assert read_table.recognise(pictures / "a.parquet") is None


TEXTS = ["Crème brûlée, twice", 'he said "no", then\nleft', "plain words here", "€5 “for” one", "a; b\tc | d",
         "x" * 500 + " end"]  # fmt: skip


def table_of_texts(quote: bool = True) -> str:
    lines = ["label,text"]
    for number in range(60):
        cell = TEXTS[number % 6].replace('"', '""') + f" number {number}"
        lines.append(f'{"ab"[number % 2]},"{cell}"')
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252", "utf-16-le"])
def test_quotes_line_ends_and_encodings(tmp_path, encoding):
    body = table_of_texts()
    for newline in ("\n", "\r\n"):
        (tmp_path / "t.csv").write_bytes(body.replace("\n", newline).encode(encoding))
        asked = {"encoding": encoding} if encoding == "utf-16-le" else {}
        reading, texts = read_texts(tmp_path / "t.csv", **asked)
        assert counts(reading) == {"a": 30, "b": 30} and not reading.problems
        assert texts.text(0) == "Crème brûlée, twice number 0"
        assert texts.text(1) == f'he said "no", then{newline}left number 1'
        assert ("cp1252" in reading.note) == (encoding == "cp1252")


def test_old_line_ends_and_backslashes(tmp_path):
    (tmp_path / "t.csv").write_bytes(table_of_texts().replace(" then\nleft", " left").replace("\n", "\r").encode())
    assert counts(read_texts(tmp_path / "t.csv")[0]) == {"a": 30, "b": 30}
    lines = [f'"{n % 2}","she said \\"number {n}\\", and left again"' for n in range(30)]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    assert read_texts(tmp_path / "t.csv")[1].text(3) == 'she said "number 3", and left again'


def test_a_quote_that_never_closes_costs_one_line(tmp_path):
    lines = [f'"{n % 2}","this is, number {n}"' for n in range(100)]
    lines[40] = '"0","this is, number 40'
    (tmp_path / "t.csv").write_text("\n".join(lines))
    reading, _ = read_texts(tmp_path / "t.csv")
    assert [(p.kind, p.item) for p in reading.problems] == [("unreadable", "t.csv:41")] and len(reading.index) == 99


def test_text_tables_that_leave_a_doubt(tmp_path):
    rows = [{"u": "xy"[n % 2], "v": "abc"[n % 3], "t": f"these are four words {n}"} for n in range(30)]
    table = write(tmp_path / "t.tsv", rows, "\t")
    assert read_text.recognise(table)
    with pytest.raises(DataError, match=r"Several columns .*: u, v") as caught:
        read_text.read(table, HOW)
    assert "label_column=" in caught.value.next
    reading, texts = read_texts(table, label_column="u", text_column="t,v")
    assert counts(reading) == {"x": 15, "y": 15} and texts.text(4) == "these are four words 4 b"
    assert len(read_texts(table, label_column="1", header=False)[0].index) == 31
    single = write(tmp_path / "s.csv", [{"a": n, "label": "xy"[n % 2]} for n in range(30)])
    with pytest.raises(DataError, match="text_column=COLUMN"):
        read_text.read(single, HOW)


def test_whether_the_first_line_is_data(tmp_path):
    """It is where its class occurs again below; unusual names, also empty ones, are names where theirs does not."""
    lines = [f"{('ham', 'spam')[n % 2]},the message number {n},,," for n in range(30)]
    (tmp_path / "spam.csv").write_text("\n".join(lines))
    reading, texts = read_texts(tmp_path / "spam.csv")
    assert len(reading.index) == 30 and "no line of column names" in reading.note and texts.text(0).endswith("number 0")
    (tmp_path / "spam.csv").write_text("\r\n".join(["v1,v2,,,", *lines]))
    reading, _ = read_texts(tmp_path / "spam.csv")
    assert counts(reading) == {"ham": 15, "spam": 15} and "'v1'" in reading.note


def test_json_lines_of_texts(tmp_path):
    rows = [{"label": n % 2, "text": f"words \ud83d of number {n}"} for n in range(20)] + [
        {"label": 1},
        {"text": "no label"},
    ]
    lines = [json.dumps(row) for row in rows] + ["[1]", "{", "[" * 100000, '{"label": 1' + "0" * 5000 + "}", ""]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    reading, _ = read_texts(tmp_path / "t.jsonl")
    assert counts(reading) == {"0": 10, "1": 10}
    assert [p.kind for p in reading.problems] == ["unreadable", "missing_label"] + ["unreadable"] * 4


def test_folders_of_text_files(tmp_path):
    for split in ("train", "test"):
        for label in ("pos", "neg"):
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(5):
                (tmp_path / split / label / f"{number}.txt").write_bytes(
                    f"Fünf {label} {number} {split}".encode("cp1252")
                )
    (tmp_path / "train" / "unsup").mkdir()
    (tmp_path / "train" / "unsup" / "0.txt").write_text("no class")
    (tmp_path / "train" / "pos" / "bin.txt").write_bytes(bytes(range(256)))
    (tmp_path / "train" / "pos" / "zero.txt").write_bytes(b"")
    before = folder_hash(tmp_path)
    assert "folder" in (read_text.recognise(tmp_path) or "")
    reading, texts = read_texts(tmp_path)
    assert counts(reading) == {"neg": 10, "pos": 10} and reading.given_splits == ("train", "test")
    assert texts.text(0) == "Fünf neg 0 train" and "20 files in latin-1" in reading.note
    assert [(p.item, p.lost) for p in reading.problems] == [("train/pos/bin.txt", True), ("train/pos/zero.txt", True),
                                                            ("train/unsup", False)]  # fmt: skip
    one_level, _ = read_texts(tmp_path / "test")
    assert counts(one_level) == {"neg": 5, "pos": 5} and one_level.given_splits == ()
    assert set(read_texts(tmp_path, resplit=True)[0].index.splits.tolist()) == {-1}
    (tmp_path / "a.png").touch()
    assert read_text.recognise(tmp_path) is None and folder_hash(tmp_path) != before


def test_plain_text_is_cut_into_pieces(tmp_path):
    body = "".join(f"Zeile {n} – mit Wörtern\n" * (n % 3) for n in range(900)) + "ü" * 9000 + "\nend"
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "t.txt").write_bytes(body.encode(encoding))
        reading, texts = read_texts(tmp_path / "t.txt")
        index = reading.index
        assert "".join(texts.text(row) for row in range(len(index))) == body, "nothing lost, nothing twice"
        assert index.task == "language" and (np.diff(index.splits) >= 0).all() and index.class_names == ()
        assert reading.given_splits == ("train", "val", "test") and "by position" in reading.note
    for name in ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"):
        (tmp_path / name).write_text(body)
    (tmp_path / "t.txt").unlink()
    reading, _ = read_texts(tmp_path)
    assert reading.given_splits == ("train", "val", "test") and len(set(np.bincount(reading.index.splits))) == 1
    (tmp_path / "small.txt").write_text("too short\n")
    with pytest.raises(DataError, match="too short"):
        read_text.read(tmp_path / "small.txt", HOW)
    with pytest.raises(DataError, match="no labels"):
        read_text.read(tmp_path / "wiki.test.tokens", How(task="text"))


def test_marked_lines(tmp_path):
    lines = [f"__label__{'good' if n % 2 else 'bad'} the text number {n}" for n in range(40)]
    lines[7] = "__label__good __label__bad two at once"
    (tmp_path / "train.txt").write_text("\n".join(lines))
    reading, _ = read_texts(tmp_path / "train.txt")
    assert counts(reading) == {"bad": 20, "good": 19} and reading.problems[0].item == "train.txt:8"
    (tmp_path / "prose.txt").write_text("\n".join(f"{w} once upon a time" for w in ("I", "The", "We", "They") * 4))
    with pytest.raises(DataError, match="too short"):  # not taken for four classes
        read_text.read(tmp_path / "prose.txt", HOW)


REAL = [  # folder, options, rows, classes, splits, given
    ("text/sms_spam", {}, {"ham": 4827, "spam": 747}, None),
    ("text/ag_news", {}, dict.fromkeys(("Business", "Sci/Tech", "Sports", "World"), 1900), None),
    ("text/trec", {}, {"0": 1300, "1": 1344, "2": 95, "3": 1288, "4": 916, "5": 1009}, [5452, 0, 500]),
    ("text/sst2", {}, {"0": 4650, "1": 4963}, [6920, 872, 1821]),
]


@pytest.mark.data
@pytest.mark.parametrize(("folder", "how", "classes", "splits"), REAL)
def test_real_texts(real_data, folder, how, classes, splits):
    before = folder_hash(real_data / folder)
    assert read_text.recognise(real_data / folder) and read_table.recognise(real_data / folder) is None
    reading, texts = read_texts(real_data / folder, **how)
    assert counts(reading) == classes and not reading.problems and reading.index.task == "text"
    if splits is None:
        assert set(reading.index.splits.tolist()) == {-1} and reading.given_splits == ()
    else:
        assert np.bincount(reading.index.splits, minlength=3).tolist() == splits
    assert reading.index.nbytes < 80 * len(reading.index)
    if folder == "text/ag_news":
        first = reading.index.class_names[reading.index.targets[0]]
        assert first == "Business" and texts.text(0).startswith("Fears for T N pension after talks Unions")
        assert "classes.txt" in reading.note
    if folder == "text/sms_spam":
        assert len(reading.index) - len({bytes(c) for c in reading.index.contents}) >= 403  # repeats, spaces apart
    assert folder_hash(real_data / folder) == before


@pytest.mark.data
def test_real_latin_1_and_leaks_between_splits(real_data):
    """TREC is Latin-1, and eleven of its texts are in both splits."""
    reading, texts = read_texts(real_data / "text/trec")
    assert "TREC.train.all is in iso8859-1" in reading.note
    assert sum("ð" in texts.text(row) for row in range(len(reading.index))) == 1
    contents = [bytes(c) for c in reading.index.contents]
    parts = [{contents[row] for row in reading.index.rows(split)} for split in ("train", "test")]
    assert len(parts[0] & parts[1]) == 11


@pytest.mark.data
def test_real_plain_text(real_data):
    reading, texts = read_texts(real_data / "text/tinyshakespeare")
    index = reading.index
    assert index.task == "language" and int(index.lengths.sum()) == 1115394 and len(index) == 274
    assert np.bincount(index.splits).tolist() == [246, 14, 14] and texts.text(0).startswith("First Citizen:")


@pytest.mark.data
def test_real_table_of_images(real_data):
    folder = real_data / "classify/facemask_crops"
    reading = read_table.read(folder / "labels.csv", How(group="photo"))
    assert counts(reading) == {"mask_weared_incorrect": 94, "with_mask": 2261, "without_mask": 418}
    assert np.bincount(reading.index.splits).tolist() == [2155, 618] and reading.given_splits == ("train", "val")
    assert len(set(reading.index.groups.tolist())) == 835 and not reading.problems
    assert read_table.recognise(folder) is None  # its class folders say the same
    for other in ("detect/bccd_voc", "segment/coco128", "classify/trashnet", "segment/nuclei_dsb2018"):
        assert read_table.recognise(real_data / other) is None and read_text.recognise(real_data / other) is None


def test_a_first_line_that_does_not_fit(pictures):
    (pictures / "a.csv").write_text("path,label\n" + "im/0.png,cat,1\n" * 5)
    with pytest.raises(DataError, match="rows have 3 columns, but the first line names 2"):
        read_table.read(pictures / "a.csv", HOW)
    (pictures / "a.csv").write_text("path,label\n")
    with pytest.raises(DataError, match="empty"):
        read_table.read(pictures / "a.csv", HOW)
