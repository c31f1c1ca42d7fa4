"""The reference program: any `DecoderSpec`, in float32, by MLX's autodiff, a layer at a time.

Forward keeps nothing but the input of every layer. On the way back a layer is computed once more
from its input and differentiated (gradient checkpointing, https://arxiv.org/abs/1604.06174), so
memory holds the insides of one layer. On a Mac the same steps run on the GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from localllm.backend.reference_attention import attention
from localllm.backend.reference_decoder import (
    Decoder,
    FeedForward,
    KeysValues,
    Layer,
    PerLayerInputs,
    Turns,
)
from localllm.backend.reference_linear import SLAB, Linear
from localllm.backend.reference_parts import Routed, Weight, Weights
from localllm.backend.reference_recurrent import GatedDeltaNet, Recurrent
from localllm.backend.weights import checked_weights
from localllm.errors import InvalidRequest
from localllm.spec import AttentionSpec, DecoderSpec, MoESpec
from localllm.train.base import BaseWeights
from localllm.train.layout import squared_norms
from localllm.train.noise import embedding_noise
from localllm.train.program import Layout, Noise, Rows
from localllm.train.reference_adapters import Adapters
from localllm.train.reference_head import Head, chunk_rows
from localllm.train.reference_matrices import frozen, trained

_OWN_TABLE = "per_layer_inputs.embed.weight"
_QUERY_ROWS = 256  # attention takes so many rows at a time, which bounds its scores
_STATE_ROWS = 64  # recurrences keep their state for the way back after so many rows


class ReferenceProgram:
    """See `Program`. weights are read once and keep the size they have in the file.

    dropout: what the noise of steps will have, for `working_bytes` alone. Raises CheckpointError
    for weights that are not as the spec wants them.
    """

    name = "reference"
    survives_full_memory = False

    def __init__(self, weights: BaseWeights, layout: Layout, *, dropout: float = 0.0) -> None:
        self.layout = layout
        self._dropout = dropout
        self.spec = weights.spec
        self._device = mx.default_device()
        parts: dict[str, Weight] = {}
        norms: dict[str, mx.array] = {}
        with mx.stream(self._device):
            for name, tensor in checked_weights(self.spec, weights.tensors()):
                parts[name] = frozen(tensor)
                if f"{name.removesuffix('.weight')}.magnitude" in layout.shapes:
                    squares = squared_norms(tensor.to_float32())
                    norms[name.removesuffix(".weight")] = mx.array(squares)
                del tensor  # else it would live on while the next one is read
            self._decoder: Decoder | None = Decoder(self.spec, parts)
            self._head = Head(self._decoder, [] if layout.scales else list(layout.shapes))
        self._adapters = Adapters(layout, norms)
        self._names = [
            [name for name in layout.shapes if name.startswith(f"layers.{index}.")]
            for index in range(len(self.spec.layers))
        ]

    def log_probs(
        self, rows: Rows, parameters: np.ndarray | None, noise: Noise | None = None
    ) -> np.ndarray:
        """See `Program.log_probs`."""
        with mx.stream(self._device):
            step = self._step(rows, parameters, noise)
            if not len(rows.tokens):
                return np.zeros(0, np.float32)
            x = step.embedded()
            for index in range(len(self.spec.layers)):
                x = step.forward(index, x)
            return self._head.log_probs(x, rows.targets, step.whole(self._head.names))

    def gradients(
        self,
        rows: Rows,
        weights: np.ndarray,
        parameters: np.ndarray,
        gradient: np.ndarray,
        noise: Noise | None = None,
    ) -> float:
        """See `Program.gradients`."""
        counted = np.flatnonzero(weights)
        if not len(counted):
            return 0.0
        into = self.layout.views(gradient)
        with mx.stream(self._device):
            step = self._step(rows, parameters, noise)
            x, inputs = step.embedded(), []
            for index in range(len(self.spec.layers)):
                inputs.append(x)
                x = step.forward(index, x)
            loss, part, sums = self._head.gradients(
                x[mx.array(counted)],
                rows.targets[counted],
                weights[counted].astype(np.float32),
                step.whole(self._head.names),
            )
            for name, found in sums.items():
                into[name] += found
            back = mx.zeros_like(x)
            back[mx.array(counted)] = part
            del x, part
            self._backward(step, inputs, back, into)
        return loss

    def _backward(
        self,
        step: _Step,
        inputs: list[mx.array],
        back: mx.array,
        into: Mapping[str, np.ndarray],
    ) -> None:
        """From the gradient by the last layer's output to those of everything below it."""
        lowest = next((n for n, names in enumerate(self._names) if names), len(self._names))
        through = not self.layout.scales  # down to the embedding
        for index in range(len(self._names) - 1, (-1 if through else lowest - 1), -1):
            names = self._names[index]
            arrays, extras = step.arrays(index), step.extras(index)

            def forward(
                x: mx.array, *values: mx.array, at: int = index, names: list[str] = names
            ) -> list[mx.array]:
                own = dict(zip(names, values[: len(names)], strict=True))
                return step.layer(at, x, own, values[len(names) :])

            before = [inputs.pop(), *arrays.values(), *extras]
            _, found = mx.vjp(forward, before, step.cotangents(index, back))
            if index > lowest or through:
                mx.eval(*found)
            else:
                mx.eval(*found[1:])  # nothing below is trained
            back = found[0]
            for name, array in zip(names, found[1 : 1 + len(names)], strict=True):
                into[name] += np.array(array)
            step.take_back(index, found[1 + len(names) :])
        if through:
            back = step.per_layer_gradient(back, into)
            step.embedding_gradient(np.array(back), into)

    def working_bytes(self, rows: Sequence[int]) -> int:
        """See `Program.working_bytes`: the inputs of all layers, and the insides of one layer or a
        chunk of logits. The factors were measured (tests/train/test_reference_memory.py)."""
        total, longest = sum(rows), max(rows, default=0)
        hidden = self.spec.hidden
        inside = 0
        for layer, names in zip(self.spec.layers, self._names, strict=True):
            ffn, q, scores = layer.ffn, hidden, 0
            values = 8 * hidden
            if isinstance(layer.mixer, AttentionSpec):
                attn = layer.mixer
                q, kv = attn.heads * attn.head_dim, attn.kv_heads * attn.head_dim
                values += 3 * q + 6 * kv
                scores = 5 * attn.heads * min(longest, _QUERY_ROWS) * longest
            else:
                q = max(hidden, layer.mixer.channels)
                values += 12 * layer.mixer.channels
                # A product of the state's size for each step of some rows, and states between.
                states = 4 * min(longest, _STATE_ROWS) + -(-longest // _STATE_ROWS)
                scores = states * layer.mixer.state_values
            inner = ffn.hidden
            if isinstance(ffn, MoESpec):
                inner = ffn.top_k * ffn.hidden + ffn.shared
            values += (15 if self.layout.scales else 9) * inner
            own = 0
            for name in names:
                shape = self.layout.shapes[name]
                own += 3 * int(np.prod(shape))
                if name.endswith(".magnitude"):
                    values += 2 * shape[0]
                if name.endswith(".a") and self._dropout:
                    values += shape[1]
            matrix = 3 * min(SLAB, hidden * max(q, ffn.hidden))
            inside = max(inside, total * values + scores + own + matrix)
        kept = total * hidden * (len(self.spec.layers) + 3)
        kept += 2 * total * _shared_values(self.spec)
        if self.spec.per_layer is not None:
            kept += 3 * total * len(self.spec.layers) * self.spec.per_layer.size
        logits = 2 * min(total, chunk_rows(self.spec)) * self.spec.vocab_size
        logits += 2 * min(SLAB, hidden * self.spec.vocab_size)
        whole = sum(int(np.prod(self.layout.shapes[name])) for name in self._head.names)
        return 4 * (kept + max(inside, logits + 2 * whole))

    def close(self) -> None:
        """Frees the weights; the program answers no more."""
        self._decoder = None
        del self._head

    def _step(self, rows: Rows, parameters: np.ndarray | None, noise: Noise | None) -> _Step:
        assert self._decoder is not None, "the program is closed"
        _check(rows, self.spec)
        views = {} if parameters is None else self.layout.views(parameters)
        return _Step(self._decoder, self._adapters, self._names, rows, views, noise)


class _Step:
    """Rows on their way through the model with one set of parameters, or none."""

    def __init__(
        self,
        decoder: Decoder,
        adapters: Adapters,
        names: Sequence[Sequence[str]],
        rows: Rows,
        views: Mapping[str, np.ndarray],
        noise: Noise | None,
    ) -> None:
        self.spec = decoder.spec
        self._decoder, self._adapters, self._names = decoder, adapters, names
        self._rows, self._views, self._noise = rows, views, noise
        sizes = np.diff(rows.offsets)
        self._lengths = np.repeat(sizes, sizes)
        self._positions = np.concatenate([np.arange(size) for size in sizes] or [np.zeros(0, int)])
        self._numbers = (rows.first_row + np.arange(len(rows.tokens))).astype(np.uint32)
        self._turns = Turns(self._positions, self._lengths)
        self._sources: list[int | None] = [None] * len(self.spec.layers)
        for index, attn in self.spec.attentions:
            self._sources[index] = attn.shared_kv
        # Of layers whose K and V others attend to: those, and the gradients that came back.
        self._kv: dict[int, list[mx.array]] = {}
        self._kv_back: dict[int, list[mx.array]] = {}
        self._own: mx.array | None = None  # the per-layer embeddings, [n, layers, size]
        self._own_back: dict[int, mx.array] = {}
        self._entered: mx.array | None = None
        self._whole = "embed.weight" in views  # all weights are trained

    def arrays(self, index: int) -> dict[str, mx.array]:
        """The parameters of a layer."""
        return self.whole(self._names[index])

    def whole(self, names: Sequence[str]) -> dict[str, mx.array]:
        return {name: mx.array(self._views[name]) for name in names} if self._views else {}

    def embedded(self) -> mx.array:
        """float32 [n, hidden]: what enters the first layer."""
        x = self._looked_up("embed.weight", self._rows.tokens) * self.spec.embed_scale
        if self._noise is not None and self._noise.neftune:
            x = x + embedding_noise(self._noise, self._numbers, self._lengths, self.spec.hidden)
        if self.spec.learned_positions is not None:
            x = x + self._looked_up("pos_embed.weight", self._positions)
        if self._decoder.per_layer is not None:
            rows = self._looked_up(_OWN_TABLE, self._rows.tokens)
            self._own = self._per_layer(self.whole(self._own_names()))(rows, x)
            self._entered = x
        return x

    def per_layer_gradient(self, back: mx.array, into: Mapping[str, np.ndarray]) -> mx.array:
        """Adds to the gradients of what makes the per-layer embeddings; back: float32 [n, hidden],
        by what enters the first layer, without and then with their share."""
        if self._entered is None:
            return back
        names = self._own_names()

        def made(x: mx.array, rows: mx.array, *values: mx.array) -> mx.array:
            return self._per_layer(dict(zip(names, values, strict=True)))(rows, x)

        rows = self._looked_up(_OWN_TABLE, self._rows.tokens)
        cotangent = mx.stack([self._own_back[n] for n in range(len(self.spec.layers))], axis=1)
        before = [self._entered, rows, *self.whole(names).values()]
        _, (of_x, of_rows, *others) = mx.vjp(made, before, [cotangent])
        np.add.at(into[_OWN_TABLE], self._rows.tokens, np.array(of_rows))
        for name, array in zip(names, others, strict=True):
            into[name] += np.array(array)
        return back + of_x

    def _own_names(self) -> list[str]:
        names = (n for n in self._views if n.startswith("per_layer_inputs.") and n != _OWN_TABLE)
        return list(names) if self._whole else []

    def _per_layer(self, arrays: Mapping[str, mx.array]) -> PerLayerInputs:
        assert self._decoder.per_layer is not None
        if not self._whole:
            return self._decoder.per_layer
        return PerLayerInputs(self.spec, Weights(trained(arrays), "per_layer_inputs."))

    def embedding_gradient(self, back: np.ndarray, into: Mapping[str, np.ndarray]) -> None:
        """Adds to the embeddings' gradients in the order of rows; back: float32 [n, hidden]."""
        scaled = back * np.float32(self.spec.embed_scale)
        np.add.at(into["embed.weight"], self._rows.tokens, scaled)
        if self.spec.learned_positions is not None:
            np.add.at(into["pos_embed.weight"], self._positions, back)

    def forward(self, index: int, x: mx.array) -> mx.array:
        """float32 [n, hidden] -> [n, hidden], computed; what later layers need is kept."""
        x, *kv = self.layer(index, x, self.arrays(index), self.extras(index))
        mx.eval(x, *kv)
        if kv:
            self._kv[index] = kv
        return x

    def extras(self, index: int) -> list[mx.array]:
        """What a layer takes beside x: its part of the per-layer embeddings, and K and V of the
        layer that it attends to, as far as it has such."""
        found = [] if self._own is None else [self._own[:, index]]
        source = self._sources[index]
        return found if source is None else [*found, *self._kv[source]]

    def cotangents(self, index: int, back: mx.array) -> list[mx.array]:
        """The gradients by what a layer gives."""
        if index not in self._kv:
            return [back]
        zeros = [mx.zeros_like(part) for part in self._kv[index]]
        return [back, *self._kv_back.pop(index, zeros)]

    def take_back(self, index: int, found: Sequence[mx.array]) -> None:
        """Keeps the gradients by a layer's extras until they are used."""
        mx.eval(*found)
        source, rest = self._sources[index], list(found)
        if self._own is not None:
            self._own_back[index] = rest.pop(0)
        if source is not None:
            sums = self._kv_back.get(source)
            self._kv_back[source] = (
                rest if sums is None else [a + b for a, b in zip(sums, rest, strict=True)]
            )

    def layer(
        self,
        index: int,
        x: mx.array,
        arrays: Mapping[str, mx.array],
        extras: Sequence[mx.array],
    ) -> list[mx.array]:
        """What leaves a layer, float32 [n, hidden], then its K and V if others attend to them."""
        at = f"layers.{index}."
        layer = self._decoder.layers[index]
        if self._whole:
            layer = Layer(
                self.spec.layers[index], Weights(trained(arrays), at), self.spec.per_layer
            )
        linears = {} if self._whole or not arrays else _linears(layer)
        # Cut once: the gradient of a slice would have the size of all experts.
        experts = {
            name: [part[0] for part in mx.split(array, array.shape[0])]
            for name, array in arrays.items()
            if array.ndim == 3 and not self._whole
        }

        def adapt(target: str, x: mx.array, y: mx.array, routed: Routed | None = None) -> mx.array:
            if not linears:
                return y
            if routed is not None:
                return self._adapters.apply_to_expert(f"{at}{target}", routed.expert, x, y, experts)
            return self._adapters.apply(
                f"{at}{target}", linears[target], x, y, arrays, self._numbers, self._noise
            )

        own = None if self._own is None else extras[0]
        kept: list[mx.array] = []

        def attend(q: mx.array, kv: KeysValues) -> mx.array:
            assert layer.attn is not None
            k, v = (extras[-2], extras[-1]) if kv is None else kv
            if index in self._sources:
                kept.extend((k, v))
            return self._attend(index, q, k, v, layer.attn.sinks)

        def recur(rows: mx.array) -> mx.array:
            assert layer.recurrent is not None
            return self._recur(layer.recurrent, rows)

        turn = self._turns.of(self.spec.layers[index].mixer)
        return [layer(x, turn, attend, adapt, recur, own), *kept]

    def _attend(
        self, index: int, q: mx.array, k: mx.array, v: mx.array, sinks: mx.array | None
    ) -> mx.array:
        """Each sequence by itself, some rows of it at a time, over the keys that they see."""
        spec = self.spec.layers[index].attention
        extra = [] if sinks is None else [sinks]
        parts = []
        for begin, end in zip(self._rows.offsets[:-1], self._rows.offsets[1:], strict=True):
            for start in range(int(begin), int(end), _QUERY_ROWS):
                stop = min(start + _QUERY_ROWS, int(end))
                first = int(begin)
                if spec.window is not None:
                    first = max(first, start - spec.window + 1)

                def some(
                    q: mx.array,
                    k: mx.array,
                    v: mx.array,
                    *sinks: mx.array,
                    queries: np.ndarray = np.arange(start, stop),  # noqa: B008
                    keys: np.ndarray = np.arange(first, stop),  # noqa: B008
                ) -> mx.array:
                    return attention(spec, q, k, v, queries, keys, *sinks)

                here = slice(first, stop)
                # Scores are computed anew on the way back: they are the largest of all.
                parts.append(mx.checkpoint(some)(q[start:stop], k[here], v[here], *extra))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def _recur(self, mixer: Recurrent, rows: mx.array) -> mx.array:
        """Each sequence by itself from an empty state, some rows of it at a time."""

        def some(state: mx.array, rows: mx.array, *filters: mx.array) -> tuple[mx.array, mx.array]:
            return mixer.advance(state, rows, filters)

        parts = []
        for begin, end in zip(self._rows.offsets[:-1], self._rows.offsets[1:], strict=True):
            state = mx.zeros((mixer.spec.state_values,))
            for start in range(int(begin), int(end), _STATE_ROWS):
                stop = min(start + _STATE_ROWS, int(end))
                y, state = mx.checkpoint(some)(state, rows[start:stop], *mixer.filters)
                parts.append(y)
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def _looked_up(self, name: str, index: np.ndarray) -> mx.array:
        """float32 [n, hidden]: rows of an embedding."""
        if self._whole:
            return mx.array(self._views[name][index])
        decoder = self._decoder
        tables = {"embed.weight": decoder.embed, _OWN_TABLE: decoder.per_layer_embed}
        matrix = tables.get(name, decoder.pos_embed)
        assert matrix is not None
        return matrix.rows(mx.array(index.astype(np.int32)))


def _shared_values(spec: DecoderSpec) -> int:
    """Of K and V that later layers attend to, for one position."""
    owners = {attn.shared_kv for _, attn in spec.attentions} - {None}
    mixers = [spec.layers[index].attention for index in owners if index is not None]
    return sum(2 * mixer.kv_heads * mixer.head_dim for mixer in mixers)


def _linears(layer: Layer) -> dict[str, Linear]:
    """By the names that `adapt` is called with."""
    found: dict[str, Linear] = {}
    mixer = layer.recurrent
    if layer.attn is not None:
        found = {f"attn.{name}": getattr(layer.attn, name) for name in ("q", "k", "v", "o")}
        if layer.attn.gate is not None:
            found["attn.gate"] = layer.attn.gate
    elif isinstance(mixer, GatedDeltaNet):
        found = {"delta.qkv": mixer.qkv, "delta.z": mixer.z, "delta.o": mixer.o}
    elif mixer is not None:
        found = {"conv.in": mixer.into, "conv.out": mixer.out}
    if isinstance(layer.ffn, FeedForward):
        found |= {f"ffn.{name}": getattr(layer.ffn, name) for name in ("gate", "up", "down")}
    return found


def _check(rows: Rows, spec: DecoderSpec) -> None:
    """Raises InvalidRequest for sequences or tokens that the model cannot take."""
    count, edges = len(rows.tokens), rows.offsets
    assert edges[0] == 0 and edges[-1] == count and (np.diff(edges) >= 0).all()  # noqa: PT018
    if not count:
        return
    limit = min(spec.context, spec.learned_positions or spec.context)
    longest = int(np.diff(edges).max())
    if longest > limit:
        raise InvalidRequest(
            f"a sequence of {longest} tokens; the model takes {limit}",
            hint="shorten it: --seq-len",
        )
    for name, ids in (("token", rows.tokens), ("target", rows.targets)):
        low, high = int(ids.min()), int(ids.max())
        if not 0 <= low <= high < spec.vocab_size:
            raise InvalidRequest(
                f"{name} ids {low} to {high}; the model has {spec.vocab_size}",
                hint="the tokenizer belongs to another model",
            )
