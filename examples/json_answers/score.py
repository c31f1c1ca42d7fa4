"""Scores answers to the held-out reports, without an adapter and with one, in one batch.

python examples/json_answers/score.py [MODEL] [ADAPTER]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from localllm import LLM, SamplingParams

HELD_OUT = Path(__file__).parent / "held_out.jsonl"


def judge(answer: str, wanted: dict[str, Any]) -> tuple[bool, bool, bool]:
    """Whether the answer is JSON, has the right keys, and has every value right."""
    try:
        found = json.loads(answer)
    except ValueError:
        return False, False, False
    keys = isinstance(found, dict) and list(found) == list(wanted)
    return True, keys, keys and found == wanted


def score(llm: LLM, adapter: str | None) -> list[float]:
    """Shares of answers that are JSON, have the right keys, and are all right."""
    rows = [json.loads(line)["messages"] for line in HELD_OUT.read_text().splitlines()]
    prompts = [llm.chat_prompt(messages[:1]) for messages in rows]
    params = SamplingParams(temperature=0, max_tokens=80)
    results = llm.generate(prompts, params, adapter=adapter)
    judged = [
        judge(result.text, json.loads(messages[1]["content"]))
        for result, messages in zip(results, rows, strict=True)
    ]
    return [sum(column) / len(judged) for column in zip(*judged, strict=True)]


def main(words: Sequence[str]) -> None:
    model = words[0] if words else "smollm2:135m"
    with LLM(model) as llm:
        rows = [("before", score(llm, None))]
        if len(words) > 1:
            rows.append(("after", score(llm, llm.load_adapter(words[1]))))
    print(f"{'':8} {'JSON':>6} {'keys':>6} {'all right':>10}")
    for name, shares in rows:
        print(f"{name:8} {shares[0]:6.0%} {shares[1]:6.0%} {shares[2]:10.0%}")


if __name__ == "__main__":
    main(sys.argv[1:])
