"""`focusllm library`: documents that are read once, kept, and asked ever after."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from focusllm.cli.ask import Alone, ConversationFile, answered, earlier, spoken, switches_of
from focusllm.cli.options import Device, Encoding, Json, ModelOptions, SamplingOptions, WeightsOption, grouped
from focusllm.cli.terminal import console, if_stopped, load, notify, reading_progress, visible
from focusllm.errors import FocusError
from focusllm.library.catalogue import Catalogue, Entry, check_folder, is_library
from focusllm.library.chunk_folder import KEYS, ROWS, ChunkFolder
from focusllm.machine import readable_bytes
from focusllm.options import parse_bytes

if TYPE_CHECKING:
    from focusllm.documents.answer import Answer
    from focusllm.library.library import Change, Library
    from focusllm.library.syncing import Synced

Folder = Annotated[
    Path, typer.Option("--library", "-l", envvar="FOCUSLLM_LIBRARY", help="The library's folder; made when needed.")
]
Names = Annotated[list[str], typer.Argument(help="Documents, or sets of them.")]
HERE = Path("library")
GOES_ON = "what was read is kept, and the same command goes on"

library = typer.Typer(help="Keep documents that are read once: add, edit and ask them.", no_args_is_help=True)


@dataclass(frozen=True)
class ReaderOptions:
    """What reads and asks. A library belongs to the first one that it was used with, which needs not be named again."""

    model: Annotated[str | None, typer.Option("--model", "-m", help="As for ask.")] = None
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None
    device: Device = None
    weights: WeightsOption = "auto"
    chunk_length: Annotated[int | None, typer.Option(help="Most tokens of a chunk.")] = None
    kv_dtype: Annotated[str | None, typer.Option(help="How chunks are kept: same (as computed), int8 or int4.")] = None

    def open(self, folder: Path, quiet: bool, disk_budget: str | None = None) -> Library:
        """The library with its model."""
        budget = parse_bytes(disk_budget) if disk_budget is not None else None
        check_folder(folder)  # before the model is loaded
        about = Catalogue(folder).about() if is_library(folder) else {}
        model, dtype = self.model or about.get("model"), self.dtype or about.get("dtype", "auto")
        settings = {name: getattr(self, name) or about.get(name) for name in ("chunk_length", "kv_dtype")}
        given = {name: value for name, value in settings.items() if value is not None}
        options = ModelOptions(model, "none", dtype, self.device, self.weights)
        llm = load(options, {"far_context": "opened", **given}, quiet)
        from focusllm.library.library import Library

        return Library(folder, llm, disk_budget=budget, notify=notify)


DiskBudget = Annotated[
    str | None, typer.Option(help="Most bytes of chunks from now on, such as 20G; what was not used goes first.")
]


@library.command()
@grouped
def add(
    documents: Annotated[list[str], typer.Argument(help="Files, folders, or quoted patterns; - for stdin.")],
    *,
    name: Annotated[str | None, typer.Option(help="What the document is called; by default as its file.")] = None,
    into: Annotated[str | None, typer.Option(help="A set of documents that they belong to.")] = None,
    folder: Folder = HERE,
    reader: ReaderOptions,
    encoding: Encoding = None,
    disk_budget: DiskBudget = None,
    as_json: Json = False,
) -> None:
    """Put documents in and read them; what was read before, in whichever document, is not read again."""
    from focusllm.documents.sources import open_source

    if name is not None and len(documents) > 1:
        raise FocusError(f"--name is of one document, and there are {len(documents)}; add them one by one.")
    sources = [open_source(path, encoding) for path in documents]  # bad ones are refused before the model is loaded
    opened = reader.open(folder, as_json, disk_budget)
    changes = []
    with if_stopped(GOES_ON):
        for source in sources:
            with reading_progress(name or source.name, quiet=as_json) as progress:
                changes.append(opened.add(source, name=name, into=into, progress=progress))
    _show_changes(changes, as_json)


@library.command()
@grouped
def update(
    document: Annotated[str, typer.Argument(help="The document.")],
    source: Annotated[str | None, typer.Argument(help="A file with its new text; by default its own.")] = None,
    *,
    folder: Folder = HERE,
    reader: ReaderOptions,
    encoding: Encoding = None,
    disk_budget: DiskBudget = None,
    as_json: Json = False,
) -> None:
    """Read what changed in a document: where a sentence changed, a chunk or two."""
    from focusllm.documents.sources import open_source

    place = source or Catalogue(folder).entry(document).source
    if place is None:
        raise FocusError(f"{document} was not read from a file; name one with its new text.")
    given = open_source(place, encoding)
    opened = reader.open(folder, as_json, disk_budget)
    with if_stopped(GOES_ON), reading_progress(document, quiet=as_json) as progress:
        change = opened.update(document, given, progress=progress)
    _show_changes([change], as_json)


@library.command()
@grouped
def ask(
    names: Annotated[list[str] | None, typer.Argument(help="Documents, or sets of them; by default all.")] = None,
    *,
    question: Annotated[
        list[str] | None, typer.Option("--question", "-q", help="Ask this; may be repeated. Without: ask at a prompt.")
    ] = None,
    folder: Folder = HERE,
    reader: ReaderOptions,
    sampling: SamplingOptions,
    num_citations: Annotated[int, typer.Option("--citations", min=0, help="How many passages to show.")] = 3,
    template_arg: Annotated[
        list[str] | None, typer.Option(help="Switch of the chat template, NAME=VALUE; may be repeated.")
    ] = None,
    conversation: ConversationFile = None,
    alone: Alone = False,
    as_json: Json = False,
) -> None:
    """Answer questions about documents; what is not there any more is read again. Typed ones are a conversation."""
    said = earlier(conversation, alone)
    meant = Catalogue(folder, read_only=True).names(names or None)
    switches = switches_of(template_arg or [])
    opened = reader.open(folder, as_json)
    with if_stopped(GOES_ON):
        for name in meant:
            with reading_progress(name, quiet=as_json) as progress:
                opened.document(name, progress=progress)
    if (question is not None and conversation is None) or alone:
        ask_next: Callable[..., Answer] = partial(opened.ask, meant, template_kwargs=switches)
    else:
        ask_next = spoken(opened.conversation(meant, said, template_kwargs=switches), conversation)
    answers = answered(ask_next, question, sampling, num_citations, as_json)
    if as_json:
        print(json.dumps({"documents": meant, "answers": answers}, indent=2))


@library.command("list")
def list_documents(folder: Folder = HERE, as_json: Json = False) -> None:
    """List the documents and sets."""
    catalogue, nbytes = Catalogue(folder, read_only=True), ChunkFolder(folder / "chunks").nbytes()
    about, entries, sets = catalogue.about(), catalogue.entries(), catalogue.sets()
    if as_json:
        found = {"about": about, "documents": [entry.to_dict() for entry in entries], "sets": sets, "nbytes": nbytes}
        print(json.dumps(found, indent=2))
        return
    from rich.table import Table

    table = Table(box=None)
    for title in ("document", "tokens", "chunks", "changed", "sets"):
        table.add_column(title, justify="right" if title in ("tokens", "chunks") else "left")
    for entry in entries:
        own = ", ".join(name for name, members in sets.items() if entry.name in members)
        numbers = (f"{entry.num_tokens:,}", f"{entry.num_chunks:,}")
        table.add_row(visible(entry.name), *numbers, _when(entry), visible(own))
    out = console()
    out.print(table)
    budget = about.get("disk_budget")
    limit = f" of at most {readable_bytes(budget)}" if budget is not None else ""
    count = f"{len(entries):,} document{'s' * (len(entries) != 1)}"
    out.print(visible(f"{count}, {readable_bytes(nbytes)}{limit} of chunks, read by {about['model']}"))


@library.command()
def show(
    document: Annotated[str, typer.Argument(help="The document.")],
    text: Annotated[bool, typer.Option("--text", help="Print its text and nothing else.")] = False,
    folder: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Show a document: its size, where it is from, its chunks."""
    entry, content = Catalogue(folder, read_only=True).content(document)
    if text:
        print(content.text, end="")
        return
    files = ChunkFolder(folder / "chunks")
    chunks = [
        {
            "start": chunk.start,
            "end": chunk.end,
            "tokens": len(chunk.token_ids),
            "kept": files.path(chunk.key, ROWS).exists() and files.path(chunk.key, KEYS).exists(),
        }
        for chunk in content.chunks
    ]
    if as_json:
        print(json.dumps({**entry.to_dict(), "chunks": chunks}, indent=2))
        return
    num_kept = sum(chunk["kept"] for chunk in chunks)
    print(visible(f"{entry.name}, changed {_when(entry)}" + (f", of {entry.source}" if entry.source else "")))
    print(f"{entry.num_characters:,} characters, {entry.num_tokens:,} tokens in {len(chunks):,} chunks")
    print(f"{num_kept:,} chunks are kept; the others are read again when they are needed")


