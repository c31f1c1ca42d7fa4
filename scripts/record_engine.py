"""Records what the engine tells while it answers: tests/tui/recorded/two_answers.jsonl.

Two requests at once, one of which repeats itself, so that there are prefill, decode and verify
steps. Run it anew when localllm/engine/events.py changes:

    python scripts/record_engine.py
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from localllm.tui.engine.client import EngineEvents, EngineState
from localllm.tui.engine.remote import RemoteEngine

OUT = Path(__file__).parent.parent / "tests" / "tui" / "recorded" / "two_answers.jsonl"
ASKED = (
    ("Repeat after me, three times: the sea is wide and the sky is high.", 60),
    ("Count from one to twenty in words.", 40),
)
STEPS = 60  # kept


async def record() -> list[Any]:
    engine, told = RemoteEngine(), []

    def hear(news: EngineState | EngineEvents) -> None:
        if isinstance(news, EngineEvents):
            told.extend(news.events)

    engine.subscribe(hear)
    await engine.open("smollm2:135m")
    await asyncio.gather(*(answer(engine, text, tokens) for text, tokens in ASKED))
    await asyncio.sleep(0.5)  # the last events
    await engine.close()
    return told


async def answer(engine: RemoteEngine, text: str, tokens: int) -> None:
    params = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    async for _ in engine.ask([{"role": "user", "content": text}], params):
        pass


def main() -> None:
    told = asyncio.run(record())
    steps = 0
    with OUT.open("w", encoding="utf-8") as file:
        for name, event in told:
            steps += name == "StepDone"
            if name == "StepDone" and steps > STEPS:
                continue
            file.write(json.dumps([name, event]) + "\n")
    print(f"{OUT}: {len(told)} events, {steps} steps")


if __name__ == "__main__":
    main()
