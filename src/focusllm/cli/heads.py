"""`focusllm heads`: finds the few attention heads by which a model chooses what to open."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from focusllm.cli.options import Device, Dtype, Json
from focusllm.cli.terminal import calm_libraries, console, notify, visible
from focusllm.files import writing_to


def heads(
    model: Annotated[str, typer.Argument(help="smollm2-135m, a folder, or a hub id.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for them; by default beside the model, or in the cache.")
    ] = None,
    questions: Annotated[int, typer.Option("--questions", "-n", min=8, max=512, help="Made-up facts to ask for.")] = 64,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Find a model's look-up heads: those that attend to the passage which answers a question. Minutes on a CPU."""
    calm_libraries()
    from tqdm.auto import tqdm

    from focusllm import FocusLLM
    from focusllm.checks.heads import find_heads
    from focusllm.huggingface.head_files import HEADS_NAME, cached_path, save_heads

    llm = FocusLLM.from_pretrained(model, adapter="none", dtype=dtype, device=device, notify=notify)
    own = Path(model)
    is_ours = own.is_dir() and os.access(own, os.W_OK)
    path = output or (own / HEADS_NAME if is_ours else cached_path(llm.model.base, model))
    with writing_to(path.parent, "name another file with --output"):  # before minutes are spent
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    with tqdm(desc="Looking", unit="step") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = find_heads(llm.model.base, llm.tokenizer, questions, progress=progress)
    about = {name: value for name, value in asdict(found).items() if name != "heads"}
    save_heads(llm.model.base, found.heads, path, about)
    if as_json:
        print(json.dumps({"heads": found.heads.pairs, **about, "file": str(path)}))
        return
    listed = ", ".join(f"{layer}.{head}" for layer, head in found.heads.pairs)
    out = console()
    out.print(visible(f"Heads (layer.head): {listed}"))
    out.print(
        f"Of {found.num_questions} facts that were not used to find them, in {found.num_chunks} chunks, the right "
        f"chunk is first in {found.right_first:.0%}, among four in {found.right_among_four:.0%}; by the mean of all "
        f"heads first in {found.all_heads_first:.0%}."
    )
    if found.right_first < 0.5:
        out.print("These heads find little: chunks will be chosen badly for questions to this model.")
    out.print(visible(f"Written to {path}."))
