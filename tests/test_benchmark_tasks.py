"""Published benchmarks: scores equal to the originals', their prompts, their files, and what is made at a length."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from conftest import byte_tokenizer
from focusllm.errors import ConfigError, DocumentError
from focusllm.evaluation import benchmark, metrics
from focusllm.evaluation.example import Example, Setting, Task
from focusllm.evaluation.tasks import registry
from focusllm.evaluation.tasks.babilong import FILES
from focusllm.evaluation.tasks.ruler import NOISE, chain

SCORED = Path(__file__).parent / "data" / "benchmark_scores.jsonl"
SCORES = [json.loads(line) for line in SCORED.read_text("utf-8").splitlines()]
BOOK = "The sea was calm that morning. Nobody on the island had seen a sail for weeks! Was it the fog? " * 400
LENGTH = 12_000
LONGBENCH = {"input": "Who?", "context": "It was Ada.", "answers": ["Ada", "Ada King"], "all_classes": None}
RULER = [name for name in registry() if name.startswith("ruler-")]


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """Book text and made-up files in the originals' formats."""
    book, data = tmp_path / "book.txt", tmp_path / "data"
    book.write_text(BOOK)
    data.mkdir()
    hotpotqa = [
        {
            "question": f"Where is thing {i}?",
            "answer": f"place {i}",
            "context": [
                [f"Thing {i}", [f"It is in place {i}.", " So it is."]],
                [f"Other {i}", ["It is elsewhere. " * 9]],
            ],
        }
        for i in range(60)
    ]
    asked = [{"question": "Where?", "answers": [{"text": "here"}], "is_impossible": False}]
    articles = [{"paragraphs": [{"context": f"It is here, {i}. " * 5, "qas": asked} for i in range(9)]}] * 2
    write(data, "hotpotqa.json", hotpotqa)
    write(data, "squad.json", {"data": articles})
    for name in FILES:
        lines = ["1 Mary moved to the garden.", "2 John went to the office.", "3 Where is Mary? \tgarden\t1"]
        (data / f"{name}_test.txt").write_text(
            "\n".join([*lines, "1 John took the milk.", "2 Where is John?\toffice\t2"])
        )
    return Setting(byte_tokenizer(), data=data, text=str(book))


def write(folder: Path, name: str, content: Any) -> None:
    lines = [content] if isinstance(content, str) or name.endswith(".json") else content
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / name).write_text(text, encoding="utf-8")


def examples(name: str, setting: Setting, limit: int = 9, length: int | None = None) -> list[Example]:
    return list(registry()[name].examples(length, limit, setting))  # type: ignore[arg-type]


def scored(name: str, prediction: str, *references: str, choices: tuple[str, ...] = ()) -> float:
    return registry()[name].score(prediction, Example("0", "", "", "", references, choices=choices))


@pytest.mark.parametrize("metric", sorted({row[0] for row in SCORES}))
def test_metrics_equal_the_originals(metric: str) -> None:
    rows = [row[1:] for row in SCORES if row[0] == metric]
    assert len({json.dumps(case) for *case, _ in rows}) >= 200
    task = {"lost-in-the-middle": "lost-in-the-middle-75"}.get(metric)
    for prediction, references, choices, score in rows:
        if task is not None:
            found = scored(task, prediction, *references, choices=tuple(choices))
        else:
            found = getattr(metrics, metric)(prediction, references, choices)
        if metric.startswith("string_match"):
            found = round(100 * found, 2) / 100  # as RULER rounds its percentages
        assert found == score, (prediction, references)


def test_every_task_has_a_metric_that_was_compared() -> None:
    used = {task.metric for task in registry().values() if isinstance(task, benchmark.Prompted)}
    assert used | {"lost-in-the-middle"} == {row[0] for row in SCORES}


def test_the_tasks_of_the_benchmarks() -> None:
    counts = Counter(name.split("-")[0] for name, task in registry().items() if isinstance(task, benchmark.Prompted))
    assert counts == {"longbench": 22, "infinitebench": 12, "leval": 4, "ruler": 13, "babilong": 10}


def test_longbench_rows_go_into_their_prompts(setting: Setting) -> None:
    write(setting.data, "hotpotqa.jsonl", [LONGBENCH, {**LONGBENCH, "question": "Why {context}?"}, LONGBENCH])
    first, second = examples("longbench-hotpotqa", setting, limit=2)
    assert (first.id, first.context, first.references, first.max_new_tokens) == (
        "1",
        "It was Ada.",
        ("Ada", "Ada King"),
        32,
    )
    assert first.before.endswith("The following are given passages.\n")
    assert first.after.endswith("Question: Who?\nAnswer:")
    assert first.chat
    assert not first.stop
    assert second.id == "2"


