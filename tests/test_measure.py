"""Measuring: what was asked for is measured or named as left out, within the time, and adds up."""

from __future__ import annotations

import json
import time

import pytest

from localllm.errors import InvalidRequest
from localllm.kernels_cpu import _native
from localllm.measure import Settings, measure
from localllm.measure.jobs import DRAFTS, Job, Speed, affordable
from localllm.measure.steps import Steps
from localllm.measure.timing import figure, take_turns
from tests.engine.toy import ToyBackend
from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("bench") / "tiny"))  # 256 positions


@pytest.fixture(scope="module")
def report(smollm2):
    settings = Settings(contexts=(64, 256), batches=(1, 2), prefill=40, rounds=2, threads=1)
    return measure(str(smollm2), settings)


def row_of(report, work, **facts):
    (found,) = (
        row
        for row in report.rows
        if row.work == work and all(getattr(row, name) == value for name, value in facts.items())
    )
    return found


def test_every_row_that_was_asked_for_is_there(report):
    assert [(row.work, row.size, row.context) for row in report.rows] == [
        ("prefill", 40, 40),
        ("decode", 1, 64),
        ("verify", DRAFTS, 64),
        ("decode", 1, 256),
        ("batch", 1, 128),
        ("batch", 2, 128),
    ]
    assert report.left_out == []
    assert (report.backend, report.threads, report.activations) == ("cpu", 1, "int8")
    assert report.kernels in _native.usable_kernels()


def test_rates_are_tokens_over_seconds_and_ranges_hold_the_median(report):
    for row in report.rows:
        assert row.rate == row.tokens / row.seconds.median
        assert row.rates[0] <= row.rate <= row.rates[1]
        assert row.seconds.rounds == 2
    verify, decode = row_of(report, "verify"), row_of(report, "decode", context=64)
    assert verify.relative == verify.seconds.median / decode.seconds.median


def test_the_share_is_of_what_a_token_reads_against_the_measured_bandwidth(report):
    near, far = row_of(report, "decode", context=64), row_of(report, "decode", context=256)
    # 30 layers, keys and values, 3 heads of 64, two bytes each
    assert far.token_bytes - near.token_bytes == 192 * 30 * 2 * 3 * 64 * 2
    assert near.share == near.token_bytes / near.seconds.median / report.bandwidth
    assert 0 < near.share < 1.5


def test_a_token_reads_the_weights_once(report):
    row = row_of(report, "decode", context=64)
    weights = row.token_bytes - 64 * 30 * 2 * 3 * 64 * 2
    assert 0.98 * report.weight_bytes < weights <= report.weight_bytes


def test_memory_and_versions_are_told_and_all_of_it_is_json(report):
    loaded, peak, end = report.resident
    assert report.weight_bytes < loaded <= peak
    assert report.first_token_seconds > report.load_seconds > 0
    assert end > report.weight_bytes
    assert report.versions["localllm"]
    told = json.loads(json.dumps(report.to_dict()))
    assert told["rows"][0]["tokens_per_second"] == report.rows[0].rate


def test_the_reference_backend_is_measured_without_what_says_nothing_of_it(tiny):
    report = measure(
        tiny, Settings(backend="reference", contexts=(8,), batches=(2,), prefill=8, rounds=1)
    )
    assert (report.backend, report.bandwidth, report.kernels) == ("reference", None, None)
    assert all(row.share is None for row in report.rows)
    assert "reference" in report.left_out[0].reason


def test_contexts_of_our_own_choice_give_way_to_the_models(tiny):
    report = measure(tiny, Settings(batches=(1,), rounds=1))
    assert [row.context for row in report.rows if row.work == "decode"] == [128]
    assert row_of(report, "prefill").size == 256
    assert {left.what for left in report.left_out} == {"decode at 1024", "decode at 4096"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"contexts": (64, 257)}, "contexts: 257 .* 1 to 256"),
        ({"prefill": 300}, "prefill: 300 .* 1 to 256"),
    ],
)
def test_contexts_that_were_asked_for_and_do_not_fit_are_refused(tiny, settings, words):
    with pytest.raises(InvalidRequest, match=words):
        measure(tiny, Settings(**settings))


@pytest.mark.parametrize(
    "settings",
    [{"contexts": (0,)}, {"batches": (0,)}, {"prefill": 0}, {"rounds": 0}, {"seconds": 0}],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(InvalidRequest, match=next(iter(settings))):
        Settings(**settings)


def test_what_takes_too_long_is_left_out_and_named():
    def job(work, context):
        return Job(work, 1, context, 1, ((0, context),), lambda: None)

    left_out = []
    jobs = [job("decode", 100), job("decode", 1000), job("decode", 200)]
    chosen = affordable(jobs, Speed(row=0.1, step=0.1), 25, left_out)
    assert [job.context for job in chosen] == [100, 200]
    assert [left.what for left in left_out] == ["decode at 1000"]
    assert "100 s" not in left_out[0].reason  # its first 100 positions are there already
    assert [job.context for job in affordable(jobs, Speed(9, 9), 1, [])] == [100]


def test_rounds_end_with_the_time_but_one_is_run():
    start = time.perf_counter()
    slow, quick = take_turns([lambda: time.sleep(0.1), lambda: None], rounds=50, seconds=0.5)
    assert time.perf_counter() - start < 1.2
    assert 1 <= slow.rounds == quick.rounds < 50
    assert slow.median >= 0.1
    assert take_turns([lambda: None], rounds=3, seconds=0)[0].rounds == 1


def test_a_figure_is_the_median_with_its_range():
    found = figure([3.0, 1.0, 2.0])
    assert (found.median, found.low, found.high, found.rounds) == (2.0, 1.0, 3.0, 3)


def test_steps_see_exactly_their_context_and_can_be_repeated():
    backend = ToyBackend(num_blocks=16)
    steps = Steps(backend, [20, 10])
    steps.fill(0, 19)
    steps.fill(1, 9)
    before = backend.cells[0].copy()
    for _ in range(2):
        steps.decode(20)
        steps.verify(20, DRAFTS)
        steps.decode(10, sequences=2)
        steps.prefill(12)
    changed = before != backend.cells[0]
    assert changed.sum() == 2  # the rows at positions 19 and 9 of the two sequences
    assert backend.steps[:3] == [[19], [9], [1]]


def test_read_bandwidth_is_that_of_a_memory_and_checks_its_arguments():
    assert 1e8 < _native.read_bandwidth(8 << 20, 1) < 1e13
    for arguments in ((0, 1), (1 << 20, 0), (1 << 41, 1), (1 << 20, 2000)):
        with pytest.raises(ValueError, match="must be from"):
            _native.read_bandwidth(*arguments)
