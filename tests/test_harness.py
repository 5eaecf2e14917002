"""The lm-evaluation-harness with FocusLLM: likelihoods, generation, and a whole run on made-up tasks, offline."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from focusllm import FocusLLM
from focusllm.errors import ConfigError, ModelError
from focusllm.evaluation.example import LossExample
from focusllm.huggingface import embedded
from focusllm.method.base import CACHE_NAME

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the harness's own dependencies
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    from focusllm.evaluation import harness
    from focusllm.evaluation.harness import FocusHarness

pytestmark = pytest.mark.filterwarnings("default")  # what the harness itself warns of is not ours
LONG = "A whale is not a fish, and the sea is wide. " * 4
SHORT = "The sea is wide."


@pytest.fixture
def lm(tiny_llm: FocusLLM) -> FocusHarness:
    return FocusHarness(tiny_llm, batch_size=2)


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    return [Instance(request_type=kind, doc={}, arguments=given, idx=0) for given in arguments]


def base_nats(llm: FocusLLM, ids: list[int], count: int) -> float:
    logits = llm.model.base(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return float(logits[torch.arange(len(ids) - 1), ids[1:]][-count:].sum())


def test_the_harness_knows_the_model(lm: FocusHarness) -> None:
    assert get_model("focusllm") is FocusHarness
    assert lm.max_length > 10 * 512  # the base model has 512 positions


@torch.no_grad()
def test_short_texts_have_the_base_models_likelihoods(lm: FocusHarness) -> None:
    ((nats, _),) = lm.loglikelihood(asked("loglikelihood", (SHORT, " Yes.")), disable_tqdm=True)
    ids = lm.tok_encode(SHORT + " Yes.")
    assert nats == pytest.approx(base_nats(lm.llm, ids, 5), abs=1e-4)
    (whole,) = lm.loglikelihood_rolling(asked("loglikelihood_rolling", (SHORT,)), disable_tqdm=True)
    assert whole == pytest.approx(base_nats(lm.llm, [1, *lm.tok_encode(SHORT)], len(SHORT)), abs=1e-4)


@torch.no_grad()
def test_long_texts_have_the_methods_likelihoods(lm: FocusHarness) -> None:
    ((nats, _),) = lm.loglikelihood(asked("loglikelihood", (LONG, "So it is.")), disable_tqdm=True)
    context, continuation = lm.tok_encode(LONG.rstrip()), lm.tok_encode(" So it is.")
    made, expected = lm.llm.model(torch.tensor([context])), 0.0
    for token in continuation:
        expected += float(made.logits[0, -1].log_softmax(-1)[token])
        made = lm.llm.model(torch.tensor([[token]]), cache=made[CACHE_NAME])
    assert nats == pytest.approx(expected, abs=1e-4)
    (whole,) = lm.loglikelihood_rolling(asked("loglikelihood_rolling", (LONG,)), disable_tqdm=True)
    ids = (1, *lm.tok_encode(LONG))
    assert whole == -lm.method.loss(LossExample("", ids, len(LONG)))[0]
    lm.max_length = 100
    ((cut, _),) = lm.loglikelihood(asked("loglikelihood", (LONG, "So it is.")), disable_tqdm=True)
    ((end, _),) = lm.loglikelihood(asked("loglikelihood", (LONG[-91:], "So it is.")), disable_tqdm=True)
    assert cut == pytest.approx(end, abs=1e-5)
    assert abs(cut - nats) > 1e-4


def test_greedy_continuations_are_called_so(lm: FocusHarness) -> None:
    context = lm.tok_encode(LONG)
    made = lm.llm.model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False)[0, len(context) :].tolist()
    (greedy,), (other,) = (
        lm._loglikelihood_tokens([(("", ""), context, [*made[:-1], last])], disable_tqdm=True)
        for last in (made[-1], (made[-1] + 1) % 250)
    )
    assert greedy[1]
    assert not other[1]
    assert greedy[0] > other[0]


def test_answers_do_not_depend_on_their_neighbours(lm: FocusHarness) -> None:
    settings = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False, "temperature": 0.0}
    requests = asked("generate_until", (LONG, settings), (SHORT, settings))
    together = lm.generate_until(requests, disable_tqdm=True)
    lm.batch_size = 1
    assert lm.generate_until(requests, disable_tqdm=True) == together


def test_names_for_the_longest_answer_and_greedy_settings(lm: FocusHarness) -> None:
    """Tasks of the harness say it in several ways."""
    (expected,) = lm.generate_until(asked("generate_until", (LONG, {"max_gen_toks": 5})), disable_tqdm=True)
    for given in (
        {"max_new_tokens": 5},
        {"max_tokens": 5, "until": None},
        {"max_gen_toks": 5, "temperature": 0},
        {"max_gen_toks": 5, "do_sample": True, "temperature": 0.0},
        {"max_gen_toks": 5, "do_sample": False, "temperature": 0.7},
    ):
        assert lm.generate_until(asked("generate_until", (LONG, given)), disable_tqdm=True) == [expected]


def test_stop_strings_end_an_answer(lm: FocusHarness) -> None:
    free = {"until": [], "max_gen_toks": 8}
    (answer,) = lm.generate_until(asked("generate_until", (LONG, free)), disable_tqdm=True)
    stop = answer[2]
    (stopped,) = lm.generate_until(asked("generate_until", (LONG, {**free, "until": stop})), disable_tqdm=True)
    assert stopped == answer[: answer.index(stop)]
    assert harness.cut_at("a, b. c", ["x", ". ", ","]) == "a"


def test_long_rolling_texts_are_predicted_once_a_token() -> None:
    for length in (2, 9, 10, 11, 30):
        predicted = [i for first, stop in harness.parts(length, 10) for i in range(first, stop)]
        assert predicted == list(range(1, length))


def test_chat_templates(lm: FocusHarness) -> None:
    history = [{"role": "user", "content": "Who?"}]
    assert lm.apply_chat_template(history) == "<s>Who?</s><s>"
    assert lm.tok_encode("<s>Who?</s>") == [1, *lm.tok_encode("Who?"), 2]
    assert lm.chat_template(True) == lm.tokenizer.chat_template


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    """A task of the harness on a local file."""
    row = {"text": LONG, "choices": ["Yes", "No"], "said": "Yes"}
    rows = [{**row, "question": f"Question {i}?", "answer": i % 2} for i in range(2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "doc_to_text": "{{text}}\n{{question}}",
        "metadata": {"version": 1},
    }


KINDS: dict[str, dict[str, Any]] = {
    "multiple_choice": {"doc_to_choice": "choices", "doc_to_target": "answer", "metric_list": [{"metric": "acc"}]},
    "generate_until": {
        "doc_to_target": "{{said}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "loglikelihood_rolling": {"doc_to_target": "{{text}}", "metric_list": [{"metric": "word_perplexity"}]},
}


@pytest.mark.parametrize(("kinds", "chat"), [(list(KINDS), False), (["generate_until"], True)])
def test_a_whole_run(kinds: list[str], chat: bool, task: dict[str, Any], lm: FocusHarness) -> None:
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=[{**task, "task": kind, "output_type": kind, **KINDS[kind]} for kind in kinds],
        task_manager=TaskManager(include_defaults=False),
        apply_chat_template=chat,
        bootstrap_iters=0,
        log_samples=True,
    )
    for kind in kinds:
        assert len(results["samples"][kind]) == 2
        assert any(isinstance(value, float) for value in results["results"][kind].values())
    prompt = results["samples"]["generate_until"][0]["arguments"][0][0]
    assert prompt == (f"<s>{LONG}\nQuestion 0?</s><s>" if chat else f"{LONG}\nQuestion 0?")


SIZED = """
import datasets
from lm_eval.tasks.ruler.common_utils import get_tokenizer, resolve_tokenizer_name


