"""The page in a browser: a real server with a tiny model, Chromium, and what people do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from focusllm import Library
from focusllm.documents.sources import of_text
from focusllm.serving.keys import Keys

pytest.importorskip("fastapi")
playwright = pytest.importorskip("playwright.sync_api")
from focusllm.serving import page_routes  # noqa: E402
from test_server import Running, clients_end, running, tiny  # noqa: E402, F401

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
    "--no-first-run"
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")
DESKTOP, PHONE = {"width": 1360, "height": 850}, {"width": 360, "height": 740}
LOG = "\n\n".join(
    f"Day {day}. \N{WHALE} The ship went {'north' if day % 2 else 'south'}, and the cook made tea for {day} men."
    for day in range(1, 41)
)
NOTES = "\n\n".join(f"Note {number} says that the harbour was closed in winter {1800 + number}." for number in range(9))
QUESTION = "Which of these many days is the one on which the harbour was closed?"
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
SECONDS = 20_000
"""Of waiting, at most, in milliseconds: other processes may be busy too."""
VIOLATIONS = """
addEventListener("securitypolicyviolation", (event) => console.error(`policy: ${event.violatedDirective}`));
"""
expect = playwright.expect
expect.set_options(timeout=SECONDS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tools:
        found = tools.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield found
        found.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With a set of documents in its library. The model writes short lines, each of which is a sentence."""
    folder, llm = tmp_path_factory.mktemp("page") / "library", tiny("aeiostn .\n")
    Library(folder, llm).add(of_text(LOG, "log of the sea"), into="sea")
    with running(library=Library(folder, llm), llm=llm, default_tokens=24) as found:
        yield found


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, str]]:
    """With a key, and answers that take long."""
    folder, llm = tmp_path_factory.mktemp("locked"), tiny("aeiostn .\n")
    key = Keys.create(folder / "keys", "ann")
    with running(Keys.load(folder / "keys"), Library(folder / "library", llm), llm, default_tokens=4000) as found:
        yield found, key


class Visitor:
    """A page, and what is done on it again and again."""

    def __init__(self, page: Any, folder: Path):
        self.page, self.folder = page, folder

    def put(self, texts: dict[str, str | bytes]) -> None:
        """Choose files, and wait until they are read."""
        files = []
        for name, text in texts.items():
            content = text if isinstance(text, bytes) else text.encode()
            files.append({"name": name, "mimeType": "text/plain", "buffer": content})
        self.page.set_input_files("#files", files)
        for name in texts:
            expect(self.entry(name)).to_have_attribute("data-status", re.compile("completed|failed"))

    def entry(self, name: str) -> Any:
        return self.page.locator("#documents li").filter(has=self.page.get_by_role("button", name=name, exact=True))

    def ask(self, question: str = QUESTION) -> tuple[dict[str, Any], dict[str, Any], Any]:
        """What was sent, what the last event of the answer says, and the last turn's element."""
        self.page.fill("#question", question)
        return self.asked(lambda: self.page.press("#question", "Enter"))

    def asked(self, act: Callable[[], None]) -> tuple[dict[str, Any], dict[str, Any], Any]:
        with self.page.expect_response("**/v1/chat/completions") as found:
            act()
        events = found.value.text().split("\n\n")
        expect(self.page.locator("#send")).to_be_visible()
        last = next(event for event in reversed(events) if '"finish_reason": "length"' in event)
        delta = json.loads(last.removeprefix("data: "))["choices"][0]["delta"]
        return found.value.request.post_data_json, delta, self.page.locator(".turn").last


@pytest.fixture
def visit(browser: Any, served: Running, tmp_path: Path) -> Iterator[Callable[..., Visitor]]:
    """Opens the page. It may talk to its own server only, break no policy, and report no error."""
    contexts, wrong = [], list[str]()

    def open_page(port: int = served.port, refused: str = "", **settings: Any) -> Visitor:
        context = browser.new_context(**{"viewport": DESKTOP, **settings})
        context.set_default_timeout(SECONDS)
        contexts.append(context)
        page, origin = context.new_page(), f"http://127.0.0.1:{port}/"
        page.add_init_script(VIOLATIONS)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda request: request.url.startswith(origin) or wrong.append(request.url))
        page.on(
            "console",
            lambda told: (
                wrong.append(told.text) if told.type == "error" and not (refused and refused in told.text) else 0
            ),
        )
        page.goto(origin)
        return Visitor(page, tmp_path)

    yield open_page
    for context in contexts:
        context.close()
    for file in json.loads(served.send("GET", "/v1/files")[2])["data"]:
        served.send("DELETE", f"/v1/files/{file['id']}")
    assert wrong == []


