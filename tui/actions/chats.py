"""The list of chats: titles, pins, folders, tags, removing; files in and out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from localllm.errors import InvalidRequest
from localllm.tui.commands import Command, register
from localllm.tui.store import Chat
from localllm.tui.text import one_line

if TYPE_CHECKING:
    from localllm.tui.app import ChatApp

_WIDTH = 200


def chosen(app: ChatApp) -> Chat:
    """The chat under the cursor of the list where that has the focus, else the open one."""
    screen = app.chat_screen
    found = screen.chats.chosen if screen.is_place("chats") else app.chat
    if found is None:
        raise InvalidRequest("this chat is empty: say something first")
    return found


def sidebar(app: ChatApp, argument: str) -> None:
    """Shows the list and goes there; from there hides it."""
    screen = app.chat_screen
    if screen.sidebar_shown and (screen.is_place("chats") or screen.is_wide):
        screen.show_sidebar(False)
        if screen.is_wide:
            app.change_settings(sidebar=False)
        screen.composer.focus()
        return
    screen.show_sidebar(True)
    if screen.is_wide:
        app.change_settings(sidebar=True)
    screen.chats.focus()


def focus_chats(app: ChatApp, argument: str) -> None:
    app.chat_screen.show_sidebar(True)
    app.chat_screen.chats.focus()


def find_chats(app: ChatApp, argument: str) -> None:
    from textual.widgets import Input

    app.chat_screen.show_sidebar(True)
    box = app.chat_screen.query_one("#find", Input)
    if argument:
        box.value = argument
    box.focus()


def rename(app: ChatApp, argument: str) -> None:
    chat = chosen(app)
    _told(app, argument, lambda title: _titled(app, chat, title), "Title", chat.title)


def _told(
    app: ChatApp,
    argument: str,
    keep: Callable[[str], None],
    question: str,
    before: str,
    placeholder: str = "",
) -> None:
    """Keeps what was typed behind the command, else what is typed into a dialog."""

    async def ask() -> None:
        from localllm.tui.widgets.confirm import AskText

        told = await app.push_screen_wait(AskText(question, before, placeholder=placeholder))
        if told:
            keep(told)

    if argument:
        keep(argument)
    else:
        app.run_worker(ask(), group="dialog")


def _titled(app: ChatApp, chat: Chat, title: str) -> None:
    app.store.edit_chat(chat.id, title=one_line(title, _WIDTH), titled=1)
    app.chat_screen.chats_changed()


def pin(app: ChatApp, argument: str) -> None:
    chat = chosen(app)
    app.store.edit_chat(chat.id, pinned=not chat.pinned)
    app.chat_screen.chats_changed()


def folder(app: ChatApp, argument: str) -> None:
    chat = chosen(app)
    known = ", ".join(app.store.folders()[:20])
    there = f"there are: {known}" if known else ""
    question = "Folder (- for none)"
    _told(app, argument, lambda name: _moved(app, chat, name), question, chat.folder, there)


def _moved(app: ChatApp, chat: Chat, name: str) -> None:
    folder = "" if name == "-" else re.sub(r"\s+", "-", one_line(name, 60))
    app.store.edit_chat(chat.id, folder=folder)
    app.chat_screen.chats_changed()


def tags(app: ChatApp, argument: str) -> None:
    chat = chosen(app)
    before = " ".join(app.store.tags(chat.id))
    question = "Tags, with spaces between (- for none)"
    _told(app, argument, lambda told: _tagged(app, chat, told), question, before)


def _tagged(app: ChatApp, chat: Chat, told: str) -> None:
    names = [] if told == "-" else [word.lstrip("#") for word in one_line(told, 400).split()]
    app.store.set_tags(chat.id, [name for name in names if name])
    app.chat_screen.chats_changed()


def delete(app: ChatApp, argument: str) -> None:
    app.run_worker(_delete(app, chosen(app)), group="dialog")


async def _delete(app: ChatApp, chat: Chat) -> None:
    from localllm.tui.widgets.confirm import Confirm

    if chat.id in app.answers.live:
        raise InvalidRequest("an answer is under way in this chat", hint="Esc stops it")
    count = len(app.store.tree(chat.id))
    title = one_line(chat.title, 60) or "New chat"
    question = f"Delete “{title}” with its {count} messages? This cannot be undone."
    if not await app.push_screen_wait(Confirm(question, yes="Delete", no="Keep")):
        return
    app.store.delete_chat(chat.id)
    app.answers.set_queue(chat.id, [])
    if chat.id == app.chat_id:
        await app.open_chat(None)
    app.chat_screen.chats_changed()


def _folders(app: ChatApp, beginning: str) -> Sequence[str]:
    return [name for name in app.store.folders() if name.startswith(beginning)]


def _tags(app: ChatApp, beginning: str) -> Sequence[str]:
    return [name for name in app.store.tags() if name.startswith(beginning)]


register(
    Command(
        "sidebar",
        "Chats",
        "Show the list of chats, or hide it",
        "Chats",
        sidebar,
        keys=("ctrl+b",),
        slash="sidebar",
        where="chat",
        shown_in_footer=True,
    ),
    Command(
        "focus-chats",
        "Go to the list of chats",
        "Choose another chat; j and k move, Enter opens",
        "Chats",
        focus_chats,
        keys=("ctrl+l",),
        slash="chats",
        where="chat",
    ),
    Command(
        "find-chat",
        "Find a chat",
        "List chats by words of their title, #tag or folder:name",
        "Chats",
        find_chats,
        keys=("slash",),
        slash="find",
        where="chats",
        argument="[WORDS]",
    ),
    Command(
        "rename",
        "Rename",
        "Give the chat another title",
        "Chats",
        rename,
        keys=("r",),
        slash="rename",
        where="chats",
        shown_in_footer=True,
        argument="[TITLE]",
    ),
    Command(
        "pin",
        "Pin",
        "Keep the chat at the top of the list, or let it go",
        "Chats",
        pin,
        keys=("p",),
        slash="pin",
        where="chats",
        shown_in_footer=True,
    ),
    Command(
        "folder",
        "Folder",
        "Put the chat into a folder",
        "Chats",
        folder,
        keys=("f",),
        slash="folder",
        where="chats",
        argument="[NAME]",
        complete=_folders,
    ),
    Command(
        "tag",
        "Tags",
        "Set the chat's tags",
        "Chats",
        tags,
        keys=("t",),
        slash="tag",
        where="chats",
        argument="[TAGS]",
        complete=_tags,
    ),
    Command(
        "delete-chat",
        "Delete",
        "Delete the chat, after a question",
        "Chats",
        delete,
        keys=("x", "delete"),
        slash="delete",
        where="chats",
        shown_in_footer=True,
    ),
)
