"""The structure: who may import whom, what is public, and that the documents say what is so."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from pathlib import Path

import pytest

import focusllm

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "focusllm"
# Data flows one way: a room may import only rooms named before it, and a file only files named before it.
ROOMS = {
    "": ["errors", "json_text", "options", "files", "machine", "config", "plots"],  # what every room may use
    "method": [
        *(
            "kv",
            "rope",
            "scoring",
            "differentiable",
            "attention",
            "passes",
            "base",
            "int8",
            "packed",
            "adapter",
            "focus",
        ),
        "opened",
    ],
    "memory": ["chunking", "store", "chunk_file", "lookup", "chunks", "chunk_cache", "cost"],
    "decoding": ["refresh", "request", "opened", "engine"],
    "documents": [
        *("extracted", "encodings", "markup", "pdf", "archives", "messages", "readers", "folders", "sources"),  # files
        *("detokenizer", "text", "words", "sentences", "answer", "document", "citing"),  # tokens
    ],
    "huggingface": [
        *("adapter_files", "embedded", "head_files", "loading", "modeling", "pretrained", "custom_generate"),
    ],
    "front": ["reading", "asking", "conversation", "llm"],  # lies in no folder
    "library": ["cutting", "catalogue", "chunk_folder", "chunk_store", "library", "syncing"],
    "training": [
        *("config", "corpus", "tasks", "dense", "sampling", "checkpoint", "sharding", "loss", "loop", "report", "run"),
    ],
    "checks": ["info", "verify", "conformance", "needles", "heads"],
    "evaluation": [
        *("example", "metrics", "benchmark"),
        *(f"tasks.{name}" for name in ("passkey", "perplexity", "documents", "retrieval")),
        *(f"tasks.{name}" for name in ("longbench", "infinitebench", "leval", "ruler", "babilong")),
        *("tasks", "method"),
        *(f"methods.{name}" for name in ("full", "truncate", "pi", "ntk", "yarn", "retrieval")),
        *(f"methods.{name}" for name in ("streaming", "snapkv", "focus")),
        *("methods", "plan", "runner", "results", "report", "harness"),
    ],
    "bench": ["plan", "measure", "contenders", "run", "report"],
    "serving": [
        *("refusals", "sampling", "stops", "job", "scheduler", "worker"),
        *(
            "settings",
            "keys",
            "api_errors",
            "bodies",
            "openai_schema",
            "messages_schema",
            "responses_schema",
            "response_store",
            "asked_documents",
            "prompts",
            "listening",
            "metrics",
            "gate",
            "file_catalogue",
            "files",
            "service",
            "answering",
            "response_answer",
        ),
        *("openai_routes", "file_routes", "responses_routes", "messages_routes", "token_routes", "app"),
    ],
    "cli": [
        "options",
        "terminal",
        "ask",
        "library",
        "heads",
        "train",
        "bench",
        "evaluate",
        "inspect",
        "serve",
        "app",
        "process",
        "",
    ],
    "shell": ["__main__"],  # lies in no folder
}
OUTSIDE = ("", "front", "shell")
ORDER = [
    name if room in OUTSIDE else f"{room}.{name}".removesuffix(".") for room, names in ROOMS.items() for name in names
]
WITHOUT_TORCH = [
    *("errors", "json_text", "options", "files", "machine", "config", "plots", "memory.chunking"),
    *(f"documents.{name}" for name in ("extracted", "encodings", "markup", "pdf", "archives", "messages", "readers")),
    *(f"documents.{name}" for name in ("folders", "sources", "detokenizer", "text", "words", "sentences")),
    *("huggingface.embedded", "library.cutting", "library.catalogue", "library.chunk_folder"),
    *(
        f"serving.{name}"
        for name in ("refusals", "stops", "settings", "keys", "api_errors", "openai_schema", "file_catalogue")
    ),
    *(f"serving.{name}" for name in ("bodies", "messages_schema", "responses_schema", "response_store")),
    *(name for name in ORDER if name.startswith("cli")),
    *("training.config", "training.corpus", "training.tasks", "training.report"),
    *("evaluation.example", "evaluation.tasks", "evaluation.methods", "evaluation.plan", "evaluation.results"),
    "evaluation.report",
    *(name for name in ORDER if name.startswith("evaluation.tasks.")),
    *("bench.plan", "bench.contenders", "bench.report"),
]
TEXTS = ("docs", "benchmarks", "recipes", "examples", "src")
"""Folders with documents."""
PACKAGES = [room for room in ROOMS if room not in (*OUTSIDE, "cli")]


def path_of(name: str) -> Path:
    path = SOURCE / name.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_name(f"{path.name}.py")


def imports(name: str, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path_of(name).read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module in [f"focusllm.{package}" for package in PACKAGES]:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_every_file_has_its_place() -> None:
    found = {".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in SOURCE.rglob("*.py")}
    assert {name.removesuffix(".__init__") for name in found} == {*ORDER, *PACKAGES, "__init__"}


@pytest.mark.parametrize("name", ORDER)
def test_data_flows_one_way(name: str) -> None:
    own = {module.removeprefix("focusllm.") for module in imports(name) if module.startswith("focusllm.")}
    assert own <= set(ORDER[: ORDER.index(name)])


@pytest.mark.parametrize("room", PACKAGES)
def test_a_room_says_what_it_knows(room: str) -> None:
    text = ast.get_docstring(ast.parse((SOURCE / room / "__init__.py").read_text()))
    assert text is not None
    assert "knows" in text.lower()
    assert " not " in text.lower()


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_light_files_import_nothing_heavy(name: str) -> None:
    assert not {module.split(".")[0] for module in imports(name, top_level_only=True)} & {"torch", "transformers"}


def test_only_one_file_knows_how_models_are_built() -> None:
    for name in ORDER:
        text = path_of(name).read_text()
        if name not in ("method.base", "method.passes", "checks.conformance"):
            assert "q_proj" not in text.replace('"q_proj": "q"', ""), name
            assert "_attn_implementation" not in text, name


def test_the_idea_fits_in_one_file() -> None:
    assert len((SOURCE / "method" / "focus.py").read_text().splitlines()) < 300


def test_public_names() -> None:
    assert list(focusllm.__all__) == sorted(focusllm.__all__)
    assert set(focusllm.__all__) == set(focusllm._HOMES)
    for name in focusllm.__all__:
        value = getattr(focusllm, name)
        assert value.__module__ == f"focusllm.{focusllm._HOMES[name]}"
        assert value.__doc__
    with pytest.raises(AttributeError, match="nothing"):
        _ = focusllm.nothing


def test_versions_agree() -> None:
    assert f"## {focusllm.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    constraints = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for dependency in project["dependencies"]:
        name, low, high = re.fullmatch(r"([\w-]+)>=([\d.]+),<([\d.]+)", dependency).groups()
        pinned = constraints.get(name) or constraints[name.replace("-", "_")]
        version, lowest, limit = ([int(part) for part in text.split(".")[:3]] for text in (pinned, low, high))
        assert lowest <= version < limit, dependency


DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *(path for folder in TEXTS for path in (ROOT / folder).rglob("*.md"))]
)


def anchors(path: Path) -> set[str]:
    """What a link to a heading of a Markdown file may name, by GitHub's rules."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    own = ROOT / document
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)", own.read_text()):
        path = own.parent / target if target else own
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_files_and_modules_that_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    for path in re.findall(r"\b(?:src|tests|benchmarks|examples|recipes|docs)/[\w/.-]*\w\.(?:py|sh|toml|md)\b", text):
        assert (ROOT / path).exists() or ((ROOT / document).parent / path).exists(), path
    for module in re.findall(r"\bfocusllm(?:\.[a-z_]\w*)+", text):
        parts = module.split(".")[1:]
        names = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        known = names[-1] in (*PACKAGES, "cli") or any(name in ORDER for name in names)
        assert known or parts[0] in focusllm.__all__, module


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if "```python" in (ROOT / name).read_text()])
def test_python_in_the_documents_runs(document: str, tiny_llm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block, on the tiny model instead of the one that is named."""
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("Call me Ishmael. Some years ago I went to sea. " * 8)
    Path("notes.txt").write_text("A whale is not a fish. " * 8)
    for cls in (focusllm.FocusLLM, focusllm.FocusForCausalLM):
        loaded = tiny_llm if cls is focusllm.FocusLLM else tiny_llm.model
        monkeypatch.setattr(cls, "from_pretrained", classmethod(lambda _, *a, loaded=loaded, **k: loaded))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.S)
    assert blocks
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, document, "exec"), scope)


def test_modules_import_alone() -> None:
    for name in ORDER[:-1]:
        importlib.import_module(f"focusllm.{name}")
