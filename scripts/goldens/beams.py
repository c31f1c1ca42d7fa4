"""Writes tests/golden/beams.json: what transformers' beam search finds over a small table.

The "model" gives logits by the last two tokens, those of tests/engine/test_beams.py, so that
searches are compared and nothing else.

    python -m scripts.goldens.beams
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":  # instead of this folder, whose modules hide libraries by their names
    sys.path[0] = str(ROOT)

GOLDEN = ROOT / "tests/golden/beams.json"
VOCAB = 31
EOS = [3, 11, 19, 27]  # so many that hypotheses end at every length
PROMPTS = [[1, 2, 4], [9, 30], [5, 6, 7, 8]]


def _table() -> np.ndarray:
    """float32 [V, V, V]: the logits after two tokens."""
    rows = [
        [np.random.default_rng([a, b]).normal(scale=2, size=VOCAB) for b in range(VOCAB)]
        for a in range(VOCAB)
    ]
    return np.array(rows, np.float32)


def _model() -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    table = torch.from_numpy(_table())

    class Table(GPT2LMHeadModel):
        def forward(self, input_ids: Any = None, **_: Any) -> Any:
            from transformers.modeling_outputs import CausalLMOutput

            before = torch.nn.functional.pad(input_ids, (1, 0))[:, :-1]
            return CausalLMOutput(logits=table[before, input_ids])

    config = GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=1, pad_token_id=0)
    return Table(config).eval()


def main() -> None:
    import torch

    model = _model()
    cases = []
    for prompt, beams, penalty, length in product(PROMPTS, (2, 4), (1.0, 0.0, 2.0, -1.0), (1, 7)):
        if penalty != 1.0 and length == 1:
            continue
        found = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=beams,
            num_return_sequences=beams,
            length_penalty=penalty,
            max_new_tokens=length,
            do_sample=False,
            use_cache=False,
            eos_token_id=EOS,
            pad_token_id=0,
            early_stopping=False,
        )
        answers = []
        for row in found[:, len(prompt) :].tolist():
            ends = [place for place, token in enumerate(row) if token in EOS]
            answers.append(row[: ends[0]] if ends else row)
        cases.append(
            {
                "name": f"{'-'.join(map(str, prompt))} beams {beams} penalty {penalty} of {length}",
                "prompt": prompt,
                "beams": beams,
                "n": beams,
                "length_penalty": penalty,
                "max_tokens": length,
                "eos": EOS,
                "answers": answers,
            }
        )
    lines = ",\n".join(json.dumps(case) for case in cases)
    GOLDEN.write_text(f"[\n{lines}\n]\n", "utf-8")
    print(f"{GOLDEN}: {len(cases)} cases")


if __name__ == "__main__":
    main()
