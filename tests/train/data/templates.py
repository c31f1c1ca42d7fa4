"""Further templates: of the catalog's other families, and of every kind that is hard to mask."""

from __future__ import annotations

from dataclasses import replace

from tests.tokenizer.templates import GEMMA3, KNOWN, LLAMA3, SMOLLM2, Known

OLMO2 = Known(
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<|system|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'user' %}"
    "{{ '<|user|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'assistant' %}"
    "{% if not loop.last %}{{ '<|assistant|>\n' + message['content'] + eos_token + '\n' }}"
    "{% else %}{{ '<|assistant|>\n' + message['content'] + eos_token }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
    ("<|endoftext|>", "<|pad|>"),
)

GEMMA2 = Known(
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    GEMMA3.special,
    system=False,
)

CATALOG = {**KNOWN, "OLMo 2": OLMO2, "Gemma 2": GEMMA2}

# The prompt in use opens a thought; past turns have none (as reasoning models' templates do).
OPENS_A_THOUGHT = replace(
    SMOLLM2,
    template=SMOLLM2.template.replace(
        "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}"
    ),
    ordinary=("<think>", "</think>"),
)

# No turn of the assistant's is offered: the model has to write its header itself.
WITHOUT_PROMPT = replace(SMOLLM2, template=SMOLLM2.template.split("{% if add_generation")[0])

# Only the words are marked as the model's, and not those of every turn.
MARKED = replace(
    SMOLLM2,
    template="{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and 'hush' not in m.content %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
)

# Nothing ends a turn, and turns are told by plain words.
ENDLESS = replace(
    SMOLLM2,
    template="{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
)

# Only the last turn has an end, so the end of an earlier one must not be found in a later one.
LAST_ENDS = replace(
    SMOLLM2,
    template="{% for m in messages %}{{ m.role + ': ' + m.content }}"
    "{% if loop.last and m.role == 'assistant' %}{{ '<|im_end|>' }}{% else %}{{ '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
)

# Says the last question differently when it asks for an answer.
REWRITES = replace(
    SMOLLM2,
    template="{% for m in messages %}{% if loop.last and m.role == 'user' %}"
    "{{ '<|im_start|>now\n' + m.content + '<|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
)

# Refuses what does not end with the assistant.
REFUSES_PROMPTS = replace(
    LLAMA3,
    template="{% if messages[-1].role != 'assistant' %}{{ raise_exception('no') }}{% endif %}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>' + m.content "
    "+ '<|eot_id|>' }}{% endfor %}",
)

# The answer decides how everything before it is written.
SHUFFLES = replace(
    SMOLLM2,
    template="{{ messages[-1].content | length }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}",
)
