from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.errors import InvalidRequest
from localllm.tui.templates import MOST, fill, to_ask

NOON = 1_700_000_000.0


def test_variables_are_asked_for_once_in_order():
    text = "To {{language}}: {{ text }}. Again {{language=French}}, {{date}} {{time}}"
    assert to_ask(text) == {"language": "French", "text": ""}
    assert list(to_ask(text)) == ["language", "text"]


def test_the_date_fills_itself():
    filled = fill("{{date}} {{weekday}}", {}, now=NOON)
    assert filled == "2023-11-14 Tuesday"


def test_a_variable_without_a_value_is_named():
    with pytest.raises(InvalidRequest, match="language"):
        fill("To {{language}}", {})


@given(st.text())
def test_what_is_filled_in_is_not_looked_at_again(value):
    assert fill("<{{x}}|{{x}}>", {"x": value}) == f"<{value}|{value}>"
    assert fill("{{x}}", {"x": "{{y}}", "y": "no"}) == "{{y}}"


@given(st.text(alphabet="{}ab=_ \n").filter(lambda text: not to_ask(text)))
def test_text_without_variables_stays(text):
    assert fill(text, {}) == text


def test_too_many_variables_are_refused():
    text = "".join(f"{{{{v{number}}}}}" for number in range(MOST + 1))
    with pytest.raises(InvalidRequest, match="33"):
        to_ask(text)


def test_a_filled_prompt_is_bounded():
    with pytest.raises(InvalidRequest, match="characters"):
        fill("{{x}}" * 3, {"x": "a" * 100_000})
