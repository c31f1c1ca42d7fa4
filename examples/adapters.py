"""Several LoRA adapters beside the base model, in one batch.

python examples/adapters.py FOLDER [FOLDER …]      PEFT or MLX-LM adapters for smollm2:135m
"""

import sys

from localllm import LLM, SamplingParams

with LLM("smollm2:135m") as llm:
    names = [None, *(llm.load_adapter(folder) for folder in sys.argv[1:])]
    params = SamplingParams(temperature=0, max_tokens=40)
    prompt = llm.chat_prompt([{"role": "user", "content": "Who are you?"}])
    streams = [llm.stream(prompt, params, adapter=name) for name in names]
    for name, stream in zip(names, streams, strict=True):
        print(f"{name or 'base model'}: {''.join(delta.text for delta in stream)}")
