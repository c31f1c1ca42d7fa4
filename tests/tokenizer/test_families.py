"""Five families: their conversations as transformers renders them, and their answers read back."""

from __future__ import annotations

import json
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localllm.errors import InvalidRequest
from localllm.tokenizer.answers import (
    FORMATS,
    AnswerParser,
    AnswerReader,
    Said,
    answer_format_of,
    named_format,
)
from localllm.tokenizer.call_bodies import ToolCall
from localllm.tokenizer.reasoning import reasoning_variables, with_reasoning
from localllm.tokenizer.tool_calls import MOST_CHARACTERS
from tests.examples import examples
from tests.tokenizer.conftest import Make
from tests.tokenizer.family_templates import ARGUMENTS, CHATS, FAMILIES, TOOLS, cases

GOLDEN = json.loads((Path(__file__).parent / "golden/families.json").read_text("utf-8"))
FORM_OF = {
    "gpt-oss": "harmony",
    "qwen3.5": "tags",
    "gemma4": "gemma4",
    "lfm2": "lfm2",
    "glm4.5": "tags",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_conversations_are_rendered_as_transformers_renders_them(family: str, build: Make) -> None:
    tokenizer = build(FAMILIES[family])
    bos = FAMILIES[family].special[0]
    compared = 0
    for case, expected in zip(cases(), GOLDEN, strict=True):
        name, chat, tools, more, options = case
        if name != family:
            continue
        rendered = tokenizer.render_spans(
            CHATS[chat],
            tools=TOOLS if tools else None,
            add_generation_prompt=more,
            bos_token=bos,
            **options,
        )
        today = datetime.now().strftime("%Y-%m-%d")
        assert rendered.text.replace(today, "YYYY-MM-DD") == expected["text"], case
        assert [list(span) for span in rendered.generated] == expected["spans"], case
        compared += 1
    assert compared >= 16


@pytest.mark.parametrize("family", FAMILIES)
def test_the_format_is_told_from_template_and_control_tokens(family: str, build: Make) -> None:
    tokenizer = build(FAMILIES[family])
    assert answer_format_of(tokenizer).name == FORM_OF[family]
    assert answer_format_of(tokenizer, "common").name == "common"
    with pytest.raises(InvalidRequest, match="no answer format 'xml'"):
        named_format("xml")


# ---- what the models write

CALL = ToolCall("weather", ARGUMENTS)
SPELLED = {
    "gpt-oss": "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant<|channel|>commentary"
    f" to=functions.weather <|constrain|>json<|message|>{json.dumps(ARGUMENTS)}",
    "qwen3.5": "<think>\nI look.</think>\n\n<tool_call>\n<function=weather>\n<parameter=city>\n"
    "Zürich\n</parameter>\n<parameter=days>\n[1, 2]\n</parameter>\n<parameter=exact>\ntrue\n"
    '</parameter>\n<parameter=place>\n{"lat": 47.4, "note": "x"}\n</parameter>\n</function>\n'
    "</tool_call>",
    "gemma4": '<|channel>thought\nI look.<channel|><|tool_call>call:weather{city:<|"|>Zürich<|"|>,'
    'days:[1,2],exact:true,place:{lat:47.4,note:<|"|>x<|"|>}}<tool_call|>',
    "lfm2": "<think>I look.</think><|tool_call_start|>[weather(city='Zürich', days=[1, 2], "
    'exact=True, place={"lat": 47.4, "note": "x"})]<|tool_call_end|>',
    "glm4.5": "\n<think>I look.</think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>"
    "Zürich</arg_value>\n<arg_key>days</arg_key>\n<arg_value>[1, 2]</arg_value>\n<arg_key>exact"
    "</arg_key>\n<arg_value>true</arg_value>\n<arg_key>place</arg_key>\n<arg_value>"
    '{"lat": 47.4, "note": "x"}</arg_value>\n</tool_call>',
}


def read(form: str, text: str, cuts: list[int] = [], end: str = "") -> tuple[Any, ...]:  # noqa: B006
    parser = AnswerParser(FORMATS[form], ("weather", "now"), prompt_end=end)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    said = Said()
    for a, b in pairwise(places):
        said += parser.feed(text[a:b])
    said += parser.finish()
    calls = [(call.name, call.arguments) for call in parser.calls]
    return said.text, said.reasoning, calls, list(parser.notes)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=examples(25))
@given(cuts=st.lists(st.integers(0, 400), max_size=12))
def test_reasoning_and_a_call_are_read_however_the_answer_is_cut(
    family: str, cuts: list[int]
) -> None:
    told = read(FORM_OF[family], SPELLED[family], cuts)
    assert told == ("", "I look.", [("weather", ARGUMENTS)], [])


