import json
from dataclasses import replace

import numpy as np
import pytest

from localllm.errors import UnsupportedModel
from localllm.spec import RopeSpec
from localllm.spec.rope import frequencies, length_class, tables
from tests.spec.rope_golden import GOLDEN, by_transformers, cases

RECORDED = json.loads(GOLDEN.read_text())
DYNAMIC = RopeSpec(64, 1e4, "dynamic", factor=4.0, original_context=2048)
LONGROPE = RopeSpec(
    4, 1e4, "longrope", factor=2.0, original_context=100, short_factor=(1, 2), long_factor=(3, 4)
)


def assert_as_transformers(rope: RopeSpec, length: int, recorded: tuple[list[float], float]):
    inv_freq, factor = frequencies(rope, length)
    assert inv_freq.dtype == np.float32
    assert inv_freq.shape == (rope.dim // 2,)
    # Within a few units in the last place: powf differs by one between libraries.
    np.testing.assert_allclose(inv_freq, np.array(recorded[0], np.float32), rtol=1e-6, atol=0)
    assert factor == pytest.approx(recorded[1], rel=1e-12)


@pytest.mark.parametrize(
    ("case", "recorded"),
    list(zip(cases(), RECORDED, strict=True)),
    ids=[f"{rope.kind}-{index}" for index, (rope, _) in enumerate(cases())],
)
def test_frequencies_of_every_kind_are_those_recorded_from_transformers(case, recorded):
    assert_as_transformers(*case, recorded)


@pytest.mark.slow
def test_frequencies_of_every_kind_are_those_of_the_transformers_installed():
    pytest.importorskip("transformers")
    for rope, length in cases():
        assert_as_transformers(rope, length, by_transformers(rope, length))


def test_most_frequencies_agree_to_the_last_bit():
    same = [
        frequencies(*case)[0] == np.array(recorded[0], np.float32)
        for case, recorded in zip(cases(), RECORDED, strict=True)
    ]
    assert np.concatenate(same).mean() > 0.9


def test_only_dynamic_and_longrope_depend_on_the_length():
    for rope, _ in cases():
        short, long = (frequencies(rope, length)[0] for length in (1, 100_000))
        assert np.array_equal(short, long) == (rope.kind not in ("dynamic", "longrope"))


def test_dynamic_is_plain_up_to_its_context_and_slows_steadily_after():
    plain = frequencies(RopeSpec(64, 1e4), 1)[0]
    assert np.array_equal(frequencies(DYNAMIC, 2048)[0], plain)
    last = plain
    for length in (2049, 4096, 100_000):
        slower = frequencies(DYNAMIC, length)[0]
        assert slower[0] == 1
        assert (slower[1:] < last[1:]).all()
        last = slower


def test_lengths_of_one_class_share_their_frequencies():
    assert length_class(DYNAMIC, 1) == length_class(DYNAMIC, 2048) == 2048
    assert length_class(DYNAMIC, 2049) == 2049
    assert length_class(LONGROPE, 1) == length_class(LONGROPE, 100)
    assert length_class(LONGROPE, 101) == length_class(LONGROPE, 5000) != length_class(LONGROPE, 1)


def test_tables_take_each_row_by_its_own_position_and_length():
    positions, lengths = np.array([5, 5, 200]), np.array([50, 150, 201])
    cos, sin = tables(LONGROPE, positions, lengths)
    assert cos.dtype == sin.dtype == np.float32
    for row, (position, length) in enumerate(zip(positions, lengths, strict=True)):
        inv_freq, factor = frequencies(LONGROPE, int(length))
        angles = np.float64(position) * inv_freq
        np.testing.assert_allclose(cos[row], factor * np.cos(angles), atol=2e-5)
        np.testing.assert_allclose(sin[row], factor * np.sin(angles), atol=2e-5)
    assert not np.array_equal(cos[0], cos[1])


def test_an_attention_factor_given_replaces_the_kinds_own():
    assert frequencies(replace(LONGROPE, attention_factor=1.5), 1)[1] == 1.5
    cos, _ = tables(replace(DYNAMIC, attention_factor=1.5), np.array([0]), np.array([1]))
    assert (cos == 1.5).all()


def test_the_cached_frequencies_cannot_be_spoilt_by_a_caller():
    inv_freq, _ = frequencies(RopeSpec(8), 1)
    with pytest.raises(ValueError, match="read-only"):
        inv_freq[0] = 2


def test_dynamic_over_a_single_pair_has_its_one_frequency():
    one = replace(DYNAMIC, dim=2)
    assert frequencies(one, 5000)[0].tolist() == [1.0]


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (RopeSpec(7), "RoPE over 7 entries"),
        (RopeSpec(0), "RoPE over 0 entries"),
        (RopeSpec(8, kind="yarn"), "yarn RoPE without its original context"),
        (replace(DYNAMIC, original_context=0), "dynamic RoPE without"),
        (replace(LONGROPE, short_factor=(1,)), "1 short factors for 2 frequencies"),
        (replace(LONGROPE, long_factor=()), "0 long factors for 2 frequencies"),
    ],
)
def test_a_spec_that_lacks_what_its_kind_needs_is_refused(rope: RopeSpec, message: str):
    with pytest.raises(UnsupportedModel, match=message):
        frequencies(rope, 10)