def test_only_the_files_of_the_page_are_given_out(served: Running, locked: tuple[Running, str]) -> None:
    for path in page_routes.FILES:
        status, headers, content = locked[0].send("GET", path)
        assert (status, headers["x-content-type-options"]) == (200, "nosniff")
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert int(headers["content-length"]) == len(content) > 0
        known = {"If-None-Match": headers["etag"]}
        assert served.send("GET", path, headers=known)[::2] == (304, b"")
        assert served.send("HEAD", path)[::2] == (200, b"")
    assert page_routes.FILES.keys() >= {"/", "/page/main.js", "/page/style.css"}
    for path in ("/page", "/page/", "/page/index.html", "/page/../app.py", "/page/%2e%2e/app.py", "/page/nothing.js"):
        assert served.send("GET", path)[0] == 404
        assert locked[0].send("GET", path)[0] == 401


def test_nothing_is_taken_from_other_sites(served: Running, locked: tuple[Running, str]) -> None:
    """A form of theirs would reach a server that asks for no key."""
    form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\na\r\n--x--\r\n'
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 400)):
        headers = {"Content-Type": "multipart/form-data; boundary=x", "Sec-Fetch-Site": site}
        assert served.send("POST", "/v1/files", form, headers)[0] == status  # 400: the purpose is missing
        assert locked[0].send("POST", "/v1/files", form, headers)[0] == 401
    assert served.send("GET", "/", headers={"Sec-Fetch-Site": "cross-site"})[0] == 200  # a link to the page


def test_the_page_is_complete_in_itself() -> None:
    """No script or style in the HTML, nothing of other origins, and no text that is taken as HTML."""
    for file in page_routes.FILES.values():
        text = file.read_text()
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), file
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|localStorage", text), (
            file
        )
    html = page_routes.FILES["/"].read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! type=\"module\" src=\"page/main.js\"></script>)", html)


