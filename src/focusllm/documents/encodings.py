"""Bytes to characters: by a byte order mark, a declaration, as UTF-8, or as a detector says; and what is no text."""

from __future__ import annotations

import codecs
import io

from focusllm.documents.extracted import counted
from focusllm.errors import DocumentError

MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16: its mark begins with UTF-16's
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
CONTROLS = bytes(set(range(1, 32)) - set(b"\a\b\t\n\v\f\r\x1a\x1b")) + b"\x7f"
"""Bytes that no text has in any encoding that keeps ASCII; those of terminals and old editors are not among them."""
DETECTED = 20_000
"""Bytes that the detector looks at."""
HINT = "try utf-8 or latin-1"


def decode(data: bytes, name: str, encoding: str | None = None, declared: str = "") -> tuple[str, list[str]]:
    """The text, and remarks on how it was read.

    Args:
        encoding: what the user said; it is obeyed. None: by the mark, `declared`, UTF-8, or detected.
        declared: what the file says of itself.

    Raises:
        DocumentError: binary data, an unknown encoding, or bytes that are not in it.
    """
    if encoding is not None:
        return _as_told(data, name, encoding)
    codec = next((codec for mark, codec in MARKS.items() if data.startswith(mark)), "")
    if codec:
        text = data.decode(codec, "replace")
        return text, [] if codec == "utf-8-sig" else [f"read as {codec.upper()}, by its byte order mark"]
    if declared and _is_codec(declared) and not _is_utf8(declared):
        try:
            return data.decode(declared), [f"read as {declared.lower()}, as it declares"]
        except UnicodeError:  # it lies
            pass
    if codec := _wide(data):
        return data.decode(codec, "replace"), [f"read as {codec.upper()}, as detected"]
    return _detected(data, name)


def decode_text(data: bytes, name: str, encoding: str | None = None) -> str:
    """Bytes to text, with a byte order mark and NUL characters removed; see `decode`."""
    return decode(data, name, encoding)[0].replace("\0", "")


def _as_told(data: bytes, name: str, encoding: str) -> tuple[str, list[str]]:
    try:
        codec = codecs.lookup(encoding).name
    except (LookupError, ValueError) as error:  # ValueError: a NUL in it
        raise DocumentError(f"{encoding!r} is not a known encoding; {HINT}.") from error
    if not codec.startswith(("utf-16", "utf-32")) and _is_binary(data):
        raise _binary(name)
    try:
        return data.decode("utf-8-sig" if codec == "utf-8" else codec), []
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{name} is not {encoding}: byte 0x{data[error.start]:02x} at position {error.start:,}; leave the encoding "
            f"out to have it detected, or name another (for example latin-1)."
        ) from error
    except (LookupError, UnicodeError) as error:  # hex, undefined and others are codecs, but not of text
        raise DocumentError(f"{encoding!r} is not an encoding of text; {HINT}.") from error


def _detected(data: bytes, name: str) -> tuple[str, list[str]]:
    """UTF-8; UTF-8 with a few odd bytes; or what the detector says of it."""
    if b"\0" in data and _is_binary(data):
        raise _binary(name)
    try:
        return data.decode(), []
    except UnicodeDecodeError as error:
        first_odd = error.start
    if _is_binary(data):
        raise _binary(name)
    text = data.decode("utf-8", "replace")
    odd = text.count("\ufffd")
    if odd * 10 < len(text) - len(text.encode("ascii", "ignore")):  # else it is another encoding
        return text, [f"{counted(odd, 'byte')} outside UTF-8 replaced by U+FFFD"]
    for codec in (_detector_says(data), "windows-1252"):
        try:
            return data.decode(codec), [f"read as {codec}, as detected"]
        except (LookupError, UnicodeError):
            pass
    raise DocumentError(
        f"{name} is not UTF-8 (byte 0x{data[first_odd]:02x} at position {first_odd:,}), nor in an encoding that can be "
        f"detected; name its encoding (for example latin-1)."
    )


def _detector_says(data: bytes) -> str:
    """The detector's choice for the lines that are not ASCII; they say all that there is to know, in less time."""
    import chardet

    sample = bytearray()
    for line in io.BytesIO(data):
        if not line.isascii():
            sample += line[:DETECTED]
        if len(sample) > DETECTED:
            break
    return (chardet.detect(bytes(sample))["encoding"] or "windows-1252").lower()


def _wide(data: bytes) -> str:
    """UTF-16 without a mark, of text that is ASCII for the most part: every second byte is NUL."""
    head = data[:65_536]
    half = len(head) // 2
    if len(data) % 2 or half < 2:
        return ""
    even, odd = head[::2].count(0), head[1::2].count(0)
    if odd > 0.7 * half and even < 0.05 * half:
        return "utf-16-le"
    return "utf-16-be" if even > 0.7 * half and odd < 0.05 * half else ""


def _is_binary(data: bytes) -> bool:
    """More than one control character in a hundred characters; in bytes with NUL that are not UTF-8, NUL too."""
    text = data.replace(b"\0", b"")
    num_controls = len(text) - len(text.translate(None, CONTROLS))
    if num_controls * 100 > len(text):
        return True
    if len(text) == len(data):
        return False
    try:
        text.decode()
    except UnicodeDecodeError:
        return len(data) - len(text) > 0.3 * len(data)
    return False


def _binary(name: str) -> DocumentError:
    return DocumentError(
        f"{name} is not text but binary data; give a text, a document of a known format, or source code."
    )


def _is_codec(encoding: str) -> bool:
    try:
        b"".decode(encoding)
    except (LookupError, ValueError):  # unknown, not of text, or with NUL in its name
        return False
    return True


def _is_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")
