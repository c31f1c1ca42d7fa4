"""The command palette: every command of the registry that can be called where the user is."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from textual.command import DiscoveryHit, Hit, Hits, Provider

from localllm.tui.commands import COMMANDS, Command, grouped, keys_of

if TYPE_CHECKING:
    from localllm.tui.app import ChatApp


class Palette(Provider):
    @property
    def _chat_app(self) -> ChatApp:
        return self.app  # type: ignore[return-value]

    async def discover(self) -> Hits:
        for _, commands in grouped(self._fitting()):
            for command in commands:
                yield DiscoveryHit(
                    _title(command), partial(self._call, command), help=self._help(command)
                )

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for command in self._fitting():
            score = max(
                matcher.match(_title(command)),
                0.9 * matcher.match(command.slash or ""),
                0.6 * matcher.match(command.help),
            )
            if score > 0:
                yield Hit(
                    score,
                    matcher.highlight(_title(command)),
                    partial(self._call, command),
                    help=self._help(command),
                )

    def _fitting(self) -> list[Command]:
        """Of the screen below the palette. A message's commands act on the last one if none is
        chosen, so they belong here too."""
        chat = self.screen is self._chat_app.chat_screen
        return [c for c in COMMANDS if c.where == "everywhere" or chat]

    def _help(self, command: Command) -> str:
        keys = ", ".join(keys_of(command, self._chat_app.remapped))
        return f"{command.help} ({keys})" if keys else command.help

    async def _call(self, command: Command) -> None:
        await self._chat_app.run_command(command)


def _title(command: Command) -> str:
    return f"{command.group}: {command.title}"
