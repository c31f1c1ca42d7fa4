"""Detokenizing one token at a time gives what decoding them together gives."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.errors import InvalidRequest
from localllm.tokenizer import StreamDecoder, Tokenizer

TEXT = "naïve 👩‍👩‍👧 中文 e\u0301 👍🏽 \u202eabc"


@pytest.fixture(params=["smollm2", "gemma3"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(f"{request.param}_tokenizer")
    return found


def streamed(tokenizer: Tokenizer, ids: list[int], *, skip_special: bool = True) -> str:
    stream = tokenizer.stream(skip_special=skip_special)
    return "".join([*(stream.push(i) for i in ids), stream.finish()])


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_random_ids_stream_to_their_decoding(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(f"{name}_tokenizer")
    # Low ids are control and byte tokens, the ones that are hard to join.
    ids = st.lists(st.integers(0, 600) | st.integers(0, tokenizer.vocab_size + 100), max_size=40)

    @given(ids, st.booleans())
    def check(drawn: list[int], skip: bool) -> None:
        whole = tokenizer.decode(drawn, skip_special=skip)
        assert streamed(tokenizer, drawn, skip_special=skip) == whole

    check()


@given(st.lists(st.binary(max_size=5), max_size=20), st.booleans())
def test_any_bytes_stream_to_their_utf8_decoding(pieces: list[bytes], strips: bool) -> None:
    stream = StreamDecoder(lambda i: pieces[i], strips_space=strips)
    out = [*(stream.push(i) for i in range(len(pieces))), stream.finish()]
    data = b"".join(pieces)
    assert "".join(out) == (data.removeprefix(b" ") if strips else data).decode("utf-8", "replace")


@given(st.text(max_size=40))
def test_no_piece_ever_ends_inside_a_character(text: str) -> None:
    data = text.encode()
    stream = StreamDecoder(lambda i: data[i : i + 1], strips_space=False)
    out = ""
    for i in range(len(data)):
        out += stream.push(i)
        assert text.startswith(out)
    assert out + stream.finish() == text


def test_half_a_character_is_held_back_until_it_is_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT, add_special=False)
    stream = tokenizer.stream()
    pushed = [stream.push(i) for i in ids]
    assert "".join(pushed) == TEXT
    assert "\ufffd" not in "".join(pushed)
    assert stream.finish() == ""


def test_a_character_cut_off_at_the_end_becomes_a_replacement(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok 🜁", add_special=False)  # no vocabulary has it whole
    stream = tokenizer.stream()
    assert "".join(stream.push(i) for i in ids[:-1]) == "ok "
    assert stream.finish() == "\ufffd"


def test_control_tokens_are_skipped_or_spelled(smollm2_tokenizer: Tokenizer) -> None:
    ids = [1, *smollm2_tokenizer.encode("hi"), 2]
    assert smollm2_tokenizer.decode(ids) == "hi"
    assert smollm2_tokenizer.decode(ids, skip_special=False) == "<|im_start|>hi<|im_end|>"


def test_token_bytes_are_what_a_token_adds_to_the_text(
    smollm2_tokenizer: Tokenizer, gemma3_tokenizer: Tokenizer
) -> None:
    for tokenizer in (smollm2_tokenizer, gemma3_tokenizer):
        ids = tokenizer.encode(TEXT, add_special=False)
        assert b"".join(map(tokenizer.token_bytes, ids)) == TEXT.encode()
    assert gemma3_tokenizer.token_bytes(238) == b"\x00"
    assert gemma3_tokenizer.token_text(238) == "<0x00>"
    assert gemma3_tokenizer.token_bytes(138) == b"  "
    assert smollm2_tokenizer.token_bytes(2) == b"<|im_end|>"


def test_ids_beyond_the_vocabulary_have_no_text_and_negative_ones_are_refused(
    tokenizer: Tokenizer,
) -> None:
    beyond = tokenizer.vocab_size
    assert tokenizer.decode([beyond, beyond + 5000]) == ""
    assert tokenizer.token_text(beyond) == ""
    with pytest.raises(InvalidRequest, match="-1 is no token id"):
        tokenizer.decode([-1])


def test_a_token_costs_the_same_late_in_a_long_stream(smollm2_tokenizer: Tokenizer) -> None:
    stream = smollm2_tokenizer.stream()
    ids = smollm2_tokenizer.encode("word " * 100)
    start = time.perf_counter()
    for _ in range(200):
        for token_id in ids:
            stream.push(token_id)
    assert time.perf_counter() - start < 3  # 20,000 tokens; re-decoding would take minutes


def test_the_bytes_of_all_tokens_are_those_of_each(tokenizer: Tokenizer) -> None:
    table = tokenizer.all_token_bytes()
    assert len(table) == tokenizer.vocab_size
    for token_id in (*range(300), *range(1000, tokenizer.vocab_size, 997)):
        assert table[token_id] == tokenizer.token_bytes(token_id)
    ids = tokenizer.encode(TEXT, add_special=False)
    assert b"".join(table[i] for i in ids).decode() == TEXT
