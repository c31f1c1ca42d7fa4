"""Widgets that are laid out once for a change, not twice."""

from __future__ import annotations

from textual.geometry import Size


class OneLayout:
    """Beside a widget class, for one whose size follows from its place and what is in it.

    Textual asks for another layout of the whole screen where one has changed the size of anything
    in it. Here nothing can come of that, and it would double what a drawing costs. Scroll bars
    that come or go still ask for theirs. It is no widget itself: the first one among a class's
    bases is where its style comes from.
    """

    def _size_updated(
        self, size: Size, virtual_size: Size, container_size: Size, layout: bool = True
    ) -> bool:
        known: bool = super()._size_updated(  # type: ignore[misc]
            size, virtual_size, container_size, layout=False
        )
        return known
