"""Tokens to text, one after another: joined, the pieces are what the tokenizer makes of all tokens at once."""

from __future__ import annotations

import time

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import byte_tokenizer, random_ids
from focusllm.documents.detokenizer import Detokenizer, decode_ids

CODE = "def f():\n    return 1\n\n  # done\n"
MIXED = "Two words, 世界 and café 🐋.\n\n Next\t  one."


def spaced_tokenizer(words: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """As Llama 2's: spaces are part of the token behind them, characters that are not known are bytes."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyz():,.#1"] if words else ["▁"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": byte + 3 for byte in range(256)}}
    vocab |= {name: 259 + i for i, name in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As newer conversions of SentencePiece: a decoder that takes the space off the first token."""
    fast = spaced_tokenizer(("letters",))
    backend = fast.backend_tokenizer
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "bytes": byte_tokenizer,
    "byte fallback": spaced_tokenizer,
    "letters and bytes": lambda: spaced_tokenizer(("letters",)),
    "metaspace": metaspace_tokenizer,
}


def streamed(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", [CODE, MIXED * 5, "  two spaces first", "\ufffd\ufffd ok", "no end: \U0001f40b", " "])
def test_pieces_are_the_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)
    # Behind a control token a text does not begin: its first space stays.
    around = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *ids]
    assert "".join(streamed(tokenizer, around)) == tokenizer.decode(around, skip_special_tokens=True)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_of_any_tokens_are_their_text(name: str) -> None:
    """Bytes that make no characters among them."""
    tokenizer = TOKENIZERS[name]()
    for seed in range(20):
        ids = random_ids(150, seed, len(tokenizer))
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_text_is_handed_on_at_once() -> None:
    pieces = streamed(byte_tokenizer(), byte_tokenizer()("a 世.", add_special_tokens=False).input_ids)
    assert pieces == ["a", " ", "", "", "世", ".", ""]


def test_the_cost_of_a_token_does_not_grow() -> None:
    """Four times as many tokens take about four times as long, not sixteen times."""

    def seconds(count: int) -> float:
        tokenizer, ids = byte_tokenizer(), [223 + i % 3 for i in range(count)]
        start = time.process_time()
        streamed(tokenizer, ids)
        return time.process_time() - start

    seconds(100)
    assert seconds(8000) < 8 * seconds(2000)


@pytest.mark.parametrize("text", ["Two words, 世界 and café 🐋.\n\nNext.", "\ufffd\ufffd ok", "no end: \U0001f40b"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_token_ids_give_the_text_that_they_were_made_of(text: str, name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    made, spans = decode_ids(tokenizer, ids)
    assert made == tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert len(spans) == len(ids)
    assert [start for start, _ in spans] == sorted(start for start, _ in spans)
    assert (spans[0][0], spans[-1][1]) == (0, len(text))
    if name == "bytes":
        first = text.encode()[: len(ids) // 2]  # perhaps within a character
        assert decode_ids(tokenizer, ids[: len(first)])[0] == first.decode(errors="replace")
