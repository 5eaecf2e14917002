"""Makes `benchmark_scores.jsonl`: made-up predictions with the scores that the benchmarks' own code gives them.

One line a case: [metric, prediction, references, choices, score]. Rerun it only to add cases; it needs checkouts of the
originals, and the packages rouge, rouge-score, jieba and fuzzywuzzy (alone, as LongBench asks for it):

    python tests/data/make_benchmark_scores.py LONGBENCH INFINITEBENCH LEVAL RULER BABILONG

Scores in the file are from LongBench 2e00731, InfiniteBench 88b3daa, L-Eval cd34b05, RULER c3f5e3b, BABILong 7a6efee.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

TEXTS = (
    "The keeper of the lighthouse lit the lamp at dusk.",
    "A letter arrived from Lisbon; nobody at the harbour opened it.",
    "He counted the bells, one after another, until the fog lifted.",
    "In the archive lay 1,024 maps of an island that no ship had found.",
    "The captain said that the storm would pass before the third day.\nShe did not believe him.",
)
CHINESE = ("灯塔的守护人在黄昏时点亮了灯。", "一封信从里斯本寄来，港口没有人打开它。", "他数着钟声，直到雾散去。")  # noqa: RUF001
CODE = ("    return self.total / len(self.items)", "for name, value in sorted(table.items()):", "import json")
CLASSES = ("Number", "Number of people", "Person", "Personal name", "Place", "Place of birth")
LABELS = ("bathroom", "garden", "kitchen", "office")


def functions(path: Path, names: str, **scope: Any) -> Any:
    """Some functions of a file whose other parts import too much."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names.split()]
    module = ModuleType(path.stem)
    module.__dict__.update(scope)
    exec(compile(tree, str(path), "exec"), module.__dict__)
    return module


