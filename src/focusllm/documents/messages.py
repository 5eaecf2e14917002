"""Text with a syntax of its own that is no markup of pages: mails, notebooks, RTF."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from focusllm.documents.encodings import decode, decode_text
from focusllm.documents.extracted import Extracted, counted, joined
from focusllm.documents.markup import html_text
from focusllm.errors import DocumentError, first_line

if TYPE_CHECKING:
    from email.message import MIMEPart

CELL = re.compile(r"(\\\\)|\\(?:nest)?cell(?![a-zA-Z])")
"""The end of a cell in RTF, or a backslash that is text."""


def from_plain(name: str, data: bytes, encoding: str | None) -> Extracted:
    """As it is."""
    text, remarks = decode(data, name, encoding)
    return joined([("", text)], remarks)


def from_eml(name: str, data: bytes, encoding: str | None = None) -> Extracted:
    """Who wrote when to whom about what, and the text; attachments are named in a remark."""
    from email import message_from_bytes, policy

    try:
        mail = message_from_bytes(data, policy=policy.default)
        head = [f"{key}: {mail[key]}" for key in ("From", "To", "Cc", "Date", "Subject") if mail[key]]
        body = mail.get_body(("plain", "html"))
        text = "" if body is None else _body(name, body)
        attached = [part.get_filename() or part.get_content_type() for part in mail.iter_attachments()]
    except DocumentError:
        raise
    except Exception as error:  # of many kinds, for a damaged mail
        raise DocumentError(f"{name} is not a mail that can be read ({first_line(error)}).") from error
    remarks = [f"{counted(len(attached), 'attachment')} not read ({', '.join(attached)})"] if attached else []
    return joined([("", "\n".join(head)), ("", text)], remarks)


def _body(name: str, part: MIMEPart) -> str:
    content = part.get_payload(decode=True)
    assert isinstance(content, bytes)
    text, _ = decode(content, name, None, part.get_content_charset("") if b"\0" not in content else "")
    text = text.replace("\r\n", "\n")
    return html_text(name, text) if part.get_content_subtype() == "html" else text.strip("\n")


def from_ipynb(name: str, data: bytes, encoding: str | None) -> Extracted:
    """A part for every cell: its source, and what it printed."""
    try:
        notebook = json.loads(decode_text(data, name, encoding))
        cells = notebook["cells"] if "cells" in notebook else notebook["worksheets"][0]["cells"]
        pieces = [(f"cell {number}", "\n".join(_cell(cell))) for number, cell in enumerate(cells, 1)]
    except DocumentError:
        raise
    except Exception as error:  # no JSON, nested too deep, or another shape
        raise DocumentError(f"{name} is not a notebook that can be read ({first_line(error)}).") from error
    return joined(pieces)


def _cell(cell: dict[str, Any]) -> list[str]:
    found = [cell.get("source", cell.get("input", ""))]
    for output in cell.get("outputs", []):
        found.append(output.get("text", output.get("data", {}).get("text/plain", "")))
    texts = ("".join(text).strip("\n") for text in found)
    return [text for text in texts if text.strip()]


def from_rtf(name: str, data: bytes, encoding: str | None = None) -> Extracted:
    """Paragraphs and tables; a row on one line with tabs between its cells."""
    try:
        from striprtf.striprtf import rtf_to_text
    except ImportError as error:
        raise DocumentError(f"{name} needs the extra documents: pip install 'focusllm[documents]'.") from error
    page = re.search(rb"\\ansicpg(\d{1,5})", data[:1024])
    try:
        markup = CELL.sub(lambda found: found[1] or r"\tab", data.decode(_code_page(page), "replace"))
        text = rtf_to_text(markup, errors="replace")
    except Exception as error:
        raise DocumentError(f"{name} is not an RTF that can be read ({first_line(error)}).") from error
    return joined([("", "\n".join(line.rstrip() for line in text.split("\n")))])


def _code_page(found: re.Match[bytes] | None) -> str:
    codec = f"cp{found[1].decode()}" if found else "cp1252"
    try:
        b"".decode(codec)
    except LookupError:
        return "utf-8" if codec == "cp65001" else "cp1252"
    return codec
