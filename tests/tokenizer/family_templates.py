"""Chat templates written again after those of gpt-oss, Qwen 3.5, Gemma 4, LFM2 and GLM 4.5.

They are no copies: shorter, with the same control tokens, options and Jinja constructs, so that
what renders these as transformers does renders the published ones so too.
"""

# ruff: noqa: E501

from __future__ import annotations

from typing import Any

from tests.tokenizer.templates import Known

GPT_OSS = Known(
    r"""{%- macro type_of(spec, required, nullable=false) -%}
    {%- if spec.type == "array" -%}
        {{- (type_of(spec["items"], required) if spec["items"] else "any") + "[]" -}}
    {%- elif spec.type is defined and spec.type is iterable and spec.type is not string and spec.type is not mapping -%}
        {{- spec.type | join(" | ") -}}
    {%- elif spec.type == "string" -%}
        {{- '"' + spec.enum | join('" | "') + '"' if spec.enum else "string" -}}
        {%- if nullable %} | null{% endif -%}
    {%- elif spec.type in ("number", "integer") -%}number
    {%- elif spec.type == "object" and spec.properties -%}
        {{- "{\n" }}
        {%- for name, inner in spec.properties.items() -%}
            {{- name -}}{%- if name not in (spec.required or []) %}?{% endif -%}: {{ type_of(inner, spec.required or []) }}
            {%- if not loop.last %},{% endif -%}
        {%- endfor -%}
        {{- "}" }}
    {%- else -%}{{ spec.type | default("any") }}{%- endif -%}
{%- endmacro -%}
{%- macro namespace_of(name, tools) -%}
    {{- "## " + name + "\n\nnamespace " + name + " {\n\n" }}
    {%- for tool in tools %}
        {%- set tool = tool.function %}
        {{- "// " + tool.description + "\ntype " + tool.name + " = " }}
        {%- if tool.parameters and tool.parameters.properties %}
            {{- "(_: {\n" }}
            {%- for name, spec in tool.parameters.properties.items() %}
                {%- if spec.description %}{{- "// " + spec.description + "\n" }}{%- endif %}
                {{- name }}{%- if name not in (tool.parameters.required or []) %}?{% endif -%}: {{ type_of(spec, tool.parameters.required or []) }}
                {%- if spec.default is defined %}{{- ", // default: " + (spec.default | tojson) }}{% else %},{% endif %}{{- "\n" }}
            {%- endfor %}
            {{- "}) => any;\n\n" }}
        {%- else %}{{- "() => any;\n\n" }}{%- endif %}
    {%- endfor %}
    {{- "} // namespace " + name }}
{%- endmacro -%}
{%- macro system_part() -%}
    {%- if model_identity is not defined %}{%- set model_identity = "You are a model." %}{%- endif %}
    {{- model_identity + "\nCurrent date: " + strftime_now("%Y-%m-%d") + "\n\n" }}
    {%- if reasoning_effort is not defined %}{%- set reasoning_effort = "medium" %}{%- endif %}
    {{- "Reasoning: " + reasoning_effort + "\n\n# Valid channels: analysis, commentary, final." }}
    {%- if tools -%}{{- "\nCalls to these tools must go to the commentary channel: 'functions'." }}{%- endif -%}
{%- endmacro -%}
{{- "<|start|>system<|message|>" }}{{- system_part() }}{{- "<|end|>" }}
{%- if messages[0].role in ("developer", "system") %}
    {%- set told = messages[0].content %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set told = "" %}{%- set loop_messages = messages %}{%- endif %}
{%- if told or tools %}
    {{- "<|start|>developer<|message|>" }}
    {%- if told %}{{- "# Instructions\n\n" + told + "\n\n" }}{%- endif %}
    {%- if tools -%}{{- "# Tools\n\n" }}{{- namespace_of("functions", tools) }}{%- endif -%}
    {{- "<|end|>" }}
{%- endif %}
{%- set last_call = namespace(name=none) %}
{%- for message in loop_messages -%}
    {%- if message.role == 'assistant' -%}
        {%- if "content" in message and message.content is not none and "<|channel|>final<|message|>" in message.content %}
            {{- raise_exception("Put reasoning into 'thinking'.") }}
        {%- endif %}
        {%- if "tool_calls" in message %}
            {%- set future = namespace(found=false) %}
            {%- for later in loop_messages[loop.index:] %}
                {%- if later.role == 'assistant' and "tool_calls" not in later %}{%- set future.found = true %}{%- endif %}
            {%- endfor %}
            {%- if message.thinking and not future.found %}
                {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
            {%- endif %}
            {%- set call = message.tool_calls[0] %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- "<|start|>assistant to=functions." + call.name + "<|channel|>commentary " }}
            {{- (call.content_type if call.content_type is defined else "json") + "<|message|>" }}
            {{- call.arguments | tojson }}{{- "<|call|>" }}
            {%- set last_call.name = call.name %}
        {%- elif loop.last and not add_generation_prompt %}
            {%- if message.thinking %}{{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}{%- endif %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}
        {%- else %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
            {%- set last_call.name = none %}
        {%- endif %}
    {%- elif message.role == 'tool' -%}
        {%- if last_call.name is none %}{{- raise_exception("A result without a call") }}{%- endif %}
        {{- "<|start|>functions." + last_call.name + " to=assistant<|channel|>commentary<|message|>" + message.content | tojson + "<|end|>" }}
    {%- elif message.role == 'user' -%}{{- "<|start|>user<|message|>" + message.content + "<|end|>" }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
""",
    (
        "<|start|>",
        "<|end|>",
        "<|message|>",
        "<|channel|>",
        "<|constrain|>",
        "<|return|>",
        "<|call|>",
    ),
)

