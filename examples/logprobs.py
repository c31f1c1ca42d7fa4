"""How sure the model is of each token it chose, and what it would have said instead."""

from localllm import LLM, SamplingParams

with LLM("smollm2:135m") as llm:
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=3)
    result = llm.generate("The largest planet is", params)
    for entry in result.logprobs or ():
        others = {llm.tokenizer.decode([i]): round(p, 2) for i, p in entry.top}
        print(f"{llm.tokenizer.decode([entry.token_id])!r:12} {entry.logprob:6.2f}  {others}")
