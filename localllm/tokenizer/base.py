"""The tokenizer every other part sees: text to ids, ids to text, conversations to ids."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from localllm.errors import InvalidRequest, TemplateError
from localllm.tokenizer.codec import Codec
from localllm.tokenizer.guard import Disguise, Guard
from localllm.tokenizer.matching import SpecialMatcher
from localllm.tokenizer.messages import (
    Message,
    check_messages,
    check_tools,
    check_unicode,
    join_parts,
    split_parts,
)
from localllm.tokenizer.rendering import Rendering, rendering_of
from localllm.tokenizer.stream import StreamDecoder
from localllm.tokenizer.template import ChatTemplate, Rendered

_PROBE = "a probe of 1 text"


class Tokenizer:
    """A model's vocabulary, its algorithm and its chat templates.

    bos_id: the token that begins a text, if the model has one.
    eos_ids: every token that ends a turn or a text.
    special_ids: control tokens; text never becomes one unless it is asked to.
    vocab_size: one more than the largest id; a model's embedding may have more rows.
    chat_template: the source of the default template; assign to use another.
    chat_templates: all templates by name.
    """

    def __init__(
        self,
        codec: Codec,
        *,
        bos_id: int | None,
        eos_ids: frozenset[int],
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        templates: Mapping[str, str] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        """`prefix` and `suffix`: what `add_special` puts around a text. `variables`: what
        templates find under the names of special tokens ("bos_token" …)."""
        self._codec = codec
        self._matcher = SpecialMatcher(codec.special, codec.added, codec.whole_words)
        self._guard = Guard(self._matcher)
        self._prefix, self._suffix = list(prefix), list(suffix)
        self._variables = dict(variables or {})
        self._compiled: dict[str, _Template] = {}
        self.vocab_size = codec.size
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self.special_ids = frozenset(codec.special.values())
        self.chat_templates = dict(templates or {})

    # Text and ids

    @property
    def frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What `add_special` puts before and after a text."""
        return tuple(self._prefix), tuple(self._suffix)

    @property
    def special_names(self) -> Mapping[str, Any]:
        """Special tokens as templates see them: "bos_token" -> its text …"""
        return dict(self._variables)

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """The ids of a text, the same as the model's original tokenizer gives.

        add_special: put the model's begin and end tokens around it, where it uses them.
        parse_special: text that spells a control token becomes that token.
        Characters that the vocabulary cannot express are treated as the original does.
        Raises `InvalidRequest` for lone surrogates, which are no text.
        """
        check_unicode(text, "the text")
        runs = self._matcher.split(text) if parse_special else [text] if text else []
        ids = self._codec.encode(runs)
        return [*self._prefix, *ids, *self._suffix] if add_special else ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD.

        skip_special: control tokens give no text; otherwise they are spelled out.
        Ids from `vocab_size` on, which a model's padded embedding may produce, give no text.
        """
        data = b"".join(self._piece(token_id, skip_special) for token_id in ids)
        if self._codec.strips_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def stream(self, *, skip_special: bool = True, keep: Collection[int] = ()) -> StreamDecoder:
        """A decoder for ids that come one by one. keep: control tokens to spell all the same."""
        return StreamDecoder(
            lambda token_id: self._piece(token_id, skip_special and token_id not in keep),
            strips_space=self._codec.strips_space,
        )

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to the text, before UTF-8 decoding; control tokens as spelled."""
        if token_id < 0:
            raise InvalidRequest(f"{token_id} is no token id")
        return self._codec.bytes(token_id)

    def all_token_bytes(self) -> list[bytes]:
        """What each token adds to the text, by id: `token_bytes` of the whole vocabulary."""
        return [self._codec.bytes(token_id) for token_id in range(self.vocab_size)]

    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary spells it ("▁the", "Ġthe"); "" beyond the vocabulary."""
        if token_id < 0:
            raise InvalidRequest(f"{token_id} is no token id")
        return self._codec.text(token_id)

    def special_id(self, text: str) -> int | None:
        """The id of the control token spelled so, or None."""
        return self._codec.special.get(text)

    def _piece(self, token_id: int, skip_special: bool) -> bytes:
        if skip_special and token_id in self.special_ids:
            return b""
        return self.token_bytes(token_id)

    # Conversations

    @property
    def chat_template(self) -> str | None:
        return self.chat_templates.get("default")

    @chat_template.setter
    def chat_template(self, source: str | None) -> None:
        if source is None:
            self.chat_templates.pop("default", None)
        else:
            self.chat_templates["default"] = source

    def template_for(self, *, with_tools: bool = False) -> str | None:
        """The source that a conversation is rendered with unless told; None if there is none."""
        named = self.chat_templates
        return named.get("tool_use" if with_tools and "tool_use" in named else "default")

    def apply_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **variables: Any,
    ) -> list[int]:
        """The ids of a conversation.

        Control tokens come from the template alone. Text of the messages (or of the tools and
        variables) that spells one is encoded as the plain text it is; all else gives the ids of
        the whole rendered text.

        tools: function schemas, for templates that offer them to the model.
        chat_template: the name of one of `chat_templates`, or the source of a template.
        variables: what else the template takes (`documents`, `enable_thinking` …).
        Raises `InvalidRequest` naming the message at fault; `TemplateError` if there is no
        template or it refuses the messages.
        """
        rendered = self.render_control(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            chat_template=chat_template,
            **variables,
        )
        return self.encode_runs(rendered.runs())

    def encode_runs(self, runs: Sequence[str | int]) -> list[int]:
        """The ids of a text cut at its control tokens: runs of plain text, and ids between them."""
        return self._codec.encode(runs)

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, as `apply_chat` encodes it."""
        return self.render_spans(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            chat_template=chat_template,
            **variables,
        ).text

    def render_spans(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        chat_template: str | None = None,
        **variables: Any,
    ) -> Rendered:
        """As `render_chat`, with the spans of the template's {% generation %} blocks."""
        rendered, disguise = self._render(
            messages, tools, add_generation_prompt, chat_template, variables
        )
        if disguise is None:
            return rendered
        return Rendered(disguise.take_off(rendered.text), rendered.generated)

    def render_control(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        chat_template: str | None = None,
        **variables: Any,
    ) -> Rendering:
        """As `render_spans`, with control tokens told apart from text that spells them."""
        rendered, disguise = self._render(
            messages, tools, add_generation_prompt, chat_template, variables
        )
        check_unicode(rendered.text, "the rendered conversation")
        runs = self._matcher.split(rendered.text)
        if disguise is not None:
            runs = [disguise.take_off(run) if isinstance(run, str) else run for run in runs]
        spelled = {token_id: len(text) for text, token_id in self._matcher.special.items()}
        return rendering_of(runs, spelled, rendered.generated)

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        chat_template: str | None,
        variables: Mapping[str, Any],
    ) -> tuple[Rendered, Disguise | None]:
        """The rendered text, and the disguise that some of it wears."""
        template = self._template(chat_template, with_tools=bool(tools))
        given = {
            "messages": template.fit(check_messages(messages)),
            "tools": check_tools(tools),
            "documents": None,
            **variables,
        }

        def render(conversation: Mapping[str, Any]) -> Rendered:
            return template.render(
                {
                    **self._variables,
                    **conversation,
                    "add_generation_prompt": add_generation_prompt,
                }
            )

        guard = self._guard
        spells, loose = guard.spells_token(given), guard.has_loose_end(given)
        if not spells and not loose:
            return render(given), None
        disguise = guard.disguise_for(given)
        hidden = guard.hide_tokens(given, disguise) if spells else given
        plain = render(hidden)
        if loose:
            # Where the template's logic does not hang on these ends, hiding them too is safer.
            safer = render(guard.hide_loose_ends(hidden, disguise))
            if disguise.take_off(safer.text) == disguise.take_off(plain.text):
                plain = safer
        return plain, disguise

    def _template(self, wanted: str | None, *, with_tools: bool) -> _Template:
        named = self.chat_templates
        if wanted is not None:
            source = named.get(wanted, wanted)
        elif with_tools and "tool_use" in named:
            source = named["tool_use"]
        elif "default" in named:
            source = named["default"]
        elif named:
            raise TemplateError(
                "the model has several chat templates and none is the default",
                hint="name one of: " + ", ".join(sorted(named)),
            )
        else:
            raise TemplateError(
                "the model has no chat template: it is probably a base model",
                hint="use it for completion (`localllm run --raw`), or give a template",
            )
        if source not in self._compiled:
            self._compiled[source] = _Template(source, self._variables)
        return self._compiled[source]


class _Template:
    """A template that is given contents in the form it understands: text, or a list of parts."""

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        self._template = ChatTemplate(source)
        self._special = variables

    def render(self, variables: Mapping[str, Any]) -> Rendered:
        return self._template.render(variables)

    def fit(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if any(isinstance(message["content"], list) for message in messages):
            if self._takes_parts:
                return messages
            return [join_parts(message) for message in messages]
        if not self._takes_text and self._takes_parts:
            return [split_parts(message) for message in messages]
        return messages

    @cached_property
    def _takes_text(self) -> bool:
        return self._shows_probe(_PROBE)

    @cached_property
    def _takes_parts(self) -> bool:
        return self._shows_probe([{"type": "text", "text": _PROBE}])

    def _shows_probe(self, content: Any) -> bool:
        messages = [{"role": "user", "content": content}]
        try:
            text = self.render({**self._special, "messages": messages}).text
        except TemplateError:
            return False
        return _PROBE in text and f"'{_PROBE}'" not in text and f'"{_PROBE}"' not in text
