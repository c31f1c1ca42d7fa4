"""Training a draft head (`localllm.models.draft_head`) for a model, on the model's own answers.

    answers -> states along them -> the network of draft_network.py -> a folder that `LLM` loads

Everything is kept in the folder, and a run that was killed goes on where it was: answers are in a
journal, states in a file, the network in checkpoints. The same config gives the same head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from localllm import hub
from localllm.checkpoint import open_checkpoint
from localllm.checkpoint.atomic import write_json
from localllm.checkpoint.tensor import Dense, Tensor
from localllm.errors import InvalidRequest
from localllm.llm import LLM
from localllm.loading import head_rows
from localllm.machine import cores
from localllm.models import load_spec
from localllm.models.draft_head import DraftHead, head_spec, no_vocabulary
from localllm.sampling import SamplingParams
from localllm.sampling.params import Speculation
from localllm.spec import DecoderSpec, FeedForwardSpec
from localllm.spec.weights import weight_shapes
from localllm.train.checkpoint import Checkpoints, Snapshot
from localllm.train.draft_config import DraftHeadConfig, DraftProgress, Report, begin
from localllm.train.draft_data import (
    Answers,
    StateFile,
    States,
    generate,
    prompt_ids,
    states_of,
)
from localllm.train.draft_network import (
    EMBEDDING_NORM,
    FROM_EMBEDDING,
    FROM_HIDDEN,
    HIDDEN_NORM,
    Arrays,
    Network,
    Sums,
    Target,
    Texts,
    initial,
    positions,
)
from localllm.train.draft_optimizer import Optimizer
from localllm.train.draft_prompts import built_in, read_prompts

_TOGETHER = 4  # texts of a step that one thread takes at a time


@dataclass(frozen=True)
class Measured:
    """With the real engine on held-out prompts, one at a time, greedily, both ways in turn: without
    guesses, and with those of the head, beside which prompt lookup makes some unless left out.

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
    begin(config, prompts)
    with LLM(config.model, threads=config.threads, max_batch=32) as llm:
        journal, file = Answers(out / "answers.jsonl"), StateFile(out, llm.spec.hidden)
        answers = generate(
            llm,
            learned,
            journal,
            file,
            tokens=config.tokens,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            seed=config.seed,
            progress=lambda done, total: progress(DraftProgress("answers", done, total)),
        )
        states = states_of(
            llm,
            answers,
            journal,
            file,
            lambda done, total: progress(DraftProgress("states", done, total)),
        )
        material = _material(config, llm, states)
    with threadpool_limits(1, "blas"):
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
        out,
        len(answers),
        int(states.lengths.sum()),
        steps,
        loss,
        agreed,
        material.coverage,
        measured,
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
    speculation: Speculation = "auto",
    progress: Report = lambda _: None,
) -> Measured:
    """Decodes each prompt with and without guesses, in turn, `rounds` times.

    speculation: "auto" is how a model runs with a head, prompt lookup beside it; "head", "ngram":
        one of the two alone.
    """
    speeds: dict[Speculation, list[float]] = {speculation: [], "off": []}
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
                        speculation=way,
                    )
                    result = llm.generate(ids, params)
                    texts[way] = result.token_ids
                    receipt = result.receipt
                    speed.append(receipt.decode_tokens_per_second or math.nan)
                    if way != "off":
                        tokens += receipt.generated_tokens
                        drafted += receipt.drafted_tokens
                        accepted += receipt.accepted_tokens
                        steps += receipt.generated_tokens - receipt.accepted_tokens
                same &= texts[speculation] == texts["off"]
            progress(DraftProgress("measuring", n + 1, len(prompts)))
    return Measured(
        prompts=len(prompts),
        tokens=tokens,
        drafted=drafted,
        accepted=accepted,
        accepted_per_step=accepted / max(steps, 1),
        speed=float(np.nanmedian(speeds[speculation])),
        plain_speed=float(np.nanmedian(speeds["off"])),
        same=same,
    )


def _prompts(config: DraftHeadConfig) -> list[str]:
    if config.prompts is None:
        return built_in(config.seed)
    found = read_prompts(config.prompts)
    order = np.random.default_rng(config.seed).permutation(len(found))
    if len(found) <= config.held_out:
        raise InvalidRequest(
            f"{config.prompts}: {len(found)} prompts are too few when {config.held_out} are kept "
            "for measuring",
            hint="give more prompts, or keep fewer",
        )
    return [found[i] for i in order]


