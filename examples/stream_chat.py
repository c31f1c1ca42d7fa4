"""Print an answer while it is being written, and what it cost."""

from localllm import LLM, SamplingParams

messages = [{"role": "user", "content": "Name three rivers in Europe."}]

with LLM("smollm2:135m") as llm:
    receipt = None
    for delta in llm.stream_chat(messages, SamplingParams(temperature=0, max_tokens=60)):
        print(delta.text, end="", flush=True)
        if delta.result is not None:
            receipt = delta.result.receipt
    print(f"\n{receipt}")