QWEN35 = Known(
    r"""{%- macro shown(content) -%}
    {%- if content is string -%}{{- content -}}
    {%- elif content is iterable and content is not mapping -%}
        {%- for item in content -%}{%- if 'text' in item -%}{{- item.text -}}{%- else -%}{{- raise_exception('What is this?') -}}{%- endif -%}{%- endfor -%}
    {%- elif content is none or content is undefined -%}{{- '' -}}
    {%- endif -%}
{%- endmacro -%}
{%- if not messages %}{{- raise_exception('No messages.') }}{%- endif %}
{%- if tools and tools is iterable and tools is not mapping %}
    {{- '<|im_start|>system\n# Tools\n\n<tools>' }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools>\n\nA call:\n\n<tool_call>\n<function=NAME>\n<parameter=P>\nvalue\n</parameter>\n</function>\n</tool_call>" }}
    {%- if messages[0].role == 'system' %}{%- set told = shown(messages[0].content) | trim %}{%- if told %}{{- '\n\n' + told }}{%- endif %}{%- endif %}
    {{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + shown(messages[0].content) | trim + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" %}
        {%- set content = shown(message.content) | trim %}
        {%- if not (content.startswith('<tool_response>') and content.endswith('</tool_response>')) %}
            {%- set ns.searching = false %}{%- set ns.last = index %}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = shown(message.content) | trim %}
    {%- if message.role == "system" %}
        {%- if not loop.first %}{{- raise_exception('The system message comes first.') }}{%- endif %}
    {%- elif message.role == "user" %}{{- '<|im_start|>user\n' + content + '<|im_end|>\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}{%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last %}{{- '<think>\n' + thought | trim + '\n</think>\n\n' }}{%- endif %}
        {%- generation %}{{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {{- ('\n\n' if content | trim else '') if loop.first else '\n' }}
            {{- '<tool_call>\n<function=' + call.name + '>\n' }}
            {%- for name, value in (call.arguments or {}) | items %}
                {{- '<parameter=' + name + '>\n' }}
                {{- value | tojson | safe if value is mapping or (value is sequence and value is not string) else value | string }}
                {{- '\n</parameter>\n' }}
            {%- endfor %}
            {{- '</function>\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}{%- endgeneration %}
    {%- elif message.role == "tool" %}
        {%- if loop.previtem and loop.previtem.role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != "tool" %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- else %}{{- raise_exception('Who is that?') }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {{- '<think>\n\n</think>\n\n' if enable_thinking is defined and enable_thinking is false else '<think>\n' }}
{%- endif %}""",
    ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    ("<think>", "</think>", "<tool_call>", "</tool_call>"),
)