@dataclass(frozen=True)
class _Material:
    """embeddings: float32 [U, hidden], of the tokens in the texts; rows: of each position the one
    of the token that follows; places: that token's row of the target, -1 where it cannot be
    guessed."""

    spec: DecoderSpec
    states: States
    target: Target
    tokens: np.ndarray | None
    embeddings: np.ndarray
    rows: np.ndarray
    coverage: float
    places: np.ndarray

    @property
    def size(self) -> float:
        """Root mean square of the states, by those of the first texts."""
        texts = range(min(32, len(self.states.starts)))
        some = np.concatenate([self.states.states[self.states.rows(text)] for text in texts])
        some = some.astype(np.float32)
        return float(np.sqrt(np.mean(some * some)))

    def texts(self, numbers: np.ndarray) -> Texts:
        """Side by side, as the network takes them."""
        states, lengths = self.states, self.states.lengths[numbers]
        shape = (len(numbers), int(lengths.max()))
        hidden = np.zeros((*shape, states.states.shape[1]), np.float32)
        rows, wanted = np.zeros(shape, np.int64), np.zeros(shape, bool)
        for at, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
            text = states.rows(number)
            hidden[at, :length] = states.states[text]
            rows[at, :length] = self.rows[text]
            # From where the answer's first token follows to where the next state is known.
            wanted[at, states.prompts[number] - 1 : length - 1] = True
        return Texts(hidden, self.embeddings[rows], wanted)

    def guessable(self, numbers: np.ndarray) -> np.ndarray:
        """Rows of the target that stand for tokens of these texts."""
        places = np.unique(np.concatenate([self.places[self.states.rows(n)] for n in numbers]))
        found: np.ndarray = places[places >= 0]
        return found


def _material(config: DraftHeadConfig, llm: LLM, states: States) -> _Material:
    spec = llm.spec
    drawn, counts = np.unique(states.drawn, return_counts=True)
    distinct, rows = np.unique(states.following, return_inverse=True)
    tokens = None
    if 0 < config.vocabulary < spec.vocab_size:
        # What was never seen follows in the order of ids, which vocabularies sort by frequency.
        by_count = drawn[np.argsort(-counts, kind="stable")]
        unseen = np.setdiff1d(np.arange(spec.vocab_size), drawn)
        tokens = np.sort(np.concatenate([by_count, unseen])[: config.vocabulary]).astype(np.int64)
    covered = counts[np.isin(drawn, tokens)].sum() / counts.sum() if tokens is not None else 1.0
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
    places = known[states.following]
    own = _head_spec(config, spec)
    return _Material(own, states, target, tokens, embeddings, rows, float(covered), places)


