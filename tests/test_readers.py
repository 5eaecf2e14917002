"""Files to text, and what is not text."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from pypdf import PdfWriter

from focusllm import DocumentError
from focusllm.documents.readers import check_text, read_text


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def pdf(text: str | None) -> bytes:
    """A PDF of one page, by hand: pypdf writes no text."""
    stream = b"" if text is None else f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources "
        b"<< /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, offsets = io.BytesIO(b"%PDF-1.4\n"), []
    out.seek(0, 2)
    for number, content in enumerate(objects, 1):
        offsets.append(out.tell())
        out.write(b"%d 0 obj\n%s\nendobj\n" % (number, content))
    start = out.tell()
    out.write(b"xref\n0 6\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % offset for offset in offsets))
    out.write(b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % start)
    return out.getvalue()


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.unknown", "noname"])
def test_plain_text(tmp_path: Path, name: str) -> None:
    text = "naïve café 世界\nline two\n"
    assert read_text(write(tmp_path, name, text.encode())) == text


def test_byte_order_mark_and_other_encodings(tmp_path: Path) -> None:
    assert read_text(write(tmp_path, "bom.txt", b"\xef\xbb\xbftext")) == "text"
    assert read_text(write(tmp_path, "latin.txt", "café".encode("latin-1")), "latin-1") == "café"
    for name in ("utf-16", "utf16", "UTF_16"):
        assert read_text(write(tmp_path, "wide.txt", "café".encode("utf-16")), name) == "café"


def test_html(tmp_path: Path) -> None:
    page = (
        b"<html><head><style>p {}</style><script>var x;</script></head><body><h1>Title</h1><p>One &amp; two</p></body>"
    )
    assert read_text(write(tmp_path, "page.html", page)) == "Title\nOne & two"


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("<p>H<sub>2</sub>O is <b>not</b> un<i>believ</i>able,\n  is it?</p>", "H2O is not unbelievable, is it?"),
        ("<div>one<p>two</p>three<br>four</div><ul><li>five<li>six</ul>", "one\ntwo\nthree\nfour\nfive\nsix"),
        ("<pre>def f():\n    return 1\n</pre>done", "def f():\n    return 1\ndone"),
        ("<table><tr>\n <td>a</td>\n <td>b</td>\n</tr>\n<tr><td> </td><td></td></tr> <tr><td>c</td></tr>", "a\tb\nc"),
        ("<!DOCTYPE html><html><!-- not shown --><body><?php no ?><p>Hi</p></body></html>", "Hi"),
    ],
)
def test_html_has_a_line_for_every_block(tmp_path: Path, markup: str, text: str) -> None:
    assert read_text(write(tmp_path, "page.html", markup.encode())) == text


def test_pdf(tmp_path: Path) -> None:
    assert read_text(write(tmp_path, "page.pdf", pdf("Hello from a page"))).strip() == "Hello from a page"
    assert read_text(write(tmp_path, "no-suffix", pdf("Hello"))).strip() == "Hello"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.txt", b"", "empty.txt has no text in it"),
        ("blank.txt", b" \n\t \n", "blank.txt has no text in it"),
        ("binary.txt", b"ab\x00cd", "is not text"),
        ("odd.html", b"<![foo bar", "odd.html is not HTML that can be read"),
        ("latin.txt", b"caf\xe9 noir", "byte 0xe9 at position 3"),
        ("broken.pdf", b"%PDF-1.4 nothing here", "not a PDF that can be read"),
        ("scan.pdf", pdf(None), "1 pages but no text"),
        ("empty.html", b"<html><script>x</script></html>", "has no text in it"),
    ],
)
def test_not_text(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        read_text(write(tmp_path, name, data))


def test_protected_pdf(tmp_path: Path) -> None:
    writer = PdfWriter()
    writer.add_blank_page(100, 100)
    writer.encrypt("secret", algorithm="RC4-128")
    writer.write(tmp_path / "locked.pdf")
    with pytest.raises(DocumentError, match="protected by a password"):
        read_text(tmp_path / "locked.pdf")


def test_unknown_encoding(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="not a known encoding"):
        read_text(write(tmp_path, "a.txt", b"x"), "utf-99")
    for codec in ("hex", "undefined"):
        with pytest.raises(DocumentError, match="is not an encoding of text"):
            read_text(write(tmp_path, "a.txt", b"x"), codec)


def test_missing_folder_and_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DocumentError, match="there is no file"):
        read_text(tmp_path / "nowhere.txt")
    with pytest.raises(DocumentError, match="is a folder"):
        read_text(tmp_path)
    path = write(tmp_path, "secret.txt", b"x")

    def denied(self: Path) -> bytes:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(DocumentError, match="Permission denied"):
        read_text(path)


def test_halves_of_characters_are_no_text() -> None:
    with pytest.raises(DocumentError, match=r"the text is not Unicode text: '\\udce9' at position 3; give it in UTF-8"):
        check_text("caf\udce9", "the text")