def test_few_shot_and_code_tasks_have_no_chat_template(setting: Setting) -> None:
    plain = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    for name in benchmark.prompts("longbench"):
        write(setting.data, f"{name}.jsonl", [{**LONGBENCH, "all_classes": ["Person", "Place"]}])
        (example,) = examples(f"longbench-{name}", setting)
        assert example.chat == (name not in plain)
        assert example.choices == ("Person", "Place")
        assert "{" not in example.before + example.after


def test_few_shot_answers_are_their_first_line() -> None:
    assert scored("longbench-triviaqa", "\nAda\nPassage: more", "Ada") == 1
    assert scored("longbench-hotpotqa", "\nAda\nPassage: more", "Ada") < 1
    assert scored("longbench-trec", "Person\nPlace", "Person", choices=("Person", "Place")) == 1


def test_longbench_v2(setting: Setting) -> None:
    row = {f"choice_{letter}": f" option {letter}" for letter in "ABCD"}
    row |= {"question": "Which? ", "context": " Long. ", "answer": "C", "length": "short", "difficulty": "hard"}
    write(setting.data, "data.json", [row, {"question": "no more"}])
    (example,) = examples("longbench-v2", setting)
    assert example.context == "Long."
    assert "(C) option C\n(D) option D\n" in example.after
    assert example.meta == {"length": "short", "difficulty": "hard"}
    assert scored("longbench-v2", "The correct answer is (C).", *example.references) == 1
    assert scored("longbench-v2", "The correct answer is (B).", *example.references) == 0


def test_infinitebench(setting: Setting) -> None:
    options = {"options": ["to sea", "home", "away", "back"], "answer": ["home"]}
    rows = {
        "longbook_choice_eng": {"context": "Long.", "input": "Where to?", **options},
        "code_run": {"context": "def", "input": "What is func_3(-4) + 1?", "answer": -7},
        "math_find": {"context": "[3, 5]", "input": "The largest number of the list is:", "answer": 5},
        "math_calc": {"context": "1 + 2", "input": "", "answer": [1, 3]},
        "passkey": {"context": "Long.", "input": "What is the pass key?", "answer": ["71432"]},
    }
    for name, row in rows.items():
        write(setting.data, f"{name}.jsonl", [row])
    (choice,), (run,), (find,), (calc,), (key,) = (examples(f"infinitebench-{name}", setting) for name in rows)
    assert choice.after.endswith("A. to sea\nB. home\nC. away\nD. back\n\nThe letter of the correct answer is")
    assert choice.references == ("home", "B")
    assert run.after.endswith("exact value of func_3(-4). The value of func_3(-4) is")
    assert "called func_3 in" in run.before
    assert run.references == ("-7",)
    assert find.before == "What is the largest number in the following list?\n\n"
    assert scored("infinitebench-math_calc", "[1, 3]", *calc.references) == 1
    assert scored("infinitebench-math_calc", "1, 4", *calc.references) == 0.5
    assert scored("infinitebench-math_calc", "1" * 5000, *calc.references) == 0  # more digits than int() takes
    write(setting.data, "math_calc.jsonl", [{**rows["math_calc"], "answer": [[1, 3]]}])
    assert examples("infinitebench-math_calc", setting) == [calc]
    assert key.after == "\n\nWhat is the pass key?\n\nThe pass key is"
    assert not any(example.chat for example in (choice, run, find, calc, key))


def test_leval_asks_every_question_of_a_document(setting: Setting) -> None:
    rows = [{"input": "Long.", "instructions": ["Q1", "Q2"], "outputs": ["A", "BD"]}] * 2
    write(setting.data, "coursera.jsonl", rows)
    found = examples("leval-coursera", setting, limit=3)
    assert [(example.id, example.references) for example in found] == [
        ("1.1", ("A",)),
        ("1.2", ("BD",)),
        ("2.1", ("A",)),
    ]
    assert [example.id for example in examples("leval-coursera", setting, limit=2)] == ["1.1", "2.1"]
    assert scored("leval-coursera", "B and D.", "BD") == scored("leval-coursera", "B.", "BD") * 4 == 1


