"""Fine-tuning from the app: start a run, watch its loss, hear its samples, talk to the result.

A run is a process of its own. It goes on when the app is left, and is found again.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from textual import events, on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import Button, OptionList, Select, Static
from textual.widgets.option_list import Option

from localllm.errors import InvalidRequest, LocalLLMError
from localllm.tui import learning
from localllm.tui.finetune_job import Job, Jobs
from localllm.tui.screens.compare import CompareScreen, before_and_after
from localllm.tui.screens.view import View
from localllm.tui.text import plain
from localllm.tui.widgets.confirm import Confirm
from localllm.tui.widgets.fields import Field
from localllm.tui.widgets.sparkline import Plot, Series
from localllm.tui.widgets.speed import seconds

_EVERY = 1.0  # seconds between two looks at a run
_SAMPLES = 4  # shown
_NONE = "none yet"
PAIRS, EXAMPLES, FILE = "pairs", "examples", "a file"

# name, label, default, what it is
_FORM: tuple[tuple[str, str, str, str], ...] = (
    ("data", "file of examples", "", "JSONL, JSON, CSV or Parquet; only for data from a file"),
    ("model", "model", "", "the base; the loaded one unless told"),
    ("steps", "steps", "100", "end after so many"),
    ("batch-size", "examples a step", "4", "computed together"),
    ("rank", "rank", "8", "of the adapter"),
    ("alpha", "alpha", "16", "the adapter's strength"),
    ("lr", "learning rate", "2e-4", "the highest"),
    ("seq-len", "longest example", "1024", "in tokens"),
    ("save-every", "save every", "50", "steps between checkpoints"),
    ("sample-every", "sample every", "25", "steps between sample answers"),
    (
        "sample-prompt",
        "sample prompt",
        "",
        "answered along the way; the chat's question unless told",
    ),
    ("seed", "seed", "0", "of order, start and noise"),
    ("more", "more options", "", "as `localllm finetune` takes them: --warmup 10 --dora"),
)
_WHOLE = ("steps", "batch-size", "rank", "seq-len", "save-every", "sample-every", "seed")
_NUMBERS = ("alpha", "lr")


class FinetuneScreen(View):
    """Left a form and the runs there are, right the run that is chosen."""

    TITLE_TEXT = "Fine-tune"
    DEFAULT_CSS = """
    FinetuneScreen Horizontal.columns { height: 1fr; }
    FinetuneScreen #left { width: 52; height: 1fr; border-right: vkey $panel; }
    FinetuneScreen #form { height: 2fr; max-height: 15; padding: 0 1; }
    FinetuneScreen #form Horizontal.choice { height: 1; }
    FinetuneScreen #form .label { width: 24; }
    FinetuneScreen #form Select { width: 1fr; }
    FinetuneScreen #hint { height: 2; }
    FinetuneScreen #start { width: 100%; margin: 0 1; }
    FinetuneScreen #runs { height: 1fr; min-height: 3; padding: 0 1; }
    FinetuneScreen #right { width: 1fr; height: 1fr; padding: 0 1; }
    FinetuneScreen Plot { height: 14; }
    FinetuneScreen #facts, FinetuneScreen #samples { height: auto; }
    FinetuneScreen.-narrow Horizontal.columns { layout: vertical; }
    FinetuneScreen.-narrow #left {
        width: 1fr; height: 3fr; border-right: none; border-bottom: hkey $panel;
    }
    FinetuneScreen.-narrow #form { height: 1fr; }
    FinetuneScreen.-narrow #hint { height: 1; }
    FinetuneScreen.-narrow .section { margin-top: 0; }
    FinetuneScreen.-narrow #runs { height: 3; }
    FinetuneScreen.-narrow #right { height: 2fr; }
    FinetuneScreen.-narrow Plot { height: 6; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "start", "Start", priority=True),
        Binding("ctrl+x", "stop", "Stop the run", priority=True),
        Binding("ctrl+r", "resume", "Go on", priority=True),
        Binding("ctrl+l", "use", "Use in chat", priority=True),
        Binding("ctrl+b", "compare", "Before and after", priority=True),
    ]

    def __init__(self, runs: Jobs | None = None) -> None:
        super().__init__()
        self._runs = runs or Jobs()
        self._jobs: list[Job] = []
        self._job: Job | None = None
        self._can: set[str] = set()  # what can be done with it

    def body(self) -> ComposeResult:
        pairs = self.store.pairs()
        preferences = sum(1 for _ in learning.preferences(pairs))
        answers = sum(1 for _ in learning.examples(pairs))
        sources = [
            (counted(preferences, "preference pair"), PAIRS),
            (counted(answers, "good answer"), EXAMPLES),
            ("a file", FILE),
        ]
        first = PAIRS if preferences else EXAMPLES if answers else FILE
        with Horizontal(classes="columns"):
            with Vertical(id="left"):
                with VerticalScroll(id="form", can_focus=False):
                    yield from self._choice("learn from", "source", sources, first)
                    methods = [(name, name) for name in ("dpo", "orpo", "sft")]
                    yield from self._choice(
                        "method", "method", methods, "dpo" if first == PAIRS else "sft"
                    )
                    for name, label, default, text in _FORM:
                        yield Field(
                            name, default, label=label, placeholder=text, help=text, id=f"f-{name}"
                        )
                yield Static("", id="hint", classes="note", markup=False)
                yield Button("Start", id="start", variant="primary", compact=True)
                yield Static("Runs", classes="section", markup=False)
                yield OptionList(id="runs", markup=False)
            with VerticalScroll(id="right"):
                yield Static("", id="facts", markup=False)
                yield Plot(x_name="step")
                yield Static("", id="samples", markup=False)

    @staticmethod
    def _choice(label: str, id: str, options: list[tuple[str, str]], value: str) -> ComposeResult:
        with Horizontal(classes="choice"):
            yield Static(label, classes="label", markup=False)
            yield Select(options, value=value, allow_blank=False, compact=True, id=id)

    def on_mount(self) -> None:
        self.query_one("#source").focus()
        self._read_jobs()
        self.set_interval(_EVERY, self._look)

    @on(Select.Changed, "#source")
    def method_follows(self, event: Select.Changed) -> None:
        """Pairs are learned from by preference, answers by imitation."""
        self.query_one("#method", Select).value = "dpo" if event.value == PAIRS else "sft"

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        """What is typed there, in whole: a field is too narrow to say it."""
        field = next((one for one in event.widget.ancestors if isinstance(one, Field)), None)
        self.query_one("#hint", Static).update("" if field is None else plain(field.help_text))

    # ---- starting

    def on_button_pressed(self) -> None:
        self.action_start()

    def _options(self) -> dict[str, str]:
        """What was typed, checked as far as it can be here. Raises InvalidRequest."""
        options = {}
        for name, label, _, _ in _FORM:
            field = self.query_one(f"#f-{name}", Field)
            field.say(None)
            value = field.value.strip()
            if not value or name in ("data", "more"):
                continue
            try:
                if name in _WHOLE:
                    int(value)
                elif name in _NUMBERS:
                    float(value)
            except ValueError as error:
                wanted = "a whole number" if name in _WHOLE else "a number"
                message = f"{label} must be {wanted}, not {value!r:.40}"
                field.say(message)
                field.focus_input()
                raise InvalidRequest(message) from error
            options[name] = value
        return options

    def _more(self) -> list[str]:
        typed = self.query_one("#f-more", Field).value
        try:
            words = shlex.split(typed)
        except ValueError as error:
            raise InvalidRequest(f"more options: {error}") from error
        if words and not words[0].startswith("--"):
            raise InvalidRequest("more options begin with --, as for `localllm finetune`")
        return words

    @work(exclusive=True, group="start")
    async def action_start(self) -> None:
        try:
            options, more = self._options(), self._more()
            source = str(self.query_one("#source", Select).value)
            options["method"] = str(self.query_one("#method", Select).value)
            info = self.engine.state.model
            if "model" not in options:
                if info is None:
                    raise InvalidRequest("no model is loaded: name the one to train")
                options["model"] = info.name
            if "sample-prompt" not in options:
                self._sample_prompt(options)
            job = self._runs.start(self._data(source), options, more)
        except LocalLLMError as error:
            self.tell(error)
            return
        self.notify(f"Run {plain(job.name)} has begun; it goes on when the app is left")
        self._job = job
        self._read_jobs()

    def _sample_prompt(self, options: dict[str, str]) -> None:
        """The chat's last question; with none, no samples are drawn."""
        chat = self.chat
        branch = [] if chat is None else self.store.branch(chat.head)
        asked = next((m.content for m in reversed(branch) if m.role == "user"), None)
        if asked:
            options["sample-prompt"] = asked[:2000]
        else:
            options.pop("sample-every", None)

    def _data(self, source: str) -> Path | list[dict[str, Any]]:
        """Raises InvalidRequest where a file is wanted and none named."""
        if source == FILE:
            typed = self.query_one("#f-data", Field).value.strip()
            if not typed:
                raise InvalidRequest("name the file of examples")
            return Path(typed).expanduser()
        pairs = self.store.pairs()
        return list(learning.preferences(pairs) if source == PAIRS else learning.examples(pairs))

    # ---- watching

    def _read_jobs(self) -> None:
        self._jobs = self._runs.all()
        options = self.query_one("#runs", OptionList)
        names = [job.name for job in self._jobs]
        shown = [f"{job.name}  {job.status()}" for job in self._jobs]
        if (shown or [_NONE]) != [str(option.prompt) for option in options.options]:
            place = options.highlighted
            options.clear_options()
            for line in shown:
                options.add_option(Option(plain(line)))
            if not shown:
                options.add_option(Option(_NONE, disabled=True))
            if self._job is not None and self._job.name in names:
                place = names.index(self._job.name)
            if shown:
                options.highlighted = min(place or 0, len(shown) - 1)
        if self._job is None and self._jobs:
            self._job = self._jobs[0]
        self._show()

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        if event.option_index < len(self._jobs):
            self._job = self._jobs[event.option_index]
            self._show()

    def _look(self) -> None:
        if self.is_current:
            self._read_jobs()

    def _show(self) -> None:
        job = self._job
        if job is None:
            self.query_one("#facts", Static).update(
                "Runs show here: their loss, speed and samples, live. Rate answers or write better "
                "ones in a chat, then start one."
            )
            self.query_one(Plot).display = False
            return
        lines, status = job.metrics(), job.status()
        self.query_one("#facts", Static).update(_facts(job.name, status, lines))
        plot = self.query_one(Plot)
        plot.show(curves(lines))
        plot.display = bool(plot.series) or status == "running"
        self._find_out(job, status)
        told = sample_lines(lines)
        if not told and (log := job.log_tail()):
            told = Content.assemble(("what it said last\n", "bold"), plain(log))
        self.query_one("#samples", Static).update(told)

    def _find_out(self, job: Job, status: str) -> None:
        """What can be done with the run, for the footer."""
        can = {"stop"} if status == "running" else {"resume"} if job.resumable() else set()
        if job.adapter() is not None:
            can |= {"use", "compare"}
        if can != self._can:
            self._can = can
            self.refresh_bindings()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action in ("stop", "resume", "use", "compare"):
            return action in self._can
        return super().check_action(action, parameters)

    def action_resume(self) -> None:
        assert self._job is not None
        try:
            self._runs.resume(self._job)
        except LocalLLMError as error:
            self.tell(error)
            return
        self.notify(f"Run {plain(self._job.name)} goes on where it was saved last")
        self._read_jobs()

    @work(exclusive=True, group="stop")
    async def action_stop(self) -> None:
        job = self._job
        assert job is not None
        if await self.app.push_screen_wait(
            Confirm(f"End {job.name} after this step? It is saved.", yes="End it", no="Go on")
        ):
            job.cancel()
            self._read_jobs()

    # ---- the result

    def _adapter(self) -> str | None:
        adapter = None if self._job is None else self._job.adapter()
        if adapter is None:
            self.tell("this run has no adapter yet")
            return None
        return str(adapter)

    @work(exclusive=True, group="use")
    async def action_use(self) -> None:
        """The open chat goes on with the adapter."""
        adapter = self._adapter()
        if adapter is None:
            return
        try:
            await self.engine.load_adapter(adapter)
        except LocalLLMError as error:
            self.tell(error)
            return
        chat = self.host.need_chat()
        self.store.edit_chat(chat.id, adapter=adapter, adapter_weight=1.0)
        await self.host.open_chat(chat.id)
        self.notify("The chat answers with the adapter now; /adapters turns it off")

    def action_compare(self) -> None:
        adapter = self._adapter()
        if adapter is not None:
            self.app.push_screen(CompareScreen(before_and_after(adapter), run=True))


