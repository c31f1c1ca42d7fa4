"""Many clients of one model in one asyncio program; the slow one is cut off after two seconds."""

import asyncio

from localllm import AsyncEngine, SamplingParams

short = SamplingParams(temperature=0, max_tokens=8)


async def ask(engine: AsyncEngine, city: str) -> None:
    result = await engine.complete(f"{city} is the capital of", short)
    print(f"{city}: {result.text!r}")


async def main() -> None:
    async with AsyncEngine("smollm2:135m") as engine:
        story = engine.generate("Once upon a time", SamplingParams(max_tokens=None), timeout=2)
        await asyncio.gather(*(ask(engine, city) for city in ("Paris", "Oslo", "Rome", "Cairo")))
        async for delta in story:  # what was said meanwhile comes at once
            print(delta.text, end="", flush=True)
        assert story.result is not None
        print(f"\n[{story.result.receipt.stopped_by}; {engine.stats()}]")


asyncio.run(main())
