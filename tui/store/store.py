"""The chat app's database: SQLite in one file, safe against a kill at any moment."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from localllm.errors import StoreError
from localllm.tui.store.records import (
    Chat,
    Hit,
    Json,
    Message,
    Pair,
    Preset,
    Prompt,
    Role,
    Status,
)
from localllm.tui.store.schema import migrate

_LITTLE = 1 << 20  # bytes that are free on a disk that counts as full
MARK, UNMARK = "\x02", "\x03"  # around the words found
_CHAT_FIELDS = (
    "id, title, titled, created, updated, pinned, model, system, params, head, folder, adapter, "
    "adapter_weight, draft"
)
_MESSAGE_FIELDS = (
    "id, chat, parent, role, content, reasoning, created, status, model, adapter, params, receipt, "
    "extra, rating"
)
_CHAT_EDITS = frozenset(
    {"title", "titled", "pinned", "model", "system", "params", "head", "folder", "adapter"}
    | {"adapter_weight", "draft", "updated"}
)
_MESSAGE_EDITS = frozenset(
    {"content", "reasoning", "status", "receipt", "extra", "rating", "params"}
)


class _Database(sqlite3.Connection):
    """`path`, once it is set: what goes wrong is told as a StoreError."""

    path: Path | str | None = None

    def execute(self, *statement: Any) -> sqlite3.Cursor:
        with self._told():
            return super().execute(*statement)

    def executemany(self, *statement: Any) -> sqlite3.Cursor:
        with self._told():
            return super().executemany(*statement)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if self.path is None:
                raise
            raise StoreError(
                f"the chats in {self.path} cannot be read or written: {error}",
                hint=_room(error, self.path) or "try it again; what is on the screen stays there",
            ) from error


class Store:
    """path: the database; ":memory:" keeps nothing. Used from one thread.

    Every method that changes something has done so durably when it returns: a process killed at any
    instant loses nothing that was told to the store. Raises StoreError for a file that is no such
    database, is locked by another program, or cannot be written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path
        try:
            if str(path) != ":memory:":
                Path(path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._db = sqlite3.connect(path, isolation_level=None, timeout=5, factory=_Database)
            self._db.execute("PRAGMA foreign_keys = ON")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            migrate(self._db)
            if str(path) != ":memory:":
                os.chmod(path, 0o600)
            self._end_answers_of_the_dead()
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"the chats in {path} cannot be opened: {error}",
                hint=_room(error, path)
                or "move the file away to begin with no chats, or name another folder in "
                "LOCALLLM_HOME",
            ) from error
        self._db.path = path

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def together(self) -> Iterator[None]:
        """All changes within, or none. Within another one it is a part of that."""
        if self._db.in_transaction:
            yield
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # a full disk has ended it already
                self._db.execute("ROLLBACK")
            raise

    # ---- chats

    def new_chat(
        self,
        *,
        model: str | None = None,
        system: str = "",
        created: float | None = None,
        **fields: Any,
    ) -> Chat:
        """created: seconds since 1970, None for now; it counts as changed then too."""
        now = time.time() if created is None else created
        with self.together():
            cursor = self._db.execute(
                "INSERT INTO chats(created, updated, model, system) VALUES (?, ?, ?, ?)",
                (now, now, model, system),
            )
            assert cursor.lastrowid is not None
            self.edit_chat(cursor.lastrowid, **fields)
        return self.chat(cursor.lastrowid)

    def chat(self, chat: int) -> Chat:
        """Raises KeyError for one that is not there."""
        row = self._db.execute(f"SELECT {_CHAT_FIELDS} FROM chats WHERE id = ?", (chat,)).fetchone()
        if row is None:
            raise KeyError(chat)
        return replace(_chat(row), tags=self.tags(chat))

    def chats(
        self,
        *,
        limit: int = 200,
        offset: int = 0,
        folder: str | None = None,
        tag: str | None = None,
        title: str = "",
    ) -> list[Chat]:
        """Pinned ones first, then by their last change; tags left out. title: a part of it."""
        where, values = _chats_where(folder, tag, title)
        rows = self._db.execute(
            f"SELECT {_CHAT_FIELDS} FROM chats WHERE {where} "
            "ORDER BY pinned DESC, updated DESC, id DESC LIMIT ? OFFSET ?",
            (*values, limit, offset),
        )
        return [_chat(row) for row in rows]

    def count_chats(
        self, *, folder: str | None = None, tag: str | None = None, title: str = ""
    ) -> int:
        """How many `chats` would give without a limit."""
        where, values = _chats_where(folder, tag, title)
        row = self._db.execute(f"SELECT count(*) FROM chats WHERE {where}", values).fetchone()
        return int(row[0])

    def edit_chat(self, chat: int, **fields: Any) -> None:
        """Sets columns of a chat; what the user did not do to it does not make it recent."""
        self._set("chats", chat, fields, _CHAT_EDITS)

    def touch(self, chat: int) -> None:
        """Makes it the most recent one."""
        self._db.execute("UPDATE chats SET updated = ? WHERE id = ?", (time.time(), chat))

    def delete_chat(self, chat: int) -> None:
        self._db.execute("DELETE FROM chats WHERE id = ?", (chat,))

    def folders(self) -> list[str]:
        rows = self._db.execute("SELECT DISTINCT folder FROM chats WHERE folder != '' ORDER BY 1")
        return [row[0] for row in rows]

    def tags(self, chat: int | None = None) -> tuple[str, ...]:
        """Of a chat, or all there are."""
        rows = (
            self._db.execute("SELECT DISTINCT tag FROM tags ORDER BY 1")
            if chat is None
            else self._db.execute("SELECT tag FROM tags WHERE chat = ? ORDER BY 1", (chat,))
        )
        return tuple(row[0] for row in rows)

    def set_tags(self, chat: int, tags: Iterable[str]) -> None:
        with self.together():
            self._db.execute("DELETE FROM tags WHERE chat = ?", (chat,))
            self._db.executemany(
                "INSERT INTO tags(chat, tag) VALUES (?, ?)", [(chat, tag) for tag in set(tags)]
            )

    # ---- the tree

    def add_message(
        self,
        chat: int,
        parent: int | None,
        role: Role,
        content: str,
        *,
        reasoning: str = "",
        status: Status = "complete",
        model: str | None = None,
        adapter: str | None = None,
        params: Json | None = None,
        receipt: Json | None = None,
        extra: Json | None = None,
        created: float | None = None,
        open_branch: bool = True,
    ) -> Message:
        """A new child of `parent` (None: a first message). open_branch: the chat then ends here."""
        now = time.time() if created is None else created
        with self.together():
            cursor = self._db.execute(
                "INSERT INTO messages(chat, parent, role, content, reasoning, created, status, "
                "model, adapter, params, receipt, extra, writer) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(chat, parent, role, content, reasoning, now, status, model, adapter),
                    *(json.dumps(dict(part or {})) for part in (params, receipt, extra)),
                    os.getpid() if status == "writing" else None,
                ),
            )
            if open_branch:
                self._db.execute(
                    "UPDATE chats SET head = ?, updated = max(updated, ?) WHERE id = ?",
                    (cursor.lastrowid, now, chat),
                )
        assert cursor.lastrowid is not None
        return self.message(cursor.lastrowid)

    def message(self, message: int) -> Message:
        """Raises KeyError for one that is not there."""
        row = self._db.execute(
            f"SELECT {_MESSAGE_FIELDS} FROM messages WHERE id = ?", (message,)
        ).fetchone()
        if row is None:
            raise KeyError(message)
        return _message(row)

    def edit_message(self, message: int, **fields: Any) -> None:
        self._set("messages", message, fields, _MESSAGE_EDITS)

    def branch(self, message: int | None) -> list[Message]:
        """From the first message of its branch to this one; empty for None."""
        rows = self._db.execute(
            "WITH RECURSIVE up(id, depth) AS (SELECT ?, 0 UNION ALL "
            "SELECT parent, depth + 1 FROM up JOIN messages USING (id) WHERE parent IS NOT NULL) "
            f"SELECT {', '.join('m.' + f for f in _MESSAGE_FIELDS.split(', '))} "
            "FROM up JOIN messages m ON m.id = up.id ORDER BY depth DESC",
            (message,),
        )
        return [_message(row) for row in rows]

    def tree(self, chat: int) -> list[Message]:
        """Every message of the chat, the oldest first."""
        rows = self._db.execute(
            f"SELECT {_MESSAGE_FIELDS} FROM messages WHERE chat = ? ORDER BY id", (chat,)
        )
        return [_message(row) for row in rows]

    def children(self, chat: int, parent: int | None) -> list[Message]:
        """Siblings that follow the same message, the oldest first."""
        rows = self._db.execute(
            f"SELECT {_MESSAGE_FIELDS} FROM messages WHERE chat = ? AND parent IS ? ORDER BY id",
            (chat, parent),
        )
        return [_message(row) for row in rows]

    def siblings(self, message: int) -> list[int]:
        """Ids of the messages that follow the same one, itself among them, the oldest first."""
        rows = self._db.execute(
            "SELECT o.id FROM messages m JOIN messages o "
            "ON o.chat = m.chat AND o.parent IS m.parent WHERE m.id = ? ORDER BY o.id",
            (message,),
        )
        return [int(row[0]) for row in rows]

    def first_messages(self) -> Iterator[tuple[int, str, str]]:
        """Chat, role and content of every message that no other comes before."""
        yield from self._db.execute(
            "SELECT chat, role, content FROM messages WHERE parent IS NULL ORDER BY id"
        )

    def newest_leaf(self, message: int) -> int:
        """The end of the branch through this message that was last written to."""
        while True:
            row = self._db.execute(
                "SELECT max(id) FROM messages WHERE parent = ?", (message,)
            ).fetchone()
            if row[0] is None:
                return message
            message = int(row[0])

    def prune(self, message: int) -> None:
        """Removes a message and all that follows it; the open branch falls back to its parent."""
        found = self.message(message)
        with self.together():
            head = self.chat(found.chat).head
            lost = head is not None and message in [m.id for m in self.branch(head)]
            self._db.execute("DELETE FROM messages WHERE id = ?", (message,))
            if lost:
                left = found.parent
                if left is None:
                    first = self.children(found.chat, None)
                    left = self.newest_leaf(first[-1].id) if first else None
                self._db.execute("UPDATE chats SET head = ? WHERE id = ?", (left, found.chat))

    # ---- search

    def search(self, words: str, limit: int = 50) -> list[Hit]:
        """Messages that hold all the words, the last one as a beginning; the best first."""
        return find_messages(self._db, words, limit)

    # ---- prompts, presets, settings

    def prompts(self) -> list[Prompt]:
        rows = self._db.execute("SELECT name, kind, text FROM prompts ORDER BY name")
        return [Prompt(*row) for row in rows]

    def save_prompt(self, prompt: Prompt) -> None:
        self._db.execute(
            "INSERT INTO prompts(name, kind, text) VALUES (?, ?, ?) "
            "ON CONFLICT(name) DO UPDATE SET kind = excluded.kind, text = excluded.text",
            (prompt.name, prompt.kind, prompt.text),
        )

    def delete_prompt(self, name: str) -> None:
        self._db.execute("DELETE FROM prompts WHERE name = ?", (name,))

    def presets(self) -> list[Preset]:
        rows = self._db.execute("SELECT name, params FROM presets ORDER BY name")
        return [Preset(name, json.loads(params)) for name, params in rows]

    def save_preset(self, preset: Preset) -> None:
        self._db.execute(
            "INSERT INTO presets(name, params) VALUES (?, ?) "
            "ON CONFLICT(name) DO UPDATE SET params = excluded.params",
            (preset.name, json.dumps(dict(preset.params))),
        )

    def delete_preset(self, name: str) -> None:
        self._db.execute("DELETE FROM presets WHERE name = ?", (name,))

    def setting(self, name: str, default: Any = None) -> Any:
        row = self._db.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return default if row is None else json.loads(row[0])

    def set_setting(self, name: str, value: Any) -> None:
        self._db.execute(
            "INSERT INTO settings(name, value) VALUES (?, ?) "
            "ON CONFLICT(name) DO UPDATE SET value = excluded.value",
            (name, json.dumps(value)),
        )

    # ---- what was preferred

    def add_pair(
        self,
        prompt: Sequence[Json],
        chosen: str,
        rejected: str | None,
        origin: str,
        chat: int | None = None,
    ) -> bool:
        """False if the same was there already."""
        text = json.dumps([dict(message) for message in prompt], ensure_ascii=False)
        digest = hashlib.sha256(json.dumps([text, chosen, rejected]).encode()).hexdigest()
        cursor = self._db.execute(
            "INSERT OR IGNORE INTO pairs(created, prompt, chosen, rejected, origin, digest, chat) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (time.time(), text, chosen, rejected, origin, digest, chat),
        )
        return cursor.rowcount > 0

    def pairs(self) -> list[Pair]:
        rows = self._db.execute(
            "SELECT id, created, prompt, chosen, rejected, origin, chat FROM pairs ORDER BY id"
        )
        return [
            Pair(number, created, tuple(json.loads(prompt)), *rest)
            for number, created, prompt, *rest in rows
        ]

    def delete_pair(self, pair: int) -> None:
        self._db.execute("DELETE FROM pairs WHERE id = ?", (pair,))

    def _end_answers_of_the_dead(self) -> None:
        """Answers whose process ended while it wrote them are marked so; they keep their part."""
        writing = self._db.execute("SELECT id, writer FROM messages WHERE status = 'writing'")
        gone = [(number,) for number, writer in writing.fetchall() if not _lives(writer)]
        self._db.executemany("UPDATE messages SET status = 'interrupted' WHERE id = ?", gone)

    def _set(self, table: str, row: int, fields: Mapping[str, Any], known: frozenset[str]) -> None:
        assert fields.keys() <= known, f"{table} has no {fields.keys() - known}"
        if not fields:
            return
        values = [
            json.dumps(dict(value)) if isinstance(value, Mapping) else value
            for value in fields.values()
        ]
        columns = ", ".join(f"{name} = ?" for name in fields)
        self._db.execute(f"UPDATE {table} SET {columns} WHERE id = ?", (*values, row))