@library.command()
def remove(names: Names, folder: Folder = HERE, as_json: Json = False) -> None:
    """Take documents out; `focusllm library gc` frees what only they needed."""
    catalogue = Catalogue(folder)
    meant = catalogue.names(names)
    catalogue.remove(meant)
    print(json.dumps({"removed": meant}) if as_json else visible(f"Removed {', '.join(meant)}."))


@library.command()
def verify(folder: Folder = HERE, as_json: Json = False) -> None:
    """Check every file, and remove damaged ones, so that they are read again; exit code 1 if something was wrong."""
    Catalogue(folder).about()
    from focusllm.library.library import Library

    found = Library(folder, notify=notify).verify()
    if as_json:
        print(json.dumps(vars(found), indent=2))
    else:
        for path in found.damaged_files:
            print(visible(f"damaged: {path}; it is read again when it is needed"))
        for name in found.damaged_documents:
            print(visible(f"damaged: the text of {name}; update it from its file, or remove it and add it again"))
        print(f"{found.num_files - len(found.damaged_files):,} of {found.num_files:,} files are whole")
    if found.damaged_files or found.damaged_documents:
        raise typer.Exit(1)


@library.command()
def gc(folder: Folder = HERE, as_json: Json = False) -> None:
    """Free what no document needs, and what is over the disk budget."""
    Catalogue(folder).about()
    from focusllm.library.library import Library

    freed = Library(folder, notify=notify).gc()
    print(json.dumps({"freed": freed}) if as_json else f"{readable_bytes(freed)} freed")


