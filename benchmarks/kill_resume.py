"""Fine-tunings of SmolLM2 killed by `kill -9` and resumed: is the adapter the unbroken run's?

    python -m benchmarks.kill_resume [RUNS]

Every run is killed once, by turns a random while after a random step and while it writes a random
one of its checkpoints; then it is resumed.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness.table import markdown
from localllm.train.runs import delete_run, open_run

STEPS, SAVE_EVERY = 30, 3
TALES = 48
WHO = ["Ada", "Ben", "Cleo", "Dan", "Eva", "Finn"]
DID = ["found", "sold", "lost", "painted"]
WHAT = ["a lamp", "two maps", "the red boat", "some bread", "a clock"]
MEASURED = ("seconds", "tokens_per_second", "memory_bytes")  # no two runs agree on these
A_STEP, A_WRITE = 0.3, 0.05  # seconds; what they take or more


def begin(data: Path, out: Path) -> subprocess.Popen[str]:
    """The run in `out` from its beginning, or resumed where there is one."""
    command = [str(Path(sys.executable).with_name("localllm")), "finetune", "--json"]
    if (out / "run.json").exists():
        command += ["--resume", str(out)]
    else:
        command += [
            "--model", "smollm2:135m", "--data", str(data), "--out", str(out),
            "--steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--eval-every", "10",
            "--batch-size", "2", "--valid-fraction", "0.1", "--dropout", "0.1",
        ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def train(data: Path, out: Path) -> None:
    """Until its end."""
    process = begin(data, out)
    process.communicate()
    if process.returncode:
        raise SystemExit(f"{out} ended with exit code {process.returncode}")


def kill_after(step: int, seconds: float, data: Path, out: Path) -> None:
    """Begins a run and kills it so long after a step; after step 0 is before the first."""
    process = begin(data, out)
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["type"] in ("start", "step") and event["step"] == step:
            break
    time.sleep(seconds)
    killed(process)


def kill_writing(number: int, seconds: float, data: Path, out: Path) -> None:
    """The same, so far into the writing of its checkpoint of that number, from 1."""
    process = begin(data, out)
    seen: set[Path] = set()
    while len(seen) < number and process.poll() is None:
        seen |= parts(out)
        time.sleep(0.001)
    time.sleep(seconds)
    killed(process)


def killed(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
    if process.returncode == 0:
        raise SystemExit("a run ended before it was killed")


def parts(out: Path) -> set[Path]:
    """Checkpoints half-written."""
    return set(out.glob("checkpoints/.part-*"))


def result(out: Path) -> tuple[bytes, list[dict]]:
    """The adapter's bytes, and the metrics without what a clock or the machine says."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    told = [
        {key: value for key, value in json.loads(line).items() if key not in MEASURED}
        for line in lines
    ]
    return (out / "adapter_model.safetensors").read_bytes(), told


def main(words: list[str]) -> int:
    runs = int(words[0]) if words else 20
    source = random.Random(0)
    rows, same = [], 0
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        with data.open("w") as file:
            for _ in range(TALES):
                text = f"{source.choice(WHO)} {source.choice(DID)} {source.choice(WHAT)}."
                file.write(json.dumps({"text": text}) + "\n")
        whole = Path(folder) / "whole"
        train(data, whole)
        wanted = result(whole)
        for number in range(1, runs + 1):
            out = Path(folder) / f"killed-{number}"
            if number % 2:
                step = source.randrange(STEPS)
                how = f"after step {step}"
                kill_after(step, source.uniform(0, A_STEP), data, out)
            else:
                which = source.randint(1, STEPS // SAVE_EVERY)
                how = f"in checkpoint {which}"
                kill_writing(which, source.uniform(0, A_WRITE), data, out)
            half = "yes" if parts(out) else "no"
            train(data, out)
            equal = result(out) == wanted
            same += equal
            rows.append((str(number), how, half, "yes" if equal else "no"))
            print(*rows[-1], file=sys.stderr)
            delete_run(open_run(out))
        delete_run(open_run(whole))
    print(markdown(("run", "killed", "half a checkpoint left", "identical"), rows))
    print(f"\n{same} of {runs} have the unbroken run's adapter and metrics, bit for bit")
    return 0 if same == runs else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