def curves(lines: Sequence[Mapping[str, Any]]) -> list[Series]:
    """Loss by step, of training and of validation."""

    def points(kind: str) -> tuple[tuple[float, float], ...]:
        return tuple(
            (float(line["step"]), float(line["loss"]))
            for line in lines
            if line.get("type") == kind and line.get("loss") is not None and "step" in line
        )

    found = [
        Series("loss", points("step"), "$primary"),
        Series("validation", points("eval"), "$warning"),
    ]
    return [series for series in found if series.points]


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _facts(name: str, status: str, lines: Sequence[Mapping[str, Any]]) -> Content:
    steps = [line for line in lines if line.get("type") == "step"]
    parts = [Content.assemble((plain(name), "bold"), f"  {plain(status)}")]
    if steps:
        last = steps[-1]
        whole = last.get("steps")
        text = f"step {last['step']}" + (f" of {whole}" if whole else "")
        if last.get("loss") is not None:
            text += f", loss {last['loss']:.4g}"
        if last.get("tokens_per_second"):
            text += f", {last['tokens_per_second']:,.0f} tokens/s"
        if last.get("memory_bytes"):
            text += f", {last['memory_bytes'] / 1e9:.2f} GB"
        pace = [line["seconds"] for line in steps[-20:] if line.get("seconds")]
        if whole and pace and status == "running":
            text += f", {seconds((whole - last['step']) * sum(pace) / len(pace))} to go"
        parts.append(Content(text))
    for line in lines:
        if line.get("type") in ("warning", "error"):
            said = str(line.get("message") or line.get("text") or "")
            parts.append(Content.styled(plain(said), "$text-warning"))
    return Content("\n").join(parts)


def sample_lines(lines: Sequence[Mapping[str, Any]]) -> Content:
    """The answers drawn along the way, the newest first."""
    drawn = [line for line in lines if line.get("type") == "samples"][-_SAMPLES:]
    parts = []
    for line in reversed(drawn):
        parts.append(Content.styled(f"after step {line.get('step')}", "bold"))
        for answer in line.get("answers", ()):
            parts.append(Content.styled(plain(str(answer.get("prompt", ""))), "dim"))
            parts.append(Content(plain(str(answer.get("answer", "")))))
    return Content("\n").join(parts)
