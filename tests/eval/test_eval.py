"""An evaluation finds what the model's own logits say."""

from __future__ import annotations

import json
import re
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from localllm import LLM, SamplingParams
from localllm.cli.app import program
from localllm.errors import InvalidRequest
from localllm.eval import Choice, Match, Text, divergence, evaluate, read_tasks
from tests.tiny_model import write_tiny_model

HI = ({"role": "user", "content": "hi"},)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(str(folder), max_batch=4) as model:
        yield model


def log_probs(llm, ids):
    """float64 [T - 1]: of each token after the first."""
    logits = llm.logits(ids)[:-1].astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    normal = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return normal[np.arange(len(ids) - 1), ids[1:]]


def greedy_answer(llm, prompt, count):
    return llm.generate(prompt, SamplingParams(temperature=0, max_tokens=count)).text


class TestTexts:
    def test_the_loss_is_the_mean_over_all_predicted_tokens(self, llm):
        texts = ["hello there", "a", "something longer than the others"]
        report = evaluate(llm, [Text(text) for text in texts])
        each = [log_probs(llm, llm.tokenizer.encode(text)) for text in texts if len(text) > 1]
        wanted = -np.concatenate(each)
        assert report.perplexity.tokens == len(wanted)
        assert report.perplexity.texts == 3
        assert report.perplexity.loss == pytest.approx(wanted.mean(), abs=1e-5)
        assert report.perplexity.perplexity == pytest.approx(np.exp(wanted.mean()), rel=1e-5)
        assert report.perplexity.error == pytest.approx(wanted.std() / len(wanted) ** 0.5, rel=1e-4)

    def test_each_window_is_predicted_from_its_own_beginning(self, llm):
        ids = llm.tokenizer.encode("abcdefghijk")
        report = evaluate(llm, [Text("abcdefghijk")], window=4)
        parts = [log_probs(llm, ids[at : at + 4]) for at in (0, 4, 8)]
        assert report.perplexity.tokens == 3 + 3 + 2
        assert report.perplexity.loss == pytest.approx(-np.concatenate(parts).mean(), abs=1e-5)

    def test_a_window_that_predicts_nothing_is_refused(self, llm):
        with pytest.raises(InvalidRequest, match="window of 1"):
            evaluate(llm, [Text("abc")], window=1)


class TestChoices:
    def test_the_likeliest_continuation_is_chosen(self, llm):
        prompt, choices = "which one", ("alpha", "b", "gamma rays")
        start = len(llm.tokenizer.encode(prompt))
        sums = [
            log_probs(llm, llm.tokenizer.encode(f"{prompt} {choice}"))[start - 1 :].sum()
            for choice in choices
        ]
        best = int(np.argmax(sums))
        even = int(np.argmax([s / len(c) for s, c in zip(sums, choices, strict=True)]))
        assert best != even, "the two ways of scoring should be told apart"
        for answer in range(3):
            found = evaluate(llm, [Choice(prompt, choices, answer)]).choices
            assert (found.count, found.correct, found.normalized) == (
                1,
                answer == best,
                answer == even,
            )

    def test_in_a_chat_a_choice_begins_where_the_answer_does(self, llm):
        ids = llm.chat_prompt(HI)
        sums = [log_probs(llm, [*ids, *choice])[len(ids) - 1 :].sum() for choice in (b"xy", b"zz")]
        found = evaluate(llm, [Choice(HI, ("xy", "zz"), int(np.argmax(sums)))]).choices
        assert found.correct == 1


class TestMatches:
    def test_an_answer_matches_as_a_whole_and_a_pattern_anywhere(self, llm):
        said = greedy_answer(llm, "x", 4)
        tasks = [
            Match("x", answers=("never", f" {said}\n")),
            Match("x", answers=(said + "more",)),
            Match("x", pattern=re.compile(re.escape(said[1:]))),
            Match("x", pattern=re.compile("never")),
        ]
        assert evaluate(llm, tasks, max_tokens=4).matches.correct == 2

    def test_the_dot_of_a_pattern_spans_lines(self):
        assert Match("x", pattern=re.compile("a.b", re.DOTALL)).holds("a\nb")


class TestDivergence:
    def test_it_is_that_of_the_two_distributions(self):
        random = np.random.default_rng(0)
        base, model = (random.normal(size=(5, 7)).astype(np.float32) for _ in range(2))
        p, q = (np.exp(x.astype(np.float64)) for x in (base, model))
        p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
        each = (p * np.log(p / q)).sum(-1)
        found = divergence(lambda ids: base[: len(ids)], lambda ids: model[: len(ids)], [[0] * 5])
        assert found.tokens == 5
        assert found.mean == pytest.approx(each.mean())
        assert found.largest == pytest.approx(each.max())
        assert found.same_top == np.mean(base.argmax(-1) == model.argmax(-1))

    def test_a_model_is_no_way_from_itself_and_some_from_another(self, llm, tmp_path):
        texts = [Text("some text to compare on")]
        assert evaluate(llm, texts, base=llm).divergence.mean == 0
        assert evaluate(llm, texts).divergence is None
        with LLM(str(write_tiny_model(tmp_path / "other", rope_theta=50.0))) as other:
            found = evaluate(llm, texts, base=other).divergence
        assert found.tokens == len(texts[0].text)
        assert found.mean > 1e-4

    def test_other_vocabularies_cannot_be_compared(self, llm, tmp_path):
        folder = write_tiny_model(tmp_path / "wide", vocab_size=300)
        with LLM(str(folder)) as other, pytest.raises(InvalidRequest, match="vocabulary of 300"):
            evaluate(llm, [Text("abc")], base=other)


