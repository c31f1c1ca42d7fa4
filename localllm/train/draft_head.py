"""Training a draft head (`localllm.engine.draft_head`) for a model, on the model's own answers.

    answers -> states along them -> the network of draft_network.py -> a folder that `LLM` loads

Everything is kept in the folder, and a run that was killed goes on where it was: answers are in a
journal, states in a file, the network in checkpoints. The same config gives the same head.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from localllm import hub
from localllm.checkpoint import open_checkpoint
from localllm.checkpoint.atomic import write_json
from localllm.checkpoint.shards import read_json
from localllm.engine.draft_head import DraftHead
from localllm.errors import InvalidRequest
from localllm.llm import LLM
from localllm.loading import head_rows
from localllm.models import load_spec
from localllm.sampling import SamplingParams
from localllm.train.checkpoint import Checkpoints, Snapshot
from localllm.train.draft_data import Answers, States, compute_states, generate, prompt_ids
from localllm.train.draft_network import Network, Target, initial, run
from localllm.train.draft_prompts import built_in, read_prompts

Stage = Literal["answers", "states", "training", "measuring"]
_SETTINGS = "draft_head_training.json"
_NAMES = ("norm", "inside", "outside")
_MAX_PROMPTS = 1200


@dataclass(frozen=True)
class DraftHeadConfig:
    """model, out: the target by any name it loads by, and the folder to make.

    prompts: a file, one prompt a line (text, or JSON with "prompt" or "messages"); None for those
        built in. held_out: how many are kept for measuring.
    tokens: of answers to learn from. max_tokens: of one answer. temperature: of the answers after
        the first round over the prompts, which is greedy.
    inner: width of the network, 0 for four times the model's. vocabulary: how many tokens, the most
        frequent ones, it may guess; 0 for all.
    candidates: tokens that a step of training compares, those of the batch among them; 0 for all.
    unroll: how many guesses in a row it learns to make. closeness: weight of how far its states are
        from the model's. decay: of each guess's weight against the one before.
    batch: positions a step. epochs: over all positions.
    """

    model: str
    out: Path
    prompts: Path | None = None
    held_out: int = 12
    tokens: int = 150_000
    max_tokens: int = 192
    temperature: float = 0.8
    inner: int = 0
    vocabulary: int = 8192
    candidates: int = 2048
    unroll: int = 3
    closeness: float = 0.1
    decay: float = 0.8
    batch: int = 1024
    epochs: float = 4.0
    learning_rate: float = 2e-3
    seed: int = 0
    save_every: int = 50
    threads: int | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        for name, low in (
            ("held_out", 1), ("tokens", 64), ("max_tokens", 8), ("inner", 0), ("vocabulary", 0),
            ("unroll", 1), ("candidates", 0), ("batch", 1), ("save_every", 1),
        ):  # fmt: skip
            if getattr(self, name) < low:
                raise InvalidRequest(f"{name} must be at least {low}, not {getattr(self, name)}")
        for name in ("temperature", "closeness", "decay", "epochs", "learning_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidRequest(f"{name} must be a number from 0 on")

    def lasting(self) -> dict[str, object]:
        """What decides the result: a run goes on only with the same."""
        facts = {**asdict(self), "prompts": None if self.prompts is None else str(self.prompts)}
        for name in ("out", "threads", "resume", "save_every"):
            del facts[name]
        return facts


def resumed_config(out: Path, threads: int | None = None) -> DraftHeadConfig:
    """The config of the run in `out`, to go on with. Raises InvalidRequest where there is none."""
    path = out / _SETTINGS
    if not path.exists():
        raise InvalidRequest(f"{out}: there is no run to resume")
    facts = {name: value for name, value in read_json(path).items() if name != "prompts_sha256"}
    facts["prompts"] = None if facts.get("prompts") is None else Path(facts["prompts"])
    try:
        return DraftHeadConfig(out=out, threads=threads, resume=True, **facts)
    except TypeError as error:
        raise InvalidRequest(f"{path}: not the settings of a draft head: {error}") from error


@dataclass(frozen=True)
class DraftProgress:
    """done, total: tokens of answers or states, steps of training, prompts measured.

    loss: of the last step. agreed: of positions that it was not trained on, how many guesses in a
        row are the model's likeliest tokens, on average.
    """

    stage: Stage
    done: int
    total: int
    loss: float | None = None
    agreed: float | None = None


@dataclass(frozen=True)
class Measured:
    """With the real engine on held-out prompts, one at a time, greedily, both ways in turn.

    accepted_per_step: guesses that were right, by step of the model; tokens_per_step is one more.
    speed, plain_speed: tokens a second of decoding, median over prompts, with and without the head.
    same: whether every answer was the same both ways.
    """

    prompts: int
    tokens: int
    drafted: int
    accepted: int
    accepted_per_step: float
    speed: float
    plain_speed: float
    same: bool

    @property
    def tokens_per_step(self) -> float:
        return 1 + self.accepted_per_step

    @property
    def speedup(self) -> float:
        return self.speed / self.plain_speed


@dataclass(frozen=True)
class DraftHeadReport:
    """agreed: see `DraftProgress`. coverage: share of the answers' tokens that can be guessed."""

    folder: Path
    answers: int
    positions: int
    steps: int
    loss: float
    agreed: float
    coverage: float
    measured: Measured | None

    def lines(self) -> list[str]:
        found = [
            f"{self.answers} answers, {self.positions} positions, {self.steps} steps, "
            f"loss {self.loss:.3f}",
            f"right in a row on positions it was not trained on: {self.agreed:.2f}; "
            f"{self.coverage:.1%} of tokens can be guessed",
        ]
        if self.measured is not None:
            m = self.measured
            found.append(
                f"on {m.prompts} held-out prompts: {m.tokens_per_step:.2f} tokens a step "
                f"({m.accepted} of {m.drafted} guesses right), {m.speed:.0f} against "
                f"{m.plain_speed:.0f} tokens/s: {m.speedup:.2f} x; answers "
                f"{'the same' if m.same else 'NOT the same'}"
            )
        return found