@pytest.mark.parametrize(
    ("form", "text", "calls"),
    [
        ("lfm2", "<|tool_call_start|>[now(), weather(city='a]\\'b')]<|tool_call_end|>",
         [("now", {}), ("weather", {"city": "a]'b"})]),
        ("lfm2", '<|tool_call_start|>[{"name": "now", "arguments": {}}]<|tool_call_end|>',
         [("now", {})]),
        ("lfm2", "<|tool_call_start|>[a.b(x=-1.5, y=(None, false), z={})]<|tool_call_end|>",
         [("a.b", {"x": -1.5, "y": [None, False], "z": {}})]),
        ("gemma4", "<|tool_call>call:now{}<tool_call|><|tool_call>call:now{}<tool_call|>",
         [("now", {}), ("now", {})]),
        ("gemma4", '<|tool_call>call:weather{city:<|"|>a}, <tool_call|> "b"<|"|>,n:null,'
         'deep:{<|"|>k<|"|>:[ ]} }<tool_call|>',
         [("weather", {"city": 'a}, <tool_call|> "b"', "n": None, "deep": {"k": []}})]),
        ("tags", "<tool_call>now</tool_call>", [("now", {})]),
        ("tags", "<tool_call>weather<arg_key>city</arg_key><arg_value>{a} [b]</arg_value>"
         "</tool_call>", [("weather", {"city": "{a} [b]"})]),
        ("harmony", "<|channel|>commentary to=functions.now<|message|>{}", [("now", {})]),
    ],
)  # fmt: skip
@settings(max_examples=examples(25))
@given(cuts=st.lists(st.integers(0, 200), max_size=8))
def test_calls_in_the_forms_of_each_family(
    form: str, text: str, calls: list[Any], cuts: list[int]
) -> None:
    assert read(form, text, cuts) == ("", "", calls, [])


@pytest.mark.parametrize(
    ("form", "body"),
    [
        ("lfm2", "[weather(__import__('os').system('true'))]"),
        ("lfm2", "[weather(city=open('/etc/passwd').read())]"),
        ("lfm2", "[weather(city=[x for x in (1,)])]"),
        ("lfm2", "[weather(**{'city': 1})]"),
        ("lfm2", "[weather(city=f'{1}')]"),
        ("lfm2", "[weather(city=1e999)]"),
        ("lfm2", "[weather(city='it's')]"),
        ("lfm2", "(" * 5000),
        ("lfm2", "-" * 5000 + "1"),
        ("gemma4", "call:weather{city:Zürich}"),
        ("gemma4", "call:weather{city:" + "[" * 500),
        ("gemma4", "weather"),
        ("tags", "weather<arg_key>city</arg_key>"),
        ("tags", "nothing of that name"),
        ("tags", '{"name": "weather", "arguments": [1]}'),
    ],
)
@settings(max_examples=examples(10))
@given(cuts=st.lists(st.integers(0, 200), max_size=8))
def test_a_call_that_cannot_be_read_is_text_with_a_note_and_nothing_is_run(
    form: str, body: str, cuts: list[int]
) -> None:
    (mark,) = FORMATS[form].calls
    close = {"lfm2": "<|tool_call_end|>", "gemma4": "<tool_call|>", "tags": "</tool_call>"}[form]
    whole = f"So:\n{mark}{body}{close} and on"
    text, reasoning, calls, notes = read(form, whole, cuts)
    assert (text, reasoning, calls) == (whole, "", [])
    assert len(notes) == 1
    assert "could not be read" in notes[0]


@pytest.mark.parametrize(
    ("text", "shown", "note"),
    [
        ("<|channel|>analysis<|end|><|start|>assistant<|channel|>final<|message|>a",
         "<|channel|>analysisa", "header could not be read"),
        ("<|channel|>" + "x" * 600 + "<|message|>a", "<|channel|>" + "x" * 600 + "<|message|>a",
         "header could not be read"),
        ("plain <|message|> text", "plain <|message|> text", None),
        ("<|channel|>commentary to=functions.now<|message|>{x", "{x", "a call of now"),
        ("<|channel|>fin", "", "ended inside of a message's header"),
    ],
)  # fmt: skip
@settings(max_examples=examples(25))
@given(cuts=st.lists(st.integers(0, 700), max_size=8))
def test_harmony_that_cannot_be_read_is_text_with_a_note(
    text: str, shown: str, note: str | None, cuts: list[int]
) -> None:
    told, reasoning, calls, notes = read("harmony", text, cuts)
    assert (told, reasoning, calls) == (shown, "", [])
    assert [note in given for given in notes] == ([True] if note else [])