GEMMA4 = Known(
    r"""{%- macro value_of(given, quoted_keys=True) -%}
    {%- if given is string -%}{{- '<|"|>' + given + '<|"|>' -}}
    {%- elif given is boolean -%}{{- 'true' if given else 'false' -}}
    {%- elif given is mapping -%}
        {{- '{' -}}{%- set ns = namespace(later=false) -%}
        {%- for key, value in given | dictsort -%}
            {%- if ns.later %},{% endif -%}{%- set ns.later = true -%}
            {{- '<|"|>' + key + '<|"|>' if quoted_keys else key -}}:{{- value_of(value, quoted_keys=quoted_keys) -}}
        {%- endfor -%}{{- '}' -}}
    {%- elif given is sequence -%}
        {{- '[' -}}{%- for item in given -%}{{- value_of(item, quoted_keys=quoted_keys) -}}{%- if not loop.last %},{% endif -%}{%- endfor -%}{{- ']' -}}
    {%- else -%}{{- given -}}{%- endif -%}
{%- endmacro -%}
{%- macro without_thinking(text) -%}
    {%- set ns = namespace(result='') -%}
    {%- for part in text.split('<channel|>') -%}
        {%- set ns.result = ns.result + (part.split('<|channel>')[0] if '<|channel>' in part else part) -%}
    {%- endfor -%}
    {{- ns.result | trim -}}
{%- endmacro -%}
{%- set ns = namespace(before=None) -%}{%- set loop_messages = messages -%}
{{ bos_token }}
{%- if (enable_thinking is defined and enable_thinking) or tools or messages[0]['role'] in ['system', 'developer'] -%}
    {{- '<|turn>system\n' -}}
    {%- if enable_thinking is defined and enable_thinking -%}{{- '<|think|>' -}}{%- endif -%}
    {%- if messages[0]['role'] in ['system', 'developer'] -%}{{- messages[0]['content'] | trim -}}{%- set loop_messages = messages[1:] -%}{%- endif -%}
    {%- for tool in tools or [] %}
        {{- '<|tool>declaration:' + tool['function']['name'] + '{description:' + value_of(tool['function']['description']) -}}
        {%- set params = tool['function']['parameters'] -%}
        {%- if params -%},parameters:{properties:{{- value_of(params['properties'] | default({}), quoted_keys=False) -}},type:<|"|>{{- params['type'] | upper -}}<|"|>}{%- endif -%}
        {{- '}<tool|>' -}}
    {%- endfor %}
    {{- '<turn|>\n' -}}
{%- endif %}
{%- for message in loop_messages -%}
    {%- set ns.before = None -%}
    {{- '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}
    {%- for call in message['tool_calls'] or [] -%}
        {%- set function = call['function'] -%}
        {{- '<|tool_call>call:' + function['name'] + '{' -}}
        {%- for key, value in function['arguments'] | dictsort -%}
            {{- key -}}:{{- value_of(value, quoted_keys=False) -}}{%- if not loop.last %},{% endif -%}
        {%- endfor -%}
        {{- '}<tool_call|>' -}}{%- set ns.before = 'call' -%}
    {%- endfor -%}
    {%- if message['content'] is string -%}{{- without_thinking(message['content']) if message['role'] == 'assistant' else message['content'] | trim -}}{%- endif -%}
    {{- '<turn|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\n' -}}
    {%- if not enable_thinking | default(false) -%}{{- '<|channel>thought\n<channel|>' -}}{%- endif -%}
{%- endif -%}
""",
    (
        "<bos>",
        "<|turn>",
        "<turn|>",
        "<|channel>",
        "<channel|>",
        "<|think|>",
        "<|tool>",
        "<tool|>",
        "<|tool_call>",
        "<tool_call|>",
        '<|"|>',
    ),
)

LFM2 = Known(
    r"""{{- bos_token -}}
{%- macro argument(value) -%}
    {%- if value is string -%}{{- "'" + value + "'" -}}{%- elif value is mapping -%}{{- value | tojson -}}{%- else -%}{{- value | string -}}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(told="", calls=[], last=-1) -%}
{%- if messages[0]["role"] == "system" -%}{%- set ns.told = messages[0].get("content") or "" -%}{%- set messages = messages[1:] -%}{%- endif -%}
{%- if tools -%}
    {%- set ns.told = ns.told + ("\n" if ns.told else "") + "Today: " + strftime_now("%Y-%m-%d") + "\nList of tools: [" -%}
    {%- for tool in tools -%}
        {%- if tool is not string -%}{%- set tool = tool | tojson -%}{%- endif -%}
        {%- set ns.told = ns.told + tool + (", " if not loop.last else "") -%}
    {%- endfor -%}
    {%- set ns.told = ns.told + "]" -%}
{%- endif -%}
{%- if ns.told -%}{{- "<|im_start|>system\n" + ns.told + "<|im_end|>\n" -}}{%- endif -%}
{%- for message in messages -%}
    {%- if message["role"] != "user" -%}{%- continue -%}{%- endif -%}
    {%- set ns.last = loop.index0 -%}
{%- endfor -%}
{%- for message in messages -%}
    {{- "<|im_start|>" + message["role"] + "\n" -}}
    {%- if message.role == "assistant" -%}
        {%- generation -%}
        {%- if message.thinking is defined and loop.index0 > ns.last -%}{{- "<think>" + message.thinking + "</think>" -}}{%- endif -%}
        {{- message.content or "" -}}
        {%- if message.tool_calls is defined -%}
            {%- set ns.calls = [] -%}
            {%- for call in message.tool_calls -%}
                {%- set parts = namespace(all=[]) -%}
                {%- for name, value in call.function.arguments.items() -%}{%- set parts.all = parts.all + [name + "=" + argument(value)] -%}{%- endfor -%}
                {%- set ns.calls = ns.calls + [call.function.name + "(" + (parts.all | join(", ")) + ")"] -%}
            {%- endfor -%}
            {{- "<|tool_call_start|>[" + (ns.calls | join(", ")) + "]<|tool_call_end|>" -}}
        {%- endif -%}
        {{- "<|im_end|>\n" -}}
        {%- endgeneration -%}
    {%- else -%}{{- message.get("content") + "<|im_end|>\n" -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\n" -}}{%- endif -%}
""",
    ("<|startoftext|>", "<|im_start|>", "<|im_end|>", "<|tool_call_start|>", "<|tool_call_end|>"),
    ("<think>", "</think>"),
)

