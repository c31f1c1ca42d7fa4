"""Templates do what transformers' do, explain what is wrong, and cannot do harm."""

from __future__ import annotations

import json
import threading
import time
import tracemalloc
from datetime import datetime
from typing import Any

import pytest

from localllm.errors import TemplateError
from localllm.tokenizer import sandbox
from localllm.tokenizer.template import ChatTemplate

USER = {"messages": [{"role": "user", "content": "hi"}]}


def render(source: str, **variables: Any) -> str:
    return ChatTemplate(source).render({**USER, **variables}).text


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ {'a': [1, 2.5, None, True], 'b': 'é <&>\"'} | tojson }}",
         '{"a": [1, 2.5, null, true], "b": "é <&>\\""}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=2) }}", '{\n  "b": 1,\n  "a": 2\n}'),
        ("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=True) }}",
         '{"a":2,"b":1}'),
        ("{{ 'é' | tojson(ensure_ascii=true) }}", '"\\u00e9"'),
        ("{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}"
         "{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("{% set ns = namespace(n=0) %}{% for m in 'abc' %}{% set ns.n = ns.n + 1 %}"
         "{% endfor %}{{ ns.n }}", "3"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a') ~ f(1) }}", "<a><1>"),
        ("a\n    {% if true %}\n  b\n    {% endif %}\nc", "a\n  b\nc"),
        ("{{ 'a,b'.split(',')[-1] }}{{ ' x '.strip() }}{{ 'abc'[::-1] }}", "bxcba"),
        ("{{ 'x' * 3 + 'y' }}{{ '%s-%d' % ('a', 2) }}{{ '{}!'.format('b') }}", "xxxya-2b!"),
        ("{{ ['a', 'b'] | join(', ') }}{{ ', '.join(['c', 'd']) }}", "a, bc, d"),
        ("{{ messages | map(attribute='role') | list }}", "['user']"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ missing is defined }}{{ none is none }}{{ missing }}", "FalseTrue"),
        ("{{ 'ab' | replace('a', 'c') | upper | trim }}{{ 'a\nb' | indent(2) }}", "CBa\n  b"),
        ("{% set x %}in {{ 1 }}{% endset %}{{ x }}{{ x | length }}", "in 14"),
        ("{{ (messages + [{'role': 'x'}])[1].role }}{{ messages[0].items() | list | length }}",
         "x2"),
        ("{% generation %}a{% endgeneration %}b", "ab"),
        ("{{ none }}{{ 2 ** 10 }}{{ 7 // 2 }}", "None10243"),
    ],
)  # fmt: skip
def test_templates_have_what_checkpoints_use(source: str, expected: str) -> None:
    assert render(source) == expected


def test_strftime_now_writes_todays_date() -> None:
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year)}


def test_tools_and_documents_are_plain_values() -> None:
    tool = {"name": "f", "parameters": {"x": "é"}}
    assert json.loads(render("{{ tools[0] | tojson }}", tools=[tool])) == tool


def test_generation_spans_are_those_of_the_text() -> None:
    source = "a{% generation %}bc{% endgeneration %}d{% generation %}{{ 'é' }}{% endgeneration %}"
    rendered = ChatTemplate(source).render(USER)
    assert rendered.text == "abcdé"
    assert rendered.generated == ((1, 3), (4, 5))


def test_no_text_can_pose_as_the_mark_of_a_generation_block() -> None:
    odd = "\U0010fffe x \U0010ffff \ue000("
    rendered = ChatTemplate("{% generation %}{{ x }}{% endgeneration %}").render({**USER, "x": odd})
    assert rendered.text == odd
    assert rendered.generated == ((0, len(odd)),)


# Errors


def test_a_templates_own_message_is_passed_on_with_the_roles_given() -> None:
    source = "{% if true %}\n{{ raise_exception('Conversation roles must alternate!') }}{% endif %}"
    messages = [{"role": role, "content": ""} for role in ("user", "user", "assistant")]
    with pytest.raises(TemplateError, match="roles must alternate!") as caught:
        render(source, messages=messages)
    assert "line 2" in str(caught.value)
    assert "user, user, assistant" in str(caught.value.hint)
    assert "take turns" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\nb\n{% if %}", r"does not parse: .*\(line 3\)"),
        ("{{ 'a' | nosuch }}", "does not parse: No filter named 'nosuch'"),
        ("x\n{{ 'a' + none }}", "TypeError.*line 2"),
        ("{{ nothing.at.all }}", "was not given: 'nothing' is undefined"),
        ("{% include 'x' %}", r"failed|stopped"),
        ("{{ " + "(" * 5000 + " }}", "does not parse|nests too deeply|does not compile"),
    ],
)
def test_errors_say_what_and_where(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        render(source)


# Hostile templates


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ range.__init__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ ('a').encode() }}",
        "{{ self.__init__ }}",
        "{% for x in ().__class__.__base__.__subclasses__() %}{% endfor %}",
    ],
)
def test_templates_cannot_reach_python(source: str) -> None:
    with pytest.raises(TemplateError, match=r"was stopped"):
        render(source)