def _head_spec(config: DraftHeadConfig, spec: DecoderSpec) -> DecoderSpec:
    """A layer like those of the model."""
    _, attention = next(spec.attentions)
    dense = [x.ffn.hidden for x in spec.layers if isinstance(x.ffn, FeedForwardSpec)]
    inner = config.inner or (dense[0] if dense else -(-8 * spec.hidden // 96) * 32)
    return head_spec(
        spec.hidden,
        heads=attention.heads,
        kv_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        inner=inner,
        rope_theta=10_000.0 if attention.rope is None else attention.rope.theta,
        eps=spec.final_norm.eps,
    )


def _train(
    config: DraftHeadConfig,
    material: _Material,
    progress: Report,
    should_stop: Callable[[], bool],
) -> tuple[DraftHead, float, float, int] | None:
    count = len(material.states.prompts)
    kept = max(1, count // 20)  # not trained on, to see how it does elsewhere
    learned, others = np.arange(count - kept), np.arange(count - kept, count)[: 2 * config.batch]
    if not len(learned):
        raise InvalidRequest("one answer is too few to learn from", hint="ask for more tokens")
    per_epoch = -(-len(learned) // config.batch)
    total = max(1, round(config.epochs * per_epoch))
    weights = initial(material.spec, material.size, config.seed)
    network = Network(material.spec, weights)
    optimizer = Optimizer(weights, config.learning_rate, total, config.weight_decay)
    checkpoints = Checkpoints(config.out / "checkpoints")
    done, loss, agreed = 0, math.nan, math.nan
    snapshot, _ = checkpoints.newest()
    if snapshot is not None:
        done = snapshot.step
        loss, agreed = snapshot.facts["loss"], snapshot.facts["agreed"]
        optimizer.restore(snapshot.arrays)
    batches: list[np.ndarray] = []
    # Threads of ours instead of BLAS's: most of the time goes into what no product is.
    pool = ThreadPoolExecutor(config.threads or cores().usable)
    try:
        for step in range(done, total):
            epoch, at = divmod(step, per_epoch)
            if not at or not batches:
                batches = _batches(config, material, learned, epoch)
            loss, gradients = _gradients(config, material, network, batches[at], step, total, pool)
            if not math.isfinite(loss):
                raise InvalidRequest(
                    f"the loss at step {step + 1} is no number any more",
                    hint="begin again with a lower learning rate",
                )
            optimizer.update(gradients, step, pool)
            last, stop = step + 1 == total, should_stop()
            if last or stop or (step + 1) % config.save_every == 0:
                agreed = _agreed(config, material, network, others, pool)
                facts = {"loss": loss, "agreed": agreed}
                checkpoints.save(Snapshot(step + 1, optimizer.arrays(), facts), best=None)
            progress(DraftProgress("training", step + 1, total, loss, agreed))
            if stop and not last:
                return None
    finally:
        pool.shutdown(cancel_futures=True)
        checkpoints.close()
    if problems := checkpoints.problems():
        raise problems[0]
    return _head(material, weights), loss, agreed, total


def _gradients(
    config: DraftHeadConfig,
    material: _Material,
    network: Network,
    batch: np.ndarray,
    step: int,
    total: int,
    pool: Executor,
) -> tuple[float, Arrays]:
    """Loss of a step, and its gradient: of some texts at a time, added in their order, so that it
    has the same bits with any number of threads."""
    steps = 1 if step < config.alone * total else config.unroll
    target = _candidates(config, material, batch, step)
    texts = _noisy(config, material, batch, step)
    counts = positions(texts.wanted, steps)

    def part(first: int) -> tuple[float, Arrays]:
        own = {name: np.zeros_like(array) for name, array in network.weights.items()}
        some = texts.some(slice(first, first + _TOGETHER))
        sums = network.run(
            target,
            some,
            steps=steps,
            closeness=config.closeness,
            decay=config.decay,
            gradients=own,
            counts=counts,
        )
        return sums.loss, own

    loss, gradients = 0.0, dict[str, np.ndarray]()
    for added, own in pool.map(part, range(0, len(batch), _TOGETHER)):
        loss += added
        for name, array in own.items():
            if name in gradients:
                gradients[name] += array
            else:
                gradients[name] = array
    return loss, gradients


def _head(material: _Material, weights: Arrays) -> DraftHead:
    layer: dict[str, Tensor] = {
        name: Dense(weights[name], "float32")
        for name in weight_shapes(material.spec)
        if name in weights
    }
    return DraftHead(
        material.spec,
        layer | no_vocabulary(material.spec.hidden),
        weights[HIDDEN_NORM],
        weights[EMBEDDING_NORM],
        Dense(weights[FROM_HIDDEN], "float32"),
        Dense(weights[FROM_EMBEDDING], "float32"),
        material.tokens,
    )


def _batches(
    config: DraftHeadConfig, material: _Material, learned: np.ndarray, epoch: int
) -> list[np.ndarray]:
    """Texts of about equal length together, in an order of the epoch's own."""
    random = np.random.default_rng((config.seed, epoch))
    shuffled = random.permutation(learned)
    lengths = material.states.lengths[shuffled] + random.uniform(0, 32, len(shuffled))
    order = shuffled[np.argsort(lengths, kind="stable")]
    batches = [order[at : at + config.batch] for at in range(0, len(order), config.batch)]
    return [batches[at] for at in random.permutation(len(batches))]


def _candidates(
    config: DraftHeadConfig, material: _Material, batch: np.ndarray, step: int
) -> Target:
    """The target confined to what stands in the batch and to some others, by chance."""
    size = len(material.target.matrix)
    if not 0 < config.candidates < size:
        return material.target
    own = material.guessable(batch)
    others = np.random.default_rng((config.seed, 1, step)).permutation(size)
    some = others[: max(0, config.candidates - len(own))]
    return material.target.rows(np.union1d(own, some))


def _noisy(config: DraftHeadConfig, material: _Material, batch: np.ndarray, step: int) -> Texts:
    texts = material.texts(batch)
    if config.noise:
        # Uniform noise, which has this deviation.
        spread = np.float32(config.noise * material.size * 3**0.5)
        chance = np.random.default_rng((config.seed, 2, step))
        noise = chance.uniform(-1, 1, texts.states.shape).astype(np.float32)
        texts = replace(texts, inputs=texts.states + spread * noise)
    return texts


def _agreed(
    config: DraftHeadConfig,
    material: _Material,
    network: Network,
    numbers: np.ndarray,
    pool: Executor,
) -> float:
    def part(first: int) -> Sums:
        return network.run(
            material.target,
            material.texts(numbers[first : first + _TOGETHER]),
            steps=config.unroll,
            closeness=config.closeness,
            decay=config.decay,
        )

    hits, tries = np.zeros((2, config.unroll))
    for sums in pool.map(part, range(0, len(numbers), _TOGETHER)):
        hits += sums.hits
        tries += sums.tries
    return float((hits / np.maximum(tries, 1)).sum())