@needs_chromium
def test_ask_and_open_what_is_cited(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    page = visitor.page
    visitor.put({"log.txt": LOG, "notes.md": NOTES})
    sent, told, turn = visitor.ask()
    assert [part["type"] for part in sent["messages"][0]["content"]] == ["file", "file", "text"]
    expect(turn.get_by_role("heading", name=QUESTION)).to_be_visible()
    said = turn.locator(".said").evaluate("""(root) => {
        const copy = root.cloneNode(true);
        copy.querySelectorAll("button").forEach((button) => button.remove());
        return copy.textContent;
    }""")
    assert len(said) == 24  # of a token a letter
    assert len(told["sentences"]) > 2
    numbers = turn.locator(".citation").all_inner_texts()
    firsts = list(dict.fromkeys(numbers))
    assert firsts == [f"[{number}]" for number in range(1, len(firsts) + 1)]
    first, known = told["sentences"][0]["citations"][0], {one["text"] for one in told["citations"]}
    known |= {one["text"] for sentence in told["sentences"] for one in sentence["citations"]}
    for number in range(min(3, len(numbers))):
        turn.locator(".citation").nth(number).click()
        mark = page.locator("#reader-text mark")
        expect(mark).to_be_in_viewport()
        assert mark.inner_text().strip() in {text.strip() for text in known}
        if not number:
            assert mark.inner_text() == first["text"]
            expect(page.locator("#reader-name")).to_have_text(first["document"])
            whole = LOG if first["document"] == "log.txt" else NOTES
            assert page.locator("#reader-text").evaluate("(root) => root.textContent") == whole
    page.click("#close")
    expect(page.locator("#reader")).to_be_hidden()


@needs_chromium
def test_an_answer_is_shown_as_it_comes(visit: Callable[..., Visitor]) -> None:
    page = visit().page
    lengths = page.evaluate_handle("""() => {
        const seen = [];
        new MutationObserver(() => {
            const said = document.querySelector(".answer[aria-busy=true] .said");
            if (said) seen.push(said.textContent.length);
        }).observe(document.querySelector("#conversation"), { subtree: true, childList: true });
        return seen;
    }""")
    assert page.locator("#conversation").get_attribute("aria-live") == "polite"
    page.fill("#question", "Hello?")
    page.press("#question", "Enter")
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
    seen = lengths.json_value()
    assert seen == sorted(seen)
    assert len(set(seen)) > 5
    assert not page.get_by_role("button", name="without").count()  # there are no documents


@needs_chromium
def test_strips_show_where_the_model_looked(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.put({"log.txt": LOG, "notes.md": NOTES})
    _, told, turn = visitor.ask()
    strips, caption = turn.locator(".strip"), turn.locator(".caption")
    expect(strips).to_have_count(2)
    expect(caption).to_have_text("Where the model looked")
    for number, place in ((1, "hover"), (0, "focus")):
        sentence = turn.locator(".sentence").nth(number)
        sentence.hover() if place == "hover" else sentence.locator(".citation").first.focus()
        expect(caption).to_have_text("Where the model looked while it wrote this sentence")
        expect(sentence).to_have_class(re.compile("shown"))
        weights = dict[tuple[str, int], float]()
        for found in told["sentences"][number]["citations"]:
            key = found["document"], found["chunk"]
            weights[key] = weights.get(key, 0) + found["weight"]
        (document, chunk), weight = max(weights.items(), key=lambda item: item[1])
        label = strips.nth(0 if document == "log.txt" else 1).get_attribute("aria-label")
        assert f"chunk {chunk + 1} ({round(100 * weight)}%)" in label
        shades = turn.locator(".strip span").evaluate_all(
            "(cells) => cells.map((cell) => Number(cell.style.getPropertyValue('--weight')))"
        )
        assert max(shades) == 1
        assert sum(shade > 0 for shade in shades) <= len(weights)
    turn.locator(".strip .seen").first.click()
    expect(visitor.page.locator("#reader-text mark").first).to_be_in_viewport()


@needs_chromium
def test_a_conversation_goes_on_and_begins_anew(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.put({"log.txt": LOG})
    _, _, turn = visitor.ask("Where was it?")
    sent, _, _ = visitor.ask("And when?")
    assert [message["role"] for message in sent["messages"]] == ["user", "assistant", "user"]
    assert sent["messages"][0]["content"][-1] == {"type": "text", "text": "Where was it?"}
    assert len(sent["messages"][1]["content"]) == 24
    expect(turn.get_by_role("button", name="Ask again")).to_have_count(1)  # the last one only
    visitor.page.get_by_role("button", name="New conversation").click()
    expect(visitor.page.locator(".turn")).to_have_count(0)
    sent, _, _ = visitor.ask("Who?")
    assert len(sent["messages"]) == 1
    visitor.entry("log.txt").get_by_role("checkbox").uncheck()
    sent, told, _ = visitor.ask("And without it?")
    assert sent["messages"][0]["content"] == "Who?"
    assert "sentences" not in told


@needs_chromium
def test_edit_a_document_and_ask_again(visit: Callable[..., Visitor], served: Running) -> None:
    visitor = visit()
    page = visitor.page
    visitor.put({"log.txt": LOG.replace("\n", "\r\n"), "notes.md": NOTES})
    before, _, turn = visitor.ask()
    page.get_by_role("button", name="log.txt", exact=True).click()
    page.get_by_role("button", name="Edit").click()
    expect(page.locator("#edited")).to_be_focused()
    expect(page.locator("#edited")).to_have_value(LOG)
    page.fill("#edited", LOG.replace("Day 20.", "Day 20, a Sunday."))
    page.click("#save")
    place = page.locator("#reader-place")
    expect(place).to_have_text(re.compile(r"^\d+ of \d+ chunks new$"))
    fresh, count = map(int, re.findall(r"\d+", place.inner_text()))
    assert 1 <= fresh <= 4 < count / 4
    expect(page.locator("#reader-text")).to_contain_text("Day 20, a Sunday.")
    names = page.locator("#documents .name").all_inner_texts()
    assert names == ["log.txt", "notes.md"]
    listed = json.loads(served.send("GET", "/v1/files")[2])["data"]
    assert sorted(file["filename"] for file in listed) == ["log.txt", "notes.md"]
    after, _, _ = visitor.asked(lambda: turn.get_by_role("button", name="Ask again").click())
    assert len(after["messages"]) == 1  # as if it had not been asked
    ids = [[part["file"]["file_id"] for part in sent["messages"][0]["content"][:2]] for sent in (before, after)]
    assert ids[0][0] != ids[1][0]
    assert ids[0][1] == ids[1][1]
    assert set(ids[1]) == {file["id"] for file in listed}
    page.locator(".turn").first.locator(".citation").first.click()  # cites the text that was
    expect(page.locator("#reader-text mark")).to_be_in_viewport()
    assert page.locator("#reader-error").inner_text() == ""


@needs_chromium
def test_the_same_question_without_the_document(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    visitor.put({"log.txt": LOG})
    _, _, turn = visitor.ask()
    sent, told, _ = visitor.asked(lambda: turn.get_by_role("button", name="without the documents").click())
    assert (sent["model"], sent["messages"]) == ("tiny", [{"role": "user", "content": QUESTION}])
    assert "sentences" not in told
    answers = turn.get_by_role("article")
    expect(answers.nth(0)).to_have_accessible_name("With the documents")
    expect(answers.nth(1)).to_have_accessible_name("Without the documents")
    left, right = (answers.nth(number).bounding_box() for number in (0, 1))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]
    visitor.page.set_viewport_size(PHONE)
    above, below = (answers.nth(number).bounding_box() for number in (0, 1))
    assert above["x"] == below["x"]
    assert above["y"] + above["height"] < below["y"]


@needs_chromium
def test_sets_of_a_library_can_be_chosen(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    page = visitor.page
    expect(page.locator("#model option")).to_have_text(["tiny", "tiny@sea"])
    page.select_option("#model", "tiny@sea")
    sent, told, turn = visitor.ask()
    assert (sent["model"], sent["messages"][0]["content"]) == ("tiny@sea", QUESTION)
    turn.locator(".citation").first.click()
    expect(page.locator("#reader-name")).to_have_text("log of the sea")
    assert page.locator("#reader-text").inner_text() == told["sentences"][0]["citations"][0]["text"]
    expect(page.locator("#edit")).to_be_hidden()
    sent, _, _ = visitor.asked(lambda: turn.get_by_role("button", name="without the documents").click())
    assert sent["model"] == "tiny"


@needs_chromium
def test_documents_are_there_again_until_they_are_removed(visit: Callable[..., Visitor], served: Running) -> None:
    visitor = visit()
    visitor.put({"log.txt": LOG, "notes.md": NOTES})
    page = visitor.page
    page.reload()
    expect(page.locator("#documents .name")).to_have_text(["log.txt", "notes.md"])
    page.get_by_role("button", name="Remove log.txt").click()
    expect(page.locator("#documents .name")).to_have_text(["notes.md"])
    assert [file["filename"] for file in json.loads(served.send("GET", "/v1/files")[2])["data"]] == ["notes.md"]


@needs_chromium
def test_files_are_dropped_and_their_progress_is_shown(visit: Callable[..., Visitor]) -> None:
    page = visit().page
    states = page.evaluate_handle("""() => {
        const seen = [];
        const list = document.querySelector("#documents");
        new MutationObserver(() => seen.push(...[...list.querySelectorAll("li")].map((item) => item.innerText)))
            .observe(list, { subtree: true, childList: true, characterData: true, attributes: true });
        return seen;
    }""")
    page.evaluate(
        """([name, text]) => {
        const data = new DataTransfer();
        data.items.add(new File([text], name));
        const event = (kind) => new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true });
        document.body.dispatchEvent(event("dragover"));
        if (!document.querySelector(".drop.over")) throw new Error("not shown");
        document.body.dispatchEvent(event("drop"));
    }""",
        ["big.txt", LOG * 3],
    )
    expect(page.locator("#documents li")).to_have_attribute("data-status", "completed")
    seen = "\n".join(states.json_value())
    assert "Sent" in seen
    assert re.search(r"Read \d+%", seen)
    expect(page.locator("#documents progress")).to_be_hidden()


@needs_chromium
def test_a_key_is_asked_for_and_kept_in_the_tab(visit: Callable[..., Visitor], locked: tuple[Running, str]) -> None:
    page = visit(locked[0].port, refused="401").page
    expect(page.locator("#key")).to_be_focused()
    expect(page.locator("#workspace")).to_be_hidden()
    page.keyboard.type("fk-wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").filter(has_text="The API key is not known here.")).to_be_visible()
    page.fill("#key", locked[1])
    page.keyboard.press("Enter")
    expect(page.locator("#workspace")).to_be_visible()
    expect(page.locator("#model option")).to_have_text(["tiny"])
    kept = page.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie]")
    assert kept == [[locked[1]], 0, ""]
    page.reload()
    expect(page.locator("#model option")).to_have_text(["tiny"])


@needs_chromium
def test_an_answer_can_be_stopped(visit: Callable[..., Visitor], locked: tuple[Running, str]) -> None:
    page = visit(locked[0].port, refused="401").page
    page.fill("#key", locked[1])
    page.keyboard.press("Enter")
    page.fill("#question", "Will this ever end?")
    page.press("#question", "Enter")
    expect(page.locator(".said")).to_have_text(re.compile(".{5}", re.S))
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".status")).to_have_text("Stopped.")
    expect(page.locator("#send")).to_be_focused()
    assert len(page.locator(".said").inner_text()) < 3000


