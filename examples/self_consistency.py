"""Ask once, sample eight answers that think aloud, and take what most of them come to."""

from localllm import LLM, SamplingParams
from localllm.reasoning import chain_of_thought, self_consistency

question = "Tom has 3 boxes with 4 apples each. How many apples does he have?"

with LLM("smollm2:135m") as llm:
    params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=160, seed=1)
    result = self_consistency(llm, chain_of_thought(question), n=8, params=params)
    print(result.text)
    print("votes:", dict(result.counts))
