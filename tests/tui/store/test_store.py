"""The store keeps every message, whatever happens to the process."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localllm.errors import StoreError
from localllm.tui.store import Preset, Prompt, Store
from localllm.tui.store.schema import STEPS, VERSION, migrate


@pytest.fixture
def store():
    with Store(":memory:") as opened:
        yield opened


def talk(store, *texts, chat=None):
    """A chat of user and assistant messages in turn; the chat and the messages' ids."""
    chat = store.new_chat().id if chat is None else chat
    ids, parent = [], None
    for number, text in enumerate(texts):
        role = "assistant" if number % 2 else "user"
        parent = store.add_message(chat, parent, role, text).id
        ids.append(parent)
    return chat, ids


class TestChats:
    def test_pinned_chats_come_first_then_the_most_recent(self, store):
        first, second, third = (store.new_chat(title=name).id for name in "abc")
        store.add_message(first, None, "user", "again")
        store.edit_chat(second, pinned=True)
        assert [chat.id for chat in store.chats()] == [second, first, third]
        assert [chat.id for chat in store.chats(limit=1, offset=1)] == [first]
        assert store.count_chats() == 3

    def test_what_is_set_is_read(self, store):
        chat = store.new_chat(model="m", system="s", params={"temperature": 0.5}, folder="work").id
        store.set_tags(chat, ["b", "a", "b"])
        store.edit_chat(chat, adapter="poet", adapter_weight=0.5, draft="half a")
        found = store.chat(chat)
        assert (found.model, found.system, found.params) == ("m", "s", {"temperature": 0.5})
        assert (found.folder, found.tags, found.adapter) == ("work", ("a", "b"), "poet")
        assert (found.adapter_weight, found.draft) == (0.5, "half a")
        assert store.folders() == ["work"]
        assert store.tags() == ("a", "b")

    def test_chats_are_found_by_folder_tag_and_part_of_the_title(self, store):
        one = store.new_chat(title="100% sure", folder="x").id
        two = store.new_chat(title="100 times").id
        store.set_tags(two, ["t"])
        assert [chat.id for chat in store.chats(title="0%")] == [one]
        assert [chat.id for chat in store.chats(folder="x")] == [one]
        assert [chat.id for chat in store.chats(tag="t")] == [two]

    def test_a_deleted_chat_leaves_nothing_behind(self, store):
        chat, ids = talk(store, "hello", "there")
        store.set_tags(chat, ["t"])
        store.delete_chat(chat)
        assert store.search("hello") == []
        assert store.tags() == ()
        for missing in (lambda: store.chat(chat), lambda: store.message(ids[0])):
            with pytest.raises(KeyError):
                missing()

    def test_only_known_columns_can_be_set(self, store):
        chat = store.new_chat().id
        with pytest.raises(AssertionError):
            store.edit_chat(chat, **{"id = 1; --": 2})