@needs_chromium
def test_errors_are_sentences(visit: Callable[..., Visitor]) -> None:
    visitor = visit(refused="Failed to load resource")
    page = visitor.page
    visitor.put({"noise.pdf": b"%PDF-1.7\n\xff\x00\xfe nothing"})
    state = visitor.entry("noise.pdf").locator(".state")
    expect(state).to_have_text(re.compile(r"\w+ .+\.$"))
    page.get_by_role("button", name="Remove noise.pdf").click()
    expect(page.locator("#documents li")).to_have_count(0)
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.fill("#question", "Are you there?")
    page.press("#question", "Enter")
    expect(page.locator(".status.error")).to_have_text("The server cannot be reached; is it still running?")
    page.unroute("**/v1/chat/completions")
    body = 'data: {"error": {"message": "There is no room; come again."}}\n\n'
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    page.get_by_role("button", name="Ask again").click()
    expect(page.locator(".status.error").last).to_have_text("There is no room; come again.")
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=502, body="<html>"))
    page.get_by_role("button", name="Ask again").click()
    expect(page.locator(".status.error").last).to_have_text("The server refused this (status 502).")


@needs_chromium
def test_a_server_without_a_library(visit: Callable[..., Visitor]) -> None:
    with running(llm=tiny("aeiostn .\n"), default_tokens=24) as bare:
        visitor = visit(bare.port, refused="400")
        expect(visitor.page.get_by_role("alert").filter(has_text="it keeps no files")).to_be_visible()
        expect(visitor.page.locator("#drop")).to_be_hidden()
        sent, _, turn = visitor.ask("Who?")
        assert sent["messages"] == [{"role": "user", "content": "Who?"}]
        expect(turn.get_by_role("button", name="without")).to_have_count(0)


