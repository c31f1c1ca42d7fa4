"""What goes out comes in again, the same; what others wrote comes in, whatever it is."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import zipfile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.errors import InvalidRequest, StoreError
from localllm.tui.exchange import (
    ChatTree,
    Found,
    Node,
    import_file,
    markdown_of,
    put_in,
    read_chats,
    tree_of,
    write_jsonl,
    write_markdown,
)
from localllm.tui.exchange.chatgpt import read_conversation
from localllm.tui.exchange.jsonl import jsonl_of, read_jsonl
from localllm.tui.exchange.markdown import read_markdown
from localllm.tui.exchange.openwebui import read_chat
from localllm.tui.exchange.trees import checked, ordered
from localllm.tui.store import Store

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
HARD = st.sampled_from(
    [
        "## You\n\n",
        "\n\n<!-- localllm:message {} -->\n\n",
        '<!-- localllm:chat {"title": "x"} -->',
        "</details>\n\n",
        "-->",
        "\n",
        "\r\n",
        "```",
        "{}",
    ]
)
SAID = st.lists(TEXT | HARD, max_size=4).map("".join)


@pytest.fixture
def store():
    with Store(":memory:") as opened:
        yield opened


@st.composite
def trees(draw: st.DrawFn) -> ChatTree:
    nodes: list[Node] = []
    for number in range(draw(st.integers(1, 8))):
        parent = draw(st.sampled_from([None, *(node.key for node in nodes)]))
        nodes.append(
            Node(
                f"n{number}",
                parent,
                draw(st.sampled_from(["user", "assistant", "system", "tool"])),
                draw(SAID),
                draw(SAID),
                draw(st.floats(0, 4e9)),
                draw(st.sampled_from(["complete", "stopped", "failed", "interrupted"])),
                draw(st.none() | st.sampled_from(["smollm2:135m"])),
                None,
                draw(st.sampled_from([{}, {"temperature": 0.5, "seed": 2**60}])),
                draw(st.sampled_from([{}, {"generated_tokens": 5, "stopped_by": "eos"}])),
                draw(st.sampled_from([{}, {"name": "add", "tool_call_id": "1"}])),
                draw(st.sampled_from([-1, 0, 1])),
            )
        )
    return ChatTree(
        tuple(nodes),
        head=draw(st.sampled_from([node.key for node in nodes])),
        title=draw(TEXT).replace("\n", " "),
        created=draw(st.floats(0, 4e9)),
        updated=draw(st.floats(0, 4e9)),
        pinned=draw(st.booleans()),
        model="smollm2:135m",
        system=draw(SAID),
        params={"top_p": 0.9},
        folder="work",
        adapter="/a/poet",
        adapter_weight=0.5,
        tags=("a", "b"),
    )


def shape(tree: ChatTree) -> Any:
    """Everything but the keys, which are another database's."""
    places = {node.key: place for place, node in enumerate(tree.nodes)}
    facts = {name: value for name, value in vars(tree).items() if name not in ("nodes", "head")}
    nodes = [
        {**vars(node), "key": places[node.key], "parent": places.get(node.parent or "")}
        for node in tree.nodes
    ]
    return facts, places.get(tree.head or ""), nodes


