"""Settings from files and flags: read back as written, refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localllm.errors import InvalidRequest
from localllm.train.config import (
    TrainConfig,
    differences,
    flat,
    load_config,
    make_config,
    to_toml,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
CHANGES = st.fixed_dictionaries(
    {"model": TEXT, "data.source": TEXT},
    optional={
        "data.valid": TEXT,
        "data.chat_template": TEXT,
        "data.seq_len": st.integers(2, 1 << 20),
        "run.steps": st.integers(1, 1 << 40),
        "run.epochs": st.floats(1e-3, 1e6),
        "optimizer.lr": st.floats(0, 1),
        "optimizer.eps": st.floats(1e-30, 1),
        "batch.pack": st.booleans(),
        "run.sample_prompts": st.lists(TEXT, max_size=3),
        "lora.targets": st.lists(TEXT.filter(bool), min_size=1, max_size=3) | st.just("all-linear"),
        "lora.rank_pattern": st.dictionaries(TEXT, st.integers(1, 64), max_size=3),
        "lora.alpha_pattern": st.dictionaries(TEXT, st.floats(0.1, 64), max_size=3),
        "lora.lora_plus": st.floats(1, 64),
        "seed": st.integers(0, 2**63 - 1),
        "program": st.sampled_from(["auto", "native", "reference"]),
    },
)


@given(CHANGES)
def test_a_saved_config_reads_back_as_it_was(tmp_path_factory, changes):
    config = make_config(None, changes)
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(to_toml(config), "utf-8")
    assert load_config(path) == config
    assert differences(config, load_config(path)) == []


@given(CHANGES, CHANGES)
def test_differences_name_every_setting_that_touches_the_weights(one, other):
    before, now = make_config(None, one), make_config(None, other)
    named = {text.split(" was ")[0] for text in differences(before, now)}
    free = {"run.sample_prompts"}
    old, new = flat(before), flat(now)
    assert named == {name for name in old if old[name] != new[name]} - free


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("modle = 'x'", "there is no setting modle", "did you mean model?"),
        ("[run]\nstep = 3", r"there is no setting run\.step", "did you mean run.steps?"),
        ("steps = 3", "there is no setting steps", "did you mean run.steps?"),
        ("[optimiser]\nlr = 1", "there is no setting optimiser", "did you mean optimizer"),
        ("[lora]\nrank = 'big'", r"lora\.rank is a whole number, not 'big'", None),
        ("[lora]\nrank = 0", "rank must be from 1", None),
        ("[batch]\npack = 1", r"batch\.pack is true or false, not 1", None),
        ("seed = true", "seed is a whole number, not True", None),
        ("data = 'file'", "data is a group of settings, not 'file'", None),
        ("[data]\non_long = 'trim'", "one of refuse, drop, cut", None),
        ("[run]\nsteps = 0", r"run\.steps must be at least 1, not 0", None),
        ("[run]\nepochs = 0", r"run\.epochs must be above 0", None),
        ("[optimizer]\nlr = nan", r"optimizer\.lr must be at least 0, not nan", None),
        ("[batch]\ntokens = 5", "which batch.pack turns on", "--pack"),
        ("[run]\nsample_every = 5", "without prompts", "--sample-prompt"),
        ("[run]\nearly_stop = 2", "needs validation", "--valid"),
        ("tune = 'full'\n[lora]\nrank = 4", "settings of an adapter", "--full"),
        ("a = ", "is no TOML", None),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(tmp_path, text, message, hint):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=message) as error:
        load_config(path)
    assert "run.toml" in str(error.value)
    assert hint is None or hint in (error.value.hint or "")


def test_flags_go_over_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("model = 'a'\n[lora]\nrank = 4\nalpha = 8\n")
    config = load_config(path, {"lora.rank": 16, "run.steps": 3})
    assert (config.model, config.lora.rank, config.lora.alpha, config.run.steps) == ("a", 16, 8, 3)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InvalidRequest, match=r"none\.toml cannot be read"):
        load_config(tmp_path / "none.toml")


def test_defaults_are_the_documented_ones():
    config = TrainConfig()
    assert (config.lora.rank, config.lora.alpha, config.batch.size) == (8, 16, 4)