def _room(error: Exception, path: Path | str) -> str:
    """What helps where it is a full disk, which SQLite tells as an error of the disk at times."""
    full = "full" in str(error)
    with suppress(OSError):
        full = full or shutil.disk_usage(Path(path).parent).free < _LITTLE
    return "free some space on its disk" if full else ""


def _chats_where(folder: str | None, tag: str | None, title: str) -> tuple[str, list[str]]:
    where, values = ["1"], []
    if folder is not None:
        where.append("folder = ?")
        values.append(folder)
    if tag is not None:
        where.append("id IN (SELECT chat FROM tags WHERE tag = ?)")
        values.append(tag)
    if title:
        where.append("title LIKE ? ESCAPE '\\'")
        escaped = re.sub(r"([%_\\])", r"\\\1", title)
        values.append(f"%{escaped}%")
    return " AND ".join(where), values


def _lives(process: int | None) -> bool:
    if process is None:
        return False
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def find_messages(db: sqlite3.Connection, words: str, limit: int) -> list[Hit]:
    """See Store.search."""
    query = _fts_query(words)
    if not query:
        return []
    rows = db.execute(
        "SELECT m.chat, m.id, c.title, m.role, "
        "snippet(messages_text, 0, ?, ?, '…', 12), m.created "
        "FROM messages_text JOIN messages m ON m.id = messages_text.rowid "
        "JOIN chats c ON c.id = m.chat "
        "WHERE messages_text MATCH ? ORDER BY rank LIMIT ?",
        (MARK, UNMARK, query, limit),
    )
    return [Hit(*row) for row in rows]


def _fts_query(words: str) -> str:
    """Each word quoted, so that nothing in it is an operator; the last one may go on."""
    found = re.findall(r"\w+", words, re.UNICODE)
    quoted = [f'"{word}"' for word in found]
    if quoted and not words[-1].isspace():
        quoted[-1] += "*"
    return " ".join(quoted)


def _chat(row: Sequence[Any]) -> Chat:
    values = list(row)
    values[5] = bool(values[5])
    values[8] = json.loads(values[8])
    return Chat(*values)


def _message(row: Sequence[Any]) -> Message:
    values = list(row)
    for place in (10, 11, 12):
        values[place] = json.loads(values[place])
    return Message(*values)