def rows(**given):
    length = len(get_tokenizer(resolve_tokenizer_name(given))("Four").input_ids)
    return {"test": datasets.Dataset.from_list([{"text": "", "question": "?", "choices": [str(length)], "answer": 0}])}
"""


@pytest.mark.slow
def test_the_real_command(task: dict[str, Any], lm: FocusHarness, tmp_path: Path) -> None:
    """As on a machine without a GPU: the alias, tasks on a local file, and one that asks for a tokenizer like RULER."""
    model = tmp_path / "models" / embedded.DEFAULT
    lm.llm.save_pretrained(model)
    digest = hashlib.sha256((model / "config.json").read_bytes()).hexdigest()
    (model / embedded.MANIFEST_NAME).write_text(json.dumps({"config.json": digest}))
    kinds = ("multiple_choice", "generate_until")
    right_answers(tmp_path / "rows.jsonl", lm)
    (tmp_path / "tasks").mkdir()
    for kind in kinds:
        config = {**task, "task": f"tiny_{kind}", "output_type": kind, **KINDS[kind]}
        (tmp_path / "tasks" / f"{kind}.yaml").write_text(json.dumps(config))
    (tmp_path / "tasks" / "sized.py").write_text(SIZED)
    (tmp_path / "tasks" / "sized.yaml").write_text(
        "include: multiple_choice.yaml\ntask: tiny_sized\ncustom_dataset: !function sized.rows\n"
    )
    command = ["run", "--model", "focusllm", "--model_args", f"model={embedded.DEFAULT}", "--log_samples"]
    command += ["--tasks", *(f"tiny_{kind}" for kind in (*kinds, "sized")), "--include_path", str(tmp_path / "tasks")]
    ran = subprocess.run(
        [sys.executable, "-m", "focusllm.evaluation.harness", *command, "--output_path", str(tmp_path / "results")],
        env={**os.environ, "FOCUSLLM_CACHE": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("no GPU") == 1
    assert "tiny_generate_until" in ran.stdout
    (path,) = (tmp_path / "results").rglob("results_*.json")
    scores = json.loads(path.read_text())["results"]
    assert scores["tiny_multiple_choice"]["acc,none"] == 1
    assert scores["tiny_generate_until"]["exact_match,none"] == 1
    (path,) = (tmp_path / "results").rglob("samples_tiny_sized_*.jsonl")
    assert json.loads(path.read_text())["doc"]["choices"] == ["4"]  # bytes: it was the model's tokenizer


def right_answers(path: Path, lm: FocusHarness) -> None:
    """Make what the model chooses and says the right answers of `task`."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        prompt = f"{row['text']}\n{row['question']}"
        pairs = [(prompt, f" {choice}") for choice in row["choices"]]
        nats = [nats for nats, _ in lm.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)]
        settings = KINDS["generate_until"]["generation_kwargs"]
        (said,) = lm.generate_until(asked("generate_until", (prompt, settings)), disable_tqdm=True)
        row |= {"answer": nats.index(max(nats)), "said": said}
    path.write_text("\n".join(map(json.dumps, rows)))


