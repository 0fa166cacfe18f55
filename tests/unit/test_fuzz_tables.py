"""Injured tables and text files give a Reading or a DataError: no traceback, no hang, no change."""

from __future__ import annotations

import json
import random
import time
from contextlib import suppress

from goodfit.core.errors import DataError
from goodfit.data.formats import read_table, read_text
from goodfit.data.formats.encoding import text_content
from goodfit.data.formats.records import TextRecords
from goodfit.data.reading import How

HOW = How()
TEXTS = ["Crème brûlée, twice", 'he said ""no"", then\nleft', "plain words here", "€5 “for” one", "a; b\tc | d"]
TABLE = "label,text\n" + "".join(f'{"ab"[n % 2]},"{TEXTS[n % 5]} {n}"\n' for n in range(60))


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four injuries: bytes flipped, cut off, deleted, doubled, or garbage put in."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(7)
        if kind == 0:
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data = data[:at] + data[at + rng.randrange(40) :]
        elif kind == 3:
            data = data[:at] + rng.randbytes(rng.randrange(30)) + data[at:]
        elif kind == 4:
            data = data[:at] + rng.choice([b'"', b"\n", b"\r", b"\t", b",", b"\0", b"{", b"[" * 5000, b"\xff\xfe",
                                           b"9" * 6000, b"NaN", b"\xed\xa0\x80", b"\\"]) + data[at:]  # fmt: skip
        elif kind == 5:
            data = data[at:] + data[:at]
        else:
            data = data.replace(
                rng.choice([b",", b"\n", b'"', b"im", b"label"]), rng.choice([b"", b";", b'"', b"\n"]), 3
            )
    return data


def seeds() -> dict[str, bytes]:
    """One sound file of each layout."""
    rows = "".join(f"im/{n}.png,{'cat' if n % 2 else 'dog'},train\n" for n in range(10))
    objects = [json.dumps({"text": f"the words of {n}", "label": n % 2}) for n in range(30)]
    return {
        "a.csv": b"path,label,split\n" + rows.encode(),
        "b.csv": TABLE.encode(),
        "c.csv": TABLE.encode("utf-16"),
        "d.jsonl": "\n".join(objects).encode(),
        "e.txt": b"\n".join(b"%d the text number %d" % (n % 3, n) for n in range(60)),
        "f.txt": "".join(f"{n} words — of prose\n" for n in range(1500)).encode(),
        "g.tsv": b"\n".join(b'%d\t"quoted" text of %d' % (n % 3, n) for n in range(60)),
    }


def test_injured_tables_and_texts(tmp_path):
    """Of 280 injured files each gives a Reading or a DataError within two seconds, and each text can be read again."""
    (tmp_path / "im").mkdir()
    for number in range(10):
        (tmp_path / "im" / f"{number}.png").write_bytes(b"picture")
    rng = random.Random(7)
    outcomes, unclear = {"read": 0, "refused": 0}, 0
    for number in range(280):
        name, data = list(seeds().items())[number % 7]
        file = tmp_path / name
        file.write_bytes(mutate(data, rng))
        before, start = file.read_bytes(), time.perf_counter()
        for module in (read_table, read_text):
            assert isinstance(module.recognise(file), str | None)
            try:
                reading = module.read(file, HOW)
                outcomes["read"] += 1
                assert len(reading.index) and reading.note
                if module is read_text:
                    texts = TextRecords(reading.index, read_text.read_texts(file, HOW)[1])
                    for row in range(len(reading.index)):
                        assert text_content(texts.text(row)) == reading.index.contents[row].tobytes()
            except DataError as error:
                outcomes["refused"] += 1
                unclear += not (error.message and error.where and error.next)
        assert time.perf_counter() - start < 2, name
        assert file.read_bytes() == before
        file.unlink()
    assert not unclear and outcomes["read"] > 100 and outcomes["refused"] > 100, outcomes


def test_what_would_take_for_ever(tmp_path):
    """Quotes that never close, one long line, a million delimiters, deep nesting: an answer within seconds."""
    hostile = {
        "a.csv": b'0,"never closed\n' * 30000,
        "b.txt": b"x" * 3_000_000,
        "c.csv": b"," * 1_000_000,
        "d.jsonl": (b"[" * 100_000 + b"\n") * 20,
        "e.jsonl": b"\n".join(json.dumps({f"k{n}-{k}": 1 for k in range(50)}).encode() for n in range(1000)),
        "f.tsv": b'\t"' * 300_000,
    }
    for name, data in hostile.items():
        file = tmp_path / name
        file.write_bytes(data)
        for module in (read_table, read_text):
            start = time.perf_counter()
            module.recognise(file)
            with suppress(DataError):
                module.read(file, HOW)
            assert time.perf_counter() - start < 10, name
            print(name, module.__name__, time.perf_counter() - start)