class TestOwnForms:
    @given(trees())
    def test_json_lines_keep_the_whole_tree(self, tree):
        lines = ['{"localllm": "chats", "version": 1}\n', *jsonl_of(tree), *jsonl_of(tree)]
        assert list(read_jsonl(iter(lines))) == [tree, tree]

    @given(trees())
    def test_the_store_keeps_the_whole_tree(self, tree):
        with Store(":memory:") as store:
            (chat,) = put_in(store, [tree])
            assert shape(tree_of(store, chat)) == shape(tree)

    @given(trees())
    def test_markdown_gives_the_branch_back(self, tree):
        with Store(":memory:") as store:
            (chat,) = put_in(store, [tree])
            branch = store.branch(store.chat(chat).head)
            found = read_markdown(markdown_of(store, chat))
        assert [(n.role, n.content, n.reasoning, n.created, n.extra) for n in found.nodes] == [
            (m.role, m.content, m.reasoning, m.created, dict(m.extra)) for m in branch
        ]
        assert (found.title, found.system, found.tags) == (tree.title, tree.system, tree.tags)

    def test_through_files(self, store, tmp_path):
        tree = example()
        (chat,) = put_in(store, [tree])
        assert write_jsonl(store, tmp_path / "chats.jsonl") == 1
        write_markdown(store, chat, tmp_path / "chat.md")
        for name, form in (("chats.jsonl", "localllm"), ("chat.md", "Markdown")):
            path = tmp_path / name
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            found = read_chats(path)
            assert (found.form, found.wrong) == (form, ())
        with Store(":memory:") as other:
            done = asyncio.run(import_file(other, tmp_path / "chats.jsonl"))
            assert (len(done.chats), done.known) == (1, 0)
            assert shape(tree_of(other, done.chats[0])) == shape(tree)

    def test_markdown_reads_well(self, store):
        (chat,) = put_in(store, [example()])
        text = markdown_of(store, chat)
        visible = [line for line in text.splitlines() if line and not line.startswith("<!--")]
        assert visible == ["# Tides", "> Be brief.", "## You", "Why?", "## Assistant", "The moon."]

    def test_markdown_changed_by_hand_is_still_read(self, store):
        (chat,) = put_in(store, [example()])
        text = markdown_of(store, chat).replace("Why?", "Why are\nthere tides?")
        text = text.replace("The moon.", "It is the moon.")
        found = read_markdown(text)
        assert [node.content for node in found.nodes] == [
            "Why are\nthere tides?",
            "It is the moon.",
        ]

    def test_one_bad_line_costs_one_chat(self):
        good = list(jsonl_of(example()))
        lines = ['{"localllm": "chats", "version": 1}\n', *good, good[0], "{broken\n", *good]
        found = list(read_jsonl(iter(lines)))
        assert [type(one).__name__ for one in found] == ["ChatTree", "InvalidRequest", "ChatTree"]

    def test_a_newer_file_is_refused(self):
        with pytest.raises(InvalidRequest, match="version 99"):
            list(read_jsonl(iter(['{"localllm": "chats", "version": 99}\n'])))

    def test_a_folder_that_cannot_be_written_is_told(self, store, tmp_path):
        (tmp_path / "file").touch()
        put_in(store, [example()])
        with pytest.raises(StoreError, match="cannot be written"):
            write_jsonl(store, tmp_path / "file" / "chats.jsonl")
        assert os.listdir(tmp_path) == ["file"]


def example() -> ChatTree:
    return ChatTree(
        (
            Node("1", None, "user", "Why?", created=10.0),
            Node("2", "1", "assistant", "The sun.", created=11.0, rating=-1),
            Node("3", "1", "assistant", "The moon.", created=12.0),
        ),
        head="3",
        title="Tides",
        created=10.0,
        updated=12.0,
        system="Be brief.",
        tags=("sea",),
    )


def test_a_message_that_another_one_tells_of_is_found_again(store, tmp_path):
    for _ in range(3):
        store.new_chat()  # so that numbers differ
    chat = store.new_chat()
    first = store.add_message(chat.id, None, "user", "Why")
    store.add_message(chat.id, None, "user", "Why?", extra={"edited_from": first.id})
    path = tmp_path / "chats.jsonl"
    write_jsonl(store, path)
    with Store(":memory:") as other:
        other.add_message(other.new_chat().id, None, "user", "Something else")
        (made,) = asyncio.run(import_file(other, path)).chats
        one, edited = other.tree(made)
        assert edited.extra == {"edited_from": one.id}


