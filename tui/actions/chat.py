"""Talking: new chats, stopping, what waits, the editor, leaving."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from localllm.errors import InvalidRequest
from localllm.tui.commands import Command, register
from localllm.tui.text import plain

if TYPE_CHECKING:
    from localllm.tui.app import ChatApp

_SUFFIX = ".md"


async def new_chat(app: ChatApp, argument: str) -> None:
    app.show_chat_screen()
    await app.open_chat(None)
    app.chat_screen.composer.focus()
    if argument:
        await app.chat_screen.take(argument)


async def escape(app: ChatApp, argument: str) -> None:
    """Leaves what is open first; stops the answer once nothing is."""
    screen = app.chat_screen
    if screen.editing is not None:
        screen.leave_editing()
    elif app.chat_id is not None and app.answers.stop(app.chat_id):
        return
    else:
        if not screen.is_wide:
            screen.show_sidebar(False)
        screen.composer.focus()


def stop(app: ChatApp, argument: str) -> None:
    if app.chat_id is None or not app.answers.stop(app.chat_id):
        app.say("no answer is under way")


def unqueue(app: ChatApp, argument: str) -> None:
    """The last message that waits, or the one of that number, goes back to where one types."""
    waiting = [] if app.chat_id is None else app.answers.queued(app.chat_id)
    if not waiting or app.chat_id is None:
        app.say("nothing waits")
        return
    place = len(waiting)
    if argument:
        if not argument.isdecimal() or not 1 <= int(argument) <= len(waiting):
            raise InvalidRequest(f"no message {argument!r} waits; they are 1 to {len(waiting)}")
        place = int(argument)
    text = waiting.pop(place - 1).typed
    app.answers.set_queue(app.chat_id, waiting)
    typed = app.chat_screen.composer.text
    app.chat_screen.composer.put(f"{text}\n{typed}" if typed.strip() else text)
    app.chat_screen.chats_changed()


async def editor(app: ChatApp, argument: str) -> None:
    """What is being typed, in the user's own editor."""
    command = app.settings.editor or os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    composer = app.chat_screen.composer
    handle, name = tempfile.mkstemp(suffix=_SUFFIX, prefix="localllm-")
    path = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(composer.text)
        try:
            with app.suspend():
                done = subprocess.run([*shlex.split(command), name], check=False)
        except (OSError, ValueError) as error:
            raise InvalidRequest(
                f"{command!r} could not be started: {error}", hint="set EDITOR to another"
            ) from error
        if done.returncode:
            raise InvalidRequest(f"{command!r} ended with code {done.returncode}; nothing changed")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"what the editor wrote cannot be read: {error}") from error
        composer.put(plain(text).removesuffix("\n"))
        composer.focus()
    finally:
        path.unlink(missing_ok=True)


async def restart(app: ChatApp, argument: str) -> None:
    await app.answers.restart_engine()


def focus_composer(app: ChatApp, argument: str) -> None:
    app.chat_screen.composer.focus()


def choose_message(app: ChatApp, argument: str) -> None:
    app.chat_screen.transcript.choose_last()


async def quit_app(app: ChatApp, argument: str) -> None:
    app.chat_screen.keep_draft()
    app.exit()


register(
    Command(
        "new-chat",
        "New chat",
        "Begin a chat; text after the command is said in it",
        "Chat",
        new_chat,
        keys=("ctrl+n",),
        slash="new",
        shown_in_footer=True,
        argument="[MESSAGE]",
    ),
    Command(
        "stop",
        "Stop / back",
        "Stop the answer and keep its part; else back to where you type",
        "Chat",
        escape,
        keys=("escape",),
        where="chat",
        shown_in_footer=True,
    ),
    Command("stop-answer", "Stop", "Stop the answer and keep its part", "Chat", stop, slash="stop"),
    Command(
        "unqueue",
        "Take back a waiting message",
        "Edit the last message that waits for its turn, or the one of that number",
        "Chat",
        unqueue,
        keys=("ctrl+z",),
        slash="unqueue",
        where="chat",
        argument="[NUMBER]",
    ),
    Command(
        "editor",
        "Write in $EDITOR",
        "Edit what you are typing in your own editor",
        "Chat",
        editor,
        keys=("ctrl+o",),
        slash="editor",
        where="chat",
    ),
    Command(
        "choose-message",
        "Messages",
        "Choose a message of the chat, to edit, branch or copy it",
        "Message",
        choose_message,
        keys=("ctrl+g", "ctrl+up"),
        slash="messages",
        where="chat",
        shown_in_footer=True,
    ),
    Command(
        "type",
        "Type",
        "Back to where you type",
        "Message",
        focus_composer,
        keys=("i",),
        where="message",
        shown_in_footer=True,
    ),
    Command(
        "restart-engine",
        "Restart the engine",
        "Start the engine again after it ended",
        "Engine",
        restart,
        slash="restart",
    ),
    Command(
        "quit",
        "Quit",
        "Leave; chats, drafts and what waits are kept",
        "App",
        quit_app,
        keys=("ctrl+q",),
        slash="quit",
    ),
)
