"""The command with a loader of chats that stands in for `load_data`."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from localllm.train import data
from localllm.train.data import DataReport, Example, TrainingData


def load_data(source, tokenizer, *, valid=None, limit=None, train_on="assistant", **_):
    def read(path):
        lines = Path(path).read_text().splitlines()[:limit]
        for number, line in enumerate(lines, 1):
            ids = tokenizer.apply_chat(json.loads(line)["messages"], add_generation_prompt=False)
            trained = np.arange(len(ids)) > len(ids) // 2
            yield Example(np.array(ids, np.int32), trained, f"{path}:{number}")

    train = tuple(read(source))
    held = tuple(read(valid)) if valid else ()
    report = DataReport(
        "chat", train_on, True, rows=len(train), train=len(train), valid=len(held),
        tokens=sum(map(len, train)), trained_tokens=sum(e.targets for e in train),
    )  # fmt: skip
    digest = hashlib.sha256(b"".join(e.tokens.tobytes() for e in train + held)).hexdigest()
    return TrainingData(train, held, report, digest)


if not hasattr(data, "load_data"):
    data.load_data = load_data

if __name__ == "__main__":
    from localllm.cli import main

    sys.argv[0] = "localllm"
    main()