@needs_chromium
def test_everything_stays_text(visit: Callable[..., Visitor]) -> None:
    """A name, a document, a question, an answer and a citation that would be HTML."""
    visitor = visit()
    page, name = visitor.page, "<img src=x onerror=alert(1)>.txt"
    visitor.put({name: f"{HOSTILE} {LOG[:300]}"})
    expect(page.locator("#documents .name")).to_have_text(name)
    visitor.ask(HOSTILE)
    expect(page.locator(".turn h2")).to_have_text(HOSTILE)
    page.locator("#documents .name").click()
    expect(page.locator("#reader-name")).to_have_text(name)
    expect(page.locator("#reader-text")).to_contain_text(HOSTILE)
    found = {"document": HOSTILE, "chunk": 0, "start": 0, "end": 9, "weight": 1, "text": HOSTILE, "part": HOSTILE}
    delta = {"content": HOSTILE, "sentences": [{"start": 0, "end": len(HOSTILE), "citations": [found]}]}
    body = f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    page.fill("#question", "b")
    page.press("#question", "Enter")
    expect(page.locator(".said").last).to_have_text(f"{HOSTILE}[1]")
    page.locator(".citation").last.click()
    expect(page.locator("#reader-text")).to_have_text(HOSTILE)
    expect(page.locator("#reader-name")).to_have_text(HOSTILE)
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.querySelectorAll('script, img').length") == 2  # the page's own


