"""Text files without columns: whether their lines begin with labels, and pieces of plain text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from goodfit.data.formats.encoding import BINARY, detect_encoding
from goodfit.data.formats.records import Layout, Lines, explained, records

BLOCK = 4096  # bytes of a row of plain text, about a thousand tokens

_MAX_FILE = 1 << 26  # bytes of one text file in a class folder
_MAX_TOKENS = 200  # different first words up to which these can be labels


def has_labels(path: Path, layout: Layout) -> bool:
    """Whether the lines begin with few different words that look like labels, and go on after them.

    Raises:
        DataError: the file cannot be read or decoded.
    """
    counts: Counter[str] = Counter()
    bad = 0
    for *_, cells in records(path, layout):
        if isinstance(cells, list):
            counts[cells[0]] += 1
        else:
            bad += 1
        if len(counts) > _MAX_TOKENS:
            return False
    lines = counts.total()
    if bad > 0.01 * lines or not 2 <= len(counts) <= lines // 2:
        return False
    if all(token.lstrip("-").isdecimal() or token.startswith("__label__") or ":" in token for token in counts):
        return True
    return len(counts) <= 20 and lines >= 20 * len(counts)  # plain words: prose never begins with so few


def blocks(path: Path, layout: Layout) -> Iterator[tuple[int, int, str]]:
    """Byte offset, bytes and text of consecutive pieces that end where lines end; a longer line is cut."""
    with explained(path, layout), open(path, "rb") as handle:
        lines = Lines(handle, layout)
        start, size, parts = lines.offset, 0, [""]
        for line in lines:
            before, size = size, lines.offset - start
            if before and size > BLOCK:
                yield start, before, "".join(parts)
                start, size, parts = start + before, size - before, []
            if size <= BLOCK:
                parts.append(line)
                continue
            for at in range(0, len(line), BLOCK):
                piece = line[at : at + BLOCK]
                length = len(piece.encode(layout.encoding))
                yield start, length, piece
                start += length
            size, parts = 0, []
        if size:
            yield start, size, "".join(parts)


def read_file(path: Path, asked: str) -> tuple[bytes, str, str]:
    """Bytes and encoding of a text file, and what is wrong with it."""
    try:
        size = path.stat().st_size
        if size > _MAX_FILE:
            return b"", "", f"The file has {size} bytes, more than {_MAX_FILE}."
        data = path.read_bytes()
        encoding = asked or detect_encoding(data)
        if encoding == BINARY:
            return b"", "", "This is not text."
        if not data.decode(encoding).strip():
            return b"", "", "The file is empty."
    except UnicodeError:
        return b"", "", f"The file is not written in {asked}."
    except OSError as error:
        return b"", "", f"The file cannot be read: {error.strerror or error}."
    return data, encoding, ""
