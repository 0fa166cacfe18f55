"""Encodings are detected from marks and bytes; what is no text is said to be none."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from goodfit.core.errors import DataError
from goodfit.data.formats import read_text
from goodfit.data.formats.encoding import BINARY, detect_encoding, text_content
from goodfit.data.reading import How


def test_detect_encoding():
    text = "naïve — “quoted” Ω\n" * 3
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert text.encode(encoding).decode(detect_encoding(text.encode(encoding))) == text
    assert detect_encoding(b"plain") == "utf-8" == detect_encoding(b"")
    assert detect_encoding("“naïve”".encode("cp1252")) == "cp1252"
    assert detect_encoding("naïve".encode("latin-1")) == "latin-1"
    for data in (b"a\0b", random.Random(0).randbytes(5000), b"\xef\xbb\xbf\xff", b"\xff\xfea"):
        assert detect_encoding(data) == BINARY
    with pytest.raises(DataError, match="no text encoding named 'hex'"):
        read_text.read(Path(__file__), How(encoding="hex"))
    with pytest.raises(DataError, match="not written in ascii"):
        read_text.read(Path(__file__), How(encoding="ascii"))  # this file holds “quotes”


def test_contents_of_texts_that_are_the_same():
    same = ["Café au lait", "Cafe\u0301  au\tlait\n", "CAFÉ AU LAIT"]
    assert len({text_content(text) for text in same}) == 1
    assert text_content("Cafe au lait") != text_content(same[0]) != text_content("Caféau lait")
