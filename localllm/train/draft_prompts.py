"""Prompts that make a model talk about many things in many forms, for learning how it talks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from localllm.errors import InvalidRequest

_MAX_BYTES = 64 << 20
_FORMS = (
    "Explain {} to a child.",
    "Write a short story about {}.",
    "What are the main facts about {}?",
    "List five tips about {}.",
    "Write a friendly e-mail to a colleague about {}.",
    "What are the advantages and disadvantages of {}?",
    "Give step-by-step instructions that have to do with {}.",
    "Write a short poem about {}.",
    "Summarize the history of {} in one paragraph.",
    "Write a dialogue between two friends about {}.",
    "How does {} work?",
    "Why is {} important?",
    "Describe {} as if you saw it for the first time.",
    "What do beginners often get wrong about {}?",
    "Write a news report about {}.",
    "Compare {} with something similar.",
    "Write three questions about {}, each with its answer.",
    "Plan a lesson about {}.",
    "Write a product description that mentions {}.",
    "What would the world be like without {}?",
    "Give a definition of {} and two examples.",
    "Write a diary entry about a day with {}.",
    "Argue for and against {}.",
    "Write a small Python program that has to do with {}.",
)
_TOPICS = (
    "the weather", "a lighthouse", "bicycles", "baking bread", "the ocean", "a lost cat",
    "trains", "learning a language", "photosynthesis", "electricity", "a job interview",
    "gardening", "mountains", "computers", "music lessons", "the water cycle", "volcanoes",
    "a family dinner", "money", "sleep", "football", "a birthday party", "recycling",
    "the human heart", "space travel", "chess", "winter", "a small village", "public libraries",
    "the internet", "healthy food", "dinosaurs", "painting", "a broken car", "friendship",
    "gravity", "coffee", "bees", "the stock market", "moving house", "vaccines",
    "a train journey", "time management", "rivers", "the Roman Empire", "solar panels",
    "a lost letter", "swimming", "bridges", "sorting numbers", "democracy", "the moon",
    "a new school", "noise in cities", "clocks", "ants", "an old piano", "public speaking",
    "earthquakes", "tea", "reading books", "a robot", "the seasons", "fractions", "a rainy day",
    "elephants", "camping", "passwords", "the sun", "shopping lists", "fire safety", "a museum",
    "cooking pasta", "maps",
)  # fmt: skip


def built_in(seed: int) -> list[str]:
    """All there are, in an order that is the same for the same seed."""
    everything = [form.format(topic) for form in _FORMS for topic in _TOPICS]
    order = np.random.default_rng(seed).permutation(len(everything))
    return [everything[i] for i in order]


def read_prompts(path: Path) -> list[str]:
    """One prompt a line: plain text, or JSON with "prompt" or with "messages" (whose last user
    message is taken). Raises InvalidRequest naming the line that is neither."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InvalidRequest(f"{path}: more than {_MAX_BYTES >> 20} MiB of prompts")
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path}: cannot be read: {error}") from error
    prompts = [_prompt(path, n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise InvalidRequest(f"{path}: holds no prompts")
    return list(dict.fromkeys(prompts))


def _prompt(path: Path, number: int, line: str) -> str:
    if not line.lstrip().startswith("{"):
        return line.strip()
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{path}:{number}: is not valid JSON: {error}") from error
    prompt = value.get("prompt")
    for message in value.get("messages") or ():
        if isinstance(message, dict) and message.get("role") == "user":
            prompt = message.get("content")
    if not isinstance(prompt, str) or not prompt.strip():
        raise InvalidRequest(f'{path}:{number}: has neither "prompt" nor a user\'s message')
    return prompt.strip()
