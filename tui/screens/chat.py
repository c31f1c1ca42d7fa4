"""The screen that opens first: the chats, the open branch, and where messages are typed."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from textual import events, on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.css.query import NoMatches
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Button, Input, Static

from localllm.errors import InvalidRequest, LocalLLMError, StoreError
from localllm.tui.answers import Said, typed_of
from localllm.tui.app import EngineChanged
from localllm.tui.commands import Where, by_slash
from localllm.tui.store import Chat, Message
from localllm.tui.telling import Telling
from localllm.tui.text import one_line, plain
from localllm.tui.widgets.chat_list import ChatList
from localllm.tui.widgets.completions import Completions
from localllm.tui.widgets.composer import Composer
from localllm.tui.widgets.footer import KeyLine
from localllm.tui.widgets.status import Banner, Queue, Status
from localllm.tui.widgets.transcript import Transcript

if TYPE_CHECKING:
    from localllm.tui.answers import Live
    from localllm.tui.app import ChatApp

_DRAFT_AFTER = 0.6  # seconds of not typing
_DRAFT = "draft"  # setting: of the chat that is not in the store yet


class ChatScreen(Telling, Screen[None]):
    """chat_id: the open chat, None while nothing was said in it."""

    AUTO_FOCUS = ""  # see ChatApp.can_type

    def __init__(self) -> None:
        super().__init__(id="chat")
        self.chat_id: int | None = None
        self.editing: int | None = None  # the message whose text is in the composer
        self._before_edit = ""
        self._sent_early: str | None = None  # before a chat was open
        self._completions: Completions | None = None  # once a chat is open
        self._drafting: Timer | None = None
        self._draft_failed = False  # and it has been told
        self._loading = asyncio.Lock()

    @property
    def chat_app(self) -> ChatApp:
        return self.app  # type: ignore[return-value]

    def compose(self) -> ComposeResult:
        with Horizontal(id="columns"):
            with Vertical(id="sidebar"):
                yield Input(placeholder="find words #tag folder:…", id="find", compact=True)
                yield ChatList(id="chats")
            with Vertical(id="main"):
                yield Static("New chat", id="title", markup=False)
                yield Banner(id="banner")
                yield Transcript(id="transcript")
                yield Queue(id="queue")
                yield Composer(id="composer")
                yield Status(id="status")
        yield KeyLine()

    # ---- parts

    @property
    def composer(self) -> Composer:
        return self.query_one("#composer", Composer)

    @property
    def transcript(self) -> Transcript:
        return self.query_one("#transcript", Transcript)

    @property
    def chats(self) -> ChatList:
        return self.query_one("#chats", ChatList)

    def on_mount(self) -> None:
        self.show_sidebar(self.chat_app.settings.sidebar)
        self.chat_app.can_type(self.composer)

    async def begin(self) -> None:
        """Opens the chat that the app was asked to begin with."""
        app, opening = self.chat_app, self.chat_app.opening
        self._completions = Completions(id="completions")
        await self.query_one("#main").mount(self._completions, before=self.composer)
        self.chats.reload()
        resume = opening.resume or (app.settings.start == "resume" and not opening.new)
        chat: int | None = None
        if resume is True:
            latest = max(app.store.chats(limit=200), key=lambda c: c.updated, default=None)
            chat = None if latest is None else latest.id
        elif resume is not False:
            try:
                chat = app.store.chat(resume).id
            except KeyError:
                app.warn(f"there is no chat {resume}; this is a new one")
        await self.open(chat)
        if chat is not None:
            changes = {"system": opening.system, "adapter": opening.adapter, "model": opening.model}
            told = {name: value for name, value in changes.items() if value is not None}
            if told:
                app.store.edit_chat(chat, **told)

    # ---- the open chat

    def need_chat(self) -> Chat:
        app = self.chat_app
        if self.chat_id is None:
            opening = app.opening
            with app.store.together():
                chat = app.store.new_chat(
                    model=app.answers.opened or app.model_name,
                    system=app.settings.system if opening.system is None else opening.system,
                    adapter=opening.adapter,
                    params=app.answers.of_new_chat(),
                )
                app.store.set_setting(_DRAFT, "")
            self.chat_id = self.chats.open_chat = chat.id
            self.chats.reload()
        return app.store.chat(self.chat_id)

    async def open(self, chat: int | None, message: int | None = None) -> None:
        """See ChatApp.open_chat."""
        store = self.chat_app.store
        first = not self.chat_app.ready
        changed = first or chat != self.chat_id
        typed = self.composer.text if first else ""
        if changed and not first:
            self.keep_draft()
            self._end_editing()
        if message is not None and chat is not None:
            head = store.chat(chat).head
            if message not in [m.id for m in store.branch(head)]:
                store.edit_chat(chat, head=store.newest_leaf(message))
        self.chat_id = self.chats.open_chat = chat
        await self.load(to=message)
        if changed:
            found = self.chat_app.chat
            draft = store.setting(_DRAFT, "") if found is None else found.draft
            self.composer.put(str(draft or "") + typed)
            asked = [m for m in self._branch() if m.role == "user"]
            self.composer.said = [typed_of(m.content, m.extra) for m in asked[-200:]]
            if message is None:
                self.composer.focus()
        if not self.is_wide:
            self.show_sidebar(False)

    def _branch(self) -> list[Message]:
        chat = self.chat_app.chat
        return [] if chat is None else self.chat_app.store.branch(chat.head)

    async def load(self, *, to: int | None = None) -> None:
        """Shows the open branch as it is in the store."""
        # Of an app that is being left, parts go one by one, while an answer may just have ended.
        with suppress(NoMatches):
            async with self._loading:
                branch = self._branch()
                await self.transcript.show(branch, to=to)
                self._show_facts(branch)

    def _show_facts(self, branch: list[Message]) -> None:
        app, chat = self.chat_app, self.chat_app.chat
        title = "New chat" if chat is None else one_line(chat.title) or "New chat"
        if chat is not None and (chat.folder or chat.tags):
            title += f"   {one_line(chat.folder)}{' ' if chat.folder else ''}"
            title += " ".join(f"#{one_line(tag)}" for tag in chat.tags)
        self.query_one("#title", Static).update(plain(title), layout=False)  # one line
        answers = [message for message in branch if message.receipt]
        self.query_one("#status", Status).context_used(answers[-1] if answers else None)
        self.query_one("#queue", Queue).show([] if chat is None else app.answers.queued(chat.id))
        self.chats.waiting = set(app.answers.live)
        self.composer.cursor_blink = not app.answers.live  # each blink is a drawing
        self.chats.refresh()
        self.refresh_bindings()

    def chats_changed(self) -> None:
        """Titles, pins or the number of chats are others now."""
        self.chats.reload()
        self._show_facts(self._branch())

    # ---- saying something

    @on(Composer.Sent)
    async def sent(self, event: Composer.Sent) -> None:
        event.stop()
        if self.chat_app.ready:
            await self.take(event.text)
        else:
            self._sent_early = event.text

    async def take_early(self) -> None:
        text, self._sent_early = self._sent_early, None
        if text is not None:
            await self.take(text)

    async def take(self, text: str) -> None:
        """Carries out a command, saves an edit, or says it."""
        app = self.chat_app
        if self.editing is not None:
            from localllm.tui.actions.tree import save_edit

            await save_edit(app, self.editing, text)
            return
        if not text.strip():
            return
        word, _, argument = text[1:].partition(" ")
        command = by_slash(word) if text.startswith("/") else None
        if command is not None:
            self.composer.sent(text)
            await app.run_command(command, argument.strip())
            return
        if text.startswith("/") and word.isalpha() and "\n" not in text:
            app.warn(f"there is no /{word}; /help lists the commands, a space before says it as is")
            return
        said = await self.with_files(text)
        if said is None:
            return
        chat = self.need_chat()
        if chat.id in app.answers.live:
            with app.store.together():
                app.answers.set_queue(chat.id, [*app.answers.queued(chat.id), said])
                app.store.edit_chat(chat.id, draft="")
            self.composer.sent(text)
            self._show_facts(self._branch())
            return
        app.answers.say(chat.id, said)
        self.composer.sent(text)
        await self._show_said(chat.id)

    async def with_files(self, text: str) -> Said | None:
        """What is said, with the text of the @files in it; None if one cannot go along."""
        if "@" not in text:
            return Said(text)
        from localllm.tui.attachments import attach

        try:
            found = await attach(text)
        except InvalidRequest as error:
            self.chat_app.tell(error)
            return None
        for note in found.notes:
            self.chat_app.warn(note)
        return Said(found.content, found.extra)

    def say_in(self, chat: int, said: Said, waiting: list[Said]) -> None:
        """What waited for an answer of this chat is said now, whichever chat is open. waiting: what
        waits on."""
        self.chat_app.answers.say(chat, said, waiting)
        self.run_worker(self._show_said(chat), group=f"say {chat}")

    async def _show_said(self, chat: int) -> None:
        self.chats.reload()
        if chat == self.chat_id:
            await self.load()

    def answer_ended(self, live: Live, *, failed: bool) -> None:
        if not self.is_mounted or not self.is_running:
            return
        with suppress(NoMatches):
            self.chats.reload()
        if live.chat == self.chat_id:
            self.run_worker(self.load(), group="load")
        elif not failed:
            title = one_line(self.chat_app.store.chat(live.chat).title, 40)
            self.chat_app.say(f"answered: {title}")

    # ---- editing

    def begin_editing(self, message: Message) -> None:
        self._before_edit = self.composer.text if self.editing is None else self._before_edit
        self.editing = message.id
        self.composer.add_class("-editing")
        self.composer.border_title = "editing — Enter saves as a new branch, Esc leaves it"
        self.composer.put(typed_of(message.content, message.extra))
        self.composer.focus()

    def leave_editing(self) -> None:
        """Back to what was being typed."""
        if self.editing is not None:
            before = self._before_edit
            self._end_editing()
            self.composer.put(before)

    def _end_editing(self) -> None:
        self.editing = None
        self._before_edit = ""
        self.composer.remove_class("-editing")
        self.composer.border_title = None

    # ---- what is being typed

    @on(Composer.Typed)
    def typed(self, event: Composer.Typed) -> None:
        event.stop()
        if self._completions is not None:
            self._completions.follow(self.chat_app, event.word)
        if self._drafting is not None:
            self._drafting.stop()
        self._drafting = self.set_timer(_DRAFT_AFTER, self._paused)

    def _paused(self) -> None:
        self.keep_draft()
        if self.editing is None:
            self.run_worker(self._show_costs(self.composer.text), exclusive=True, group="costs")

    async def _show_costs(self, text: str) -> None:
        """The tokens of every @file that is named, on the edge of where one types."""
        costs = ""
        if "@" in text:
            from localllm.tui.attachments import attach, token_costs

            try:
                found = await attach(text)
                tokens = await token_costs(self.chat_app.engine, found.files)
            except LocalLLMError as error:
                costs = str(error)
            else:
                named = zip(found.files, tokens, strict=True)
                costs = " · ".join(f"{one_line(f.name, 30)} {n:,} tokens" for f, n in named)
        if self.editing is None:
            self.composer.border_title = Content(one_line(costs, 100)) if costs else None

    def keep_draft(self) -> None:
        """What is being typed survives the app."""
        if self.editing is not None:
            return
        text = self.composer.text
        store = self.chat_app.store
        try:
            if self.chat_id is None:
                if store.setting(_DRAFT, "") != text:
                    store.set_setting(_DRAFT, text)
            elif (chat := self.chat_app.chat) is not None and chat.draft != text:
                store.edit_chat(chat.id, draft=text)
        except StoreError as error:
            if not self._draft_failed:  # once, not with every pause
                self.chat_app.tell(error)
            self._draft_failed = True
        else:
            self._draft_failed = False

    def completing(self, event: events.Key) -> bool:
        """Keys of the open completions; True if it was one."""
        box = self._completions
        if box is None:
            return False
        if event.key in ("enter", "tab"):  # which may come before what was typed is told of
            box.follow(self.chat_app, self.composer.word)
        if not box.is_open:
            return False
        offer = box.offer
        match event.key:
            case "down":
                box.move(1)
            case "up":
                box.move(-1)
            case "escape":
                box.show([])
            case "tab" | "enter" if offer is not None:
                before = self.composer.word
                self.composer.complete(offer.text)
                box.show([])
                if event.key == "enter" and before.startswith("/") and offer.whole:
                    self.composer.send()
            case _:
                return False
        event.stop()
        event.prevent_default()
        return True

    @on(Completions.OptionSelected)
    def offer_clicked(self, event: Completions.OptionSelected) -> None:
        event.stop()
        box = self._completions
        if box is not None and box.offer is not None:
            self.composer.complete(box.offer.text)
            box.show([])

    # ---- the list of chats

    @property
    def is_wide(self) -> bool:
        return self.size.width >= 90

    @property
    def sidebar_shown(self) -> bool:
        return not self.has_class("-no-sidebar")

    def show_sidebar(self, shown: bool) -> None:
        self.set_class(not shown, "-no-sidebar")
        if not shown and self.focused is not None and self.focused.id in ("chats", "find"):
            self.composer.focus()

    def on_resize(self, event: events.Resize) -> None:
        if event.size.width < 90 and self.focused is not None:
            if self.focused.id not in ("chats", "find"):
                self.show_sidebar(False)
        elif event.size.width >= 90:
            self.show_sidebar(self.chat_app.settings.sidebar)

    @on(ChatList.Opened)
    async def chat_chosen(self, event: ChatList.Opened) -> None:
        event.stop()
        await self.open(event.chat)

    @on(Input.Changed, "#find")
    def find_changed(self, event: Input.Changed) -> None:
        event.stop()
        self.chats.show(event.value)

    @on(Input.Submitted, "#find")
    def find_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self.chats.focus()

    # ---- the engine, and where the user is

    async def on_engine_changed(self, event: EngineChanged) -> None:
        await self.query_one("#banner", Banner).show(event.state)
        self.query_one("#status", Status).look()

    @on(Button.Pressed, "#restart")
    async def restart_pressed(self, event: Button.Pressed) -> None:
        event.stop()
        from localllm.tui.commands import find

        await self.chat_app.run_command(find("restart-engine"))

    def is_place(self, where: Where) -> bool:
        focused = self.focused
        match where:
            case "chat":
                return True
            case "composer":
                return isinstance(focused, Composer)
            case "chats":
                return focused is not None and focused.id == "chats"
            case "message":
                return focused is not None and focused.parent is self.transcript
        return False