BOMBS = {
    "wide loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "silent loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i %}"
    "{% endfor %}{% endfor %}",
    "filtered loops": "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}"
    "{% endfor %}",
    "long range": "{{ range(10 ** 12) | list }}",
    "range sum": "{{ range(10 ** 18) | sum }}",
    "times": "{{ 'a' * 10 ** 10 }}",
    "times list": "{{ ([0] * 10 ** 9) | length }}",
    "times reversed": "{{ 10 ** 10 * 'a' }}",
    "nested times": "{{ ('a' * 1000000) * 1000000 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "squares": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}"
    "{% endfor %}{{ n.x }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}",
    "adding": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}"
    "{% endfor %}",
    "doubling lists": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling blocks": "{% set n = namespace(x='a') %}{% for i in range(99) %}"
    "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "lists in lists": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "tuples compared": "{% set n = namespace(x=(1,), y=(1,)) %}{% for i in range(99) %}"
    "{% set n.x = (n.x, n.x) %}{% set n.y = (n.y, n.y) %}{% endfor %}{{ n.x == n.y }}",
    "dicts in dicts": "{% set n = namespace(x={}) %}{% for i in range(99) %}"
    "{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x | tojson }}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "output": "{% for i in range(100000) %}" + "x" * 10000 + "{% endfor %}",
    "captured output": "{% set x %}{% for i in range(100000) %}" + "x" * 10000
    + "{% endfor %}{% endset %}{{ x | length }}",
    "center": "{{ 'a'.center(10 ** 10) }}",
    "center filter": "{{ 'a' | center(10 ** 10) }}",
    "ljust often": "{% for i in range(1000) %}{{ 'a'.ljust(999999) }}{% endfor %}",
    "zfill": "{{ '1'.zfill(9 ** 12) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (10 ** 10, 1) }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "nested format": "{{ '{:>{}}'.format(1, 10 ** 10) }}",
    "format filter": "{{ '%9999999999d' | format(1) }}",
    "replace": "{{ ('a' * 999999).replace('a', 'a' * 999999) | length }}",
    "replace filter": "{{ ('a' * 999999) | replace('a', 'a' * 999999) | length }}",
    "join": "{{ ('a' * 999999).join('a' * 999999) | length }}",
    "join filter": "{{ range(999999) | join('a' * 999999) | length }}",
    "indent": "{{ ('\n' * 999999) | indent(999999) | length }}",
    "json indent": "{{ range(99999) | list | tojson(indent=999999) | length }}",
    "batch": "{{ [1] | batch(10 ** 12, 'x') | list | length }}",
    "slice": "{{ [1] | slice(10 ** 12) | list | length }}",
    "expandtabs": "{{ '\t\t'.expandtabs(10 ** 10) }}",
    "translate": "{{ ('a' * 99999).translate({97: 'a' * 999999}) }}",
    "kept slices": "{% set n = namespace(x=[]) %}{% set s = 'a' * 1000000 %}"
    "{% for i in range(99999) %}{% set n.x = n.x + [s[1:]] %}{% endfor %}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "call blocks": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 40 + "x" + "{% endcall %}" * 40,
    "long source": "x" * (2 << 20),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_ends_in_an_error_soon_and_in_little_memory(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.5)
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(TemplateError):
            render(BOMBS[name])
        assert time.perf_counter() - start < 5  # compiling, and one step past the limit
        assert tracemalloc.get_traced_memory()[1] < 500 << 20
    finally:
        tracemalloc.stop()


def test_limits_grow_with_the_conversation() -> None:
    messages = [{"role": "user", "content": "hello " * 20} for _ in range(3000)]
    source = (
        "{% set n = namespace(x='') %}{% for m in messages %}{% if messages | length > 1 %}"
        "{{ m.content | trim }}{% for k in messages[:3] %}{{ k.role }}{% endfor %}{% endif %}"
        "{% endfor %}"
    )
    assert len(render(source, messages=messages)) > 300_000


def test_one_template_renders_in_many_threads() -> None:
    template = ChatTemplate("{% for i in range(50) %}{{ word }}{% endfor %}")
    found: dict[int, str] = {}

    def work(i: int) -> None:
        found[i] = template.render({**USER, "word": str(i)}).text

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: str(i) * 50 for i in range(8)}