class TestDuplicates:
    def test_the_same_file_twice_brings_nothing_new(self, store):
        (chat,) = put_in(store, [example()])
        assert list(put_in(store, [example(), example()])) == [None, None]
        # Not even where the chat went on meanwhile, has another name or is in another folder.
        store.add_message(chat, store.chat(chat).head, "user", "And why twice?")
        store.edit_chat(chat, title="Renamed", folder="sea")
        assert list(put_in(store, [example()])) == [None]

    def test_a_chat_that_says_more_is_another(self, store):
        tree = example()
        more = ChatTree((*tree.nodes, Node("4", "3", "user", "More?")), head="4")
        assert [type(one) for one in put_in(store, [tree, more])] == [int, int]
        same_begin = ChatTree((tree.nodes[0], Node("2", "1", "assistant", "Wind.")))
        assert [type(one) for one in put_in(store, [same_begin])] == [int]

    def test_own_chats_are_recognised_in_their_export(self, store, tmp_path):
        chat = store.new_chat(system="Be brief.")
        first = store.add_message(chat.id, None, "user", "Hello")
        store.add_message(chat.id, first.id, "assistant", "Hi", status="writing")
        path = tmp_path / "chats.jsonl"
        write_jsonl(store, path)
        done = asyncio.run(import_file(store, path))
        assert (done.chats, done.known) == ((), 1)


CHATGPT: dict[str, Any] = {
    "title": "Tides",
    "create_time": 1700000000.5,
    "update_time": 1700000100.0,
    "current_node": "c2",
    "mapping": {
        "root": {"id": "root", "message": None, "parent": None, "children": ["sys"]},
        "sys": {
            "message": {
                "author": {"role": "system"},
                "content": {"content_type": "text", "parts": [""]},
                "metadata": {"is_visually_hidden_from_conversation": True},
            },
            "parent": "root",
        },
        "a": {
            "message": {
                "author": {"role": "user"},
                "create_time": 1700000001.0,
                "content": {
                    "content_type": "multimodal_text",
                    "parts": [{"content_type": "image_asset_pointer"}, "Why?"],
                },
            },
            "parent": "sys",
        },
        "b1": {
            "message": {
                "author": {"role": "assistant"},
                "content": {"content_type": "text", "parts": ["The sun."]},
                "metadata": {"model_slug": "gpt-5"},
            },
            "parent": "a",
        },
        "t": {
            "message": {
                "author": {"role": "assistant"},
                "content": {
                    "content_type": "thoughts",
                    "thoughts": [{"summary": "Tides", "content": "It is the moon."}],
                },
            },
            "parent": "a",
        },
        "code": {
            "message": {
                "author": {"role": "assistant"},
                "recipient": "python",
                "content": {"content_type": "code", "language": "python", "text": "print(1)"},
            },
            "parent": "t",
        },
        "run": {
            "message": {
                "author": {"role": "tool", "name": "python"},
                "content": {"content_type": "execution_output", "text": "1"},
            },
            "parent": "code",
        },
        "b2": {
            "message": {
                "author": {"role": "assistant"},
                "content": {"content_type": "text", "parts": ["The moon."]},
            },
            "parent": "run",
        },
        "c2": {
            "message": {
                "author": {"role": "user"},
                "content": {"content_type": "user_editable_context", "parts": []},
            },
            "parent": "b2",
        },
    },
}


class TestChatGpt:
    def test_a_conversation_with_its_branches(self):
        tree = read_conversation(CHATGPT)
        assert [(n.role, n.content, n.parent) for n in tree.nodes] == [
            ("user", "[a picture]\nWhy?", None),
            ("assistant", "The sun.", "a"),
            ("assistant", "```python\nprint(1)\n```", "a"),
            ("tool", "```\n1\n```", "code"),
            ("assistant", "The moon.", "run"),
        ]
        by_key = {node.key: node for node in tree.nodes}
        assert by_key["code"].reasoning == "Tides\n\nIt is the moon."
        assert by_key["b1"].model == "gpt-5"
        assert by_key["run"].extra == {"name": "python"}
        assert (tree.title, tree.created, tree.head) == ("Tides", 1700000000.5, "b2")

    def test_its_file_and_its_archive(self, tmp_path):
        path = tmp_path / "conversations.json"
        path.write_text(json.dumps([CHATGPT, {"mapping": 3}, CHATGPT]))
        found = read_chats(path)
        assert (found.form, len(found.chats)) == ("ChatGPT", 2)
        assert found.wrong == ("chat 2: it has no mapping of messages",)
        archive = tmp_path / "export.zip"
        with zipfile.ZipFile(archive, "w") as file:
            file.write(path, "export/conversations.json")
            file.writestr("../../evil", "x")
        assert read_chats(archive).chats == found.chats
        assert sorted(os.listdir(tmp_path)) == ["conversations.json", "export.zip"]

    def test_circles_and_loose_ends_are_no_trouble(self):
        def entry(parent: str | None, text: str) -> dict[str, Any]:
            content = {"content_type": "text", "parts": [text]}
            return {"parent": parent, "message": {"author": {"role": "user"}, "content": content}}

        mapping = {
            "a": entry("b", "1"),
            "b": entry("a", "2"),
            "c": entry("nowhere", "3"),
            "x": {"parent": "y", "message": None},
            "y": {"parent": "x", "message": None},
            "d": entry("x", "4"),
            "e": entry("e", "5"),
        }
        tree = read_conversation({"mapping": mapping, "current_node": "x"})
        assert sorted(node.content for node in tree.nodes) == ["1", "2", "3", "4", "5"]