def test_bad_rows_are_named_left_out_and_counted(setting: Setting) -> None:
    rows = [
        LONGBENCH,
        "{broken",
        "",
        {"context": "x", "answers": ["y"]},
        {**LONGBENCH, "answers": "z"},
        "[]",
        LONGBENCH,
    ]
    write(setting.data, "musique.jsonl", rows)
    said: list[str] = []
    found = list(registry()["longbench-musique"].examples(None, 9, setting, said.append))  # type: ignore[call-arg]
    assert [example.id for example in found] == ["1", "7"]
    *each, last = said
    assert [re.search(r"line (\d+) is left out: (.*)\.$", line).groups() for line in each] == [
        ("2", "it is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        ("4", "it has no input"),
        ("5", "answers are of another type than in the benchmark"),
        ("6", "it is not a JSON object"),
    ]
    assert last.startswith("4 of 6 rows")


def test_answers_that_cannot_be_scored_are_bad_rows(setting: Setting) -> None:
    write(setting.data, "musique.jsonl", [{**LONGBENCH, "answers": []}, LONGBENCH])
    write(setting.data, "trec.jsonl", [LONGBENCH, {**LONGBENCH, "all_classes": ["Ada"]}])
    number = {"context": "[3, 5]", "input": "The largest number of the list is:"}
    write(setting.data, "math_find.jsonl", [{**number, "answer": "many"}, {**number, "answer": 5}])
    for name in ("longbench-musique", "longbench-trec", "infinitebench-math_find"):
        said: list[str] = []
        found = list(registry()[name].examples(None, 9, setting, said.append))  # type: ignore[call-arg]
        assert [example.id for example in found] == ["2"], said
        assert "line 1 is left out" in said[0]


def test_files_without_anything_to_use(setting: Setting) -> None:
    write(setting.data, "musique.jsonl", ["{}", "x"])
    with pytest.raises(DocumentError, match=r"no row can be used, up to .*musique.jsonl, line 2"):
        examples("longbench-musique", setting)
    write(setting.data, "data.json", "[{]")
    with pytest.raises(DocumentError, match=r"data.json cannot be read"):
        examples("longbench-v2", setting)
    with pytest.raises(DocumentError, match=r"has no leval/tpo.jsonl or"):
        examples("leval-tpo", setting)


def test_hub_rows_are_read_where_there_is_no_file(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def rows(source: Any) -> Any:
        asked.append((source.path, source.subset, source.split))
        yield {"context": "Long.", "input": "Who?", "answers": ["Ada"], "all_classes": None}

    monkeypatch.setattr(benchmark, "dataset_rows", rows)
    setting.hub = True
    (example,) = examples("longbench-2wikimqa", setting)
    assert "Question: Who?" in example.after
    assert asked == [("hf:zai-org/LongBench/data.zip/data/2wikimqa.jsonl", None, "train")]


def test_babilong_from_the_hub(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def rows(source: Any) -> Any:
        asked.append((source.path, source.subset, source.split))
        yield {"input": "Too long. " * 110_000, "question": "Where is Mary?", "target": "office"}
        yield {"input": "Mary went to the garden.", "question": "Where is Mary?", "target": "garden"}

    monkeypatch.setattr("focusllm.evaluation.tasks.babilong.dataset_rows", rows)
    setting.hub, setting.data = True, None
    for length in (5000, 8191, 9000, 2**20, 2**21):
        example = examples("babilong-qa1", setting, length=length)[-1]
        assert (example.id, example.context, example.references) == ("2", "Mary went to the garden.", ("garden",))
        assert "Where is Mary?" in example.after
    assert [subset for _, subset, _ in asked] == ["4k", "4k", "8k", "1M", "1M"]
    assert asked[0][::2] == ("hf:RMT-team/babilong", "qa1")


@pytest.mark.parametrize("name", RULER)
def test_ruler_fills_its_length(name: str, setting: Setting) -> None:
    task, length = registry()[name], LENGTH
    found = examples(name, setting, 3, length)
    assert len({example.context for example in found}) == 3
    assert found == examples(name, setting, 3, length)  # the same in every run
    for example in found:
        parts = example.before, example.after, example.answer_prefix
        room = setting.room(name, length, *parts, max_new_tokens=example.max_new_tokens)
        assert 0.85 * room < setting.num_tokens(example.context) <= room
        assert all(reference in example.context for reference in example.references)
        assert task.score(", ".join(example.references).upper(), example) == 1
        assert task.score("no idea", example) == 0
        assert "{" not in "".join(parts)


def test_ruler_needles(setting: Setting) -> None:
    (single,) = examples("ruler-niah_single_1", setting, 1, LENGTH)
    key, value = re.search(r"One of the special magic numbers for (\S+) is: (\d{7})\.", single.context).groups()
    assert single.references == (value,)
    assert single.context.count("special magic") == 1
    assert NOISE in single.context
    assert single.before.startswith("A special magic number is hidden")
    assert single.after.endswith(f"is the special magic number for {key} mentioned in the provided text?")
    assert single.answer_prefix == f" The special magic number for {key} mentioned in the provided text is"
    (queries,) = examples("ruler-niah_multiquery", setting, 1, LENGTH)
    assert queries.context.count("special magic") == len(queries.references) == 4
    assert queries.before.startswith("Some special magic numbers are hidden")
    assert ", and " in queries.after
    (values,) = examples("ruler-niah_multivalue", setting, 1, LENGTH)
    assert len(values.references) == 4
    assert values.context.startswith("The sea was calm")
    (uuids,) = examples("ruler-niah_multikey_3", setting, 1, LENGTH)
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", *uuids.references)
    assert uuids.context.count("One of the special magic uuids for") > 20


def test_ruler_chains_and_counts(setting: Setting) -> None:
    (asked,) = examples("ruler-vt", setting, 1, LENGTH)
    steps = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", asked.context)
    assert [name for name, _ in steps] == list(asked.references)
    assert [source for _, source in steps] == [steps[0][1], *asked.references[:-1]]
    assert f"5 variables are assigned the value {steps[0][1]}" in asked.answer_prefix
    assert "variables are assigned" in asked.before  # the solved one in front
    for size in range(9):  # in order among few sentences too
        case = chain(random.Random(size), 5)
        assert [name for name, _ in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", case.build(size))] == case.references
    (common,) = examples("ruler-cwe", setting, 1, LENGTH)
    counts = Counter(re.findall(r"\d+\. (\S+)", common.context)).most_common()
    assert {word for word, _ in counts[:10]} == set(common.references)
    assert counts[9][1] == 30
    assert {count for _, count in counts[10:]} == {3}
    (frequent,) = examples("ruler-fwe", setting, 1, LENGTH)
    ranked = [word for word, _ in Counter(frequent.context.split()).most_common(4)]
    assert ranked[0] == "..."
    assert set(ranked[1:]) == set(frequent.references)


def test_ruler_documents_have_the_answer(setting: Setting) -> None:
    for example in examples("ruler-qa_2", setting, 3, LENGTH):
        number = re.search(r"thing (\d+)\?", example.after)[1]
        assert f"\nThing {number}\nIt is in place {number}. So it is." in example.context
        documents = re.findall(r"^Document (\d+):$", example.context, re.M)
        assert documents == [str(i) for i in range(1, len(documents) + 1)]


@pytest.mark.parametrize("name", ["ruler-niah_single_2", "ruler-qa_1", "babilong-qa1"])
def test_too_short_lengths_are_refused(name: str, setting: Setting) -> None:
    with pytest.raises(ConfigError, match=r"no room|has no room"):
        examples(name, setting, 1, 300)


@pytest.mark.parametrize("number", range(1, 11))
def test_babilong_hides_the_facts_in_order(number: int, setting: Setting) -> None:
    name = f"babilong-qa{number}"
    found = examples(name, setting, 9, LENGTH)
    assert len(found) == 2
    asked = {example.after.split("Question: ")[1]: example for example in found}
    mary = asked["Where is Mary?"]
    assert 0 <= mary.context.index("Mary moved to the garden.") < mary.context.index("John went to the office.")
    assert mary.references == ("garden",)
    assert mary.before.endswith("\n\n<context>\n")
    room = setting.room(name, LENGTH, mary.before, mary.after, max_new_tokens=20)
    assert 0.9 * room < setting.num_tokens(mary.context) <= room


def test_a_damaged_story_is_not_asked_about(setting: Setting) -> None:
    good = "1 Mary went home.\n2 Where is Mary?\thome\t1"
    damaged = "1 John took the milk.\nJohn went out.\n3 Where is John?\tout\t2\n1x Ann slept.\n2 Where is Ann?\tbed\t1"
    assert setting.data is not None
    (setting.data / f"{FILES[0]}_test.txt").write_text(f"{damaged}\n{good}")
    (example,) = examples("babilong-qa1", setting, length=LENGTH)
    assert example.after.endswith("Where is Mary?")
    assert "3 Where" not in example.context
    assert "facts in front of it are missing" in " ".join(setting.notes)
    assert "4 of 7 rows up to here are left out." in setting.notes


def test_babilong_counts_other_places_as_wrong() -> None:
    places = ("garden", "office")
    assert scored("babilong-qa1", "Mary is in the garden.", "garden", choices=places) == 1
    assert scored("babilong-qa1", "In the garden or the office.", "garden", choices=places) == 0


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rouge", None)
    with pytest.raises(ConfigError, match=r"needs the package rouge: pip install '\.\[eval\]' in a clone"):
        metrics.rouge_l("a", ["b"])


def test_prompts_have_one_place_for_the_text() -> None:
    prompted: list[Task] = [task for task in registry().values() if isinstance(task, benchmark.Prompted)]
    assert all(task.about["prompt"].count("{context}") == 1 for task in prompted)  # type: ignore[attr-defined]
