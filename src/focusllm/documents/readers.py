"""Files to text: which formats there are, and which one a file has."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from focusllm.documents import archives, markup, messages, pdf
from focusllm.documents.encodings import decode_text
from focusllm.documents.extracted import Extracted
from focusllm.errors import DocumentError, first_line

__all__ = ["DOCUMENT_SUFFIXES", "FORMATS", "Format", "check_text", "decode_text", "read_data", "read_file", "read_text"]


@dataclass(frozen=True)
class Format:
    """A kind of file: its name, suffixes, and who reads it, called with (name, bytes, encoding or None)."""

    name: str
    suffixes: tuple[str, ...]
    read: Callable[[str, bytes, str | None], Extracted]


PLAIN = Format("text", (".txt", ".md", ".rst", ".tex", ".json", ".csv", ".tsv", ".log", ".py"), messages.from_plain)
FORMATS = (
    PLAIN,
    Format("HTML", (".html", ".htm", ".xhtml"), markup.from_html),
    Format("PDF", (".pdf",), pdf.from_pdf),
    Format("Word", (".docx", ".docm"), archives.from_docx),
    Format("PowerPoint", (".pptx", ".pptm"), archives.from_pptx),
    Format("spreadsheet", (".xlsx", ".xlsm", ".xlsb", ".xls", ".ods"), archives.from_sheets),
    Format("OpenDocument text", (".odt",), archives.from_odt),
    Format("EPUB", (".epub",), archives.from_epub),
    Format("RTF", (".rtf",), messages.from_rtf),
    Format("mail", (".eml",), messages.from_eml),
    Format("notebook", (".ipynb",), messages.from_ipynb),
)
BY_SUFFIX = {suffix: format for format in FORMATS for suffix in format.suffixes}
DOCUMENT_SUFFIXES = frozenset(BY_SUFFIX)
"""What names of documents end in; other files are taken as text."""


def read_text(path: str | Path, encoding: str | None = None) -> str:
    """The text of a file alone, see `read_file`."""
    return read_file(path, encoding).text


def read_file(path: str | Path, encoding: str | None = None) -> Extracted:
    """The text of a file with its parts and remarks; `-` reads standard input.

    Args:
        encoding: of plain text and HTML; None: by its byte order mark, what HTML declares, UTF-8, or detected.

    Raises:
        DocumentError: a missing or unreadable file, one that is not text, bytes that are not in the encoding, a
            damaged or protected document, a package that is not installed, or a file without any text.
    """
    name = str(path)
    return read_data(name, _content(name, path), encoding)


def read_data(name: str, data: bytes, encoding: str | None = None) -> Extracted:
    """The text of a file's bytes, which its name may say more of.

    Raises:
        DocumentError: as of `read_file`.
    """
    try:
        found = format_of(name, data).read(name, data, encoding)
    except (MemoryError, RecursionError) as error:
        raise DocumentError(
            f"{name} cannot be read: it is nested too deep or too big ({first_line(error)})."
        ) from error
    check_text(found.text, name)
    return found


def format_of(name: str, data: bytes) -> Format:
    """What a file is: by how it begins where that says it, else by its suffix, else text."""
    if data.startswith(b"%PDF-"):
        return BY_SUFFIX[".pdf"]
    if data.startswith(b"{\\rtf"):
        return BY_SUFFIX[".rtf"]
    inside = archives.kind_of(data) if data.startswith(b"PK\3\4") else ""
    return BY_SUFFIX.get(inside or Path(name).suffix.lower(), PLAIN)


def _content(name: str, path: str | Path) -> bytes:
    try:
        return sys.stdin.buffer.read() if name == "-" else Path(path).read_bytes()
    except FileNotFoundError as error:
        raise DocumentError(f"there is no file {name}; check the path.") from error
    except IsADirectoryError as error:
        raise DocumentError(f"{name} is a folder; name the files in it.") from error
    except OSError as error:
        raise DocumentError(f"{name} cannot be read ({error.strerror or error}); check its permissions.") from error
    except ValueError as error:  # NUL in the name
        raise DocumentError(f"{name!r} cannot be the name of a file ({first_line(error)}).") from error


def check_text(text: str, name: str) -> str:
    """The text itself, if there is any.

    Raises:
        DocumentError: it is empty or white space only, or has halves of characters (lone surrogates).
    """
    if not text.strip():
        raise DocumentError(f"{name} has no text in it ({len(text)} characters of white space); give one with text.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        odd = f"{text[error.start]!r} at position {error.start:,}"
        raise DocumentError(f"{name} is not Unicode text: {odd}; give it in UTF-8, or name its encoding.") from error
    return text