class TestTree:
    def test_a_branch_is_the_way_from_its_end_to_the_root(self, store):
        chat, (u1, a1, _u2, a2) = talk(store, "u1", "a1", "u2", "a2")
        other = store.add_message(chat, u1, "assistant", "b1").id
        assert [m.content for m in store.branch(a2)] == ["u1", "a1", "u2", "a2"]
        assert [m.content for m in store.branch(other)] == ["u1", "b1"]
        assert [m.content for m in store.children(chat, u1)] == ["a1", "b1"]
        assert [m.id for m in store.children(chat, None)] == [u1]
        assert store.chat(chat).head == other
        assert store.newest_leaf(a1) == a2
        assert store.newest_leaf(u1) == other
        assert store.branch(None) == []
        assert len(store.tree(chat)) == 5

    def test_pruning_takes_a_subtree_and_falls_back_to_its_parent(self, store):
        chat, (u1, a1, u2, _a2) = talk(store, "u1", "a1", "u2", "a2")
        store.prune(u2)
        assert store.chat(chat).head == a1
        assert [m.id for m in store.tree(chat)] == [u1, a1]
        other = store.add_message(chat, None, "user", "anew").id
        store.prune(other)
        assert store.chat(chat).head == a1
        store.prune(u1)
        assert store.chat(chat).head is None

    def test_pruning_another_branch_leaves_the_open_one(self, store):
        chat, (u1, a1) = talk(store, "u1", "a1")
        other = store.add_message(chat, u1, "assistant", "b1", open_branch=False).id
        store.prune(other)
        assert store.chat(chat).head == a1

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=40))
    def test_any_history_of_branches_and_prunes_stays_a_tree(self, steps):
        with Store(":memory:") as store:
            chat = store.new_chat().id
            alive: dict[int, int | None] = {}
            for pick, prune in steps:
                ids = list(alive)
                if prune and ids:
                    gone = {ids[pick % len(ids)]}
                    while more := {m for m, p in alive.items() if p in gone} - gone:
                        gone |= more
                    store.prune(ids[pick % len(ids)])
                    alive = {m: p for m, p in alive.items() if m not in gone}
                else:
                    parent = ids[pick % len(ids)] if ids and pick % 5 else None
                    alive[store.add_message(chat, parent, "user", f"word{pick}").id] = parent
                assert {m.id: m.parent for m in store.tree(chat)} == alive
                head = store.chat(chat).head
                assert (head in alive) if alive else (head is None)
                for message in alive:
                    path = [m.id for m in store.branch(message)]
                    assert path[-1] == message
                    assert [alive[m] for m in path] == [None, *path[:-1]]


class TestSearch:
    def test_all_words_are_needed_and_the_last_may_go_on(self, store):
        chat, (one, _) = talk(store, "The quick brown fox", "jumps over")
        talk(store, "a quick answer")
        assert [hit.message for hit in store.search("quick bro")] == [one]
        assert store.search("quick bro ") == []
        hit = store.search("QUICK fox")[0]
        assert (hit.chat, hit.role) == (chat, "user")
        assert "\x02quick\x03" in hit.excerpt
        assert len(store.search("quick")) == 2

    def test_accents_and_edits_are_followed(self, store):
        _, (one,) = talk(store, "café crème")
        assert [hit.message for hit in store.search("cafe creme")] == [one]
        store.edit_message(one, content="tea")
        assert store.search("cafe") == []
        assert [hit.message for hit in store.search("tea")] == [one]

    @pytest.mark.parametrize("words", ['"', "a AND", "NEAR(", "*", "col:", "-", "", " ", "'; --"])
    def test_nothing_that_is_typed_is_an_operator(self, store, words):
        talk(store, "some text")
        assert store.search(words) == []


class TestKept:
    def test_prompts_presets_and_settings(self, store):
        store.save_prompt(Prompt("pirate", "system", "Arr"))
        store.save_prompt(Prompt("pirate", "system", "Arrr"))
        store.save_preset(Preset("wild", {"temperature": 2}))
        store.set_setting("theme", "nord")
        assert store.prompts() == [Prompt("pirate", "system", "Arrr")]
        assert store.presets() == [Preset("wild", {"temperature": 2})]
        assert store.setting("theme") == "nord"
        assert store.setting("none", 3) == 3
        store.delete_prompt("pirate")
        store.delete_preset("wild")
        assert (store.prompts(), store.presets()) == ([], [])

    def test_the_same_pair_is_kept_once(self, store):
        chat, _ = talk(store, "q")
        prompt = [{"role": "user", "content": "q"}]
        assert store.add_pair(prompt, "good", "bad", "rating", chat)
        assert not store.add_pair(prompt, "good", "bad", "compare")
        assert store.add_pair(prompt, "good", None, "edit")
        store.delete_chat(chat)
        first, second = store.pairs()
        assert (first.chosen, first.rejected, first.chat) == ("good", "bad", None)
        assert first.prompt == tuple(prompt)
        assert second.rejected is None
        store.delete_pair(first.id)
        assert len(store.pairs()) == 1