@needs_chromium
def test_the_keyboard_is_enough(visit: Callable[..., Visitor]) -> None:
    visitor = visit()
    page = visitor.page
    path = visitor.folder / "log.txt"
    path.write_text(LOG)

    def tab_to(selector: str, key: str = "Tab") -> None:
        for _ in range(40):
            page.keyboard.press(key)
            if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                shown = page.evaluate("""() => {
                    const seen = [document.activeElement, document.activeElement.parentElement];
                    return seen.some((one) => getComputedStyle(one).outlineStyle !== "none")
                        || document.activeElement.id === "question"; // whose frame changes its colour
                }""")
                assert shown, selector
                return
        raise AssertionError(f"{selector} is not reached")

    page.on("filechooser", lambda chooser: chooser.set_files(path))
    expect(page.locator("#model option")).to_have_count(2)
    tab_to("#files")
    page.keyboard.press("Enter")
    expect(page.locator("#documents li")).to_have_attribute("data-status", "completed")
    tab_to("#question")
    page.keyboard.type(QUESTION)
    visitor.asked(lambda: page.keyboard.press("Enter"))
    expect(page.locator("#question")).to_be_focused()
    tab_to(".citation", "Shift+Tab")
    number = page.evaluate("document.activeElement.textContent")
    page.keyboard.press("Enter")
    expect(page.locator("#reader-text")).to_be_focused()
    expect(page.locator("#reader-text mark")).to_be_in_viewport()
    page.keyboard.press("Escape")
    expect(page.locator("#reader")).to_be_hidden()
    assert page.evaluate("document.activeElement.textContent") == number
    tab_to(".name", "Shift+Tab")
    page.keyboard.press("Enter")
    tab_to("#edit", "Shift+Tab")
    page.keyboard.press("Enter")
    page.keyboard.type("Once more. ")
    page.keyboard.press("Escape")  # out of the editor, without its changes
    expect(page.locator("#reader-text")).not_to_contain_text("Once more.")
    page.keyboard.press("Escape")
    expect(page.locator("#reader")).to_be_hidden()


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_light_and_dark(visit: Callable[..., Visitor], scheme: str) -> None:
    """Nothing scrolls sideways, and what is written can be read."""
    visitor = visit(viewport=PHONE, color_scheme=scheme, has_touch=True, reduced_motion="reduce")
    page, name = visitor.page, f"{'a-long-name-of-a-document-' * 5}.txt"

    def fits() -> bool:
        return bool(page.evaluate("document.documentElement.scrollWidth <= 360"))

    assert fits()
    visitor.put({name: f"{'w' * 300}. {LOG}"})
    _, _, turn = visitor.ask(f"{'q' * 200} {QUESTION}")
    assert fits()
    visitor.asked(lambda: turn.get_by_role("button", name="without the documents").tap())
    assert fits()
    for selector in ("h2", ".said", ".citation", ".caption", ".usage", ".actions button"):
        assert page.evaluate(CONTRAST, f".turn {selector}") >= 4.5, selector
    turn.locator(".citation").first.tap()
    expect(page.locator("#reader-text mark")).to_be_in_viewport()
    assert page.locator("#reader").bounding_box()["width"] == 360
    assert page.evaluate(CONTRAST, "mark") >= 4.5
    page.get_by_role("button", name="Edit").tap()
    assert fits()
    page.get_by_role("button", name="Close").tap()
    expect(page.locator("#reader")).to_be_hidden()
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == (scheme == "dark")
    assert page.evaluate("getComputedStyle(document.querySelector('.sentence')).transitionProperty") in ("all", "none")
    assert page.evaluate("getComputedStyle(document.querySelector('.sentence')).transitionDuration") == "0s"


CONTRAST = """(selector) => {
    const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const luminance = (colour) => channels(colour).slice(0, 3)
        .map((value) => value / 255)
        .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
        .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
    let behind = document.querySelector(selector);
    const front = luminance(getComputedStyle(behind).color);
    const isClear = (colour) => channels(colour)[3] === 0;
    while (isClear(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
    const back = luminance(getComputedStyle(behind).backgroundColor);
    return (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
}"""
