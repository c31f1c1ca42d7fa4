"""Writes train.jsonl and held_out.jsonl: short reports, to be answered as JSON of one shape.

    python examples/json_answers/make_data.py

Every sentence is put together here from small lists; nothing is taken from anywhere. The answer to
"Ana paid 12.50 for two lamps in Oslo on Monday." is {"name": "Ana", "item": "lamp", "count": 2,
"price": 12.5, "city": "Oslo", "day": "Monday"}. What is held out has sentences, names and things in
combinations that training never shows.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

NAMES = [
    "Ana",
    "Ben",
    "Chloe",
    "Dan",
    "Emma",
    "Finn",
    "Grace",
    "Hugo",
    "Iris",
    "Jon",
    "Kira",
    "Leo",
]
ITEMS = ["lamp", "chair", "book", "mug", "clock", "scarf", "knife", "plate", "pen", "ticket"]
CITIES = ["Oslo", "Rome", "Lima", "Cairo", "Delhi", "Paris", "Quito", "Seoul", "Tunis", "Vienna"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
COUNTS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}
SENTENCES = [
    "{name} paid {price} for {count} {items} in {city} on {day}.",
    "On {day}, {name} bought {count} {items} in {city} and paid {price}.",
    "In {city}, {count} {items} cost {name} {price} last {day}.",
    "{count} {items} for {price}: that is what {name} got in {city} on {day}.",
    "It was {day} when {name} went to {city} to buy {count} {items} at {price}.",
]
TRAIN, HELD_OUT = 300, 60


def case(dice: random.Random) -> tuple[str, dict[str, object]]:
    """A report and its fields."""
    number, item = dice.choice(list(COUNTS)), dice.choice(ITEMS)
    price = dice.randrange(100, 9900) / 100
    fields: dict[str, object] = {
        "name": dice.choice(NAMES),
        "item": item,
        "count": number,
        "price": price,
        "city": dice.choice(CITIES),
        "day": dice.choice(DAYS),
    }
    text = dice.choice(SENTENCES).format(
        **{**fields, "count": COUNTS[number], "price": f"{price:.2f}"},
        items=item if number == 1 else f"{item}s",
    )
    return text[0].upper() + text[1:], fields


def row(text: str, fields: dict[str, object]) -> str:
    answer = json.dumps(fields)
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}) + "\n"


def main() -> None:
    dice = random.Random(2026)
    cases: dict[str, dict[str, object]] = {}
    while len(cases) < TRAIN + HELD_OUT:
        text, fields = case(dice)
        cases[text] = fields
    rows = [row(text, fields) for text, fields in cases.items()]
    folder = Path(__file__).parent
    (folder / "train.jsonl").write_text("".join(rows[:TRAIN]), encoding="utf-8")
    (folder / "held_out.jsonl").write_text("".join(rows[TRAIN:]), encoding="utf-8")


if __name__ == "__main__":
    main()
