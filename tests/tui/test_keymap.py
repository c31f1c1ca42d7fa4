"""keys.toml: keys go where the user wants them; a bad file costs nothing but itself."""

from __future__ import annotations

import pytest

from localllm.tui.commands import COMMANDS, Command, gather, keys_of, meet
from localllm.tui.keymap import key_name, read_keys

COMMANDS_HERE = [
    Command("one", "One", "", "App", lambda app, a: None, keys=("ctrl+a",)),
    Command("two", "Two", "", "App", lambda app, a: None, keys=("ctrl+b", "f2")),
    Command("three", "Three", "", "Tree", lambda app, a: None, keys=("x",), where="message"),
    Command("four", "Four", "", "Chats", lambda app, a: None, keys=("x",), where="chats"),
]


def read(tmp_path, text):
    path = tmp_path / "keys.toml"
    path.write_text(text)
    return read_keys(path, COMMANDS_HERE)


def test_a_command_gets_the_keys_of_the_file(tmp_path):
    remapped, problems = read(tmp_path, 'one = "ctrl+t"\ntwo = ["F5", "Alt+Shift+Q"]\n')
    assert problems == []
    assert remapped == {"one": ("ctrl+t",), "two": ("f5", "alt+shift+q")}
    assert keys_of(COMMANDS_HERE[2], remapped) == ("x",)


def test_no_keys_at_all_is_a_choice(tmp_path):
    assert read(tmp_path, "two = []\n") == ({"two": ()}, [])


def test_two_commands_may_change_their_keys(tmp_path):
    remapped, problems = read(tmp_path, 'one = "ctrl+b"\ntwo = "ctrl+a"\n')
    assert problems == []
    assert remapped == {"one": ("ctrl+b",), "two": ("ctrl+a",)}


def test_a_key_that_is_taken_is_refused_and_the_default_stays(tmp_path):
    remapped, problems = read(tmp_path, 'one = "f2"\n')
    assert remapped == {}
    assert "taken by two" in problems[0]


def test_places_that_never_meet_may_share_a_key(tmp_path):
    assert read(tmp_path, 'three = "d"\nfour = "d"\n')[1] == []


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('five = "f5"', "no command 'five'"),
        ("one = 5", "must be a key or a list of keys"),
        ('one = "hyper key"', "is no key"),
        ('one = ""', "is no key"),
        ('one = "enter"', "needed for typing"),
        ("one = ", "was not read"),
    ],
)
def test_a_bad_line_is_named_and_defaults_stay(tmp_path, line, named):
    remapped, problems = read(tmp_path, line + "\n")
    assert remapped == {}
    assert named in problems[0]


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("Ctrl+N", "ctrl+n"),
        ("shift+ctrl+x", "ctrl+shift+x"),
        ("?", "question_mark"),
        ("+", "plus"),
        ("esc", "escape"),
        ("G", "G"),
    ],
)
def test_keys_may_be_written_as_people_do(typed, name):
    assert key_name(typed) == name


def test_no_two_commands_of_the_app_share_a_key_where_they_meet():
    gather()
    for place, one in enumerate(COMMANDS):
        for other in COMMANDS[place + 1 :]:
            if meet(one.where, other.where):
                assert not set(one.keys) & set(other.keys), (one.name, other.name)


def test_every_command_can_be_reached_and_says_what_it_does():
    for command in gather():
        assert command.title
        assert command.help
        assert command.name == command.name.lower()
        assert command.slash is None or command.slash.replace("-", "").isalnum()
    slashes = [command.slash for command in COMMANDS if command.slash]
    assert len(slashes) == len(set(slashes))
