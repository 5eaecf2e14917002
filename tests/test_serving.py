"""Folders that FocusLLM saved, loaded and served by transformers itself: they generate as FocusLLM does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, dynamic_module_utils, pipeline

from conftest import byte_tokenizer, random_ids
from focusllm import FocusForCausalLM, FocusLLM, ModelError
from focusllm.method.adapter import injected

PROMPT = "Some years ago I went to sea, and saw the watery part of the world. " * 12  # 816 tokens of 512 positions
MESSAGES = [{"role": "user", "content": PROMPT}]
UNREADABLE = [token for token, name in enumerate(byte_tokenizer().convert_ids_to_tokens(range(259))) if name > "~"]


@pytest.fixture
def folder(tmp_path: Path, tiny_llm: FocusLLM, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A saved model that writes ASCII, by its generation settings; what it brings along is copied to `modules`."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    settings = tiny_llm.model.generation_config
    settings.suppress_tokens, settings.eos_token_id = [*range(3), *UNREADABLE, 259], None
    tiny_llm.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def prompt_ids() -> torch.Tensor:
    return byte_tokenizer().apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]


def expected_text(folder: Path, count: int) -> str:
    ids = prompt_ids()
    made = FocusForCausalLM.from_pretrained(folder).generate(ids, max_new_tokens=count)[0, ids.shape[1] :]
    assert len(made) == count
    return byte_tokenizer().decode(made)


def test_loaded_with_trust_it_generates_as_focusllm(folder: Path) -> None:
    ids, trusting = prompt_ids(), AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    expected = FocusForCausalLM.from_pretrained(folder).generate(ids, max_new_tokens=20)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    logits = plain(ids[:, :100]).logits
    assert not torch.equal(plain.generate(ids, max_new_tokens=20), expected)  # or nothing would be shown
    for _ in range(2):
        assert torch.equal(trusting.generate(ids, max_new_tokens=20), expected)
    assert torch.equal(trusting.generate(input_ids=ids, max_new_tokens=20, num_beams=2)[:, :816], ids[:, :816])
    assert torch.equal(trusting(ids[:, :100]).logits, logits)  # the model itself is the base
    assert type(trusting) is type(plain)


def test_custom_generate_of_a_folder(folder: Path) -> None:
    """transformers' other way, with a model that was loaded without trust: for that call alone."""
    ids, model = prompt_ids(), AutoModelForCausalLM.from_pretrained(folder)
    before = model.generate(ids, max_new_tokens=8)
    expected = FocusForCausalLM.from_pretrained(folder).generate(ids, max_new_tokens=8)
    assert torch.equal(
        model.generate(ids, max_new_tokens=8, custom_generate=str(folder), trust_remote_code=True), expected
    )
    assert torch.equal(model.generate(ids, max_new_tokens=8), before)


def test_pipeline_of_a_folder(folder: Path) -> None:
    generator = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    (made,) = generator(MESSAGES, max_new_tokens=8, do_sample=False)
    assert made["generated_text"][-1] == {"role": "assistant", "content": expected_text(folder, 8)}


def test_our_own_loading_runs_no_code_of_the_folder(folder: Path) -> None:
    (folder / "custom_generate" / "generate.py").write_text("raise SystemExit('run')")
    FocusForCausalLM.from_pretrained(folder)
    FocusLLM.from_pretrained(folder, device="cpu")


def test_unloaded_it_is_the_base_even_if_its_code_is_trusted(folder: Path) -> None:
    ids = torch.tensor([random_ids(110)])
    expected = AutoModelForCausalLM.from_pretrained(folder).generate(ids, max_new_tokens=8)
    base = FocusForCausalLM.from_pretrained(folder, trust_remote_code=True).unload()
    assert torch.equal(base.generate(ids, max_new_tokens=8), expected)
    assert injected(base) == {}


def test_a_folder_without_settings_is_refused(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    (folder / "focus_settings.json").unlink()
    with pytest.raises(ModelError, match=r"has no focus_settings.json; load one that FocusLLM saved"):
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=2)


@pytest.fixture
def address(folder: Path, tmp_path: Path) -> Iterator[str]:
    """The stock command on the folder, on a free port of this machine."""
    pytest.importorskip("fastapi")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", folder, "--trust-remote-code"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + 300
            while True:
                assert server.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def ask(address: str, **more: object) -> str:
    """The body of the answer to a chat request."""
    body = json.dumps({"messages": MESSAGES, "max_tokens": 24, **more}).encode()
    request = urllib.request.Request(f"{address}/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return response.read().decode()


@pytest.mark.slow
def test_transformers_serve(folder: Path, address: str) -> None:
    """Its answers are FocusLLM's, whole and in a stream, of a prompt longer than the base model's positions."""
    expected = expected_text(folder, 24)
    answer = json.loads(ask(address, model=str(folder)))
    assert answer["choices"][0]["message"]["content"] == expected
    assert answer["usage"]["prompt_tokens"] == prompt_ids().shape[1] > 512
    events = [line.removeprefix("data: ") for line in ask(address, model=str(folder), stream=True).splitlines() if line]
    pieces = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events if event[0] == "{"]
    assert "".join(pieces) == expected
    assert len([piece for piece in pieces if piece]) > 12  # token by token
    stop = expected[10]
    stopped = json.loads(ask(address, model=str(folder), stop=[stop]))["choices"][0]["message"]["content"]
    assert stopped == expected[: expected.index(stop) + 1]
