"""The chat app: what its screens share, and how keys, palette and slash commands reach commands."""

from __future__ import annotations

import contextlib
import gc
import inspect
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from textual import events
from textual.app import App
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.screen import ModalScreen
from textual.worker import WorkerFailed

from localllm.errors import LocalLLMError
from localllm.tui.answers import Answers
from localllm.tui.commands import COMMANDS, Command, find, keys_of
from localllm.tui.engine.client import EngineState
from localllm.tui.keymap import Remapped
from localllm.tui.opening import Opening
from localllm.tui.places import KEYS, SETTINGS, config_folder
from localllm.tui.settings import Settings, with_setting, write_settings
from localllm.tui.telling import Telling
from localllm.tui.text import plain
from localllm.tui.themes import ANSI, theme_for

if TYPE_CHECKING:
    from textual.command import Provider

    from localllm.tui.engine.client import Engine, News
    from localllm.tui.screens.chat import ChatScreen
    from localllm.tui.store import Chat, Store
    from localllm.tui.tools import AppTools
    from localllm.tui.widgets.composer import Composer


_SOON = 0.5  # seconds after the start, when the first letters have been typed


class EngineChanged(Message):
    """The engine's state is another one."""

    def __init__(self, state: EngineState) -> None:
        super().__init__()
        self.state = state


def _palette() -> type[Provider]:
    from localllm.tui.palette import Palette

    return Palette