class TestReading:
    def test_every_kind_of_line_is_told_apart(self, tmp_path):
        path = tmp_path / "tasks.jsonl"
        rows = [
            {"text": "abc"},
            {"prompt": "p", "choices": ["x", "y"], "answer": "y"},
            {"question": "q", "choices": ["x", "y"], "answer": "a"},
            {"prompt": "p", "choices": ["x", "y"], "answer": 1},
            {"messages": [*HI], "answer": "z"},
            {"prompt": "p", "answers": ["u", "v"]},
            {"prompt": "p", "answer": 7},
            {"prompt": "p", "pattern": "^a"},
        ]
        path.write_text("\n\n".join(map(json.dumps, rows)))
        assert read_tasks(path) == [
            Text("abc"),
            Choice("p", ("x", "y"), 1),
            Choice("q", ("x", "y"), 0),
            Choice("p", ("x", "y"), 1),
            Match(HI, ("z",)),
            Match("p", ("u", "v")),
            Match("p", ("7",)),
            Match("p", pattern=re.compile("^a", re.DOTALL)),
        ]
        assert len(read_tasks(path, limit=3)) == 3

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ("[1]", "a JSON object"),
            ("{", "no JSON"),
            ('{"prompt": "p"}', "neither"),
            ('{"text": ""}', '"text"'),
            ('{"prompt": "p", "choices": ["x"], "answer": 0}', "two strings or more"),
            ('{"prompt": "p", "choices": ["x", "y"], "answer": 2}', "one of the 2 choices"),
            ('{"prompt": "p", "choices": ["x", "y"], "answer": true}', "one of the 2 choices"),
            ('{"prompt": "p", "pattern": "("}', "no regular expression"),
            ('{"messages": "hi", "answer": "a"}', '"messages"'),
            ('{"answer": "a"}', "missing"),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path, line, reason):
        path = tmp_path / "tasks.jsonl"
        path.write_text('{"text": "fine"}\n' + line + "\n")
        with pytest.raises(InvalidRequest, match=re.escape(reason)) as error:
            read_tasks(path)
        assert f"{path}:2:" in str(error.value)

    def test_a_file_that_cannot_be_used_is_named(self, tmp_path):
        with pytest.raises(InvalidRequest, match="cannot be read"):
            read_tasks(tmp_path / "none.jsonl")
        (tmp_path / "empty.jsonl").write_text("\n")
        with pytest.raises(InvalidRequest, match="no line"):
            read_tasks(tmp_path / "empty.jsonl")
        (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
        with pytest.raises(InvalidRequest, match="UTF-8"):
            read_tasks(tmp_path / "latin.jsonl")


class TestCommand:
    def test_it_prints_a_table_or_json(self, folder, tmp_path):
        path = tmp_path / "tasks.jsonl"
        path.write_text('{"text": "hello"}\n{"prompt": "p", "choices": ["x", "y"], "answer": 0}\n')
        table = CliRunner().invoke(program(), ["evaluate", str(folder), str(path)])
        assert table.exit_code == 0, table.output
        assert "perplexity" in table.stdout
        assert "choices" in table.stdout
        assert "answers" not in table.stdout
        printed = CliRunner().invoke(
            program(), ["evaluate", str(folder), str(path), "--base", str(folder), "--json"]
        )
        report = json.loads(printed.stdout)
        assert report["perplexity"]["tokens"] == 4
        assert report["divergence"]["mean"] == 0
        assert report["matches"] is None


class TestHarness:
    @pytest.fixture
    def harness(self, llm, monkeypatch):
        """With the one class of lm-evaluation-harness that ours builds on."""
        for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["lm_eval.api.model"].LM = object
        monkeypatch.delitem(sys.modules, "localllm.eval.lm_eval", raising=False)
        from localllm.eval.lm_eval import Harness

        yield Harness(llm)
        del sys.modules["localllm.eval.lm_eval"]

    def asked(self, *args):
        return SimpleNamespace(args=args)

    def test_likelihoods_are_those_of_the_logits(self, llm, harness):
        ids = llm.tokenizer.encode("ab cde")
        ((found, greedy),) = harness.loglikelihood([self.asked("ab", " cde")])
        assert found == pytest.approx(log_probs(llm, ids)[1:].sum(), abs=1e-4)
        best = llm.logits(ids)[1:-1].argmax(-1)
        assert greedy == (list(best) == ids[2:])
        continued = "ab" + greedy_answer(llm, "ab", 1)
        assert harness.loglikelihood([self.asked("ab", continued[2:])])[0][1]

    def test_rolling_likelihood_spans_the_context(self, llm, harness):
        text = "x" * 300  # longer than the context of 256
        ids = llm.tokenizer.encode(text)
        wanted = log_probs(llm, ids[:255]).sum() + log_probs(llm, ids[255:]).sum()
        assert harness.loglikelihood_rolling([self.asked(text)]) == [
            pytest.approx(wanted, abs=1e-2)
        ]

    def test_generation_ends_where_it_should(self, llm, harness):
        whole = greedy_answer(llm, "x", 8)
        until = whole[3]
        asked = [self.asked("x", {"until": [until], "max_gen_toks": 8, "do_sample": False})]
        assert harness.generate_until(asked) == [whole.split(until)[0]]
        with pytest.raises(InvalidRequest, match="beams"):
            harness.generate_until([self.asked("x", {"beams": 3})])
