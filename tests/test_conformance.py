"""Every golden case of the authors' released code, in float32 and float64."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import GOLDEN
from focusllm.checks.conformance import CaseError, CaseResult, find_cases, run_case

CASES = sorted(path.parent.name for path in GOLDEN.glob("*/case.json"))


def test_all_cases_are_here() -> None:
    assert len(CASES) == 9


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    result = run_case(GOLDEN / name)
    assert result.passed, (result.errors, result.failures)
    quantities = {"logits f32", "logits f64"} | ({"gradients f64", "loss f64"} if name.startswith("t") else set())
    assert quantities <= set(result.errors)
    if name.startswith("i") and not name.startswith("i10"):
        assert {"candidate keys f64", "candidate values f64"} <= set(result.errors)


def test_a_wrong_golden_number_fails(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "i7_short_memory", tmp_path / "case")
    golden = load_file(tmp_path / "case" / "golden.safetensors")
    golden["f64.logits"][3, 7] += 1e-6
    save_file(golden, tmp_path / "case" / "golden.safetensors")
    result = run_case(tmp_path / "case")
    assert not result.passed
    assert result.errors["logits f64"] == pytest.approx(1e-6, rel=1e-3)


def test_wrong_greedy_tokens_fail(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "i7_short_memory", tmp_path / "case")
    case = json.loads((tmp_path / "case" / "case.json").read_text())
    case["generate_greedy_tokens"][-1] += 1
    (tmp_path / "case" / "case.json").write_text(json.dumps(case))
    assert "greedy tokens" in run_case(tmp_path / "case").failures[0]


def test_not_a_number_fails() -> None:
    result = CaseResult("x")
    result.record("logits", torch.tensor([1.0, float("nan")]), torch.ones(2), 1.0)
    assert not result.passed


def test_another_shape_fails() -> None:
    result = CaseResult("x")
    result.record("logits", torch.ones(3), torch.ones(2), 1.0)
    assert not result.passed


def test_no_cases(tmp_path: Path) -> None:
    with pytest.raises(CaseError, match="no golden cases"):
        find_cases(tmp_path)


def test_damaged_golden_numbers(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "i7_short_memory", tmp_path / "case")
    (tmp_path / "case" / "golden.safetensors").write_bytes(b"nothing")
    with pytest.raises(CaseError, match="damaged"):
        run_case(tmp_path / "case")


def test_damaged_case(tmp_path: Path) -> None:
    (tmp_path / "case").mkdir()
    (tmp_path / "case" / "case.json").write_text("{")
    with pytest.raises(CaseError, match="damaged"):
        run_case(tmp_path / "case")
