"""Scores of the published benchmarks, equal to what their own code gives for the same predictions.

Every metric is a pure function (prediction, references, choices) -> 0..1. Oddities of the originals are kept where
scores depend on them; comments name them. Sources: LongBench (arXiv 2308.14508), LongBench v2 (2412.15204),
InfiniteBench (2402.13718), L-Eval (2307.11088), RULER (2404.06654), BABILong (2406.10149).
"""

from __future__ import annotations

import difflib
import importlib
import logging
import re
import string
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from focusllm.errors import missing_package

Metric = Callable[[str, Sequence[str], Sequence[str]], float]
CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』"  # noqa: RUF001
    "【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001
)
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
NO_CHINESE_PUNCTUATION = str.maketrans("", "", string.punctuation + CHINESE_PUNCTUATION)
LETTERS = "ABCD"


def library(name: str) -> Any:
    """A package that only some benchmarks need.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old packages: invalid escapes, deprecated imports
            return importlib.import_module(name)
    except ImportError as error:
        raise missing_package("this task needs", name, "eval") from error


def best(metric: Callable[[str, str], float]) -> Metric:
    """The greatest score over the references."""

    @wraps(metric)
    def over_references(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
        return max((metric(prediction, reference) for reference in references), default=0.0)

    return over_references


def first(metric: Callable[[str, str], float]) -> Metric:
    """The score with the first reference, where the original looks at no other."""

    @wraps(metric)
    def of_first(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
        return metric(prediction, references[0])

    return of_first


def overlap(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of two bags of words."""
    common = (Counter(prediction) & Counter(reference)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return (2 * precision * recall) / (precision + recall)


def words(text: str) -> list[str]:
    """Without punctuation and articles; in lower case this is SQuAD's normal form."""
    return re.sub(r"\b(a|an|the)\b", " ", text.translate(NO_PUNCTUATION)).split()


def characters(text: str) -> str:
    """Chinese text in lower case, without punctuation and spaces."""
    return "".join(text.lower().translate(NO_CHINESE_PUNCTUATION).split())


def segments(text: str) -> list[str]:
    """The words of Chinese text."""
    jieba = library("jieba")
    jieba.setLogLevel(logging.WARNING)
    return list(jieba.cut(text, cut_all=False))


@best
def qa_f1(prediction: str, reference: str) -> float:
    """F1 of words. LongBench, InfiniteBench."""
    return overlap(words(prediction.lower()), words(reference.lower()))


@best
def qa_f1_zh(prediction: str, reference: str) -> float:
    """F1 of Chinese words. LongBench."""
    bags = ([word for word in map(characters, segments(text)) if word] for text in (prediction, reference))
    return overlap(*bags)


@best
def character_f1(prediction: str, reference: str) -> float:
    """F1 of Chinese characters. InfiniteBench."""
    return overlap(characters(prediction), characters(reference))


def _rouge_l(prediction: str, reference: str) -> float:
    rouge = library("rouge").Rouge(metrics=["rouge-l"])
    try:
        scores = rouge.get_scores([prediction], [reference], avg=True)
    except (ValueError, RecursionError):  # an empty or far too long sentence counts nothing
        return 0.0
    return float(scores["rouge-l"]["f"])


@best
def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L as the package `rouge` has it. LongBench."""
    return _rouge_l(prediction, reference)


@best
def rouge_l_zh(prediction: str, reference: str) -> float:
    """The same on Chinese words. LongBench."""
    return _rouge_l(" ".join(segments(prediction)), " ".join(segments(reference)))


@best
def rouge_l_sum(prediction: str, reference: str) -> float:
    """ROUGE-L of summaries as the package `rouge_score` has it. InfiniteBench."""
    scorer = library("rouge_score.rouge_scorer").RougeScorer(["rougeLsum"], use_stemmer=False)
    return float(scorer.score(reference, prediction)["rougeLsum"].fmeasure)


@best
def code_similarity(prediction: str, reference: str) -> float:
    """Likeness of the first line that is no comment, to a hundredth. LongBench."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


@best
def count(prediction: str, reference: str) -> float:
    """Share of the named numbers that are the right one. LongBench."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


@best
def paragraph(prediction: str, reference: str) -> float:
    """The same with the number of a paragraph. LongBench."""
    number = re.search(r"(?:Paragraph |段落)(\d+)", reference)
    return count(prediction, [number[1]], ()) if number else 0.0


def classification(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """One over the number of named classes if the right one is among them. LongBench."""

    def score(reference: str) -> float:
        named = [name for name in choices if name in prediction]
        for name in named:  # the original shortens the list that it walks, which spares the class behind each removed
            if name in reference and name != reference:
                named.remove(name)
        return 1 / len(named) if reference in named else 0.0

    return max(map(score, references), default=0.0)


@best
def letter(prediction: str, reference: str) -> float:
    """The letter in "The correct answer is (X)". LongBench v2."""
    answer = prediction.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", answer) or re.search(
        r"The correct answer is ([A-D])", answer
    )
    return float(found is not None and found[1] == reference)


@first
def first_integer(prediction: str, reference: str) -> float:
    """The first digits. InfiniteBench."""
    found = re.search(r"[0-9]+", prediction)
    return float((found[0] if found else "") == reference)


def _plain(text: str, marks: str) -> str:
    return text.translate(str.maketrans(marks, " " * len(marks)))


@first
def word(prediction: str, reference: str) -> float:
    """The reference as a word. InfiniteBench."""
    return float(reference in _plain(prediction, "\n:\"'.,?!{}").split())


@first
def name(prediction: str, reference: str) -> float:
    """The reference, which is in capitals, as a word. InfiniteBench."""
    return word(prediction.upper(), [reference], ())


@first
def first_number(prediction: str, reference: str) -> float:
    """The first number. InfiniteBench."""
    found = re.search(r"\d+\.\d+|\d+", prediction)
    if found is None:
        return 0.0
    whole = found[0].isdecimal() and reference.isdecimal()  # compared exactly, however long
    return float(_same_integer(found[0], reference) if whole else float(found[0]) == float(reference))


@first
def last_integer(prediction: str, reference: str) -> float:
    """The last word as an integer. InfiniteBench."""
    last, right = _plain(prediction.strip(), "\n.`'\":").split()[-1:], int(reference)
    try:
        return float(bool(last) and int(last[0]) == right)
    except ValueError:
        return 0.0


def first_values(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Share of the values that are right before the first wrong one. InfiniteBench. Signs are not read, as there."""
    values = re.findall(r"[0-9]+", prediction)
    right = 0
    for value, reference in zip(values, references, strict=False):
        if not _same_integer(value, reference):
            break
        right += 1
    return right / len(references)


def _same_integer(digits: str, reference: str) -> bool:
    """Whether digits are a number; of thousands of them, which Python's `int` refuses, they are none of ours."""
    return len(digits) <= sys.int_info.default_max_str_digits and int(digits) == int(reference)


def _behind(text: str, prefixes: Sequence[str], answers: Sequence[str]) -> float | None:
    """Whether an answer follows the first prefix that occurs, after one more character; None without a prefix."""
    for prefix in prefixes:
        _, found, rest = text.partition(prefix)
        if found:
            return float(any(rest[1:].startswith(answer) for answer in answers if rest))
    return None


def choice(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """The right option by its letter or text. InfiniteBench."""
    text = prediction.strip()
    if not text:
        return 0.0
    if text[0] in LETTERS:
        return float(text[0] in references)
    if text in references:
        return 1.0
    text = re.sub(" +", " ", _plain(text, "\n\"'.,?!{}"))
    score = _behind(text, ("answer is:", "answer:", "answer is", "option is"), references)
    if score is not None:
        return score
    return float(next((part for part in text.split() if part in LETTERS), None) in references)


def function(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """The function with the error: references are its name and its letter. InfiniteBench."""
    text = prediction.strip()
    if text[:2] in (f"{references[1]}.", f"{references[1]}:"):
        return 1.0
    text = re.sub(" +", " ", re.sub("[\n`'\"*-]|Option|option", " ", text))
    return _behind(text, ("answer is:", "is:", "answer:", "correct option is:"), references[:2]) or 0.0


def _options(reference: str) -> str:
    return re.sub("[^A-D]", "", reference.split()[0]) or "A"


@best
def first_letter(prediction: str, reference: str) -> float:
    """The first of A, B, C, D. L-Eval."""
    found = None if prediction in LETTERS else re.search("[A-D]", prediction)
    return _letters(found[0] if found else _all_letters(prediction), _options(reference))


@best
def letters(prediction: str, reference: str) -> float:
    """All letters; some of the right ones and no wrong one are a quarter. L-Eval."""
    return _letters(_all_letters(prediction), _options(reference))


def _letters(found: str, right: str) -> float:
    return 1.0 if found == right else 0.25 if set(found) <= set(right) else 0.0


def _all_letters(prediction: str) -> str:
    if not prediction.strip():
        return "None"  # as no answer is: its other letters make it wrong
    if prediction in LETTERS:
        return prediction
    leading = re.match("[A-D]*", prediction)[0]  # type: ignore[index]  # may be empty, always matches
    if len(leading) > 1:
        return "".join(sorted(set(leading)))
    rest = prediction[len(leading) :].split("Question")[0]
    marked = leading + "".join(re.findall(r"[A-D](?=[\s.)])", rest))
    run = re.search("[A-D]+", rest)
    return "".join(sorted(set(marked))) or (run[0] if run else "A")


@best
def contained(prediction: str, reference: str) -> float:
    """The reference, whatever its spaces and case; or the same number. L-Eval."""
    right = " ".join(words(reference))
    if set(right) <= set(LETTERS):  # the original takes it for options
        return _letters(" ".join(words(prediction)), right)
    try:
        return float(float(prediction) == float(reference))
    except ValueError:
        return float(reference.lower().replace(" ", "") in prediction.lower().replace(" ", ""))


def _matches(prediction: str, references: Sequence[str]) -> list[bool]:
    text = re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
    return [reference.lower() in text for reference in references]


def string_match_all(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Share of the references that occur. RULER."""
    return sum(_matches(prediction, references)) / len(references)


def string_match_part(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Whether a reference occurs. RULER."""
    return float(any(_matches(prediction, references)))


def babilong(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """The reference and no other choice in the first sentence; choices are the labels not in the question. BABILong."""
    text = prediction.lower().split(".")[0].split("<context>")[0].split("<example>")[0]
    target = references[0].lower()
    several = "," in target and len(target) > 3  # a list of objects; shorter ones are directions, such as "n,w"
    found = {label for label in map(str.lower, choices) if label in text}
    wanted = target.split(",") if several else [target]
    return float(found.issuperset(wanted) and len(found) == len(wanted))