class TestBadDays:
    def test_a_kill_in_mid_answer_loses_nothing_told_to_the_store(self, tmp_path):
        path = tmp_path / "chats.db"
        script = (
            "import sys, time\n"
            "from localllm.tui.store import Store\n"
            f"store = Store({str(path)!r})\n"
            "chat = store.new_chat().id\n"
            "user = store.add_message(chat, None, 'user', 'question').id\n"
            "answer = store.add_message(chat, user, 'assistant', '', status='writing').id\n"
            "for n in range(10**9):\n"
            "    store.edit_message(answer, content='word ' * n)\n"
            "    print(n, flush=True)\n"
        )
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
            for line in process.stdout:
                if int(line) == 50:
                    break
            os.kill(process.pid, signal.SIGKILL)
        with Store(path) as store:
            question, answer = store.branch(store.chats()[0].head)
            assert question.content == "question"
            assert answer.status == "interrupted"
            assert len(answer.content.split()) >= 50
            assert store.search("question")

    def test_a_database_of_the_first_version_opens(self, tmp_path):
        path = tmp_path / "chats.db"
        old = sqlite3.connect(path, isolation_level=None)
        migrate(old, STEPS[:1])
        old.execute("INSERT INTO chats(title, created, updated, head) VALUES ('old', 1, 1, 1)")
        old.execute(
            "INSERT INTO messages(chat, role, content, created) VALUES (1, 'user', 'hi', 1)"
        )
        old.close()
        with Store(path) as store:
            assert store.chats()[0].title == "old"
            assert store.branch(1)[0].content == "hi"
            assert store.branch(1)[0].rating == 0
            assert store.search("hi")
            store.edit_chat(1, folder="x")

    def test_a_kill_in_mid_migration_leaves_a_database_that_opens(self, tmp_path):
        path = tmp_path / "chats.db"
        old = sqlite3.connect(path, isolation_level=None)
        migrate(old, STEPS[:1])
        old.execute("INSERT INTO chats(title, created, updated) VALUES ('old', 1, 1)")
        old.close()
        script = (
            "import os, sqlite3\n"
            "from localllm.tui.store.schema import STEPS, migrate\n"
            f"db = sqlite3.connect({str(path)!r}, isolation_level=None)\n"
            "db.create_function('die', 0, lambda: os.kill(os.getpid(), 9))\n"
            "migrate(db, (STEPS[0], (*STEPS[1][:4], 'SELECT die()', *STEPS[1][4:])))\n"
        )
        done = subprocess.run([sys.executable, "-c", script])
        assert done.returncode == -signal.SIGKILL
        check = sqlite3.connect(path)
        assert check.execute("PRAGMA user_version").fetchone() == (1,)
        check.close()
        with Store(path) as store:
            assert store.chats()[0].title == "old"
            assert store.chats()[0].folder == ""

    def test_a_newer_database_is_left_alone(self, tmp_path):
        path = tmp_path / "chats.db"
        Store(path).close()
        newer = sqlite3.connect(path)
        newer.execute(f"PRAGMA user_version = {VERSION + 1}")
        newer.close()
        with pytest.raises(StoreError, match="newer localllm"):
            Store(path)

    def test_a_file_that_is_no_database_is_named_and_kept(self, tmp_path):
        path = tmp_path / "chats.db"
        path.write_text("these are no chats, but something of mine " * 100)
        before = path.read_bytes()
        with pytest.raises(StoreError, match="cannot be opened"):
            Store(path)
        assert path.read_bytes() == before

    def test_others_on_the_machine_cannot_read_the_chats(self, tmp_path):
        path = tmp_path / "own" / "chats.db"
        Store(path).close()
        assert path.stat().st_mode & 0o077 == 0
        assert path.parent.stat().st_mode & 0o077 == 0

    def test_two_apps_can_have_the_chats_open(self, tmp_path):
        path = tmp_path / "chats.db"
        with Store(path) as one, Store(path) as two:
            chat, _ = talk(one, "hello")
            talk(two, "x", chat=chat)
            assert len(one.tree(chat)) == 2
            assert one.search("hello")
            assert two.search("hello")


def test_answers_that_others_are_writing_stay_theirs(tmp_path):
    """Opening the store again marks as interrupted only what no living app is writing."""
    path = tmp_path / "chats.db"
    with Store(path) as one:
        chat, (user,) = talk(one, "q")
        answer = one.add_message(chat, user, "assistant", "", status="writing").id
        with Store(path) as two:
            assert two.message(answer).status == "writing"

        assert one.message(answer).status == "writing"