OPENWEBUI: dict[str, Any] = {
    "id": "u1",
    "title": "Tides",
    "created_at": 1700000000,
    "updated_at": 1700000100,
    "pinned": True,
    "meta": {"tags": ["sea", {"name": "sky"}]},
    "chat": {
        "title": "Tides",
        "models": ["llama3:8b"],
        "params": {"system": "Be brief."},
        "history": {
            "currentId": "c",
            "messages": {
                "c": {
                    "parentId": "a",
                    "role": "assistant",
                    "content": '<details type="reasoning" done="true" duration="2">\n'
                    "<summary>Thought for 2 seconds</summary>\n&gt; It is\n&gt; the moon"
                    "\n</details>\nThe moon.",
                    "model": "llama3:8b",
                    "timestamp": 1700000003,
                    "annotation": {"rating": 1},
                },
                "b": {"parentId": "a", "role": "assistant", "content": "The sun.", "done": False},
                "a": {
                    "parentId": None,
                    "childrenIds": ["b", "c"],
                    "role": "user",
                    "content": "Why?",
                    "timestamp": 1700000001000,
                },
            },
        },
    },
}


class TestOpenWebUi:
    def test_a_chat_with_its_branches(self):
        tree = read_chat(OPENWEBUI)
        assert [(n.role, n.content, n.parent, n.status) for n in tree.nodes] == [
            ("user", "Why?", None, "complete"),
            ("assistant", "The sun.", "a", "interrupted"),
            ("assistant", "The moon.", "a", "complete"),
        ]
        assert tree.nodes[0].created == 1700000001.0
        assert tree.nodes[2].rating == 1
        assert (tree.system, tree.model, tree.pinned) == ("Be brief.", "llama3:8b", True)
        assert (tree.tags, tree.head) == (("sea", "sky"), "c")

    def test_thinking_is_no_part_of_the_answer(self):
        content = OPENWEBUI["chat"]["history"]["messages"]["c"]["content"].replace("&gt;", ">")
        message = {"role": "assistant", "content": content}
        tree = read_chat({"messages": [{"role": "user", "content": "Why?"}, message]})
        assert (tree.nodes[1].reasoning, tree.nodes[1].content) == ("It is\nthe moon", "The moon.")
        assert tree.nodes[1].parent == tree.nodes[0].key

    def test_its_file(self, tmp_path):
        path = tmp_path / "chat-export.json"
        path.write_bytes(b"\xef\xbb\xbf" + json.dumps([OPENWEBUI, 7]).encode())
        found = read_chats(path)
        assert (found.form, len(found.chats), len(found.wrong)) == ("Open WebUI", 1, 1)


