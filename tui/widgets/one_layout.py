"""Widgets that are laid out once for a change, not twice."""

from __future__ import annotations

from textual.geometry import Size


class OneLayout:
    """Beside a widget class, for one whose size follows from its place and what is in it.

    Textual asks for another layout of the whole screen where one has changed the size of anything
    in it, and once more for what asked for one before it was ever laid out. Here nothing can come
    of either, and each would double what a drawing costs. Scroll bars that come or go still ask
    for theirs. It is no widget itself: the first one among a class's bases is where its style
    comes from.
    """

    _is_laid_out = False

    def _size_updated(
        self, size: Size, virtual_size: Size, container_size: Size, layout: bool = True
    ) -> bool:
        known: bool = super()._size_updated(  # type: ignore[misc]
            size, virtual_size, container_size, layout=False
        )
        if not self._is_laid_out:
            # Whatever was set until now is in this layout, and in the drawing that follows it.
            self._is_laid_out = True
            self._layout_required = self._repaint_required = False
        return known
