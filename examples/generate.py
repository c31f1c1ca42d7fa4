"""Complete several prompts in one batch."""

from localllm import LLM, SamplingParams

with LLM("smollm2:135m") as llm:
    params = SamplingParams(temperature=0, max_tokens=20)
    for result in llm.generate(["The capital of France is", "Water boils at"], params):
        print(repr(result.text), result.finish_reason, result.receipt.prompt_tokens)
