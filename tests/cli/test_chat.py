"""`localllm chat`, line by line: the conversation grows, commands work, errors lose nothing."""

from __future__ import annotations

from localllm import LLM, SamplingParams

OPTIONS = ("--temperature", 0, "--max-tokens", 6)


def answers(tiny, *questions: str, system: str | None = None) -> list[str]:
    """The library's answers to a growing conversation."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    texts = []
    with LLM(str(tiny)) as llm:
        for question in questions:
            messages.append({"role": "user", "content": question})
            result = llm.chat(messages, SamplingParams(temperature=0, max_tokens=6))
            messages.append({"role": "assistant", "content": result.text})
            texts.append(result.text)
    return texts


def test_each_answer_sees_the_conversation_so_far(localllm, tiny):
    done = localllm("chat", tiny, *OPTIONS, stdin="hello\nand then?\n")
    assert done.returncode == 0
    assert done.stdout == "".join(f"{t}\n" for t in answers(tiny, "hello", "and then?"))


def test_reset_forgets_and_system_starts_anew(localllm, tiny):
    done = localllm("chat", tiny, *OPTIONS, stdin="hello\n/reset\nhello\n/system be kind\nhello\n")
    plain, kind = answers(tiny, "hello"), answers(tiny, "hello", system="be kind")
    assert done.stdout == "".join(f"{t}\n" for t in [*plain, *plain, *kind])


def test_retry_answers_the_same_message_again(localllm, tiny):
    done = localllm(
        "chat", tiny, *OPTIONS, stdin="/retry\nhello\n/retry\n/stats\n/exit\nnot said\n"
    )
    assert done.stdout == 2 * f"{answers(tiny, 'hello')[0]}\n"
    assert "nothing to retry" in done.stderr
    assert "6 new tokens" in done.stderr


def test_several_lines_make_one_message(localllm, tiny):
    done = localllm("chat", tiny, *OPTIONS, stdin='"""\none\ntwo\n"""\n')
    assert done.stdout == f"{answers(tiny, chr(10).join(['one', 'two']))[0]}\n"


def test_a_message_too_long_is_refused_and_the_conversation_goes_on(localllm, tiny):
    done = localllm(
        "chat", tiny, *OPTIONS, "--context", 64, stdin=f"{'x' * 100}\nhello\n/nonsense\n"
    )
    assert done.returncode == 0
    assert "context holds 64" in done.stderr
    assert "no command /nonsense" in done.stderr
    assert done.stdout == f"{answers(tiny, 'hello')[0]}\n"
