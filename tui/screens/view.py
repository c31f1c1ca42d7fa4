"""What the screens beside the chat share: a title, a way back, and the chat they were opened on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import Screen
from textual.widgets import Static

from localllm.errors import LocalLLMError
from localllm.tui.store import Chat, Message, Store
from localllm.tui.telling import Telling
from localllm.tui.text import plain
from localllm.tui.widgets.footer import KeyLine

if TYPE_CHECKING:
    from localllm.tui.engine.client import Engine, TokenInfo


class Live(Protocol):
    """An answer under way. seen: its tokens so far."""

    seen: list[TokenInfo]


class Answering(Protocol):
    """What screens ask of the app's answers. opened: the model that the engine was last asked for;
    a screen that opens another one says so here, lest it be loaded again for the next answer."""

    opened: str | None

    @property
    def live(self) -> Mapping[int, Live]:
        """The answer under way of each chat."""
        ...

    def params(self, chat: Chat) -> dict[str, Any]:
        """The sampling that holds in a chat."""
        ...

    def usual(self) -> dict[str, Any]:
        """The sampling that holds where a chat sets nothing."""
        ...

    def offered(self) -> Sequence[Mapping[str, Any]]:
        """The tools that the model is told of, as JSON schemas."""
        ...

    def go_on(self, message: Message) -> None:
        """Continues an answer where its text ends. Raises InvalidRequest while another is made."""
        ...


class Host(Protocol):
    """What a screen asks of the app it is pushed on."""

    store: Store
    engine: Engine
    answers: Answering

    @property
    def chat_id(self) -> int | None:
        """The open chat."""
        ...

    def need_chat(self) -> Chat:
        """The open chat; one is made where there is none yet."""
        ...

    async def open_chat(self, chat: int, message: int | None = None) -> None:
        """Shows a chat as it is in the store now; message: whose branch is opened."""
        ...


class View(Telling, Screen[None]):
    """A screen with a title and a footer; Escape leaves it."""

    DEFAULT_CSS = """
    View { background: $background; }
    View > .view-title {
        height: 1; padding: 0 1; background: $panel; color: $foreground; text-style: bold;
    }
    View > .view-body { height: 1fr; }
    View .note { color: $text-muted; height: auto; padding: 0 1; }
    View .wrong { color: $text-error; height: auto; padding: 0 1; }
    View .section {
        color: $text-primary; text-style: bold; height: 1; padding: 0 1; margin-top: 1;
    }
    View DataTable { background: $surface; overflow-x: hidden; }
    View OptionList, View OptionList:focus {
        border: none; padding: 0; height: 1fr; background: $surface;
    }
    View SelectOverlay, View SelectOverlay:focus {
        border: none; padding: 0; height: auto; max-height: 12; background: $panel;
    }
    View TextArea, View TextArea:focus { border: none; padding: 0 1; }
    View Input.line, View Input.line:focus { border: none; height: 1; padding: 0 1; }
    View Input.line:focus { background: $primary-muted; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "Back")]
    TITLE_TEXT: ClassVar[str] = ""
    NOTICE_SECONDS = 8
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (90, "-wide")]  # noqa: RUF012  as Screen declares it

    def compose(self) -> ComposeResult:
        # Before there is anything within: to style it all twice takes a tenth of the opening.
        wide = self.app.size.width >= 90
        self.set_class(wide, "-wide")
        self.set_class(not wide, "-narrow")
        yield Static(self.TITLE_TEXT, classes="view-title", markup=False)
        with Vertical(classes="view-body"):
            yield from self.body()
        yield KeyLine()

    def body(self) -> ComposeResult:
        raise NotImplementedError

    @property
    def host(self) -> Host:
        return cast(Host, self.app)

    @property
    def store(self) -> Store:
        return self.host.store

    @property
    def engine(self) -> Engine:
        return self.host.engine

    @property
    def chat(self) -> Chat | None:
        """The open chat as it is now."""
        number = self.host.chat_id
        if number is None:
            return None
        try:
            return self.store.chat(number)
        except KeyError:
            return None

    def title_is(self, text: str) -> None:
        self.query_one(".view-title", Static).update(plain(text))

    def action_leave(self) -> None:
        self.dismiss(None)

    async def attempt(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """The result of `work`; an error of ours is told, and None comes back."""
        try:
            return await work()
        except LocalLLMError as error:
            self.tell(error)
            return None
