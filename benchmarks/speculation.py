"""What guessing ahead brings: prompt lookup on rewriting, and what it costs where it cannot help.

    python -m benchmarks.speculation [--rounds 5] [--threads N] [--json FILE] [--draft-head DIR]

SmolLM2-135M, greedy. "rewrite": texts to be given back with one change, the model's own answers;
"story": text that does not repeat the prompt, where guesses are mostly wrong. Tokens/s of decoding
with speculation over those without, both in turn; the answers are the same, which is checked.
Wanted: 1.8 x for rewriting, no less than 0.95 x for stories.
With a draft head that `localllm finetune --method draft-head` made: the prompts that it kept for
measuring, without guesses and with those of head and prompt lookup, as the engine runs with a head,
and of each alone. Wanted: more than 2 tokens a step and 1.4 x (medians of speeds).
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.machine import print_heading
from benchmarks.harness.table import Goal, markdown, verdict, wanted, write_json
from localllm import LLM, SamplingParams
from localllm.sampling.params import Speculation
from localllm.train.draft_config import DraftHeadConfig
from localllm.train.draft_head import measure_draft_head
from localllm.train.draft_prompts import built_in

MODEL = "smollm2:135m"
# (text, change): of the kind that this small model does carry out, most words unchanged.
TASKS = [
    (
        "The lighthouse at the end of the pier was built in 1871 by a company of stonemasons from "
        "Cornwall. It stands forty metres tall and its lamp can be seen from thirty kilometres "
        "away. Every evening the keeper climbs the two hundred and twelve steps to light the lamp, "
        "and every morning he climbs them again to put it out. In winter the waves reach the "
        "gallery.",
        "Replace 1871 with 1901.",
    ),
    (
        "Dear Mr. Thompson, thank you for your letter of the third of March about the delivery of "
        "the garden chairs. We are sorry that two of the chairs arrived damaged. We will send you "
        "two new chairs next week, free of charge, and our driver will take the damaged ones back. "
        "Please keep the original packaging if you still have it. Yours sincerely, Anna Keller.",
        "Replace Thompson with Miller.",
    ),
    (
        "The meeting of the town council began at seven o'clock. The mayor presented the budget "
        "for the coming year. The council voted for a new roof for the school, for the repair of "
        "the bridge over the mill stream, and against a new car park behind the station. The "
        "meeting ended at ten.",
        "Replace seven o'clock with eight o'clock.",
    ),
    (
        "The old mill by the river grinds wheat and rye for the villages nearby. The miller starts "
        "the wheel at dawn and stops it when the bell rings at noon. His daughter fills the sacks "
        "and ties them with red string. On Saturdays the farmers come with their carts, and there "
        "is always fresh bread for the children.",
        "Replace red string with blue string.",
    ),
    (
        "Preheat the oven to 180 degrees. Mix the flour, the sugar and the butter in a large bowl "
        "until the mixture looks like fine sand. Add two eggs and the milk, and stir until the "
        "dough is smooth. Pour it into a round tin and bake it for forty minutes. Let the cake "
        "cool before you cut it.",
        "Replace two eggs with three eggs.",
    ),
    (
        "The train to Edinburgh leaves from platform four at nine thirty. It stops at York, Durham "
        "and Newcastle, and it has a restaurant car. Passengers with bicycles are asked to use the "
        "last carriage. Tickets can be bought on board, but seats should be reserved the day "
        "before.",
        "Replace platform four with platform six.",
    ),
    (
        "Bees live in colonies of up to sixty thousand animals. The queen lays about two thousand "
        "eggs a day in summer. The workers build the comb, feed the larvae, guard the hive and "
        "collect nectar. In autumn the drones are driven out, and the colony spends the winter in "
        "a tight cluster around the queen.",
        "Replace two thousand with three thousand.",
    ),
]
STORIES = [
    "Write a short story about a fox who learns to sail.",
    "Explain how a bicycle stays upright.",
    "What are the main differences between coffee and tea?",
    "Describe a market in a small town on a rainy morning.",
]


@dataclass(frozen=True)
class Row:
    work: str
    plain: float  # tokens per second of decoding
    drafted: float
    times: float
    accepted: float  # tokens for every step of the model
    goal: Goal


def prompts() -> dict[str, list[str]]:
    rewrite = [
        f"Copy the following text word for word, with one change: {change}\n\nText: {text}"
        for text, change in TASKS
    ]
    return {"rewrite": rewrite, "story": STORIES}


def measure(llm: LLM, rounds: int) -> list[Row]:
    rows = []
    for work, goal in (("rewrite", Goal(1.8)), ("story", Goal(0.95))):
        speeds: dict[str, list[float]] = {"off": [], "ngram": []}
        drafted = accepted = tokens = 0
        answers: dict[tuple[str, int], tuple[int, ...]] = {}
        for round_ in range(rounds + 1):  # the first one warms up
            for index, prompt in enumerate(prompts()[work]):
                for kind in ("off", "ngram") if (round_ + index) % 2 else ("ngram", "off"):
                    params = SamplingParams(
                        temperature=0,
                        max_tokens=160,
                        speculation=kind,  # type: ignore[arg-type]
                    )
                    result = llm.chat([{"role": "user", "content": prompt}], params)
                    answers[kind, index] = result.token_ids
                    receipt = result.receipt
                    if round_ and receipt.decode_tokens_per_second:
                        speeds[kind].append(receipt.decode_tokens_per_second)
                        drafted += receipt.drafted_tokens
                        accepted += receipt.accepted_tokens
                        tokens += receipt.generated_tokens if kind == "ngram" else 0
                assert answers["off", index] == answers["ngram", index]
        plain, fast = (harmonic(speeds[kind]) for kind in ("off", "ngram"))
        rows.append(Row(work, plain, fast, fast / plain, tokens / (tokens - accepted), goal))
    return rows


def harmonic(speeds: list[float]) -> float:
    """Of answers of like lengths: tokens over the time they took together."""
    return statistics.harmonic_mean(speeds)


def measure_head(head: Path, threads: int | None, rounds: int) -> None:
    rows = []
    ways: tuple[tuple[Speculation, str], ...] = (
        ("auto", "head and prompt lookup"),
        ("head", "head alone"),
        ("ngram", "prompt lookup alone"),
    )
    prompts = built_in(0)[: DraftHeadConfig.held_out]
    for way, name in ways:
        found = measure_draft_head(
            MODEL, head, prompts, threads=threads, rounds=rounds, speculation=way
        )
        assert found.same
        reached = [
            verdict(value, goal) if way == "auto" else ""
            for value, goal in ((found.tokens_per_step, Goal(2.0)), (found.speedup, Goal(1.4)))
        ]
        right = f"{found.accepted / max(1, found.drafted):.0%}"
        tokens, speed = f"{found.tokens_per_step:.2f}", f"{found.speedup:.2f} x"
        plain = f"{found.plain_speed:.0f}"
        rows.append([name, tokens, reached[0], speed, reached[1], plain, right])
    header = ["guesses", "tokens a step", "more than 2", "speed", "1.4 x", "plain tok/s", "right"]
    print(markdown(header, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--draft-head", type=Path)
    args = parser.parse_args()
    print_heading()
    if args.draft_head is not None:
        measure_head(args.draft_head, args.threads, args.rounds)
        return
    with LLM(MODEL, threads=args.threads) as llm:
        rows = measure(llm, args.rounds)
    lines = [
        [
            row.work,
            f"{row.plain:.0f}",
            f"{row.drafted:.0f}",
            f"{row.times:.2f} x",
            wanted(row.goal),
            verdict(row.times, row.goal),
            f"{row.accepted:.2f}",
        ]
        for row in rows
    ]
    header = ["work", "plain tok/s", "drafted tok/s", "ratio", "wanted", "reached", "tokens a step"]
    print(markdown(header, lines))
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
