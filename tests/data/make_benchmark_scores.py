"""Makes `benchmark_scores.jsonl`: made-up predictions with the scores that the benchmarks' own code gives them.

One line a case: [metric, prediction, references, choices, score], the same number of different ones for every metric.
Rerun it only to add cases; it needs checkouts of the originals, and the packages rouge, rouge-score, jieba, tqdm and
fuzzywuzzy (alone, as LongBench asks for it: with python-Levenshtein it gives other scores):

    python tests/data/make_benchmark_scores.py LONGBENCH INFINITEBENCH LEVAL RULER BABILONG LOST_IN_THE_MIDDLE

Scores in the file are from LongBench 2e00731, InfiniteBench 88b3daa, L-Eval cd34b05, RULER c3f5e3b, BABILong 7a6efee,
Lost in the Middle 29b8a6d.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import json
import random
import re
import statistics
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

CASES = 200
"""Different ones of every metric."""
ROUNDS = 50 * CASES
"""After so many draws of every metric it has too few different cases to draw from."""

Case = tuple[str, str, list[str], list[str]]
"""Metric, prediction, references, choices."""

TEXTS = (
    "The keeper of the lighthouse lit the lamp at dusk.",
    "A letter arrived from Lisbon; nobody at the harbour opened it.",
    "He counted the bells, one after another, until the fog lifted.",
    "In the archive lay 1,024 maps of an island that no ship had found.",
    "The captain said that the storm would pass before the third day.\nShe did not believe him.",
    "An owl, a cat and the dog sat on the wall.",
    "It rained, rained, and rained again. Then it rained.",
    "The bakery on Elm St. opens at 9:30 a.m., doesn't it?",
    "Café Zoë sells crème brûlée for £4.50\u00a0a bowl…",  # a space that does not break
    "İzmir'de çay içtik, Straße für Straße.",
    '"Who rang?" – “Nobody,” said the well-known e-mail clerk (twice).',  # noqa: RUF001
    "Line one.\n\nLine two has the number 7.\n- line three",
    "🐳 and 🐙 swam past pier_4",
    "3.14 is near it; 22/7 is nearer than 3.",
    "ο φάρος είναι κλειστός",  # noqa: RUF001
    "THE END",
    "yes",
    "Ada King",
    "42",
    "the an a",  # articles only
    "?!",
    ". . .",
)
CHINESE = (
    "灯塔的守护人在黄昏时点亮了灯。",
    "一封信从里斯本寄来，港口没有人打开它。",  # noqa: RUF001
    "他数着钟声，直到雾散去。",  # noqa: RUF001
    "《海图》一共有1024页（第3页丢失了）！",  # noqa: RUF001
    "船长说：“风暴明天就过去。”\n她不相信。",  # noqa: RUF001
    "Ada 住在 3 号楼，电话是 555-0199",  # noqa: RUF001
    "雨下了，又下了，又下了一整夜",  # noqa: RUF001
    "面包店早上九点半开门，不是吗？",  # noqa: RUF001
    "【公告】港口关闭～请绕行——谢谢",  # noqa: RUF001
    "灯塔",
    "是的",
    "……",
    "ＡＢＣ１２３",  # noqa: RUF001
)
CODE = (
    "    return self.total / len(self.items)",
    "for name, value in sorted(table.items()):",
    "import json",
    "}",
    "if (count > 0 && !done) {",
    "print(f'Grüße: {name!r}')",
    "numbers = [" + ", ".join(map(str, range(60))) + "]",  # difflib treats lines above 200 characters otherwise
    "",
)
COMMENTS = (
    "", "", "", "\n", "\n\n", " \n", "# next\n", "```python\n", "// so\n", "# one\n// two\n```\n", "#", "x `y`",
)  # fmt: skip
EXACT = (
    "12", "12.0", "1e1", "10", " 7 ", "-0.5", "nan", "A", "BD", "ABC", "...", "the fog", "Fog, and the sea", "a fog",
)  # fmt: skip
CLASSES = (
    "Num", "Number", "Number of people", "Person", "Personal name", "Place", "Place of birth", "人物", "Why?", "a.m.",
)  # fmt: skip
LABELS = (
    ("bathroom", "garden", "kitchen", "office"),
    ("Ada", "Fred", "apple", "milk"),
    ("no", "yes", "maybe"),
    ("none", "one", "two", "three"),  # one of them is part of another
    ("apple", "football", "milk", "nothing"),
    ("n,w", "s,e", "e,e"),
)
NAMES = ("ADA", "ADA KING", "ZOË", "JOSÉ", "O'BRIEN", "SMITH-JONES", "STRASSE", "MR. HILL", "КИРА", "李雷")
OPTIONS = ("The harbour", "Ada King", "A lamp", "Fog, and rain", "42", "“Lisbon”", "is it?", "dusk")
WORDS = ("Lisbon", "the", "7", "ÖL", "42", "ada", "é", "\n", "1,024", "owl", "T", "x-1")
FUNCTIONS = ("light", "count_bells", "Lamp.open", "is_open", "B2", "_")

IN_NUMBERS = (
    "{0}", "{0}.", "The key is {0}.", '"{0}"', "x{0}", "It is {0}, or {1}", "none", "-{0}", "{1} {0}", "{0} {1}",
    "{0}{1}", "", " \n", "{0}\n{1}", "`{0}`", "'{0}':", "{0}!", "{{{0}}}", "Key: {0}?", "no. {0}", "{1}, {1}, {0}",
    "0{0}", "({0})", " {0} ", "+{0}", "{0}e1", "1_{0}", "{0}:\n", "٣ {0}", "\uff12{0}", "\u2212{0}", "{0}\u00a0{1}",
    "{0}\t", "key={0};",
)  # fmt: skip
IN_DECIMALS = ("{0}.{1}", ".{0}", "{0}.", "{1} or {0}.5", "v{0}.{0}.{1}", "{0},{1}")
IN_LISTS = ("[{0}]", "{0}", "3\n{0}", "The values: {0}, 4", "none", "", "٣ {0}")
IN_LETTERS = (
    "{0}", "{0}.", " {0}", "{0}\n", "The answer is {0}", "The answer is {0}.", "{0}: yes", "none", "", " \n",
    "Because {0}) it is", "Option {0}", "{0}) and {1}.", "{0} and {1} ", "{0}, {1}.", "{0}.\n{1}.",
    "{0} Question: is B. so?", "so Question A. {0}", "Question {0}.", "E. or F) or {0}", "Both {0} hold", "abc",
    "it is ({0})", "{0}{1}", "lamp {0}, {1}", "X {0}\tY", "Éa",
)  # fmt: skip
IN_OPTIONS = (
    "{0}", "{0}.", " {0}\n", "{0}: yes", "", " ", "The answer is: {0}", "The answer is {0}.", "So the answer:\n{0}",
    "the option is  {0}", "My  answer   is {0}!", "the answer is", "the answer is:", "the answer: ", 'I think "{0}"',
    "it may be {0} or {1}", "`{0}`", "'{0}'", "no idea", "the answer is:{0}",
    "the option is\n{1}, so the answer is: {0}", "it is AB, {0}", "answer {0}", "\"{0}\" is it",
    "the answer is: the answer is {0}", "not {1}. {0}", "i say {0}?", "({0})",
)  # fmt: skip
IN_BUGS = (
    "{0}", "{0}. light", "{0}: light", "{0}) light", " {0}.", "The answer is: {0}", "The answer is:{0}",
    "`light` is: {0}", "Answer: {0}", "my answer: {0}", "correct option is: {0}", "The Option is: {0}",
    "- answer: **{0}**", "the answer is:", "it is:", "", "\n", "the answer is:\n{0}", "**The answer is:** {0}",
    "the answer is: \"{0}\"", "this is: {1}; the answer is: {0}", "the answer is: option {0}",
    "so is: {1} answer: {0}", "the answer is:  {0}", "{1}. but the answer is: {0}", "is {0}",
)  # fmt: skip
IN_ANSWERS = (
    "The correct answer is ({0})", "The correct answer is {0}", "**The correct answer is {0}.**",
    "The correct answer is **({0})**", "The correct answer is: {0}", "the correct answer is ({0})",
    "The correct answer is ( {0} )", "The correct answer is\n{0}", "The correct answer is ({0}",
    "The * correct answer is {0}", "The correct* answer is *{0}*", "It is {0}", "({0})", "", "{0}",
)  # fmt: skip
AROUND_ANSWERS = (
    "{}", "{}.", "Let me see. {}", "\n{}\n", "{} because of the fog", "{}\nThe correct answer is (D)",
    "The correct answer is C; {}", "The correct answer is (a). {}", "*{}*", "Not (B). {}",
)  # fmt: skip
IN_PLACES = (
    "{0}", "{0}.", "{0}. In the {1}", "The {0} and the {1}", "{0} <example> {1}", "{0}<context>{1}", "{0},{1}",
    "{0}, {1}", "nobody knows", "", ".{0}", "Question: {0}", "It is the {0}\n{1}", "not the {1}", "<example> {0}",
    "{1},{0}", "the {0}s", "<context>{0}.<example>",
)  # fmt: skip
IN_VALUES = (
    "{0}", '"{0}"', " {0}\n", "The value is {0}.", '{{"key": "{0}"}}', "{1}", "{1} or {0}", "", "no", "{0}{1}",
    "x{0}x", "{0},\n{1}", "`{0}`",
)  # fmt: skip


def functions(path: Path, names: str, **scope: Any) -> Any:
    """Some functions of a file whose other parts import too much."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names.split()]
    module = ModuleType(path.stem)
    module.__dict__.update(scope)
    exec(compile(tree, str(path), "exec"), module.__dict__)
    return module