class TestHostile:
    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"hello",
            b"\xff\xfe\x00",
            b"[" * 200_000,
            b'{"a":' * 200_000,
            b"[]",
            b"{}",
            b"[1, 2]",
            b"9" * 10_000,
            b"PK\x03\x04garbage",
            b'{"mapping": []}',
            b"<!-- localllm:message {} -->",
            b"<!-- localllm:chat {} -->\n<!-- localllm:message {} -->",
        ],
    )
    def test_a_file_that_is_no_export_is_refused(self, tmp_path, content):
        path = tmp_path / "x"
        path.write_bytes(content)
        with pytest.raises(InvalidRequest):
            read_chats(path)
        with pytest.raises(InvalidRequest):
            read_chats(tmp_path)
        with pytest.raises(InvalidRequest):
            read_chats(tmp_path / "missing")

    JSON = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        *("mapping", "message", "author", "role", "content", "parts", "parent"),
                        *("content_type", "chat", "history", "messages", "currentId", "parentId"),
                        *("childrenIds", "title", "models", "meta", "tags", "key", "current_node"),
                        *(
                            "params",
                            "receipt",
                            "extra",
                            "head",
                            "timestamp",
                            "create_time",
                            "thoughts",
                        ),
                        *("tool_calls", "metadata", "annotation", "rating", "a", "b"),
                    ]
                ),
                inner,
                max_size=5,
            )
        ),
        max_leaves=25,
    )

    @given(JSON)
    def test_any_json_is_read_or_refused_and_can_be_stored(self, value):
        given = [value, {"mapping": value}, {"mapping": {"a": value}}, {"history": value}]
        given += [{"chat": value}, {"history": {"messages": value}}, {"messages": [value]}]
        found: list[ChatTree] = []
        for one in given:
            for read in (read_conversation, read_chat):
                try:
                    found.append(read(one))
                except InvalidRequest:
                    continue
        text = json.dumps(value)
        lines = ['{"localllm": "chats", "version": 1}', f'{{"chat": {text}}}', text]
        lines += [f'{{"message": {text}}}']
        found += [one for one in read_jsonl(iter(lines)) if isinstance(one, ChatTree)]
        with Store(":memory:") as store:
            for chat in put_in(store, found):
                if chat is not None:
                    tree = tree_of(store, chat)
                    markdown_of(store, chat)
                    list(jsonl_of(tree))

    def test_fields_that_make_no_sense_are_left_out(self):
        node = Node(
            "1",
            None,
            "user",
            "half \ud83d",
            created=1e300,
            status="hacked",
            receipt={"generated_tokens": "many", "seed": None, "stopped_by": "eos", "x": 1},
            params={"a": [1]},
            extra={"tool_calls": [1], "name": "add", "other": 1},
            rating=7,
        )
        tree = checked(ChatTree((node,), title="a\nb" * 1000, adapter_weight=1e9, head="9"))
        (found,) = tree.nodes
        assert found.content == "half ?"
        assert (found.created, found.status, found.rating) == (None, "complete", 0)
        assert found.receipt == {"seed": None, "stopped_by": "eos"}
        assert found.extra == {"name": "add"}
        assert (len(tree.title), tree.adapter_weight, tree.head) == (500, 1.0, "1")

    def test_what_is_no_tree_or_beyond_bounds_is_refused(self):
        one = Node("1", None, "user", "x")
        for nodes, why in (
            ((one, one), "no tree"),
            ((Node("2", "1", "user", "x"), one), "no tree"),
            ((Node("1", None, "root", "x"),), "role"),
            ((Node("1", None, "user", "x" * (17 << 20)),), "characters"),
            ((one,) * 50_001, "messages"),
        ):
            with pytest.raises(InvalidRequest, match=why):
                checked(ChatTree(nodes))

    def test_a_deep_chat_is_as_good_as_a_wide_one(self):
        nodes = [Node(str(n), str(n - 1) if n else None, "user", str(n)) for n in range(20_000)]
        assert [node.key for node in ordered(reversed(nodes), {})][-1] == "19999"
        wide = [Node(str(n), None, "user", str(n)) for n in range(20_000)]
        assert len(ordered(wide, {})) == 20_000

    def test_a_store_that_fails_midway_keeps_nothing_of_the_chat(self, store, monkeypatch):
        calls = []
        real = store.add_message

        def failing(*args: Any, **more: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise OSError("disk full")
            return real(*args, **more)

        monkeypatch.setattr(store, "add_message", failing)
        with pytest.raises(OSError, match="disk full"):
            list(put_in(store, [example()]))
        assert store.count_chats() == 0
        monkeypatch.undo()
        assert list(put_in(store, [example()])) != [None]


def test_many_chats_come_in_at_a_bearable_pace(store):
    found = Found("x", tuple(ChatTree((Node("1", None, "user", f"{n}"),)) for n in range(500)))
    assert len(list(put_in(store, found.chats))) == 500
    assert list(put_in(store, found.chats)) == [None] * 500
