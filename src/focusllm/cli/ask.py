"""`focusllm ask` and `focusllm generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from focusllm.cli.options import Encoding, FocusOptions, Json, ModelOptions, SamplingOptions, grouped
from focusllm.cli.terminal import if_stopped, load, notify, reading_progress, say
from focusllm.errors import FocusError
from focusllm.machine import readable_bytes

if TYPE_CHECKING:
    from focusllm.conversation import Conversation
    from focusllm.documents.answer import Answer

ConversationFile = Annotated[
    Path | None,
    typer.Option(
        "--conversation", help="File of the conversation: gone on with, also by -q, and kept after each answer."
    ),
]
Alone = Annotated[bool, typer.Option("--alone", help="Typed questions stand alone, too.")]


@grouped
def ask(
    documents: Annotated[
        list[str],
        typer.Argument(help="Files, folders, or quoted patterns such as 'src/**/*.py'; - for stdin."),
    ],
    *,
    question: Annotated[
        list[str] | None, typer.Option("--question", "-q", help="Ask this; may be repeated. Without: ask at a prompt.")
    ] = None,
    model: ModelOptions,
    focus: FocusOptions,
    sampling: SamplingOptions,
    encoding: Encoding = None,
    store: Annotated[
        Path | None, typer.Option(help="Folder that keeps what was read: asked again, it is not read again.")
    ] = None,
    num_citations: Annotated[int, typer.Option("--citations", min=0, help="How many passages to show.")] = 3,
    template_arg: Annotated[
        list[str] | None,
        typer.Option(help="Switch of the chat template, NAME=VALUE (enable_thinking=false); may be repeated."),
    ] = None,
    conversation: ConversationFile = None,
    alone: Alone = False,
    as_json: Json = False,
) -> None:
    """Read documents once and answer questions about them: typed ones are a conversation, those of -q stand alone."""
    from focusllm.documents.sources import open_source, short_names

    said = earlier(conversation, alone)

    if question is None and "-" in documents:
        raise FocusError("standard input is the document, so questions cannot be typed; give them with -q.")
    switches = switches_of(template_arg or [])
    sources = [open_source(path, encoding) for path in documents]
    names = short_names([source.whole for source in sources])
    llm = load(model, focus.given(), quiet=as_json)
    for text in question or []:
        llm.frame(text, switches)  # a bad question is refused before the long read
    read = []
    kept = f"the same command goes on with what is in {store}" if store else "with --store FOLDER it could go on"
    with if_stopped(kept):
        for name, source in zip(names, sources, strict=True):
            with reading_progress(name, quiet=as_json) as progress:
                read.append(llm.read(source, name=name, progress=progress, store=store, template_kwargs=switches))
    if (question is not None and conversation is None) or alone:
        ask_next: Callable[..., Answer] = partial(llm.ask, read, template_kwargs=switches)
    else:
        ask_next = spoken(llm.conversation(read, said, template_kwargs=switches), conversation)
    answers = answered(ask_next, question, sampling, num_citations, as_json)
    if as_json:
        described = [
            {
                "name": document.name,
                "num_tokens": document.num_tokens,
                "num_chunks": len(document.chunks),
                "num_files": len(document.files),
                "read_seconds": document.read_seconds,
            }
            for document in read
        ]
        print(json.dumps({"model": model.model, "documents": described, "answers": answers}, indent=2))


@grouped
def generate(
    prompt: Annotated[str, typer.Argument(help="File with the text to go on from; - for stdin.")],
    model: ModelOptions,
    focus: FocusOptions,
    sampling: SamplingOptions,
    encoding: Encoding = None,
    as_json: Json = False,
) -> None:
    """Continue a text of any length."""
    from focusllm.documents.sources import open_source

    source = open_source(prompt, encoding)
    for remark in source.remarks:
        notify(remark)
    llm = load(model, focus.given(), quiet=as_json)
    with reading_progress(Path(prompt).name, quiet=as_json) as progress:
        answer = llm.continue_text(source.text, progress=progress, on_text=_printer(as_json), **sampling.arguments())
    if as_json:
        print(json.dumps({"model": model.model, **answer.to_dict()}, indent=2))
    else:
        say("")
        _show_speed(answer)


def answered(
    ask: Callable[..., Answer],
    questions: list[str] | None,
    sampling: SamplingOptions,
    num_citations: int,
    as_json: bool,
) -> list[dict[str, Any]]:
    """Answer questions, those given or those typed, and show the answers or return them.

    Args:
        ask: a function of a question and the keyword arguments of `FocusLLM.ask`.
    """
    answers = []
    for number, text in enumerate(questions if questions is not None else _typed_questions()):
        if number and not as_json:
            print()
        try:
            arguments = sampling.arguments()  # seeds anew: an answer does not depend on what was asked before
            answer = ask(text, on_text=_printer(as_json), **arguments)
        except FocusError as error:
            if questions is not None:
                raise
            notify(f"focusllm: {error}")  # typed: the next one may be better, and the documents are read
            continue
        if as_json:
            answers.append({"question": text, **answer.to_dict(num_citations)})
        else:
            say("")
            _show_origin(answer, num_citations)
    return answers


def earlier(file: Path | None, alone: bool) -> list[dict[str, str]]:
    """What was said in the conversation of a file, if there is one."""
    if file is None:
        return []
    if alone:
        raise FocusError("--alone and --conversation contradict each other; leave one out.")
    from focusllm.conversation import load_messages

    return load_messages(file) if file.exists() else []


def spoken(conversation: Conversation, file: Path | None) -> Callable[..., Answer]:
    """What asks the next question of a conversation, and keeps it in a file."""

    def ask(question: str, **arguments: Any) -> Answer:
        answer = conversation.ask(question, **arguments)
        if file is not None:
            conversation.save(file)
        return answer

    return ask


def switches_of(given: list[str]) -> dict[str, Any]:
    """`NAME=VALUE` each; a value is what JSON makes of it, else a string."""
    found = {}
    for argument in given:
        name, equals, value = argument.partition("=")
        if not name.isidentifier() or not equals:
            raise FocusError(f"--template-arg {argument!r} is not NAME=VALUE; write it like enable_thinking=false.")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found


def _typed_questions() -> Iterator[str]:
    """Questions from the terminal until an empty one or the end of input."""
    while True:
        try:
            print("\nQuestion (empty to leave): ", end="", file=sys.stderr, flush=True)
            text = input()
        except EOFError:
            return
        if not text.strip():
            return
        yield text


def _printer(quiet: bool) -> Callable[[str], None]:
    return (lambda _: None) if quiet else (lambda piece: say(piece, end=""))


def _show_origin(answer: Answer, count: int) -> None:
    if answer.citations and count:
        notify()
        notify("Looked for in:")
        for citation in answer.citations[:count]:
            start = " ".join(citation.text.split())[:90]
            part = f" ({citation.part})" if citation.part else ""
            place = f"{citation.document}{part}, characters {citation.start:,}-{citation.end:,}"
            notify(f"  {citation.weight:6.1%}  {place}: {start}...")
    _show_speed(answer)


def _show_speed(answer: Answer) -> None:
    notify()
    notify(
        f"{answer.num_generated_tokens} tokens; first after {answer.time_to_first_token:.2f} s, then "
        f"{answer.tokens_per_second:.1f} tokens/s; peak memory {readable_bytes(answer.peak_memory)}"
    )