PIECES = st.sampled_from(
    [
        *("<|tool_call>", "<tool_call|>", '<|"|>', "call:f", "{a:", "}", "<|channel>thought\n"),
        *("<channel|>", "<|tool_call_start|>", "<|tool_call_end|>", "[f(x=", "'", ")]", "now"),
        *("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>"),
        *("<arg_value>", "</arg_value>", "<function=f>", "</function>", "<|channel|>", "final"),
        *("<|message|>", "<|start|>", "<|end|>", " to=functions.now", "{}", " ", "<", "<|", "a"),
    ]
)


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=examples(60))
@given(st.lists(PIECES, max_size=16), st.lists(st.integers(0, 300), max_size=10))
def test_the_way_an_answer_is_cut_changes_nothing(
    form: str, pieces: list[str], cuts: list[int]
) -> None:
    text = "".join(pieces)
    whole = read(form, text)
    assert read(form, text, cuts) == whole
    assert read(form, text, list(range(len(text)))) == whole


@pytest.mark.parametrize("form", ["gemma4", "lfm2", "tags"])
def test_a_call_without_an_end_is_bounded(form: str) -> None:
    (mark,) = FORMATS[form].calls
    parser = AnswerParser(FORMATS[form], ("now",))
    parser.feed(mark)
    shown = "".join(parser.feed("x" * 4096).text for _ in range(MOST_CHARACTERS // 4096 + 2))
    assert len(shown) > MOST_CHARACTERS
    assert parser.notes


def test_without_tools_calls_are_text_and_reasoning_is_told_all_the_same() -> None:
    parser = AnswerParser(FORMATS["tags"], None, prompt_end="<think>\n")
    said = parser.feed("hm</think><tool_call>now</tool_call>") + parser.finish()
    assert said == Said("<tool_call>now</tool_call>", "hm")


def test_control_tokens_that_mark_parts_are_spelled_for_the_parser(build: Make) -> None:
    tokenizer = build(FAMILIES["gemma4"])
    prompt = tokenizer.encode("<|turn>model\n", add_special=False, parse_special=True)
    answer = tokenizer.encode(SPELLED["gemma4"], add_special=False, parse_special=True)
    reader = AnswerReader(tokenizer, answer_format_of(tokenizer), prompt, ("weather",))
    stream, parser = reader.detokenizer(), reader.parser()
    said = Said()
    for token in answer:
        said += parser.feed(stream.push(token))
    said += parser.feed(stream.finish()) + parser.finish()
    assert said == Said("", "I look.")
    assert [(call.name, call.arguments) for call in parser.calls] == [("weather", ARGUMENTS)]


# ---- how much it reasons


@pytest.mark.parametrize(
    ("family", "wish", "variables"),
    [
        ("gpt-oss", "low", {"reasoning_effort": "low"}),
        ("gpt-oss", None, {}),
        ("qwen3.5", "off", {"enable_thinking": False}),
        ("gemma4", "on", {"enable_thinking": True}),
        ("glm4.5", "off", {"enable_thinking": False}),
    ],
)
def test_a_wish_becomes_the_templates_own_variable(
    family: str, wish: Any, variables: dict[str, Any]
) -> None:
    assert reasoning_variables(FAMILIES[family].template, wish) == variables


@pytest.mark.parametrize(
    ("family", "wish", "hint"),
    [
        ("gpt-oss", "off", "low, medium, high"),
        ("qwen3.5", "high", "on, off"),
        ("lfm2", "on", "no option"),
        ("lfm2", "most", None),
    ],
)
def test_a_wish_that_the_template_does_not_know_is_refused(
    family: str, wish: Any, hint: str | None
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        reasoning_variables(FAMILIES[family].template, wish)
    assert (hint or "") in (refused.value.hint or "")


def test_a_wish_and_its_variable_are_not_given_both() -> None:
    template = FAMILIES["qwen3.5"].template
    assert with_reasoning(template, "off", {"x": 1}) == {"x": 1, "enable_thinking": False}
    with pytest.raises(InvalidRequest, match="contradict each other"):
        with_reasoning(template, "off", {"enable_thinking": True})


def test_harmony_ends_at_a_return_or_a_call_and_not_at_the_end_of_a_message(build: Make) -> None:
    tokenizer = build(FAMILIES["gpt-oss"])
    ends = {tokenizer.special_id("<|return|>"), tokenizer.special_id("<|call|>")}
    assert ends <= tokenizer.eos_ids
    assert tokenizer.special_id("<|end|>") not in tokenizer.eos_ids
