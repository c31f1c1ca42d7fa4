"""The database's tables, and how older ones are brought up to date.

`PRAGMA user_version` counts the steps taken. A step runs in one transaction with its number, so a
process killed in the middle leaves the database at the step before.
"""

from __future__ import annotations

import sqlite3

from localllm.errors import StoreError

_CHATS = """
CREATE TABLE chats (
  id INTEGER PRIMARY KEY,
  title TEXT NOT NULL DEFAULT '',
  titled INTEGER NOT NULL DEFAULT 0,      -- 1: by the user, 2: by the model
  created REAL NOT NULL,
  updated REAL NOT NULL,
  pinned INTEGER NOT NULL DEFAULT 0,
  model TEXT,
  system TEXT NOT NULL DEFAULT '',
  params TEXT NOT NULL DEFAULT '{}',      -- sampling, JSON
  head INTEGER                            -- the message that the open branch ends with
)
"""
_MESSAGES = """
CREATE TABLE messages (
  id INTEGER PRIMARY KEY,
  chat INTEGER NOT NULL REFERENCES chats(id) ON DELETE CASCADE,
  parent INTEGER REFERENCES messages(id) ON DELETE CASCADE,
  role TEXT NOT NULL,
  content TEXT NOT NULL,
  reasoning TEXT NOT NULL DEFAULT '',
  created REAL NOT NULL,
  status TEXT NOT NULL DEFAULT 'complete',
  model TEXT,
  params TEXT NOT NULL DEFAULT '{}',
  receipt TEXT NOT NULL DEFAULT '{}',
  extra TEXT NOT NULL DEFAULT '{}'        -- tool calls, attachments; JSON
)
"""
# Text lives in one place: the index refers to it.
_INDEX = (
    "CREATE VIRTUAL TABLE messages_text USING fts5("
    "content, content='messages', content_rowid='id', tokenize='unicode61 remove_diacritics 2')",
    """
    CREATE TRIGGER messages_added AFTER INSERT ON messages BEGIN
      INSERT INTO messages_text(rowid, content) VALUES (new.id, new.content);
    END
    """,
    """
    CREATE TRIGGER messages_gone AFTER DELETE ON messages BEGIN
      INSERT INTO messages_text(messages_text, rowid, content)
      VALUES ('delete', old.id, old.content);
    END
    """,
    """
    CREATE TRIGGER messages_changed AFTER UPDATE OF content ON messages BEGIN
      INSERT INTO messages_text(messages_text, rowid, content)
      VALUES ('delete', old.id, old.content);
      INSERT INTO messages_text(rowid, content) VALUES (new.id, new.content);
    END
    """,
)

STEPS: tuple[tuple[str, ...], ...] = (
    (
        _CHATS,
        _MESSAGES,
        "CREATE INDEX messages_of_chat ON messages(chat)",
        "CREATE INDEX children ON messages(parent)",
        "CREATE INDEX recent_chats ON chats(pinned DESC, updated DESC)",
        *_INDEX,
        "CREATE TABLE prompts (name TEXT PRIMARY KEY, kind TEXT NOT NULL, text TEXT NOT NULL)",
        "CREATE TABLE presets (name TEXT PRIMARY KEY, params TEXT NOT NULL)",
        "CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    ),
    (
        "ALTER TABLE chats ADD COLUMN folder TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE chats ADD COLUMN adapter TEXT",
        "ALTER TABLE chats ADD COLUMN adapter_weight REAL NOT NULL DEFAULT 1.0",
        "ALTER TABLE chats ADD COLUMN draft TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE messages ADD COLUMN adapter TEXT",
        "ALTER TABLE messages ADD COLUMN rating INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE messages ADD COLUMN writer INTEGER",  # the process that is writing it
        "CREATE TABLE tags (chat INTEGER NOT NULL REFERENCES chats(id) ON DELETE CASCADE, "
        "tag TEXT NOT NULL, PRIMARY KEY (chat, tag))",
        """
        CREATE TABLE pairs (
          id INTEGER PRIMARY KEY,
          created REAL NOT NULL,
          prompt TEXT NOT NULL,           -- messages, JSON
          chosen TEXT NOT NULL,
          rejected TEXT,                  -- NULL: an example to learn from, not a pair
          origin TEXT NOT NULL,           -- rating, edit or compare
          digest TEXT NOT NULL UNIQUE,    -- of prompt and answers: duplicates are one
          chat INTEGER REFERENCES chats(id) ON DELETE SET NULL
        )
        """,
    ),
)
VERSION = len(STEPS)


def migrate(connection: sqlite3.Connection, steps: tuple[tuple[str, ...], ...] = STEPS) -> None:
    """Brings the database to the newest step, one transaction a step.

    Raises StoreError for a database of a newer localllm, which is left untouched.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(steps):
        raise StoreError(
            f"the chats were last opened by a newer localllm (their version is {version}, this "
            f"one knows {len(steps)})",
            hint="install the newer localllm again; nothing was changed",
        )
    for number in range(version, len(steps)):
        connection.execute("BEGIN IMMEDIATE")
        try:
            # Another process may have taken the step while we waited for the lock.
            if connection.execute("PRAGMA user_version").fetchone()[0] == number:
                for statement in steps[number]:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {number + 1}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:  # a full disk has ended it already
                connection.execute("ROLLBACK")
            raise