@library.command()
@grouped
def sync(
    source: Annotated[Path, typer.Argument(help="A folder, or a quoted pattern.")],
    *,
    into: Annotated[str | None, typer.Option(help="The set's name; by default the folder's.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Go on whenever a file changes.")] = False,
    folder: Folder = HERE,
    reader: ReaderOptions,
    disk_budget: DiskBudget = None,
    as_json: Json = False,
) -> None:
    """Bring a set of documents up to date with a folder, a document a file, by what is in the files."""
    from focusllm.documents.folders import find_files

    find_files(source)
    opened = reader.open(folder, as_json, disk_budget)
    from focusllm.library import syncing

    progress = partial(reading_progress, quiet=as_json)
    with if_stopped(GOES_ON):
        if not watch:
            _show_synced(syncing.sync(opened, source, into, progress), as_json)
        else:
            for found in syncing.watch(opened, source, into, progress=progress):
                _show_synced(found, as_json)


def _show_changes(changes: list[Change], as_json: bool) -> None:
    if as_json:
        print(json.dumps([{**change.entry.to_dict(), "num_read": change.num_read} for change in changes], indent=2))
        return
    for change in changes:
        entry = change.entry
        print(
            visible(
                f"{entry.name}: {entry.num_tokens:,} tokens in {entry.num_chunks:,} chunks, {change.num_read:,} of "
                f"them read now"
            )
        )


def _show_synced(found: Synced, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found.to_dict()), flush=True)
        return
    for what in ("added", "updated", "removed"):
        for name in getattr(found, what):
            print(visible(f"{what} {name}"))
    for sentence in found.left_out:
        notify(f"left out {sentence}")
    print(visible(f"{found.name}: {found.num_read:,} chunks read, {found.num_unchanged:,} files unchanged"), flush=True)


def _when(entry: Entry) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.changed))