def test_a_gpu_that_is_not_there(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(harness.LOG, "warning", lambda text, *values: said.append(text % values))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert FocusHarness(str(model_folder), device="cuda:0").device.type == "cpu"
    assert said == ["There is no GPU cuda:0 here; computing on the CPU."]


@pytest.mark.parametrize("most", [1, 700, 50_000])
def test_the_longest_text(most: int, lm: FocusHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm.method, "fits", lambda length: None if length <= most else "too long")
    assert most - most // 1000 <= lm._longest() <= most


def test_wrong_arguments(tiny_llm: FocusLLM) -> None:
    with pytest.raises(ConfigError, match=r"unknown setting chunk_lenght"):
        FocusHarness(tiny_llm, chunk_lenght=24)
    with pytest.raises(ConfigError, match=r"device, chunk_length: too late for a loaded model"):
        FocusHarness(tiny_llm, device="cpu", chunk_length=24)
    with pytest.raises(ConfigError, match=r"batch_size is 'auto'"):
        FocusHarness(tiny_llm, batch_size="auto")


def test_the_command_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def not_here(name: str, notify: Any) -> str:
        raise ModelError(f"the model {name} is not here")

    monkeypatch.setattr(harness, "resolve_model", not_here)
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--model", "focusllm", "--tasks", "hellaswag"])
    with pytest.raises(SystemExit) as stopped:
        harness.main()
    assert stopped.value.code == 2
    assert "error: the model qwen2.5-coder-0.5b is not here" in capsys.readouterr().err