Report = Callable[[DraftProgress], None]


def train_draft_head(
    config: DraftHeadConfig,
    progress: Report = lambda _: None,
    *,
    measure: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
) -> DraftHeadReport | None:
    """Makes `config.out`, which `LLM(draft_head=…)` loads, and measures it.

    should_stop: asked after every step; True saves and gives None, to be resumed.
    Raises InvalidRequest where the folder holds another run or one that `resume` does not ask for,
    for prompts that are too few, and for a loss that is no number any more.
    """
    out = config.out
    prompts = _prompts(config)
    learned, held = prompts[config.held_out :], prompts[: config.held_out]
    _begin(config, prompts)
    with LLM(config.model, threads=config.threads, max_batch=32) as llm:
        answers = generate(
            llm,
            learned,
            Answers(out / "answers.jsonl"),
            tokens=config.tokens,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            seed=config.seed,
            progress=lambda done, total: progress(DraftProgress("answers", done, total)),
        )
        states = compute_states(
            llm,
            answers,
            out,
            lambda done, total: progress(DraftProgress("states", done, total)),
        )
        material = _material(config, llm, states)
    trained = _train(config, material, progress, should_stop)
    if trained is None:
        return None
    head, loss, agreed, steps = trained
    head.save(out)
    measured = None
    if measure:
        measured = measure_draft_head(
            config.model, out, held, max_tokens=config.max_tokens, threads=config.threads,
            progress=progress,
        )  # fmt: skip
    report = DraftHeadReport(
        out, len(answers), len(states.drawn), steps, loss, agreed, material.coverage, measured
    )
    write_json(out / "report.json", {**asdict(report), "folder": str(out)})
    return report


def measure_draft_head(
    model: str,
    head: Path,
    prompts: Sequence[str],
    *,
    max_tokens: int = 192,
    threads: int | None = None,
    rounds: int = 2,
    progress: Report = lambda _: None,
) -> Measured:
    """Decodes each prompt with and without the head, in turn, `rounds` times."""
    speeds: dict[str, list[float]] = {"head": [], "off": []}
    tokens = drafted = accepted = steps = 0
    same = True
    with LLM(model, draft_head=head, threads=threads, max_batch=4) as llm:
        for n, prompt in enumerate(prompts):
            ids = prompt_ids(llm, prompt)
            for _ in range(rounds):
                texts = {}
                for way, speed in speeds.items():
                    params = SamplingParams(
                        max_tokens=max_tokens,
                        temperature=0.0,
                        speculation="head" if way == "head" else "off",
                    )
                    result = llm.generate(ids, params)
                    texts[way] = result.token_ids
                    receipt = result.receipt
                    speed.append(receipt.decode_tokens_per_second or math.nan)
                    if way == "head":
                        tokens += receipt.generated_tokens
                        drafted += receipt.drafted_tokens
                        accepted += receipt.accepted_tokens
                        steps += receipt.generated_tokens - receipt.accepted_tokens
                same &= texts["head"] == texts["off"]
            progress(DraftProgress("measuring", n + 1, len(prompts)))
    return Measured(
        prompts=len(prompts),
        tokens=tokens,
        drafted=drafted,
        accepted=accepted,
        accepted_per_step=accepted / max(steps, 1),
        speed=float(np.nanmedian(speeds["head"])),
        plain_speed=float(np.nanmedian(speeds["off"])),
        same=same,
    )


