"""The open branch, some messages of it mounted; others come when they are scrolled to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from textual.containers import VerticalScroll

from localllm.tui.store import Message
from localllm.tui.widgets.one_layout import OneLayout

if TYPE_CHECKING:
    from localllm.tui.app import ChatApp
    from localllm.tui.widgets.message import MessageView

MOUNTED = 12  # messages, at first
MORE = 4  # when an end of these is reached
_NEAR = 4  # lines


class Transcript(OneLayout, VerticalScroll, can_focus=False):
    """Messages of a branch as views. `show` makes it a branch; views that stay are kept."""

    DEFAULT_CSS = """
    Transcript { padding: 1 1 0 1; scrollbar-gutter: stable; scrollbar-size-vertical: 1; }
    .-plain Transcript { padding: 0; }
    """

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._branch: list[Message] = []
        self._first = 0  # of the branch, the first that is mounted
        self._last = 0  # and the first after them that is not
        self._busy = False

    @property
    def chat_app(self) -> ChatApp:
        return self.app  # type: ignore[return-value]

    @property
    def views(self) -> list[MessageView]:
        if not self.children:
            return []  # the first frame comes before what Markdown takes is imported
        from localllm.tui.widgets.message import MessageView

        return [child for child in self.children if isinstance(child, MessageView)]

    @property
    def chosen(self) -> MessageView | None:
        """The view that has the focus, or holds it."""
        if not self.is_mounted or not self.children:
            return None
        from localllm.tui.widgets.message import view_of

        found = view_of(self.screen.focused)
        return found if found is not None and found.parent is self else None

    async def show(self, branch: Sequence[Message], *, to: int | None = None) -> None:
        """to: a message to scroll to and choose; else a new branch is shown from its end."""
        self._busy = True
        try:
            await self._show(list(branch), to)
        finally:
            self._busy = False

    async def _show(self, branch: list[Message], to: int | None) -> None:
        ids = [message.id for message in branch]
        first, last, kept = self._window(ids, to)
        at_end = self.is_vertical_scroll_end or not kept
        views = self.views
        self._branch, self._first, self._last = branch, first, last
        with self.app.batch_update():
            gone = views[kept:]
            if gone:
                await self.remove_children(gone)
            for view, message in zip(views[:kept], branch[first:], strict=False):
                view.change(message, self._place(message))
            new = [self._view(m) for m in branch[first + kept : last]]
            if new:
                await self.mount_all(new)
        if to in ids:
            self.choose(to)
        elif last == len(ids) and (at_end or new):
            self.anchor()
            self.scroll_end(animate=False)

    def _window(self, ids: list[int], to: int | None) -> tuple[int, int, int]:
        """Which messages are to be mounted, and how many of those that are can stay."""
        mounted, count = [view.message.id for view in self.views], len(ids)
        before = [message.id for message in self._branch]
        start, kept = max(0, count - MOUNTED), 0
        if mounted and mounted[0] in ids:
            start = ids.index(mounted[0])
            for one, other in zip(mounted, ids[start:], strict=False):
                if one != other:
                    break
                kept += 1
        end = count
        if self._last < len(before) and ids == before:
            end = start + kept  # in the middle of it, and nothing is new: it stays there
        elif count - start - kept > MOUNTED:
            start, kept = max(0, count - MOUNTED), 0
        if to in ids and not start <= ids.index(to) < end:
            start, kept = max(0, min(ids.index(to) - 2, count - MOUNTED)), 0
            end = min(count, start + MOUNTED)
        return start, end, kept

    def refresh_messages(self, branch: Sequence[Message]) -> None:
        """The same messages, their fields as they are now."""
        found = {message.id: message for message in branch}
        self._branch = list(branch)
        for view in self.views:
            if view.message.id in found:
                view.change(found[view.message.id], self._place(found[view.message.id]))

    def choose(self, message: int) -> None:
        for view in self.views:
            if view.message.id == message:
                self.release_anchor()
                view.focus(scroll_visible=False)
                self.call_after_refresh(self._to_top, view)

    def _to_top(self, view: MessageView) -> None:
        if view.is_mounted:
            # While nothing was mounted, the anchor may have scrolled beyond the top.
            y = max(0, min(view.virtual_region.y, self.max_scroll_y))
            self.scroll_to(y=y, animate=False, force=True, immediate=True)

    def choose_last(self, role: str | None = None) -> None:
        for view in reversed(self.views):
            if role is None or view.message.role == role:
                view.focus()
                return

    async def move(self, by: int) -> None:
        """Chooses the next (1) or the previous (-1) message."""
        views, chosen = self.views, self.chosen
        if not views:
            return
        if chosen is None:
            views[-1].focus()
            return
        place = views.index(chosen) + by
        if place < 0 and self._first:
            await self.more()
            views = self.views
            place = views.index(chosen) + by
        if place == len(views) and self._last < len(self._branch):
            await self.more_after()
            views = self.views
        if 0 <= place < len(views):
            self.release_anchor()
            views[place].focus()

    async def more(self) -> None:
        """Mounts some messages that come before; what is seen stays where it is."""
        if not self._first or self._busy:
            return
        self._busy = True
        try:
            start = max(0, self._first - MORE)
            older = self._branch[start : self._first]
            views = [self._view(m) for m in older]
            height, at = self.virtual_size.height, self.scroll_y
            self._first = start
            await self.mount_all(views, before=0)

            def stay() -> None:
                grown = self.virtual_size.height - height
                if grown > 0:
                    self.scroll_to(y=at + grown, animate=False, immediate=True)

            self.call_after_refresh(stay)
        finally:
            self._busy = False

    async def more_after(self) -> None:
        """Mounts some messages that come after."""
        if self._last >= len(self._branch) or self._busy:
            return
        self._busy = True
        try:
            newer = self._branch[self._last : self._last + MORE]
            self._last += len(newer)
            await self.mount_all([self._view(message) for message in newer])
        finally:
            self._busy = False

    def watch_scroll_y(self, old: float, new: float) -> None:
        super().watch_scroll_y(old, new)
        if self._busy:
            return
        if self._first and new < old and new <= _NEAR:
            self.run_worker(self.more(), exclusive=True, group="more")
        elif self._last < len(self._branch) and new > old and new >= self.max_scroll_y - _NEAR:
            self.run_worker(self.more_after(), exclusive=True, group="more")

    def _view(self, message: Message) -> MessageView:
        from localllm.tui.widgets.message import MessageView

        return MessageView(message, self._place(message))

    def _place(self, message: Message) -> tuple[int, int]:
        siblings = self.chat_app.store.siblings(message.id)
        if message.id not in siblings:
            return 1, 1
        return siblings.index(message.id) + 1, len(siblings)
