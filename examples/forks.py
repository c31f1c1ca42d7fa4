"""Four answers to one prompt: it is computed once, and each answer is a fork of it."""

from localllm import LLM, SamplingParams

with LLM("smollm2:135m") as llm:
    params = SamplingParams(n=4, temperature=0.9, seed=7, max_tokens=30)
    result = llm.chat([{"role": "user", "content": "Suggest a name for a boat."}], params)
    for answer in (result, *result.alternatives):
        print(answer.receipt.seed, answer.text.replace("\n", " "))