def some(draw: random.Random, values: Sequence[str], most: int) -> list[str]:
    """One to `most` different ones."""
    return draw.sample(values, draw.randint(1, min(most, len(values))))


def phrase(draw: random.Random, phrases: tuple[str, ...], *values: str) -> str:
    """A phrase with the values in it."""
    return draw.choice(phrases).format(*values)


def changed(draw: random.Random, text: str, others: tuple[str, ...]) -> str:
    """A prediction that is more or less like a reference."""
    parts = text.split(" ")
    half, other = len(parts) // 2, draw.choice(others)
    return draw.choice(
        [
            text,
            other,
            text.lower(),
            " ".join(parts[:half]),
            " ".join(parts[half:]),
            text[: len(text) // 2],
            " ".join(draw.sample(parts, len(parts))),
            "  ".join(parts),
            f"The answer is: {text}",
            f"\n{text.upper()} {other}",
            f"{other}\n{text}",
            f"{text}. {text}",
            f'"{text}"!?',
            "".join(character for character in text if draw.random() < 0.8),
            "".join(f"{character} " if draw.random() < 0.1 else character for character in text),
            draw.choice(["", ".", "\n ", "...\n.", "，", "the"]),  # noqa: RUF001
        ]
    )


def text_cases(draw: random.Random) -> Iterator[Case]:
    """Answers in sentences or code; the best of the references counts."""
    right = some(draw, TEXTS, 3)
    answer = changed(draw, draw.choice(right), TEXTS)
    for metric in ("qa_f1", "rouge_l", "rouge_l_sum"):
        yield metric, answer, right, []
    right = some(draw, draw.choice([TEXTS, EXACT]), 2)
    yield "contained", changed(draw, draw.choice(right), EXACT), right, []
    right = some(draw, CHINESE, 3)
    answer = changed(draw, draw.choice(right), CHINESE)
    for metric in ("qa_f1_zh", "rouge_l_zh", "character_f1"):
        yield metric, answer, right, []
    right = some(draw, CODE, 2)
    line = changed(draw, draw.choice(right), CODE)
    yield "code_similarity", draw.choice(COMMENTS) + line + draw.choice(["", "", "\n", "\nbreak", " # so"]), right, []
    right = draw.sample(WORDS, draw.choice([1, 3, 4, 5, 10]))  # RULER's tasks have so many answers
    found = [part.upper() if draw.random() < 0.3 else part for part in (*some(draw, right, 10), *some(draw, WORDS, 2))]
    said = draw.choice(["", "\x01", "\t ", "\x1f\x00", "\n"]) + draw.choice([", ", "\x02", "\n", ""]).join(found)
    said = draw.choice([said, said, changed(draw, draw.choice(TEXTS), TEXTS)])
    for metric in ("string_match_all", "string_match_part"):
        yield metric, said, right, []


def number_cases(draw: random.Random) -> Iterator[Case]:
    """Numbers, values and names among other words."""
    number = draw.choice([draw.randint(0, 30), draw.randint(1_000, 99_999), 2**53 + draw.randint(0, 3)])
    right, other = str(number), str(number + draw.choice([-1, 1, 10]))
    said = draw.choice([(right, other), (right, other), (other, right)])
    yield "first_integer", phrase(draw, IN_NUMBERS + IN_DECIMALS, *said), [right, other][: draw.randint(1, 2)], []
    yield "first_number", phrase(draw, IN_NUMBERS, *said), [right, other][: draw.randint(1, 2)], []
    # 1.5 where 1 is right is an error in the original; 1 where 1.5 is right is wrong
    quarters = [str(number / 4), str(number // 4)]
    yield "first_number", phrase(draw, IN_NUMBERS + IN_DECIMALS, *draw.sample(quarters, 2)), quarters[:1], []
    signed = draw.choice([right, f"-{right}"])
    yield "last_integer", phrase(draw, IN_NUMBERS + IN_DECIMALS, *said), [signed, other][: draw.randint(1, 2)], []
    few = [str(draw.randint(1, 4)) for _ in range(4)]
    named = draw.choice([" ", ", ", "\n", "", " or "]).join(
        phrase(draw, (*IN_NUMBERS, "Paragraph {0}", "段落{0}"), *draw.sample(few, 2)) for _ in range(draw.randint(1, 3))
    )
    yield "count", named, some(draw, few, 3), []
    kind = draw.choice(["Paragraph {}", "段落{}", "Paragraph {}: Paragraph 9", "in Paragraph {}.", "段落 1 段落{}"])
    yield "paragraph", named, [kind.format(part) for part in some(draw, few, 2)], []
    values = ["naïve", right, "a,b", "x-1", str(uuid.UUID(int=draw.getrandbits(128)))[:13]]
    draw.shuffle(values)
    yield "word", phrase(draw, IN_NUMBERS + IN_DECIMALS, *draw.sample(values[:2], 2)), values[:1], []
    right_names = some(draw, NAMES, 3)
    said = draw.sample((right_names[0], draw.choice(NAMES)), 2)
    said = [draw.choice([name, name.title(), name.lower(), name.replace("SS", "ß")]) for name in said]
    yield "name", phrase(draw, IN_NUMBERS + IN_DECIMALS, *said), right_names, []
    results = [str(draw.choice([-2, 0, 1, 7, 12, 40])) for _ in range(draw.randint(1, 5))]
    mixed = draw.sample(results, len(results))
    said = draw.choice([results, results, results[:-1], [*results, "4"], ["7", *results[1:]], mixed])
    joined = draw.choice([", ", " ", "\n", " then ", "; x"]).join(said)
    yield "first_values", phrase(draw, IN_LISTS, joined), results, []
    value, another = (str(uuid.UUID(int=draw.getrandbits(128))) for _ in range(2))
    value = draw.choice([value, value, value, "İd-Straße 7"])
    said = [draw.choice([value, value.upper(), value.title(), value[:-1], value.replace("-", "")]), another]
    yield "lost-in-the-middle", phrase(draw, IN_VALUES, *said), [value], []


def option_cases(draw: random.Random) -> Iterator[Case]:
    """Letters, options and classes."""
    named = [*some(draw, CLASSES, 4), *draw.choice([[], [], ["else"]])]
    classes = draw.sample(CLASSES, draw.randint(2, len(CLASSES)))
    said = draw.choice([", ", "\n", "", " / "]).join(named)
    right = [*draw.choices(named, k=draw.randint(1, 2))]
    yield "classification", draw.choice([said, said, said, said.lower(), ""]), right, classes
    letter, wrong = draw.sample("ABCD", 2)
    said = phrase(draw, IN_ANSWERS, draw.choice([letter, letter, letter, wrong, letter.lower(), "E"]))
    yield "letter", phrase(draw, AROUND_ANSWERS, said), [letter], []
    sets = ["".join(draw.sample("ABCD", draw.choice([1, 1, 2, 3]))) for _ in range(2)]
    right = [draw.choice([*sets, "B. the fog", "C)", "AC and", "none", " D "]) for _ in range(draw.choice([1, 1, 2]))]
    said = [draw.choice(["", ", ", " ", ". ", ") "]).join(part) for part in draw.sample(sets, 2)]
    for metric in ("first_letter", "letters"):
        yield metric, phrase(draw, IN_LETTERS, *said), right, []
    right = [draw.choice(OPTIONS), draw.choice("ABCD")]
    said = draw.sample([*right, *right, draw.choice(OPTIONS), draw.choice("ABCDEab"), "BC"], 2)
    yield "choice", phrase(draw, IN_OPTIONS, *said), right, []
    right = [draw.choice(FUNCTIONS), draw.choice("ABCD")]
    said = draw.sample([*right, *right, draw.choice(FUNCTIONS), draw.choice("ABCDE")], 2)
    yield "function", phrase(draw, IN_BUGS, *said), right, []
    labels = draw.choice(LABELS)
    asked = draw.choice(["", "", draw.choice(labels)])
    places = draw.sample(labels, 2)
    target = draw.choice([places[0], places[0], ",".join(places), ",".join([places[0]] * 2)])
    said = [draw.choice([place, place, place.upper()]) for place in places]
    choices = [label for label in labels if label not in asked]  # the task leaves them out too
    yield "babilong", phrase(draw, IN_PLACES, *said), [target], choices


def originals(
    longbench: Path, infinite: Path, leval: Path, ruler: Path, babi: Path, lost: Path
) -> dict[str, Callable[..., float]]:
    """By metric, the original's function of (prediction, references, choices)."""
    sys.modules["args"] = SimpleNamespace(parse_args=None)  # type: ignore[assignment]

    def compute(predictions: list[str], references: list[list[str]], **_: object) -> dict[str, list[float]]:
        """What `evaluate.load("rouge")`, which would be fetched from the hub, hands on to."""
        scores = RougeScorer(["rougeLsum"]).score_multi(*references, *predictions)
        return {"rougeLsum": [scores["rougeLsum"].fmeasure]}

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

    files: dict[str, io.StringIO] = {}
    pairs = functions(
        lost / "scripts/evaluate_kv_responses.py",
        "main",
        json=json,
        statistics=statistics,
        deepcopy=copy.deepcopy,
        tqdm=list,
        logger=SimpleNamespace(info=print),
        xopen=lambda name, mode="r": contextlib.nullcontext(files[name]),
    )

    def each(score: Callable[..., float]) -> Callable[..., float]:
        return lambda said, right, classes: max(score(said, one, all_classes=classes) for one in right)

    def one(task: str, number: bool = False, first: bool = False) -> Callable[..., float]:
        def score(said: str, right: list[str], _: object) -> float:
            label: Any = [json.loads(part) for part in right] if number else right
            return float(compute_scores.get_score_one(said, label[0] if first else label, task, "yarn-mistral"))

        return score

    def both(score: Callable[..., float], other: Callable[..., float]) -> Callable[..., float]:
        """Of a metric that two tasks have."""

        def equal(*case: object) -> float:
            assert score(*case) == other(*case), case
            return score(*case)

        return equal

    def letters(file: str) -> Callable[..., float]:
        def score(said: str, right: list[str], _: object) -> float:
            settings.pred_file = file
            found, labels = options.process_output_mc(said), [options.process_gt_mc(part) for part in right]
            return float(em.metric_max_over_ground_truths(em.exact_match_score, found, labels))

        return score

    def matching(name: str) -> Callable[..., float]:
        return lambda said, right, _: getattr(matches, name)([clean.postprocess_pred(said, {})], [right]) / 100

    def place(said: str, right: list[str], choices: list[str]) -> float:
        """The original takes all labels, and leaves out those in the question itself."""
        labels = next(labels for labels in LABELS if set(choices) <= set(labels))
        question = f"Is it {' or '.join(label for label in labels if label not in choices)}?"
        return float(places.compare_answers(right[0], said, question, labels))

    def paragraph(said: str, right: list[str], _: object) -> float:
        score = metrics.retrieval_score if "P" in right[0] else metrics.retrieval_zh_score
        return max(score(said, part) for part in right)

    def value(said: str, right: list[str], _: object) -> float:
        files.update({"in": io.StringIO(json.dumps({"model_answer": said, "value": right[0]})), "out": io.StringIO()})
        pairs.main("in", "out")
        return float(json.loads(files["out"].getvalue())["metric_accuracy"])

    return {
        "qa_f1": both(each(metrics.qa_f1_score), one("longbook_qa_eng")),
        "qa_f1_zh": each(metrics.qa_f1_zh_score),
        "rouge_l": each(metrics.rouge_score),
        "rouge_l_zh": each(metrics.rouge_zh_score),
        "classification": each(metrics.classification_score),
        "count": each(metrics.count_score),
        "paragraph": paragraph,
        "code_similarity": each(metrics.code_sim_score),
        "letter": lambda said, right, _: float(extract.extract_answer(said) == right[0]),
        "character_f1": one("longbook_qa_chn"),
        "rouge_l_sum": one("longbook_sum_eng"),
        "first_integer": both(one("passkey"), one("number_string")),
        "word": one("kv_retrieval", first=True),
        "name": one("longdialogue_qa_eng"),
        "first_number": one("math_find", number=True),
        "last_integer": one("code_run", number=True),
        "first_values": one("math_calc", number=True),
        "choice": one("longbook_choice_eng"),
        "function": one("code_debug"),
        "first_letter": letters("quality"),
        "letters": letters("coursera"),
        "contained": lambda said, right, _: float(em.metric_max_over_ground_truths(em.exact_match_score, said, right)),
        **{name: matching(name) for name in ("string_match_all", "string_match_part")},
        "babilong": place,
        "lost-in-the-middle": value,
    }


def main() -> None:
    """Score and write."""
    table, draw = originals(*map(Path, sys.argv[1:])), random.Random(0)
    rows: dict[str, dict[str, float]] = {metric: {} for metric in table}
    for _ in range(ROUNDS):
        for metric, *case in (*text_cases(draw), *number_cases(draw), *option_cases(draw)):
            key = json.dumps([metric, *case], ensure_ascii=False)
            if len(rows[metric]) < CASES and key not in rows[metric]:
                with contextlib.redirect_stdout(io.StringIO()):
                    rows[metric][key] = float(table[metric](*case))
        if all(len(scores) == CASES for scores in rows.values()):
            break
    else:
        sys.exit(f"too few different cases: { {metric: len(scores) for metric, scores in rows.items()} }")
    lines = sorted(f"{key[:-1]}, {json.dumps(score)}]" for scores in rows.values() for key, score in scores.items())
    Path(__file__).with_name("benchmark_scores.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