GLM45 = Known(
    r"""[gMASK]<sop>
{%- if tools -%}
<|system|>
# Tools
<tools>
{% for tool in tools %}
{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}
</tools>
A call:
<tool_call>{name}
<arg_key>{key}</arg_key>
<arg_value>{value}</arg_value>
</tool_call>{%- endif -%}
{%- macro text_of(content) -%}
    {%- if content is string -%}{{- content }}
    {%- elif content is iterable and content is not mapping -%}
        {%- for item in content -%}{%- if item is mapping and item.type == 'text' -%}{{- item.text }}{%- endif -%}{%- endfor -%}
    {%- else -%}{{- content }}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{% set ns.last = loop.index0 -%}{%- endif %}{%- endfor %}
{% for m in messages %}
{%- if m.role == 'user' -%}<|user|>
{{ text_of(m.content) }}
{{- '/nothink' if (enable_thinking is defined and not enable_thinking and not text_of(m.content).endswith("/nothink")) else '' -}}
{%- elif m.role == 'assistant' -%}
<|assistant|>
{%- set thought = '' %}{%- set content = text_of(m.content or '') %}
{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}
{%- elif '</think>' in content %}
    {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
    {%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{ '\n<think>' + (thought.strip() if loop.index0 > ns.last else '') + '</think>' }}
{%- if content.strip() -%}{{ '\n' + content.strip() }}{%- endif -%}
{% for tc in m.tool_calls or [] %}
{%- if tc.function %}{%- set tc = tc.function %}{%- endif %}
{{ '\n<tool_call>' + tc.name }}
{% for k, v in tc.arguments.items() %}
<arg_key>{{ k }}</arg_key>
<arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>
{% endfor %}
</tool_call>{% endfor %}
{%- elif m.role == 'tool' -%}
{%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|observation|>' }}{%- endif %}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- elif m.role == 'system' -%}
<|system|>
{{ text_of(m.content) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    <|assistant|>{{- '\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' -}}
{%- endif -%}
""",
    ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    (
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
    ),
)

FAMILIES = {"gpt-oss": GPT_OSS, "qwen3.5": QWEN35, "gemma4": GEMMA4, "lfm2": LFM2, "glm4.5": GLM45}

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather <b>now</b> & 'later' in °C",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": 'Which "city"'},
                    "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
                    "days": {"type": "array", "items": {"type": "integer"}},
                    "place": {"type": "object", "properties": {"lat": {"type": "number"}}},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "now",
            "description": "The time",
            "parameters": {"type": "object", "properties": {}},
        },
    },
]
ARGUMENTS = {"city": "Zürich", "days": [1, 2], "exact": True, "place": {"lat": 47.4, "note": "x"}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}

CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": " What is 2 < 3 & 'x'? "}],
    "system and turns": [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": "日本語"},
        {"role": "assistant", "content": "Yes.", "reasoning": "It is\nJapanese."},
        {"role": "user", "content": "More"},
    ],
    "a call and its result": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "thinking": "I look.", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"sun": true}'},
    ],
    "an answer at the end": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "reasoning_content": "A greeting."},
    ],
}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "gpt-oss": [{}, {"reasoning_effort": "high"}, {"model_identity": "You are X."}],
    **{
        name: [{}, {"enable_thinking": True}, {"enable_thinking": False}]
        for name in ("qwen3.5", "gemma4", "glm4.5")
    },
    "lfm2": [{}],
}


def cases() -> list[tuple[str, str, bool, bool, dict[str, Any]]]:
    """(family, chat, with tools, whether an answer is to follow, template variables)."""
    return [
        (family, chat, tools, more, options)
        for family in FAMILIES
        for chat in CHATS
        for tools in (False, True)
        for more in (False, True)
        for options in OPTIONS[family]
    ]
