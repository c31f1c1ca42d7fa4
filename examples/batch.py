"""Answer a file of requests; run again with the same file, it goes on where it was."""

import json
import tempfile
from pathlib import Path

from localllm import LLM, SamplingParams
from localllm.batch import BatchRun

folder = Path(tempfile.mkdtemp())
cities = ["Paris", "Oslo", "Rome", "Cairo"]
with (folder / "in.jsonl").open("w") as file:
    for city in cities:
        print(json.dumps({"id": city, "prompt": f"{city} is the capital of"}), file=file)

with LLM("smollm2:135m") as llm:
    params = SamplingParams(temperature=0, max_tokens=5)
    done = BatchRun(llm, folder / "in.jsonl", folder / "out.jsonl", params=params).run()
    print(done)

for line in (folder / "out.jsonl").read_text().splitlines():
    answer = json.loads(line)
    print(answer["id"], repr(answer["text"]))
