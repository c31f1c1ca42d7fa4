"""Vim's basics for the composer: normal and insert mode, motions, and d, c, y with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from textual import events

    from localllm.tui.widgets.composer import Composer

Place = tuple[int, int]  # row, column
_MOST = 9999  # a count above it is taken as this


class Vim:
    """Reads keys for a composer. Enter sends in both modes; Escape goes to normal mode, and in
    normal mode is left to the app."""

    def __init__(self, composer: Composer) -> None:
        self._area = composer
        self.normal = False
        self._count = ""
        self._operator = ""
        self._pending = ""  # g
        self._yanked = ""
        self._yanked_lines = False

    def took(self, event: events.Key) -> bool:
        """Whether the key was vim's; the composer has the others."""
        if not self.normal:
            if event.key != "escape":
                return False
            self._set(normal=True)
            row, column = self._area.cursor_location
            self._area.move_cursor((row, max(0, column - 1)))
            return True
        if event.key == "escape":
            idle = not (self._count or self._operator or self._pending)
            self._forget()
            return not idle
        if event.key == "ctrl+r":
            self._area.redo()
            return True
        if not event.is_printable or event.character is None:
            return False
        self._key(event.character)
        return True

    # ---- a key in normal mode

    def _key(self, key: str) -> None:
        if (key.isdecimal() and key != "0") or (key == "0" and self._count):
            self._count += key
            return
        if self._pending:
            key, self._pending = self._pending + key, ""
        elif key == "g":
            self._pending = key
            return
        count = min(int(self._count or 1), _MOST)
        if self._operator:
            self._operate(key, count)
        elif key in "dcy":
            self._operator = key
            return
        elif (to := self._motion(key, count)) is not None:
            self._area.move_cursor(to)
        else:
            self._do(key, count)
        self._forget()

    def _operate(self, key: str, count: int) -> None:
        """d, c or y over a motion, or over whole lines when doubled."""
        row, column = self._area.cursor_location
        operator = self._operator
        last = self._area.document.line_count - 1
        if key == operator or key in ("j", "k", "G", "gg"):
            to = (row + count - 1, 0) if key == operator else self._motion(key, count) or (row, 0)
            first, final = sorted((row, min(to[0], last)))
            self._lines(operator, first, final)
            return
        if operator == "c" and key == "w":
            key = "e"  # as vim has it
        found = self._motion(key, count)
        if found is None:
            return
        start, end = sorted(((row, column), found))
        if key in ("e", "$"):
            end = (end[0], end[1] + 1)
        if key == "w" and end[0] > start[0]:
            end = (start[0], len(self._line(start[0])))
        self._yanked, self._yanked_lines = self._area.get_text_range(start, end), False
        if operator == "y":
            self._area.move_cursor(start)
            return
        self._area.delete(start, end)
        if operator == "c":
            self._set(normal=False)

    def _lines(self, operator: str, first: int, final: int) -> None:
        lines = [self._line(row) for row in range(first, final + 1)]
        self._yanked, self._yanked_lines = "\n".join(lines), True
        if operator == "y":
            return
        if operator == "c":
            self._area.delete((first, 0), (final, len(lines[-1])))
            self._set(normal=False)
        elif final < self._area.document.line_count - 1:
            self._area.delete((first, 0), (final + 1, 0))
        else:
            start = (first - 1, len(self._line(first - 1))) if first else (0, 0)
            self._area.delete(start, (final, len(lines[-1])))

    def _do(self, key: str, count: int) -> None:
        area = self._area
        row, column = area.cursor_location
        line = self._line(row)
        match key:
            case "i":
                self._set(normal=False)
            case "a":
                area.move_cursor((row, min(len(line), column + 1)))
                self._set(normal=False)
            case "I":
                area.move_cursor((row, len(line) - len(line.lstrip())))
                self._set(normal=False)
            case "A":
                area.move_cursor((row, len(line)))
                self._set(normal=False)
            case "o":
                area.insert("\n", (row, len(line)))
                area.move_cursor((row + 1, 0))
                self._set(normal=False)
            case "O":
                area.insert("\n", (row, 0))
                area.move_cursor((row, 0))
                self._set(normal=False)
            case "x":
                end = (row, min(len(line), column + count))
                self._yanked, self._yanked_lines = area.get_text_range((row, column), end), False
                area.delete((row, column), end)
            case "D" | "C":
                self._yanked, self._yanked_lines = line[column:], False
                area.delete((row, column), (row, len(line)))
                self._set(normal=key == "D")
            case "p" | "P":
                self._put(row, column, line, after=key == "p")
            case "u":
                area.undo()
            case "J":
                if row < area.document.line_count - 1:
                    below = self._line(row + 1)
                    area.replace(" ", (row, len(line)), (row + 1, len(below) - len(below.lstrip())))

    def _put(self, row: int, column: int, line: str, *, after: bool) -> None:
        if not self._yanked_lines:
            place = (row, min(len(line), column + 1) if after else column)
            self._area.insert(self._yanked, place)
        elif after:
            self._area.insert("\n" + self._yanked, (row, len(line)))
            self._area.move_cursor((row + 1, 0))
        else:
            self._area.insert(self._yanked + "\n", (row, 0))
            self._area.move_cursor((row, 0))

    # ---- motions

    def _motion(self, key: str, count: int) -> Place | None:
        """Where a motion leads; None for what is none."""
        row, column = self._area.cursor_location
        last = self._area.document.line_count - 1
        line = self._line(row)
        match key:
            case "h":
                return row, max(0, column - count)
            case "l" | " ":
                return row, min(len(line), column + count)
            case "j":
                return self._on(min(last, row + count), column)
            case "k":
                return self._on(max(0, row - count), column)
            case "0":
                return row, 0
            case "^":
                return row, len(line) - len(line.lstrip())
            case "$":
                return row, max(0, len(line) - 1)
            case "gg":
                return self._on(min(last, count - 1), 0)
            case "G":
                return self._on(min(last, count - 1) if self._count else last, 0)
        if key in ("w", "b", "e"):
            place = (row, column)
            for _ in range(count):
                place = self._word(key, place)
            return place
        return None

    def _word(self, key: str, place: Place) -> Place:
        row, column = place
        last = self._area.document.line_count - 1
        line = self._line(row)
        if key == "w":
            end = column
            kind = _kind(line, end)
            while end < len(line) and _kind(line, end) == kind and kind != " ":
                end += 1
            while end < len(line) and _kind(line, end) == " ":
                end += 1
            if end < len(line) or row == last:
                return row, end
            below = self._line(row + 1)
            return row + 1, len(below) - len(below.lstrip())
        if key == "e":
            end = column + 1
            while end >= len(line.rstrip()) and row < last:
                row, line, end = row + 1, self._line(row + 1), 0
            while end < len(line) and _kind(line, end) == " ":
                end += 1
            while end + 1 < len(line) and _kind(line, end + 1) == _kind(line, end):
                end += 1
            return row, min(end, max(0, len(line) - 1))
        start = column - 1
        while not line[: start + 1].strip() and row > 0:
            row, line = row - 1, self._line(row - 1)
            start = len(line) - 1
        while start > 0 and _kind(line, start) == " ":
            start -= 1
        while start > 0 and _kind(line, start - 1) == _kind(line, start):
            start -= 1
        return row, max(0, start)

    def _on(self, row: int, column: int) -> Place:
        return row, min(column, max(0, len(self._line(row)) - 1))

    def _line(self, row: int) -> str:
        return self._area.document.get_line(row)

    def _set(self, *, normal: bool) -> None:
        self.normal = normal
        self._area.border_subtitle = "normal" if normal else "insert"

    def _forget(self) -> None:
        self._count = self._operator = self._pending = ""


def _kind(line: str, column: int) -> str:
    """Words, signs and spaces: where it changes, a word ends."""
    character = line[column] if column < len(line) else " "
    if character.isspace():
        return " "
    return "w" if character.isalnum() or character == "_" else "."
