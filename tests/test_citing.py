"""Citations of sentences, and what chooses chunks beside look-up heads: the words of the question."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch

from conftest import asked_about
from focusllm import FocusLLM
from focusllm.decoding.opened import choose, fused
from focusllm.decoding.request import OpenSpan, Watched
from focusllm.documents.citing import cite_sentences
from focusllm.documents.document import words_of
from focusllm.documents.sentences import LONGEST, sentence_starts
from focusllm.documents.words import WordIndex
from focusllm.memory.lookup import Looked

STORY = " ".join(f"Person {i} keeps thing {i * 7} in the {place}." for i, place in enumerate(["attic", "barn"] * 8))


@pytest.fixture
def opening_llm(tiny_llm: FocusLLM) -> FocusLLM:
    tiny_llm.model.focus_config = tiny_llm.config.replace(far_context="opened", open_tokens=48, chunk_overlap=4)
    return tiny_llm


def units(text: str) -> list[str]:
    starts = sentence_starts(text).tolist()
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("One. Two! Three?", ["One. ", "Two! ", "Three?"]),
        ("Mr. Bell saw J. Bell. He left.", ["Mr. Bell saw J. Bell. ", "He left."]),
        ('"Go." She went.', ['"Go." ', "She went."]),
        ("It cost 3.5 or so. it was said. Then", ["It cost 3.5 or so. it was said. ", "Then"]),
        ("a = 1\n  b = 2\nc = f(3)\nD", ["a = 1\n  ", "b = 2\n", "c = f(3)\n", "D"]),
        (
            f"A line of {'many ' * 8}words\nthat goes on. The next\nis short.",
            [f"A line of {'many ' * 8}words\nthat goes on. ", "The next\nis short."],
        ),
        ("key: 1\nother: 2", ["key: 1\n", "other: 2"]),
        ("Head\n\nBody", ["Head\n\n", "Body"]),
        ("他走了。她来了\uff01", ["他走了。", "她来了\uff01"]),
        ("", [""]),
    ],
)  # fmt: skip
def test_sentences(text: str, wanted: list[str]) -> None:
    assert units(text) == wanted


def test_what_has_no_end_is_cut() -> None:
    words = "word " * 500
    assert max(map(len, units(words))) <= LONGEST
    assert all(unit.endswith(" ") for unit in units(words))
    assert {len(unit) for unit in units("x" * (3 * LONGEST))} == {LONGEST}


def test_attention_to_tokens_becomes_attention_to_sentences(opening_llm: FocusLLM) -> None:
    """Against a count token by token, over two documents with an end in the local context each."""
    documents = [opening_llm.read_text(STORY, name="a"), opening_llm.read_text(STORY[:200], name="b")]
    asked = asked_about(opening_llm, documents, "Where?")
    assert asked.context.near
    rng = np.random.default_rng(0)
    last = len(asked.context.far)
    spans = [OpenSpan(0, 3, 20), OpenSpan(2, 0, 24), OpenSpan(last, 0, 5)]  # of the last one nothing is known
    first_near, count = 2, len(asked.context.token_ids) + 5
    text, ends = "Yes. No.", [2, 4, 8]  # "Ye", "s.", " No."
    watched = [
        Watched(spans, torch.tensor(rng.random(46), dtype=torch.float32), torch.tensor(rng.random(count)).float())
        for _ in ends
    ]
    seen: list[dict[tuple[int, int], float]] = []
    for step in watched:
        got: dict[tuple[int, int], float] = defaultdict(float)
        place = 0
        for span in spans[:2]:
            number, index = asked.context.far[span.chunk]
            for token in range(span.first, span.stop):
                end = documents[number].token_ends(index)[token]
                got[number, int((sentence_starts(documents[number].text) < end).sum())] += float(step.opened[place])
                place += 1
        for near in asked.context.near:
            first = documents[near.document].chunks[near.chunk].first_token
            for token in range(near.start, near.end):
                if first + token - near.start < documents[near.document].num_tokens:  # else it is the boundary
                    end = documents[near.document].token_ends(near.chunk)[token - near.start]
                    sentence = int((sentence_starts(documents[near.document].text) < end).sum())
                    got[near.document, sentence] += float(step.local[first_near + token])
        seen.append(got)
    cited, sentences = cite_sentences(asked.context, watched, first_near, text, ends)
    assert [(sentence.start, sentence.end) for sentence in sentences] == [(0, 4), (5, 8)]
    for found, steps in ((cited, [0, 1, 2]), (sentences[0].citations, [0, 1]), (sentences[1].citations, [2])):
        total: dict[tuple[int, int], float] = defaultdict(float)
        for step_number in steps:
            for key, weight in seen[step_number].items():
                total[key] += weight
        whole = sum(total.values())
        assert len(found) == len(total)
        for citation in found:
            document = documents[citation.document_index]
            sentence = int((sentence_starts(document.text) <= citation.start).sum())
            assert citation.weight == pytest.approx(total[citation.document_index, sentence] / whole, rel=1e-5)
            assert citation.text == document.text[citation.start : citation.end] == citation.text.strip()
        assert [c.weight for c in found] == sorted((c.weight for c in found), reverse=True)


def test_an_answer_cites_sentences(opening_llm: FocusLLM) -> None:
    document = opening_llm.read_text(STORY, name="story")
    answer = opening_llm.ask(document, "Where is thing 14?", max_new_tokens=24, eos_token_id=-1)
    assert sum(c.weight for c in answer.citations) == pytest.approx(1)
    known = {unit.strip() for unit in units(STORY)}
    assert {c.text for c in answer.citations} <= known
    for sentence in answer.sentences:
        assert answer.text[sentence.start : sentence.end].strip()
        assert sum(c.weight for c in sentence.citations) == pytest.approx(1)
    assert len(answer.to_dict(1)["citations"]) == 1
    assert all(len(sentence["citations"]) <= 1 for sentence in answer.to_dict(1)["sentences"])


def test_words_find_the_text_that_has_them() -> None:
    texts = ["the cat sat", "the dog barked at the cat", "a zebra, and the dog", "猫坐下了"]
    index = WordIndex(texts)
    assert index.scores("Where is the Zebra?").argmax() == 2
    assert index.scores("猫").argmax() == 3
    assert not index.scores("quantum").any()
    assert not WordIndex(["", "?!"]).scores("anything").any()
    cat = index.scores("cat")
    assert cat[0] > cat[1] > 0  # the shorter text first
    assert cat[2] == 0


def test_words_of_several_documents_are_counted_together_once(opening_llm: FocusLLM) -> None:
    a, b, c = (opening_llm.read_text(STORY + name, name=name) for name in ("aardvark", "bison", "cuckoo"))
    joint = words_of([a, b])
    assert words_of([a, b]) is joint
    assert words_of([a, c]) is not joint
    assert words_of([a]) is a.words
    assert words_of([a, c]).scores("cuckoo").argmax() == len(a.chunks) + len(c.chunks) - 1


def test_a_chunk_is_chosen_by_words_too(opening_llm: FocusLLM) -> None:
    filler = "The quick brown fox jumps. " * 3
    opening_llm.model.focus_config = opening_llm.config.replace(open_tokens=None)
    document = opening_llm.read_text(filler * 2 + "A zebra sleeps. " + filler * 2, name="fable")
    right = [i for i, text in enumerate(document.chunk_texts) if "zebra" in text]
    asked = asked_about(opening_llm, [document], "zebra")
    assert asked.word_scores is not None
    assert len(asked.word_scores) == len(asked.context.far)
    assert int(asked.word_scores.argmax()) in right
    num_chunks = len(asked.context.far)
    found = Looked([torch.ones(block.num_chunks, block.length) for block in asked.blocks], torch.ones(num_chunks))
    (span,) = choose(found, asked.blocks, opening_llm.config, 24, asked.word_scores)
    assert span.chunk in right
    assert torch.equal(fused(found.chunks, None), found.chunks)
    assert torch.equal(fused(found.chunks, torch.zeros(num_chunks)), found.chunks)