def _prompts(config: DraftHeadConfig) -> list[str]:
    if config.prompts is None:
        return built_in(_MAX_PROMPTS, config.seed)
    found = read_prompts(config.prompts)
    order = np.random.default_rng(config.seed).permutation(len(found))
    if len(found) <= config.held_out:
        raise InvalidRequest(
            f"{config.prompts}: {len(found)} prompts are too few when {config.held_out} are kept "
            "for measuring",
            hint="give more prompts, or keep fewer",
        )
    return [found[i] for i in order]


def _begin(config: DraftHeadConfig, prompts: Sequence[str]) -> None:
    """Claims the folder for this config, or finds it claimed by the same."""
    out, path = config.out, config.out / _SETTINGS
    facts = config.lasting()
    facts["prompts_sha256"] = hashlib.sha256("\0".join(prompts).encode()).hexdigest()
    facts = json.loads(json.dumps(facts))
    if path.exists():
        known = read_json(path)
        if not config.resume:
            raise InvalidRequest(
                f"{out}: a draft head was begun here", hint="resume it, or name another folder"
            )
        changed = sorted(k for k in {*facts, *known} if facts.get(k) != known.get(k))
        if changed:
            raise InvalidRequest(
                f"{out}: was begun with another {', '.join(changed)}",
                hint="resume it with the same settings, or name another folder",
            )
        return
    if config.resume:
        raise InvalidRequest(f"{out}: there is no run to resume")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, facts)


@dataclass(frozen=True)
class _Material:
    """embeddings: float32 [U, hidden], of the tokens in the answers; rows: of each position the one
    that its token has there; places: its row of the target, -1 where it cannot be guessed."""

    states: States
    target: Target
    tokens: np.ndarray | None
    embeddings: np.ndarray
    rows: np.ndarray
    coverage: float
    places: np.ndarray


def _material(config: DraftHeadConfig, llm: LLM, states: States) -> _Material:
    spec = llm.spec
    distinct, rows, counts = np.unique(states.drawn, return_inverse=True, return_counts=True)
    tokens = None
    if 0 < config.vocabulary < spec.vocab_size:
        # What was never seen follows in the order of ids, which vocabularies sort by frequency.
        by_count = distinct[np.argsort(-counts, kind="stable")]
        unseen = np.setdiff1d(np.arange(spec.vocab_size), distinct)
        tokens = np.sort(np.concatenate([by_count, unseen])[: config.vocabulary]).astype(np.int64)
    covered = np.isin(states.drawn, tokens).mean() if tokens is not None else 1.0
    checkpoint = open_checkpoint(hub.resolve(config.model).path)
    try:
        wanted = np.arange(spec.vocab_size) if tokens is None else tokens
        matrix = head_rows(checkpoint, load_spec(checkpoint), wanted).to_float32()
    finally:
        checkpoint.close()
    embeddings = llm.pump.alone(lambda engine: engine.backend.embed(distinct.tolist()))
    target = Target(matrix, spec.logit_scale, spec.logit_softcap)
    known = np.full(spec.vocab_size, -1, np.int64)
    known[np.arange(spec.vocab_size) if tokens is None else tokens] = np.arange(len(matrix))
    places = known[states.drawn]
    return _Material(states, target, tokens, embeddings, rows, float(covered), places)


