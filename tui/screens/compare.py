"""Several answers to one question, side by side; the best goes on, and is learned from."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, HorizontalScroll, Vertical, VerticalScroll
from textual.widgets import Select, Static

from localllm.errors import InvalidRequest, LocalLLMError
from localllm.tui.answers import how_many
from localllm.tui.conversation import Question, question_of
from localllm.tui.sampling_fields import sampling_params
from localllm.tui.screens.view import View
from localllm.tui.text import model_name, plain
from localllm.tui.tokens import keep_tokens, token_views
from localllm.tui.widgets.fields import Field

if TYPE_CHECKING:
    from localllm.tui.engine.client import TokenInfo

MOST = 6
_COLUMN_LEAST = 30  # cells; more columns than fit are scrolled to


@dataclass(frozen=True)
class Variant:
    """How one of the answers is made; what is None is as in the chat. model: another one is loaded
    for it after the rest has been answered."""

    temperature: float | None = None
    seed: int | None = None
    adapter: str | None = None
    weight: float = 1.0
    model: str | None = None

    def title(self) -> str:
        parts = []
        if self.model:
            parts.append(model_name(self.model))
        if self.adapter == "-":
            parts.append("without an adapter")
        elif self.adapter:
            weight = "" if self.weight == 1 else f" x{self.weight:g}"
            parts.append(f"adapter {model_name(self.adapter)}{weight}")
        if self.temperature is not None:
            parts.append(f"temperature {self.temperature:g}")
        if self.seed is not None:
            parts.append(f"seed {self.seed}")
        return ", ".join(parts) or "as in the chat"

    def params(self, base: dict[str, Any]) -> dict[str, Any]:
        """Of one answer, whatever `n` the chat has."""
        base = {name: value for name, value in base.items() if name != "n"}
        own = {"temperature": self.temperature, "seed": self.seed}
        return {**base, **{name: value for name, value in own.items() if value is not None}}


@dataclass
class _Answer:
    variant: Variant
    text: str = ""
    reasoning: str = ""
    state: str = "waiting"
    receipt: dict[str, Any] = field(default_factory=dict)
    tokens: list[TokenInfo] = field(default_factory=list)
    model: str | None = None
    adapter: str | None = None


class Column(Vertical):
    """One answer as it comes."""

    DEFAULT_CSS = """
    Column { width: 1fr; min-width: 30; height: 1fr; border: round $panel; padding: 0 1; }
    Column.-chosen { border: round $accent; }
    Column .head { color: $text-primary; text-style: bold; height: auto; }
    Column .foot { color: $text-muted; height: auto; }
    Column VerticalScroll { height: 1fr; }
    Column .text { height: auto; }
    """

    def __init__(self, number: int, variant: Variant) -> None:
        super().__init__(id=f"column-{number}")
        self._number, self._variant = number, variant

    def compose(self) -> ComposeResult:
        yield Static(
            f"{self._number + 1}  {plain(self._variant.title())}", classes="head", markup=False
        )
        with VerticalScroll(can_focus=False):
            yield Static("", classes="text", markup=False)
        yield Static("waiting", classes="foot", markup=False)

    def show(self, answer: _Answer) -> None:
        thought = f"(thinking: {answer.reasoning})\n\n" if answer.reasoning else ""
        self.query_one(".text", Static).update(plain(thought + answer.text))
        foot = answer.state
        speed = answer.receipt.get("decode_tokens_per_second")
        if answer.receipt:
            foot += f", {answer.receipt.get('generated_tokens', 0)} tokens"
        if speed:
            foot += f", {speed:.1f}/s"
        if (seed := answer.receipt.get("seed")) is not None:
            foot += f", seed {seed}"
        self.query_one(".foot", Static).update(plain(foot))

    def on_click(self) -> None:
        self.screen.choose(self._number)  # type: ignore[attr-defined]


class CompareScreen(View):
    """The answers of one model come from one batch. Choosing one keeps the others as siblings."""

    TITLE_TEXT = "Compare"
    DEFAULT_CSS = """
    CompareScreen #form { height: auto; padding: 0 1; }
    CompareScreen #form Select { width: 26; }
    CompareScreen #form Field { width: 1fr; }
    CompareScreen.-narrow #form { layout: vertical; }
    CompareScreen #columns { height: 1fr; }
    CompareScreen #question { height: auto; max-height: 3; padding: 0 1; color: $text-muted; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "run", "Answer"),
        Binding("s", "stop", "Stop"),
        Binding("enter", "take", "Take it"),
        Binding("left,h", "step(-1)", "Left", show=False),
        Binding("right,l", "step(1)", "Right", show=False),
        *(
            Binding(str(number + 1), f"pick({number})", "Choose", show=False)
            for number in range(MOST)
        ),
    ]

    def __init__(self, variants: Sequence[Variant] | None = None, *, run: bool = False) -> None:
        """variants: what to compare; None leaves it to the form. run: begins at once."""
        super().__init__()
        self._given = None if variants is None else tuple(variants[:MOST])
        self._run_now = run
        self._question: Question | None = None
        self._answers: list[_Answer] = []
        self._asked: list[Any] = []
        self._chosen = 0
        self._stopped = False

    def body(self) -> ComposeResult:
        yield Static("", id="question", markup=False)
        with Horizontal(id="form"):
            yield Select(
                [
                    ("different seeds", "seed"),
                    ("temperatures", "temperature"),
                    ("adapters", "adapter"),
                    ("models", "model"),
                ],
                value="seed",
                allow_blank=False,
                compact=True,
                id="by",
            )
            yield Field("values", self._count(), label="how many")
        with HorizontalScroll(id="columns", can_focus=False):
            yield Static(
                "Enter or r answers. Then arrow keys or a number choose, Enter takes the chosen "
                "one: the chat goes on from it, the others stay as siblings, and each becomes a "
                "preference pair to learn from.",
                classes="note",
                markup=False,
            )

    def on_mount(self) -> None:
        chat = self.chat
        self._question = None if chat is None else question_of(self.store, chat)
        question = self.query_one("#question", Static)
        if self._question is None:
            question.update("Nothing was asked in this chat yet: ask first, then compare.")
            return
        question.update(plain(self._question.parent.content))
        if self._given is not None:
            self.query_one("#form").display = False
            if self._run_now:
                self.action_run()
        else:
            self.query_one(Field).focus_input()

    def on_select_changed(self, event: Select.Changed) -> None:
        by = str(event.value)
        labels = {
            "seed": ("how many", self._count()),
            "temperature": ("temperatures", "0, 0.7, 1.2"),
            "adapter": ("adapters, - is none", self._adapters()),
            "model": ("models", self._models()),
        }
        label, value = labels[by]
        form = self.query_one("#form Field", Field)
        form.label = label
        form.value = value

    def _count(self) -> str:
        """As many as the chat's `n` asks for at once, where that is a comparison."""
        chat = self.chat
        wanted = 1 if chat is None else how_many(self.host.answers.params(chat))
        return str(wanted) if 2 <= wanted <= MOST else "3"

    def _adapters(self) -> str:
        chat = self.chat
        return f"-, {chat.adapter}" if chat and chat.adapter else "-, path/to/adapter"

    def _models(self) -> str:
        info = self.engine.state.model
        return f"{info.name}, " if info else ""

    def on_input_submitted(self) -> None:
        self.action_run()

    def _variants(self) -> list[Variant]:
        """Raises InvalidRequest for what the form does not hold."""
        if self._given is not None:
            return list(self._given)
        by = str(self.query_one("#by", Select).value)
        typed = self.query_one("#form Field", Field).value
        values = [part.strip() for part in typed.split(",") if part.strip()]
        if by == "seed":
            if len(values) != 1 or not values[0].isdecimal() or not 2 <= int(values[0]) <= MOST:
                raise InvalidRequest(f"how many answers: a number from 2 to {MOST}")
            return [Variant() for _ in range(int(values[0]))]
        if not 2 <= len(values) <= MOST:
            raise InvalidRequest(f"give 2 to {MOST}, with commas between them")
        if by == "temperature":
            try:
                found = [Variant(temperature=float(value)) for value in values]
            except ValueError as error:
                raise InvalidRequest("temperatures are numbers") from error
        elif by == "model":
            return [Variant(model=value) for value in values]
        else:
            found = [_adapter_variant(value) for value in values]
        return found

    # ---- answering

    @work(exclusive=True, group="compare")
    async def action_run(self) -> None:
        form = self.query_one("#form Field", Field)
        if self._question is None:
            return
        try:
            variants = self._variants()
            base = self.host.answers.params(self._question.chat)
            for variant in variants:
                sampling_params({k: v for k, v in variant.params(base).items() if k != "reasoning"})
            form.say(None)
        except InvalidRequest as error:
            form.say(str(error))
            return
        self._stopped = False
        self._answers = [_Answer(variant) for variant in variants]
        columns = self.query_one("#columns", HorizontalScroll)
        await columns.remove_children()
        await columns.mount_all(Column(number, variant) for number, variant in enumerate(variants))
        columns.focus()
        self.set_focus(None)
        self.choose(0)
        try:
            await self._answer_all(base)
        except LocalLLMError as error:
            self.tell(error)

    async def _answer_all(self, base: dict[str, Any]) -> None:
        """The loaded model's answers together, then those of each other model; then back."""
        info = self.engine.state.model
        loaded = info.name if info else None
        wanted = [answer.variant.model or loaded for answer in self._answers]
        order = sorted(set(wanted), key=lambda name: (name != loaded, wanted.index(name)))
        now = loaded
        try:
            for name in order:
                if self._stopped:
                    return
                if name != now and name is not None:
                    for answer, its in zip(self._answers, wanted, strict=True):
                        if its == name:
                            self._state(answer, f"loading {name}")
                    await self.engine.open(name)
                    now = name
                group = [a for a, its in zip(self._answers, wanted, strict=True) if its == name]
                for answer in group:
                    answer.model = name
                await asyncio.gather(*(self._answer(answer, base) for answer in group))
        finally:
            self._asked.clear()
            if now != loaded and loaded is not None:
                await self.engine.open(loaded)

    async def _answer(self, answer: _Answer, base: dict[str, Any]) -> None:
        assert self._question is not None
        variant, chat = answer.variant, self._question.chat
        # "-" asks for none where the chat has one.
        adapter = chat.adapter if variant.adapter is None else variant.adapter
        weight = chat.adapter_weight if variant.adapter is None else variant.weight
        try:
            # An adapter belongs to the model it was made for.
            answer.adapter = None if adapter == "-" or variant.model else adapter
            asked = self.engine.ask(
                self._question.messages,
                variant.params({k: v for k, v in base.items() if k != "reasoning"}),
                adapter=answer.adapter,
                adapter_weight=weight,
            )
            self._asked.append(asked)
            self._state(answer, "answering")
            async for piece in asked:
                answer.text += piece.text
                answer.reasoning += piece.reasoning
                answer.tokens += piece.tokens
                self._show(answer)
            finished = asked.result[0]
            answer.receipt = dict(finished.receipt)
            self._state(answer, finished.reason)
        except LocalLLMError as error:
            self._state(answer, f"failed: {error}")

    def _state(self, answer: _Answer, state: str) -> None:
        answer.state = state
        self._show(answer)

    def _show(self, answer: _Answer) -> None:
        for number, other in enumerate(self._answers):
            if other is answer:
                for column in self.query(f"#column-{number}").results(Column):
                    column.show(answer)

    def action_stop(self) -> None:
        self._stopped = True
        for asked in self._asked:
            asked.stop()

    def action_leave(self) -> None:
        self.action_stop()
        super().action_leave()

    # ---- choosing

    def choose(self, number: int) -> None:
        if 0 <= number < len(self._answers):
            self._chosen = number
            for place, column in enumerate(self.query(Column)):
                column.set_class(place == number, "-chosen")
                if place == number:
                    column.scroll_visible(animate=False)

    def action_step(self, by: int) -> None:
        self.choose(self._chosen + by)

    def action_pick(self, number: int) -> None:
        self.choose(number)

    async def action_take(self) -> None:
        """The chosen answer becomes the branch, the others its siblings, each pair a lesson."""
        question = self._question
        done = [answer for answer in self._answers if answer.text]
        if question is None or not done or self._chosen >= len(self._answers):
            return
        if self._asked:
            self.tell("the answers are not finished; s stops them")
            return
        chosen = self._answers[self._chosen]
        if not chosen.text:
            self.tell("this answer is empty")
            return
        chat = question.chat
        # Several that say the same are one.
        others = list({answer.text: answer for answer in done}.values())
        others = [answer for answer in others if answer.text != chosen.text]
        with self.store.together():
            for answer in others:
                self._keep(question, answer, open_branch=False)
            message = self._keep(question, chosen, open_branch=True)
        pairs = 0
        for answer in others:
            pairs += self.store.add_pair(
                question.messages, chosen.text, answer.text, "compare", chat.id
            )
        told = f"{pairs} preference {'pair' if pairs == 1 else 'pairs'} kept"
        self.notify(told if others else "They all said the same: nothing to prefer")
        await self.host.open_chat(chat.id, message)
        self.dismiss(None)

    def _keep(self, question: Question, answer: _Answer, *, open_branch: bool) -> int:
        params = answer.variant.params(self.host.answers.params(question.chat))
        seed = answer.receipt.get("seed")
        message = self.store.add_message(
            question.chat.id,
            question.parent.id,
            "assistant",
            answer.text,
            reasoning=answer.reasoning,
            status="stopped" if answer.state in ("cancelled", "stopped") else "complete",
            model=answer.model,
            adapter=answer.adapter,
            params=params if seed is None else {**params, "seed": seed},
            receipt=answer.receipt,
            open_branch=open_branch,
        )
        keep_tokens(self.app, message.id, token_views(answer.tokens))
        return message.id


def _adapter_variant(text: str) -> Variant:
    """NAME or NAME x0.5; "-" for none."""
    name, cross, weight = text.rpartition(" x")
    if not cross:
        return Variant(adapter=text)
    try:
        return Variant(adapter=name.strip(), weight=float(weight))
    except ValueError as error:
        raise InvalidRequest(f"the weight in {text!r:.60} is no number") from error


def before_and_after(adapter: str, weight: float = 1.0) -> tuple[Variant, ...]:
    """The same question without the adapter and with it, drawn with one seed."""
    return (
        replace(Variant(adapter="-"), seed=0),
        Variant(adapter=adapter, weight=weight, seed=0),
    )
