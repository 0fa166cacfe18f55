"""Which encoding a text file has, and the content hash of a text."""

from __future__ import annotations

import codecs
import hashlib
import unicodedata
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from goodfit.core.errors import DataError

BINARY = "binary"  # what detect_encoding says of bytes that are no text

_CHUNK = 1 << 20
_MAX_CONTROLS = 0.001  # share of control characters; text has next to none, compressed data 11 %
_MARKS = (  # byte order marks; that of UTF-32 begins with that of UTF-16, so it comes first
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_CONTROLS = bytes([*range(9), *range(14, 27), *range(28, 32), 127])  # all but tab, line ends, form feed, escape
_C1 = bytes(range(0x80, 0xA0))  # letters and quotes in Windows-1252, unused controls in Latin-1
_NOT_1252 = bytes([0x81, 0x8D, 0x8F, 0x90, 0x9D])


def detect_encoding(data: bytes) -> str:
    """The codec that decodes these bytes: by byte order mark, else strict UTF-8, else Windows-1252 or Latin-1.

    Bytes 0x80 to 0x9F decide between the last two: they are quotes and dashes in Windows-1252 and nothing in Latin-1.

    Returns:
        "utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252" or "latin-1", or BINARY for bytes with NUL, with more than
        one control character in a thousand, or that do not hold what their mark says.
    """
    return _detect([data])


def file_encoding(path: Path, asked: str | None = None) -> str:
    """detect_encoding of a whole file, read in pieces; or the encoding that a person asked for.

    Raises:
        DataError: the file cannot be read, or there is no text encoding of the name that was asked for.
    """
    if asked is not None:
        return check_encoding(asked)
    try:
        with open(path, "rb") as handle:
            return _detect(iter(partial(handle.read, _CHUNK), b""))
    except OSError as error:
        raise DataError(f"The file cannot be read: {error.strerror or error}.", where=str(path),
                        next="check the file and its permissions") from error  # fmt: skip


def check_encoding(name: str) -> str:
    """The name, if it is that of a text encoding.

    Raises:
        DataError: there is no such text encoding.
    """
    try:
        if "a\n".encode(name).decode(name) == "a\n":
            return name
    except (LookupError, UnicodeError, ValueError):
        pass
    raise DataError(f"There is no text encoding named {name!r}.", where=f"encoding={name}",
                    next="try: encoding=utf-8, encoding=latin-1, encoding=cp1252 or encoding=gb18030")  # fmt: skip


def without_mark(encoding: str, head: bytes) -> tuple[str, int]:
    """The codec of the bytes after the byte order mark, and the bytes that the mark takes (0 where there is none)."""
    plain = codecs.lookup(encoding).name
    for mark, marked in _MARKS:
        if head.startswith(mark) and plain.startswith(marked.removesuffix("-sig")):
            if marked == "utf-8-sig":
                return "utf-8", len(mark)
            return f"{marked}-{'le' if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF32_LE) else 'be'}", len(mark)
    return {"utf-8-sig": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}.get(plain, plain), 0


def text_content(text: str) -> bytes:
    """128-bit BLAKE2b of a text without regard to case, in Unicode form NFC and with whitespace collapsed.

    Copies of a text often differ in no more than that: of the eleven questions that are in both splits of TREC, one is
    written in another case.
    """
    text = text.lower() if text.isascii() else unicodedata.normalize("NFC", text.casefold())
    return hashlib.blake2b(" ".join(text.split()).encode("utf-8", "replace"), digest_size=16).digest()


def _detect(chunks: Iterable[bytes]) -> str:
    marked = ""
    decoder = None
    decodes, has_c1, has_odd = True, False, False
    size = controls = 0
    for chunk in chunks:
        if not size:
            marked = next((name for mark, name in _MARKS if chunk.startswith(mark)), "")
            decoder = codecs.getincrementaldecoder(marked or "utf-8")("strict")
        size += len(chunk)
        wide = marked in ("utf-16", "utf-32")
        if not wide:
            if b"\0" in chunk:
                return BINARY
            controls += len(chunk) - len(chunk.translate(None, _CONTROLS))
            has_c1 = has_c1 or len(chunk.translate(None, _C1)) < len(chunk)
            has_odd = has_odd or len(chunk.translate(None, _NOT_1252)) < len(chunk)
        if decodes and decoder is not None:
            decodes, found = _decode(decoder, chunk, wide=wide)
            controls += found
        if not decodes and marked:
            return BINARY
    if decodes and decoder is not None:
        decodes, _ = _decode(decoder, b"", wide=False, final=True)
    if controls > _MAX_CONTROLS * size or (marked and not decodes):
        return BINARY
    if decodes:
        return marked or "utf-8"
    return "cp1252" if has_c1 and not has_odd else "latin-1"


def _decode(decoder: codecs.IncrementalDecoder, chunk: bytes, *, wide: bool, final: bool = False) -> tuple[bool, int]:
    """Whether the chunk decodes, and how many NULs and controls a wide encoding hides from a look at the bytes."""
    try:
        text = decoder.decode(chunk, final)
    except UnicodeError:
        return False, 0
    return True, 4 * sum(text.count(chr(c)) for c in _CONTROLS) if wide else 0