def changed(draw: random.Random, text: str, others: tuple[str, ...]) -> str:
    """A prediction that is more or less like a reference."""
    parts = text.split(" ")
    return draw.choice(
        [
            text,
            draw.choice(others),
            " ".join(parts[: len(parts) // 2]),
            " ".join(draw.sample(parts, len(parts))),
            f"The answer is: {text}",
            f"\n{text.upper()} {draw.choice(others)}",
            "".join(character for character in text if draw.random() < 0.8),
            draw.choice(["", ".", "\n "]),
        ]
    )


def cases(draw: random.Random) -> Any:
    """(metric, prediction, references, choices)."""
    for _ in range(20):
        text, letters = draw.choice(TEXTS), "".join(sorted(draw.sample("ABCD", draw.randint(1, 3))))
        letter, number = letters[0], str(draw.randint(1, 30))
        answer = changed(draw, text, TEXTS)
        for metric in ("qa_f1", "rouge_l", "rouge_l_sum", "contained"):
            yield metric, answer, [text], []
        chinese = draw.choice(CHINESE)
        for metric in ("qa_f1_zh", "rouge_l_zh", "character_f1"):
            yield metric, changed(draw, chinese, CHINESE), [chinese], []
        line = draw.choice(CODE)
        comment = draw.choice(["", "\n", "# next\n", "```python\n", "// so\n"])
        yield "code_similarity", comment + changed(draw, line, CODE), [line], []
        numbers = f"{draw.choice(['', number, f'Paragraph {number}', f'段落{number}'])} or {draw.randint(1, 30)}"
        yield "count", numbers, [number], []
        yield "paragraph", numbers, [draw.choice([f"Paragraph {number}", f"段落{number}"])], []
        named = draw.sample(CLASSES, 3)
        yield "classification", ", ".join(named), [draw.choice(named)], list(CLASSES)
        phrase = draw.choice(["The correct answer is ({})", "**The correct answer is {}.**", "It is {}", "({})"])
        yield "letter", phrase.format(letter), [draw.choice([letter, "B"])], []
        marked = draw.choice(["{}", "{}.", "The answer is {}", "{}: yes", "none", "", "Because {}) it is", "Option {}"])
        for metric in ("first_letter", "letters"):
            yield metric, marked.format(letters), [draw.choice([letters, letter, "ABD"])], []
        yield "choice", marked.format(letter), ["The harbour", draw.choice([letter, "C"])], []
        yield (
            "choice",
            draw.choice(["answer is: {}", "so the option is  {}", "{}"]).format("The harbour"),
            [
                "The harbour",
                "B",
            ],
            [],
        )
        wrong = draw.choice(
            ["{}. light", "The answer is: {}", "`light` is: {}", "Answer: light", "correct option is: {}"]
        )
        yield "function", wrong.format(letter), ["light", draw.choice([letter, "D"])], []
        said = draw.choice(["{}", "The key is {}.", '"{}"', "x{}", "It is {}, or 7", "none", "-{}", "{} 12"])
        for metric in ("first_integer", "word", "first_number", "last_integer"):
            yield metric, said.format(number), [number], []
        yield "name", said.format("Ada"), ["ADA", "ADA KING"], []
        values = [str(draw.randint(0, 9)) for _ in range(5)]
        yield "first_values", f"[3, {', '.join(values[: draw.randint(1, 5)])}, 4]", values, []
        places = draw.sample(LABELS, 2)
        found = draw.choice(["{}", "{}. In the {}", "The {} and the {}", "{} <example> {}"]).format(*places)
        yield "babilong", found, [places[0]], list(LABELS[:3])
        yield "babilong", found.replace(" and the ", ","), [",".join(places)], list(LABELS)
        for metric in ("string_match_all", "string_match_part"):
            yield metric, f"\x01{answer}\t{number}", [number, text[:9], "Lisbon", "the"], []


def originals(longbench: Path, infinite: Path, leval: Path, ruler: Path, babi: Path) -> dict[str, Callable[..., float]]:
    """By metric, the original's function of (prediction, references, choices)."""
    sys.modules["args"] = SimpleNamespace(parse_args=None)  # type: ignore[assignment]

    def compute(predictions: list[str], references: list[str], **_: object) -> dict[str, list[float]]:
        """What `evaluate.load("rouge")`, which would be fetched from the hub, hands on to."""
        return {"rougeLsum": [RougeScorer(["rougeLsum"]).score(*references, *predictions)["rougeLsum"].fmeasure]}

    sys.modules["evaluate"] = SimpleNamespace(load=lambda name: SimpleNamespace(compute=compute))  # type: ignore[assignment]
    sys.path += [str(longbench / "LongBench"), str(infinite / "src"), str(leval / "Evaluation")]
    import compute_scores
    import em
    import metrics

    extract = functions(longbench / "pred.py", "extract_answer", re=re)
    settings = SimpleNamespace(pred_file="")
    options = functions(leval / "Evaluation/auto_eval.py", "process_output_mc process_gt_mc", re=re, args=settings)
    matches = functions(ruler / "scripts/eval/synthetic/constants.py", "string_match_all string_match_part")
    clean = functions(ruler / "scripts/eval/evaluate.py", "postprocess_pred", re=re)
    places = functions(babi / "babilong/metrics.py", "preprocess_output compare_answers")

    def each(score: Callable[..., float]) -> Callable[..., float]:
        return lambda said, right, classes: max(score(said, one, all_classes=classes) for one in right)

    def one(task: str, number: bool = False, first: bool = False) -> Callable[..., float]:
        def score(said: str, right: list[str], _: object) -> float:
            label: Any = [int(part) for part in right] if number else right
            return float(compute_scores.get_score_one(said, label[0] if first else label, task, "gpt4"))

        return score

    def letters(file: str) -> Callable[..., float]:
        def score(said: str, right: list[str], _: object) -> float:
            settings.pred_file = file
            return float(em.exact_match_score(options.process_output_mc(said), options.process_gt_mc(right[0])))

        return score

    def matching(name: str) -> Callable[..., float]:
        return lambda said, right, _: getattr(matches, name)([clean.postprocess_pred(said, {})], [right]) / 100

    def paragraph(said: str, right: list[str], _: object) -> float:
        return float((metrics.retrieval_score if "P" in right[0] else metrics.retrieval_zh_score)(said, right[0]))

    return {
        "qa_f1": each(metrics.qa_f1_score),
        "qa_f1_zh": each(metrics.qa_f1_zh_score),
        "rouge_l": each(metrics.rouge_score),
        "rouge_l_zh": each(metrics.rouge_zh_score),
        "classification": each(metrics.classification_score),
        "count": each(metrics.count_score),
        "paragraph": paragraph,
        "code_similarity": each(metrics.code_sim_score),
        "letter": lambda said, right, _: float(extract.extract_answer(said) == right[0]),
        "character_f1": one("longbook_qa_chn"),
        "rouge_l_sum": one("longbook_sum_eng", first=True),
        "first_integer": one("passkey"),
        "word": one("kv_retrieval", first=True),
        "name": one("longdialogue_qa_eng"),
        "first_number": one("math_find", number=True),
        "last_integer": one("code_run", number=True),
        "first_values": one("math_calc", number=True),
        "choice": one("longbook_choice_eng"),
        "function": one("code_debug"),
        "first_letter": letters("quality"),
        "letters": letters("coursera"),
        "contained": lambda said, right, _: float(em.exact_match_score(said, right[0])),
        **{name: matching(name) for name in ("string_match_all", "string_match_part")},
        "babilong": lambda said, right, labels: float(places.compare_answers(right[0], said, "?", labels)),
    }


def main() -> None:
    """Score and write."""
    table = originals(*map(Path, sys.argv[1:]))
    rows = set()
    for metric, prediction, references, choices in cases(random.Random(0)):
        with contextlib.redirect_stdout(io.StringIO()):
            score = table[metric](prediction, references, choices)
        rows.add(json.dumps([metric, prediction, references, choices, score], ensure_ascii=False))
    Path(__file__).with_name("benchmark_scores.jsonl").write_text("\n".join(sorted(rows)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
