"""Pictures of the server's page for the README: a real model is asked about a real document, in Chromium.

    apt-get install chromium fonts-inter fonts-urw-base35
    python benchmarks/page_screenshots.py

The documents are chapters of the language reference that comes with every Python. Writes page.png (a passage is open
beside the answer), page-dark.png (the same question without the documents beside it) and page-phone.png.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from focusllm import FocusLLM, Library
from focusllm.serving.app import Server, create_app, listener
from focusllm.serving.settings import ServerSettings

CHAPTERS = {
    "functions.txt": ("function", "lambda", "return", "yield", "calls"),
    "exceptions.txt": ("exceptions", "try", "raise", "assert", "with"),
}
QUESTION = "When are default parameter values evaluated?"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
MINUTES = 60_000
"""Playwright counts in milliseconds."""

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=None, help="by default the one that `focusllm serve` takes")
parser.add_argument("--question", default=QUESTION)
parser.add_argument("--tokens", type=int, default=96, help="most tokens of an answer")
parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "docs" / "images")
arguments = parser.parse_args()


@contextmanager
def serving(llm: FocusLLM, folder: Path) -> Iterator[str]:
    """The address of a server in a thread."""
    settings = ServerSettings(port=0, model_id=llm.name, default_tokens=arguments.tokens, grace_seconds=1)
    with listener(settings) as taken:
        server = Server(create_app(llm, settings, library=Library(folder, llm)), settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        while not server.started:
            time.sleep(0.05)
        try:
            yield f"http://127.0.0.1:{taken.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


def take(page: Any, name: str) -> None:
    """A picture of what is in view."""
    page.wait_for_timeout(400)  # colours change slowly
    path = arguments.output / name
    page.screenshot(path=path)
    Image.open(path).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    """Ask once with the documents and once without, and take pictures on the way."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    chosen = {} if arguments.model is None else {"model": arguments.model}
    llm = FocusLLM.from_pretrained(**chosen, far_context="opened", notify=print)
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(llm, Path(folder) / "library") as address,
        sync_playwright() as tools,
    ):
        browser = tools.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 1360, "height": 820})
        page.set_default_timeout(10 * MINUTES)
        page.goto(address)
        files = [
            {"name": name, "mimeType": "text/plain", "buffer": "\n\n".join(topics[one] for one in chapters).encode()}
            for name, chapters in CHAPTERS.items()
        ]
        page.set_input_files("#files", files)
        page.locator("#documents [data-status=completed]").nth(len(files) - 1).wait_for()
        page.fill("#question", arguments.question)
        page.press("#question", "Enter")
        page.locator(".strip").first.wait_for()
        print(page.inner_text(".said"))
        page.locator(".citation").first.click()
        take(page, "page.png")
        page.click("#close")
        page.get_by_role("button", name="without the documents").click()
        page.locator(".answer .usage").nth(1).wait_for()
        page.emulate_media(color_scheme="dark")
        page.locator(".sentence").first.hover()
        take(page, "page-dark.png")
        page.emulate_media(color_scheme="light")
        page.set_viewport_size({"width": 390, "height": 780})
        page.locator(".turn").first.evaluate("(turn) => turn.scrollIntoView()")
        take(page, "page-phone.png")
        browser.close()
    for picture in sorted(arguments.output.glob("page*.png")):
        print(f"{picture.name}: {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
