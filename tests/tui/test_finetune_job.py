from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from localllm.errors import InvalidRequest, StoreError
from localllm.tui.finetune_job import Jobs

# Writes what a run writes: metrics, run.json, an adapter; ends after a step when interrupted.
STAND_IN = """
import json, pathlib, signal, sys, time
stop = []
signal.signal(signal.SIGINT, lambda *_: stop.append(1))
words = sys.argv[1:]
if "--resume" in words:
    out = pathlib.Path(words[words.index("--resume") + 1])
    first = len((out / "metrics.jsonl").read_text().splitlines()) + 1
    steps, data = first + 2, []
else:
    out = pathlib.Path(words[words.index("--out") + 1]); out.mkdir(parents=True)
    first, steps = 1, int(words[words.index("--steps") + 1])
    data = pathlib.Path(words[words.index("--data") + 1]).read_text().splitlines()
def say(status): (out / "run.json").write_text(json.dumps({"status": status}))
if steps == 0: print("localllm: no steps"); sys.exit(1)
say("running")
with (out / "metrics.jsonl").open("a") as file:
    for step in range(first, steps + 1):
        line = {"type": "step", "step": step, "steps": steps, "loss": 3 / step}
        file.write(json.dumps(line) + "\\n"); file.flush()
        print(json.dumps(line), flush=True)
        if stop: break
        time.sleep(0.02)
(out / "adapter_config.json").write_text("{}")
print(f"learned from {len(data)}", flush=True)
say("interrupted" if stop else "finished")
"""
LINES = [{"messages": [{"role": "user", "content": "Hi"}]}]


@pytest.fixture
def jobs(tmp_path):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    made = Jobs(tmp_path / "home", (sys.executable, str(script)))
    yield made
    for job in made.all():
        job.cancel()


def wait(done: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_a_run_is_started_watched_and_ends(jobs):
    job = jobs.start(LINES, {"steps": "5", "model": "smollm2:135m"}, ["--warmup", "2"])
    assert job.command[-2:] == ["--warmup", "2"]
    wait(lambda: job.status() == "finished")
    assert [line["step"] for line in job.metrics()] == [1, 2, 3, 4, 5]
    assert job.adapter() == job.out
    assert job.log_tail() == "learned from 1"


def test_it_goes_on_and_is_found_again_when_the_app_has_gone(jobs, tmp_path):
    starter = (
        "import sys; from pathlib import Path; from localllm.tui.finetune_job import Jobs\n"
        f"Jobs(Path({str(tmp_path / 'home')!r}), "
        f"({sys.executable!r}, {str(tmp_path / 'stand_in.py')!r}))"
        f".start({LINES!r}, {{'steps': '100'}})"
    )
    subprocess.run([sys.executable, "-c", starter], check=True, timeout=30)
    (job,) = jobs.all()
    wait(lambda: len(job.metrics()) > 2)
    assert job.status() == "running"
    job.cancel()
    wait(lambda: job.status() == "interrupted")
    assert len(job.metrics()) < 100
    job.cancel()  # again, for nothing


def test_a_process_that_died_is_told(jobs):
    job = jobs.start(LINES, {"steps": "1000"})
    wait(lambda: bool(job.metrics()))
    assert job._child is not None
    job._child.kill()
    wait(lambda: job.status() == "killed")


def test_another_process_of_the_same_number_is_not_the_run(jobs):
    """As after a reboot: the number is taken by something else."""
    job = jobs.start(LINES, {"steps": "1"})
    wait(lambda: job.status() == "finished")
    path = job.folder / "job.json"
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        path.write_text(json.dumps({**json.loads(path.read_text()), "pid": other.pid}))
        (found,) = Jobs(jobs._home).all()
        assert not found.alive()
        found.cancel()
        assert other.poll() is None
    finally:
        other.kill()
        other.communicate()


def test_one_that_fails_before_it_begins_says_why(jobs):
    job = jobs.start(LINES, {"steps": "0"})
    wait(lambda: job.status() == "failed")
    assert job.log_tail() == "localllm: no steps"
    assert job.adapter() is None


def test_a_run_that_was_stopped_goes_on_in_its_place_and_is_found_again(jobs):
    job = jobs.start(LINES, {"steps": "1000"})
    wait(lambda: bool(job.metrics()))
    assert not job.resumable()
    job.cancel()
    wait(lambda: job.status() == "interrupted")
    done = len(job.metrics())
    jobs.resume(job)
    wait(lambda: job.status() == "finished")
    assert len(job.metrics()) == done + 3
    (found,) = Jobs(jobs._home).all()
    assert found._facts["pid"] == job._facts["pid"]
    with pytest.raises(InvalidRequest, match="nothing to go on"):
        jobs.resume(job)


def test_one_that_failed_before_it_began_cannot_go_on(jobs):
    job = jobs.start(LINES, {"steps": "0"})
    wait(lambda: job.status() == "failed")
    assert not job.resumable()


def test_the_end_of_a_long_log_has_no_half_line_of_events(jobs):
    job = jobs.start(LINES, {"steps": "1"})
    wait(lambda: job.status() == "finished")
    event = json.dumps({"type": "step", "text": "x" * 5000}) + "\n"
    (job.folder / "log.txt").write_text(3 * event + "a warning\n")
    assert job.log_tail() == "a warning"


def test_a_line_half_written_waits(jobs):
    job = jobs.start(LINES, {"steps": "1"})
    wait(lambda: job.status() == "finished")
    with (job.out / "metrics.jsonl").open("a") as file:
        file.write('{"type": "step", "st')
    assert len(job.metrics()) == 1
    with (job.out / "metrics.jsonl").open("a") as file:
        file.write('ep": 2}\nno json\n')
    assert len(job.metrics()) == 2


def test_a_run_that_resumed_is_read_anew(jobs):
    job = jobs.start(LINES, {"steps": "3"})
    wait(lambda: job.status() == "finished")
    assert len(job.metrics()) == 3
    (job.out / "metrics.jsonl").write_text('{"type": "step", "step": 1}\n')
    assert job.metrics() == [{"type": "step", "step": 1}]


def test_nothing_to_learn_from_and_no_file_are_refused(jobs, tmp_path):
    with pytest.raises(InvalidRequest, match="nothing to learn"):
        jobs.start([], {})
    with pytest.raises(InvalidRequest, match="there is no file"):
        jobs.start(Path(tmp_path / "none.jsonl"), {})


def test_a_home_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "home").write_text("")
    with pytest.raises(StoreError):
        Jobs(tmp_path / "home").start(LINES, {})
    assert Jobs(tmp_path / "home").all() == []


def test_damaged_folders_are_left_out(jobs):
    job = jobs.start(LINES, {"steps": "1"})
    wait(lambda: job.status() == "finished")
    for name, text in (("bad", "{"), ("odd", "[]"), ("empty", "{}")):
        (jobs._home / "jobs" / name).mkdir()
        (jobs._home / "jobs" / name / "job.json").write_text(text)
    assert [found.name for found in jobs.all()] == [job.name]