def _train(
    config: DraftHeadConfig,
    material: _Material,
    progress: Report,
    should_stop: Callable[[], bool],
) -> tuple[DraftHead, float, float, int] | None:
    states = material.states
    answers = len(states.starts) - 1
    kept = max(1, answers // 20)  # not trained on, to see how it does elsewhere
    places = states.anchors(config.unroll, range(answers - kept))
    others = states.anchors(config.unroll, range(answers - kept, answers))[: 2 * config.batch]
    if not len(places) or not len(others):
        raise InvalidRequest(
            "the answers are too short to learn from", hint="ask for more tokens, or more of each"
        )
    hidden = states.states.shape[1]
    inner = config.inner or 4 * hidden
    per_epoch = -(-len(places) // config.batch)
    total = max(1, round(config.epochs * per_epoch))
    sizes = _rms(states.states[places[:4096]]), _rms(material.embeddings[material.rows])
    network = initial(hidden, inner, sizes, config.seed)
    optimizer = _Adam(network, config.learning_rate, total)
    checkpoints = Checkpoints(config.out / "checkpoints")
    done, loss, agreed = 0, math.nan, math.nan
    snapshot, _ = checkpoints.newest()
    if snapshot is not None:
        done = snapshot.step
        loss, agreed = snapshot.facts["loss"], snapshot.facts["agreed"]
        network = Network(*(snapshot.arrays[name].copy() for name in _NAMES))
        optimizer.restore(snapshot)
    try:
        for step in range(done, total):
            epoch, at = divmod(step, per_epoch)
            order = np.random.default_rng((config.seed, epoch)).permutation(len(places))
            batch = places[order[at * config.batch : (at + 1) * config.batch]]
            gradients = Network(*(np.zeros_like(array) for array in network.arrays()))
            sums = run(
                network,
                _candidates(config, material, batch, step),
                *_gather(material, batch, config.unroll),
                closeness=config.closeness,
                decay=config.decay,
                gradients=gradients,
            )
            if not math.isfinite(sums.loss):
                raise InvalidRequest(
                    f"the loss at step {step + 1} is no number any more",
                    hint="begin again with a lower learning rate",
                )
            loss = sums.loss
            optimizer.update(network, gradients, step)
            last, stop = step + 1 == total, should_stop()
            if last or stop or (step + 1) % config.save_every == 0:
                agreed = _agreed(config, material, network, others)
                facts = {"loss": loss, "agreed": agreed}
                checkpoints.save(Snapshot(step + 1, optimizer.arrays(network), facts), best=None)
            progress(DraftProgress("training", step + 1, total, loss, agreed))
            if stop and not last:
                return None
    finally:
        checkpoints.close()
    if problems := checkpoints.problems():
        raise problems[0]
    head = DraftHead(*network.arrays(), material.tokens)
    return head, loss, agreed, total


def _candidates(
    config: DraftHeadConfig, material: _Material, batch: np.ndarray, step: int
) -> Target:
    """The target confined to what was drawn around the batch and to some others, by chance."""
    size = len(material.target.matrix)
    if not 0 < config.candidates < size:
        return material.target
    window = batch[:, None] + np.arange(config.unroll + 1)
    drawn = np.unique(material.places[window])
    drawn = drawn[drawn >= 0]
    others = np.random.default_rng((config.seed, 1, step)).permutation(size)
    some = others[: max(0, config.candidates - len(drawn))]
    return material.target.rows(np.union1d(drawn, some))


def _gather(material: _Material, places: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """States float32 [n, K + 1, D], and embeddings float32 [n, K, D] of what was drawn there."""
    window = places[:, None] + np.arange(steps + 1)
    states = material.states.states[window].astype(np.float32)
    return states, material.embeddings[material.rows[window[:, :-1]]]


def _agreed(
    config: DraftHeadConfig, material: _Material, network: Network, places: np.ndarray
) -> float:
    states, embeddings = _gather(material, places, config.unroll)
    sums = run(
        network, material.target, states, embeddings,
        closeness=config.closeness, decay=config.decay,
    )  # fmt: skip
    return sum(sums.hits) / sums.positions


def _rms(array: np.ndarray) -> float:
    wide = array.astype(np.float32)
    return float(np.sqrt(np.mean(wide * wide)))


class _Adam:
    """AdamW without decay, its rate warmed up over a twentieth of the steps, then a cosine to 0."""

    def __init__(self, network: Network, rate: float, total: int) -> None:
        self._rate, self._total = rate, total
        self._m = [np.zeros_like(array) for array in network.arrays()]
        self._v = [np.zeros_like(array) for array in network.arrays()]

    def update(self, network: Network, gradients: Network, step: int) -> None:
        rate, t = self._at(step), step + 1
        for parameter, g, m, v in zip(
            network.arrays(), gradients.arrays(), self._m, self._v, strict=True
        ):
            m += np.float32(0.1) * (g - m)
            v += np.float32(0.02) * (g * g - v)
            step_size = np.float32(rate * math.sqrt(1 - 0.98**t) / (1 - 0.9**t))
            parameter -= step_size * m / (np.sqrt(v) + np.float32(1e-8))

    def _at(self, step: int) -> float:
        warm = max(1, self._total // 20)
        if step < warm:
            return self._rate * (step + 1) / warm
        return self._rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / (self._total - warm)))

    def arrays(self, network: Network) -> dict[str, np.ndarray]:
        """Copies, for a checkpoint that is written while training goes on."""
        found: dict[str, np.ndarray] = {}
        for name, p, m, v in zip(_NAMES, network.arrays(), self._m, self._v, strict=True):
            found |= {name: p.copy(), f"{name}.m": m.copy(), f"{name}.v": v.copy()}
        return found

    def restore(self, snapshot: Snapshot) -> None:
        self._m = [snapshot.arrays[f"{name}.m"].copy() for name in _NAMES]
        self._v = [snapshot.arrays[f"{name}.v"].copy() for name in _NAMES]