class ChatApp(Telling, App[None], inherit_bindings=False):
    """store, engine: used by every screen. answers: those under way. chat_id: the open chat, None
    for one that nothing was said in yet."""

    CSS_PATH = Path(__file__).with_name("app.tcss")
    COMMANDS: ClassVar[set[Any]] = {_palette}
    BINDINGS: ClassVar[list[BindingType]] = []
    TITLE = "localllm"
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (90, "-wide")]  # noqa: RUF012

    def __init__(
        self,
        store: Store,
        engine: Engine,
        settings: Settings | None = None,
        opening: Opening | None = None,
        *,
        config: Path | None = None,
        problems: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self.store = store
        self.engine = engine
        self.settings = settings or Settings()
        self.opening = opening or Opening()
        self.config = config or config_folder()
        self.remapped: Remapped = {}
        self._problems = list(problems)
        self._bound: list[str] = []
        self._chat_screen: ChatScreen | None = None
        self._unsubscribe: Any = None
        self._early: list[events.Key | events.Paste] | None = []  # typed before there is a composer
        self.typed = 0.0  # when a key was last typed, time.monotonic()
        self.ready = False  # whether the keys are bound and the first chat is open
        self.answers = Answers(self)
        self.tools: AppTools | None = None  # once the first screen is there

    # ---- start and end

    def on_load(self) -> None:
        self._look()  # before anything is styled, so that nothing has to be styled anew

    def get_default_screen(self) -> ChatScreen:
        """The lowest screen, so that no empty one is drawn first."""
        from localllm.tui.screens.chat import ChatScreen

        self._chat_screen = ChatScreen()
        # Textual sets it too, when all is styled already.
        self._chat_screen.add_class("-wide" if self.size.width >= 90 else "-narrow")
        return self._chat_screen

    def on_mount(self) -> None:
        self.call_after_refresh(self._begin)

    async def on_event(self, event: events.Event) -> None:
        if self._early is not None and isinstance(event, events.Key | events.Paste):
            self._early.append(event)
        else:
            await super().on_event(event)

    def can_type(self, composer: Composer) -> None:
        """From now on keys have somewhere to go; those that were typed before go there first."""
        early, self._early = self._early or [], None
        self.chat_screen.set_focus(composer)
        for event in early:
            composer._forward_event(event)

    async def _begin(self) -> None:
        """What can wait until something is on the screen."""
        gc.freeze()
        gc.enable()
        from localllm.tui.tool_settings import read_tool_settings
        from localllm.tui.tools import AppTools
        from localllm.tui.trace import trace_of

        self._unsubscribe = self.engine.subscribe(self._heard)
        trace_of(self.engine)  # from the start, so that the views have what happened
        self.answers.open_engine(self.model_name, self.opening.options)
        self.tools = AppTools(self.config, read_tool_settings(self.store))
        self.tools.start()
        self.bind_commands()
        for problem in self._problems:
            self.warn(problem)
        if self._chat_screen is not None:
            await self._chat_screen.begin()
        self.ready = True
        if self._chat_screen is not None:
            await self._chat_screen.take_early()
        self.set_timer(_SOON, _load_views)

    async def on_unmount(self) -> None:
        if self._unsubscribe is not None:
            self._unsubscribe()
        with contextlib.suppress(LocalLLMError):
            await self.answers.close()
        if self.tools is not None:
            await self.tools.close()
        await self.engine.close()

    @property
    def model_name(self) -> str:
        return self.opening.model or self.settings.model

    # ---- the open chat

    @property
    def chat_screen(self) -> ChatScreen:
        assert self._chat_screen is not None
        return self._chat_screen

    @property
    def chat_id(self) -> int | None:
        return None if self._chat_screen is None else self._chat_screen.chat_id

    @property
    def chat(self) -> Chat | None:
        """The open chat as the store has it now."""
        if self.chat_id is None:
            return None
        try:
            return self.store.chat(self.chat_id)
        except KeyError:
            return None

    def need_chat(self) -> Chat:
        """The open chat; one is made in the store where there is none yet."""
        return self.chat_screen.need_chat()

    async def open_chat(self, chat: int | None, message: int | None = None) -> None:
        """Shows a chat as it is in the store now (None: a new one). message: whose branch is opened
        and which is scrolled to."""
        await self.chat_screen.open(chat, message)

    def show_chat_screen(self) -> None:
        """Leaves whatever is above it."""
        while len(self.screen_stack) > 1 and self.screen is not self._chat_screen:
            self.pop_screen()

    # ---- commands

    def bind_commands(self) -> None:
        """Binds every command's keys, the user's own where keys.toml has some."""
        from localllm.tui.commands import gather
        from localllm.tui.keymap import read_keys

        self.remapped, problems = read_keys(self.config / KEYS, gather())
        for problem in problems:
            self.warn(problem)
        table = self._bindings.key_to_bindings
        table.pop(self.COMMAND_PALETTE_BINDING, None)  # the registry has a command for it
        for key in self._bound:
            table[key] = [b for b in table.get(key, []) if not b.action.startswith("command(")]
        self._bound.clear()
        # A message's and a list's keys go before those of the whole app.
        narrow_first = sorted(COMMANDS, key=lambda command: command.where in ("everywhere", "chat"))
        for command in narrow_first:
            for number, key in enumerate(keys_of(command, self.remapped)):
                binding = Binding(
                    key,
                    f"command({command.name!r})",
                    command.title,
                    show=command.shown_in_footer and number == 0,
                    priority=_goes_first(key),
                    tooltip=command.help,
                    id=command.name,
                )
                table.setdefault(key, []).append(binding)
                self._bound.append(key)
        self.refresh_bindings()

    def can_run(self, command: Command) -> bool:
        """Whether the command makes sense where the user is."""
        if isinstance(self.screen, ModalScreen):
            return False
        if command.where == "everywhere":
            return True
        chat = self._chat_screen
        return chat is not None and self.screen is chat and chat.is_place(command.where)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "command":
            try:
                return self.can_run(find(str(parameters[0])))
            except KeyError:
                return False
        return super().check_action(action, parameters)

    def action_pressed(self, key: str) -> None:
        """A click on a key of the footer."""
        self.simulate_key(key)

    async def action_command(self, name: str) -> None:
        await self.run_command(find(name))

    async def run_command(self, command: Command, argument: str = "") -> None:
        """Errors of ours become a notice; the app goes on."""
        try:
            done = command.run(self, argument)
            if inspect.isawaitable(done):
                await done
        except LocalLLMError as error:
            self.tell(error)

    # ---- telling

    def _handle_exception(self, error: Exception) -> None:
        """Of timers, callbacks and workers."""
        cause = error.error if isinstance(error, WorkerFailed) else error
        if isinstance(cause, LocalLLMError):
            self.tell(cause)
        else:
            super()._handle_exception(error)

    def warn(self, text: str) -> None:
        self.notify(plain(text), severity="warning", markup=False, timeout=10)

    def say(self, text: str) -> None:
        self.notify(plain(text), markup=False, timeout=4)

    # ---- settings

    def change_settings(self, **changes: Any) -> None:
        """Sets and keeps them. Raises InvalidRequest for what makes no sense."""
        settings = self.settings
        for name, value in changes.items():
            settings = with_setting(settings, name, value)
        self.settings = settings
        self._look()
        try:
            write_settings(self.config / SETTINGS, settings)
        except OSError as error:
            self.warn(f"the setting holds until you leave, it could not be kept: {error}")

    def try_theme(self, name: str) -> None:
        """Shows a theme without keeping it."""
        self.theme, _ = theme_for(self, name)

    def _look(self) -> None:
        self.theme, problem = theme_for(self, self.settings.theme)
        if problem:
            self.settings = replace(self.settings, theme=self.theme)
            self.warn(problem)
        self.animation_level = "none" if self.settings.plain else "full"
        self.set_class(self.settings.plain, "-plain")
        self.set_class(self.settings.theme == ANSI, "-ansi-theme")

    # ---- the engine

    def _heard(self, news: News) -> None:
        if isinstance(news, EngineState):
            for screen in self.screen_stack:
                screen.post_message(EngineChanged(news))


def _load_views() -> None:
    """What shows messages, so that the first answer need not wait for it beside the engine."""
    import localllm.tui.widgets.message  # noqa: F401


def _goes_first(key: str) -> bool:
    """Keys that no one types are taken before the field that has the focus sees them."""
    return key.startswith(("ctrl+", "alt+")) or (key[0] == "f" and key[1:].isdecimal())
