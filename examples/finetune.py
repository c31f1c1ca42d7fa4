"""Fine-tune a small model from Python and hear the difference.

python examples/finetune.py
"""

from localllm import LLM, SamplingParams
from localllm.train import Trainer

config = {
    "model": "smollm2:135m",
    "data": {"source": "examples/json_answers/train.jsonl", "valid_fraction": 0.1},
    "lora": {"rank": 8, "alpha": 16.0},
    "optimizer": {"lr": 1e-3},
    "run": {"steps": 40},
}
with Trainer(config) as trainer:
    result = trainer.train()
print(f"loss {result.loss:.3f}, best on validation {result.best_loss:.3f}: {result.adapter}")

question = [{"role": "user", "content": "On Monday, Nina bought four maps in Oslo and paid 12.50."}]
greedy = SamplingParams(temperature=0, max_tokens=60)
with LLM("smollm2:135m") as llm:
    adapter = llm.load_adapter(result.adapter)
    print("before:", llm.chat(question, greedy).text)
    print("after: ", llm.chat(question, greedy, adapter=adapter).text)
