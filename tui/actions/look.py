"""Themes, vim keys, plain look, settings, the palette."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from localllm.errors import InvalidRequest
from localllm.tui.commands import Command, register
from localllm.tui.settings import Settings, describe
from localllm.tui.themes import ANSI

if TYPE_CHECKING:
    from localllm.tui.app import ChatApp


def theme(app: ChatApp, argument: str) -> None:
    if not argument:
        app.run_worker(_choose_theme(app), group="dialog")
        return
    if argument not in _themes(app, ""):
        raise InvalidRequest(
            f"there is no theme {argument!r}", hint=f"there are {', '.join(_themes(app, ''))}"
        )
    app.change_settings(theme=argument)


async def _choose_theme(app: ChatApp) -> None:
    from localllm.tui.widgets.choose import Choose

    before = app.settings.theme
    found = await app.push_screen_wait(
        Choose("Theme", _themes(app, ""), before, on_highlight=app.try_theme)
    )
    if found is None:
        app.try_theme(before)
    else:
        app.change_settings(theme=found)


def _themes(app: ChatApp, beginning: str) -> Sequence[str]:
    names = [ANSI, *sorted(name for name in app.available_themes)]
    return [name for name in names if name.startswith(beginning)]


def vim(app: ChatApp, argument: str) -> None:
    app.change_settings(vim=not app.settings.vim)
    app.chat_screen.composer.use_vim(app.settings.vim)
    app.say(f"vim keys are {'on' if app.settings.vim else 'off'}")


def plain_look(app: ChatApp, argument: str) -> None:
    app.change_settings(plain=not app.settings.plain)
    app.say(f"the plain look is {'on' if app.settings.plain else 'off'}")


def settings(app: ChatApp, argument: str) -> None:
    """Without an argument what is set; NAME=VALUE sets."""
    name, equals, told = argument.partition("=")
    name, told = name.strip(), told.strip()
    if not argument:
        lines = [f"{key} = {value}" for key, value in describe(app.settings).items()]
        app.notify("\n".join(lines), title=str(app.config), markup=False, timeout=20)
        return
    if not equals:
        raise InvalidRequest(f"/set {argument}: write NAME=VALUE")
    try:
        value = json.loads(told)
    except ValueError:
        value = told
    app.change_settings(**{name: value})
    app.say(f"{name} = {describe(app.settings)[name]}")


def _names(app: ChatApp, beginning: str) -> Sequence[str]:
    names = [f"{field.name}=" for field in fields(Settings)]
    return [name for name in names if name.startswith(beginning)]


def palette(app: ChatApp, argument: str) -> None:
    app.action_command_palette()


def reload_keys(app: ChatApp, argument: str) -> None:
    app.bind_commands()
    app.say("keys.toml was read")


register(
    Command(
        "palette",
        "Palette",
        "Find a command by its name",
        "App",
        palette,
        keys=("ctrl+p",),
        shown_in_footer=True,
    ),
    Command(
        "theme",
        "Theme",
        "Choose the colours; ansi uses your terminal's own",
        "App",
        theme,
        slash="theme",
        argument="[NAME]",
        complete=_themes,
    ),
    Command("vim", "Vim keys", "Vim keys where you type, on or off", "App", vim, slash="vim"),
    Command(
        "plain",
        "Plain look",
        "No borders and no animation, for screen readers; on or off",
        "App",
        plain_look,
        slash="plain",
    ),
    Command(
        "set",
        "Settings",
        "Show the settings, or change one",
        "App",
        settings,
        slash="set",
        argument="[NAME=VALUE]",
        complete=_names,
    ),
    Command(
        "reload-keys",
        "Read keys.toml again",
        "Take over your changed keys",
        "App",
        reload_keys,
        slash="reload-keys",
    ),
)
