"""settings.toml: what is wrong is told and its default holds; what is set is kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.errors import InvalidRequest
from localllm.tui.settings import Settings, read_settings, with_setting, write_settings


def test_without_a_file_the_defaults_hold(tmp_path):
    assert read_settings(tmp_path / "settings.toml") == (Settings(), [])


@given(
    st.builds(
        Settings,
        theme=st.text(st.characters(exclude_categories=["Cs"])),
        vim=st.booleans(),
        start=st.sampled_from(["new", "resume"]),
        max_tokens=st.integers(1, 1_000_000),
        system=st.text(st.characters(exclude_categories=["Cs"])),
    )
)
def test_what_is_written_is_read_again(tmp_path_factory, settings):
    path = tmp_path_factory.mktemp("settings") / "deep" / "settings.toml"
    write_settings(path, settings)
    assert read_settings(path) == (settings, [])


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("vim = 1", "vim must be true or false"),
        ('max_tokens = "many"', "max_tokens must be a whole number"),
        ("max_tokens = true", "max_tokens must be a whole number"),
        ("max_tokens = 0", "max_tokens must be between"),
        ('start = "sometimes"', "start must be one of"),
        ('colour = "red"', "no setting 'colour'"),
    ],
)
def test_a_bad_line_is_named_and_the_others_hold(tmp_path, line, named):
    path = tmp_path / "settings.toml"
    path.write_text(f'theme = "nord"\n{line}\n')
    settings, problems = read_settings(path)
    assert settings == Settings(theme="nord")
    (problem,) = problems
    assert named in problem
    assert str(path) in problem


@pytest.mark.parametrize("data", [b"theme = [", b"\xff\xfe", b"x" * (1 << 21)])
def test_a_broken_file_leaves_the_defaults_and_says_why(tmp_path, data):
    path = tmp_path / "settings.toml"
    path.write_bytes(data)
    settings, problems = read_settings(path)
    assert settings == Settings()
    assert len(problems) == 1


def test_a_setting_that_is_none_is_refused():
    with pytest.raises(InvalidRequest, match="there is no setting"):
        with_setting(Settings(), "colours", True)
