"""An answer that is valid JSON of the shape you ask for, whatever the model would rather say."""

import json

from localllm import LLM, SamplingParams

schema = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 30},
        "country": {"type": "string", "maxLength": 30},
        "inhabitants": {"type": "integer", "minimum": 0, "maximum": 50_000_000},
    },
    "required": ["city", "country", "inhabitants"],
    "additionalProperties": False,
}

with LLM("smollm2:135m") as llm:
    question = "Name a large city, its country and how many people live there. Answer in JSON."
    result = llm.chat(
        [{"role": "user", "content": question}],
        SamplingParams(temperature=0, max_tokens=200, json_schema=schema),
    )
    print(json.loads(result.text))
