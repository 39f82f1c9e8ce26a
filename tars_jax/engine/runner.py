"""The device's part of an engine: weights, KV cache, and the compiled steps that join them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tars_jax import sharding
from tars_jax.adapters import is_weight, weight_shapes
from tars_jax.cache import gather_pages, scatter_pages
from tars_jax.compile_cache import Recipe
from tars_jax.config import EngineConfig
from tars_jax.engine.adapters import AdapterSlots
from tars_jax.engine.decodes import run_decodes
from tars_jax.engine.programs import Programs
from tars_jax.engine.request import TokenLogprob
from tars_jax.engine.sampler import SampleBatches, head, read_row, run_sampler, run_scores
from tars_jax.engine.scheduler import Plan, Span
from tars_jax.engine.step import Batches, EngineState, bucket_of, buckets, init_state, run_draft, run_step, write_history
from tars_jax.engine.structure import Structure, flatten
from tars_jax.errors import InvalidRequest
from tars_jax.loaders.loaded import Model
from tars_jax.model import Decoder
from tars_jax.quant import LowRank

SCORED = 64  # tokens of a prompt scored at once
COMMON_ROWS = 16  # samplers of more are loaded when they are wanted: each takes 10 MB
STRUCTURES = 4  # of weights, whose programs are kept: those of the file, of a version with an adapter, ...


class Compiled(NamedTuple):
    """What depends on the structure of the weights alone: what makes the steps' inputs, and the programs."""

    batches: Batches
    steps: Programs[int]  # by bucket
    drafts: Programs[int]
    decodes: Programs[int]
    samplers: Programs[tuple[int, bool]]  # by rows, and whether some are not plain
    head_ranks: int  # of the adapters that update the head

    def all(self) -> tuple[Programs[Any], ...]:
        return self.steps, self.samplers, self.drafts, self.decodes  # samplers begin decodes


class Weights(NamedTuple):
    """Parameters and the adapters that requests choose among; both as the steps take them, flattened once; and what runs them."""

    params: Any  # a Decoder; None after `close`
    adapters: AdapterSlots
    arrays: list[jax.Array]
    structure: Structure
    head: list[jax.Array]
    compiled: Compiled

    @property
    def batches(self) -> Batches:
        return self.compiled.batches


class Runner:
    """Runs plans. With a ``draft`` model, its keys and values stand in the same pages as the model's own."""

    def __init__(
        self, model: Model, config: EngineConfig, draft: Model | None = None, *, observe: Callable[[float], None] = lambda _: None
    ) -> None:
        """``config`` is a resolved one. ``observe`` hears the seconds of every compilation."""
        if draft is not None:
            _check_draft(model, draft, config)
        self._model, self._config, self._draft, self._observe = model, config, draft, observe
        self._mesh = sharding.make_mesh(config.tensor_parallel) if config.tensor_parallel > 1 else None
        self._samples = SampleBatches(config.max_rows, model.config.vocab_size)
        self._state: EngineState
        self.reset()
        self.num_pages: int = self._state.cache.k.shape[0] // model.config.num_layers
        caches = sum(leaf.nbytes for leaf in jax.tree.leaves(self._state))
        self.nbytes: int = model.nbytes + caches + (draft.nbytes if draft else 0)
        self._known: dict[Any, Compiled] = {}  # by structure, the latest last
        self._ahead: list[int] = []  # buckets to be compiled before they are needed
        self._samplers: dict[Any, Programs[tuple[int, bool]]] = {}  # by structure of the head
        self._histories = Programs[int](self._history_recipe, observe)
        self._weights = self._placed(model.params, AdapterSlots())

    @property
    def adapters(self) -> AdapterSlots:
        """Those that requests may choose."""
        return self._weights.adapters

    def reset(self) -> None:
        """An empty cache."""
        draft = self._draft.config if self._draft else None
        self._state = init_state(self._model.config, self._config, draft, self._mesh)

    def compile_ahead(self, *, everything: bool) -> None:
        """Compile in the background: the step of one token, and ``everything`` else that may hold up a request after it."""
        self._ahead = buckets(self._config) if everything else [1]
        rows, compiled = sorted({self._rows(bucket) for bucket in self._ahead}), self._weights.compiled
        common, rare = [(count, False) for count in rows if count <= COMMON_ROWS], [(count, True) for count in rows]
        rare += [(count, False) for count in rows if count > COMMON_ROWS]
        compiled.steps.prepare(self._ahead)
        compiled.samplers.prepare(common, rare=rare if everything else [])
        if everything:
            self._histories.prepare([self._config.max_context])

    def compiled(self) -> list[int]:
        """Buckets whose step is ready, smallest first."""
        return self._weights.compiled.steps.compiled()

    def stop_compiling(self) -> None:
        """Begin no further compilation in the background."""
        for compiled in self._known.values():
            for programs in compiled.all():
                programs.stop()

    def send(self, plan: Plan) -> tuple[int, jax.Array, jax.Array]:
        """Start a step, and before it the drafting of the guesses it is to check: its bucket, and to come the states for `sample` and for
        `score`."""
        self._write_histories(plan)
        now = self._weights
        if drafting := [span for span in plan if span.drafts]:
            bucket, numbers = now.batches.build_drafts(drafting)
            samples = self._samples.build([dataclasses.replace(span, guesses=()) for span in drafting], now.batches.layout(bucket).rows)
            self._state = now.compiled.drafts.get(bucket)(now.arrays, self._state, numbers, samples)
        bucket, numbers = now.batches.build(plan)
        self._state, last, hidden = now.compiled.steps.get(bucket)(now.arrays, self._state, numbers)
        return bucket, last, hidden

    def sample(self, plan: Plan, last: jax.Array) -> jax.Array:
        """Start the sampling of a plan that was sent, before the next one is: its output to come (`sampler.read_row`)."""
        now, sampled = self._weights, [span for span in plan if span.samples for _ in range(1 + len(span.guesses))]
        rows = self._rows(len(sampled))
        strengths = np.zeros((rows, now.compiled.head_ranks), np.float32)
        for row, span in enumerate(sampled if now.compiled.head_ranks else ()):
            _add_strengths(strengths[row], span)
        batch = self._samples.build(plan, rows)
        program = now.compiled.samplers.get((rows, not all(span.sequence.plain for span in sampled)))
        tokens, mu, out = program(now.head, self._state.tokens, self._state.mu, last, strengths, batch)
        self._state = dataclasses.replace(self._state, tokens=tokens, mu=mu)
        return out

    def decodes_ready(self, rows: int) -> bool:
        """Whether so many rows can decode for several steps at once; if not, it is seen to that they soon can."""
        return self._draft is None and self._weights.compiled.decodes.find(bucket_of(rows)) is not None

    def decode(self, plan: Plan) -> tuple[int, jax.Array]:
        """Start the steps of a plan of decodes: its bucket, and their outputs to come, [MOST_STEPS, rows, ...] (`decodes.run_decodes`)."""
        self._write_histories(plan)
        now = self._weights
        bucket, numbers = now.batches.build(plan)
        rows = now.batches.layout(bucket).rows
        batch, ends = self._samples.build(plan, rows), self._samples.ends(plan, rows)
        program = now.compiled.decodes.get(bucket)
        self._state, out = program(now.arrays, self._state, numbers, batch, ends, np.int32(plan[0].steps))
        return bucket, out

    def _write_histories(self, plan: Plan) -> None:
        """What penalties look back on: of sequences that begin in this plan, the tokens that were cached."""
        for span in plan:
            sequence = span.sequence
            if 0 < sequence.cached == span.start:
                history = np.zeros(self._config.max_context, np.int32)
                history[: span.start] = sequence.tokens[: span.start]
                write = self._histories.get(self._config.max_context)
                self._state = dataclasses.replace(self._state, tokens=write(self._state.tokens, np.int32(sequence.slot), history))

    def settle(self) -> None:
        """Wait for what is being compiled in the background."""
        for programs in (self._histories, *self._weights.compiled.all()):
            programs.settle()

    def score(self, hidden: jax.Array, at: int, span: Span) -> list[TokenLogprob]:
        """Log-probabilities of the prompt's tokens that follow those of a span, whose states stand in ``hidden`` from ``at`` on."""
        sequence, now = span.sequence, self._weights
        targets = np.asarray(sequence.request.prompt_ids[span.start + 1 : span.start + span.count + 1], np.int32)
        states, scored = np.asarray(hidden)[at : at + len(targets)], list[TokenLogprob]()
        strengths = np.zeros((SCORED, now.adapters.ranks), np.float32)
        _add_strengths(strengths, span)
        for start in range(0, len(targets), SCORED):
            part = slice(start, start + SCORED)
            missing = SCORED - len(targets[part])
            padded = np.pad(states[part], ((0, missing), (0, 0))), np.pad(targets[part], (0, missing))
            out = run_scores(now.arrays, *padded, strengths, structure=now.structure, config=self._model.config)
            rows = np.asarray(out)[: len(targets[part])]
            scored += [read_row(row, sequence.params.prompt_logprobs or 0)[0] for row in rows]
        return scored

    def prepared(
        self, params: Decoder | None = None, adapters: AdapterSlots | None = None, stopped: Callable[[], bool] = lambda: False
    ) -> Weights:
        """Other parameters of the same model or other adapters, ready for `use`: what is compiled for the weights served now, and what
        is being compiled for them in the background, is compiled for the structure of these too. That of the latest few structures is
        kept. From any thread, one at a time. ``stopped``: whether to compile no more, for weights that will not be used. Raises
        InvalidRequest for weights of another model."""
        now = self._weights
        if params is not None:
            _check_same_model(params, self._model.params)
        weights = self._placed(params or now.params, adapters or now.adapters)
        if weights.compiled is not now.compiled:
            wanted: list[tuple[Programs[Any], Any]] = [
                (weights.compiled.steps, bucket) for bucket in sorted({*self._ahead, *now.compiled.steps.compiled()})
            ]
            for programs, theirs in zip(weights.compiled.all()[1:], now.compiled.all()[1:], strict=True):
                wanted += [(programs, kind) for kind in theirs.compiled()]
            for programs, kind in wanted:
                if not stopped():
                    programs.get(kind)
        return weights

    def use(self, weights: Weights) -> None:
        """Run later plans with these weights."""
        self._weights = weights

    def page_shapes(self) -> list[tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of a page in each of the cache's arrays, as `read_pages` gives them."""
        leaves = jax.tree.leaves((self._state.cache, self._state.draft))
        return [((leaf.shape[0] // self.num_pages, *leaf.shape[1:]), np.dtype(leaf.dtype)) for leaf in leaves]

    def read_pages(self, pages: list[int]) -> list[np.ndarray]:
        """The contents of some pages: an array [n, layers, ...] for each of the cache's arrays."""
        caches = jax.tree.leaves((self._state.cache, self._state.draft))
        return [np.asarray(array) for array in gather_pages(caches, np.asarray(pages, np.int32), num_pages=self.num_pages)]

    def write_pages(self, pages: list[int], contents: list[np.ndarray]) -> None:
        """Fill pages with what `read_pages` gave."""
        caches, tree = jax.tree.flatten((self._state.cache, self._state.draft))
        caches = scatter_pages(caches, np.asarray(pages, np.int32), contents, num_pages=self.num_pages)
        cache, draft = jax.tree.unflatten(tree, caches)
        self._state = dataclasses.replace(self._state, cache=cache, draft=draft)

    def close(self) -> None:
        """Let weights and cache go."""
        self.stop_compiling()
        del self._state
        self._weights = self._weights._replace(params=None, arrays=[], head=[])

    def _placed(self, params: Decoder, adapters: AdapterSlots) -> Weights:
        placed = adapters.put_on(params)
        if self._mesh is not None:
            placed = sharding.shard(placed, self._model.config, self._mesh)
        arrays, structure = flatten((placed, self._draft.params if self._draft else None))
        kind = structure, tuple((array.shape, array.dtype) for array in arrays)
        top = head(placed)
        compiled = self._known.pop(kind, None) or self._programs(arrays, structure, adapters.ranks, top)
        self._known[kind] = compiled
        if len(self._known) > STRUCTURES:
            del self._known[next(iter(self._known))]
        return Weights(params, adapters, arrays, structure, flatten(top)[0], compiled)

    def _programs(self, arrays: list[jax.Array], structure: Structure, ranks: int, top: Decoder) -> Compiled:
        batches = Batches(self._config, ranks)
        draft = self._draft.config if self._draft else None
        fixed = {"structure": structure, "config": self._model.config, "draft": draft, "dtype": self._model.dtype}
        shapes = jax.tree.map(_shape, (arrays, self._state))  # not the arrays: programs outlive them

        def step(bucket: int) -> Recipe:
            arguments = *shapes, batches.empty(bucket)
            return Recipe(run_step, arguments, {"layout": batches.layout(bucket), "mesh": self._mesh, **fixed}, (shapes[1], 0, 0))

        def drafting(bucket: int) -> Recipe:
            layout = batches.layout(bucket)
            arguments = *shapes, batches.empty(bucket), self._samples.empty(layout.rows)
            return Recipe(run_draft, arguments, {"layout": layout, **fixed}, shapes[1])

        def decoding(bucket: int) -> Recipe:
            layout = batches.layout(bucket)
            samples, ends = self._samples.empty(layout.rows), self._samples.ends((), layout.rows)
            arguments = *shapes, batches.empty(bucket), samples, ends, np.int32(1)
            static = {"layout": layout, "mesh": self._mesh, **{name: fixed[name] for name in ("structure", "config", "dtype")}}
            return Recipe(run_decodes, arguments, static, (shapes[1], 0))

        head_ranks = ranks if any(isinstance(leaf, LowRank) for leaf in jax.tree.leaves(top, is_leaf=is_weight)) else 0
        samplers = self._sampler_programs(top, head_ranks)
        steps, drafts, decodes = (Programs(recipe, self._observe) for recipe in (step, drafting, decoding))
        return Compiled(batches, steps, drafts, decodes, samplers, head_ranks)

    def _history_recipe(self, context: int) -> Recipe:
        return Recipe(write_history, (_shape(self._state.tokens), np.int32(0), np.zeros(context, np.int32)), {}, 0)

    def _sampler_programs(self, top: Decoder, ranks: int) -> Programs[tuple[int, bool]]:
        """Those of a head of these shapes: the same for all weights that differ in their layers alone."""
        head_arrays, structure = flatten(top)
        arrays = [_shape(array) for array in head_arrays]
        tokens, mu = _shape(self._state.tokens), _shape(self._state.mu)
        size, config = (self._config.max_rows, self._model.config.hidden_size), self._model.config
        last = jax.ShapeDtypeStruct(size, jnp.dtype(self._model.dtype), sharding=tokens.sharding)

        def sampling(kind: tuple[int, bool]) -> Recipe:
            rows, full = kind
            arguments = arrays, tokens, mu, last, np.zeros((rows, ranks), np.float32), self._samples.empty(rows)
            static = {"structure": structure, "config": config, "plain": not full, "mesh": self._mesh}
            return Recipe(run_sampler, arguments, static, (0, 0, 0))

        kind = structure, tuple((array.shape, array.dtype) for array in arrays), ranks
        return self._samplers.setdefault(kind, Programs(sampling, self._observe))

    def _rows(self, count: int) -> int:
        """Rows of the sampler's program for so many: powers of two but 2 and 8, for a program of all filters takes 21 MB."""
        rows = 1 << max(count - 1, 0).bit_length()
        return min(2 * rows if rows in (2, 8) else rows, self._config.max_rows)


def _add_strengths(strengths: np.ndarray, span: Span) -> None:
    """Add those of a span's adapters, to [..., ranks]."""
    for share in span.sequence.adapters:
        strengths[..., share.start : share.stop] += share.strength


def _shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _check_same_model(params: Decoder, other: Decoder) -> None:
    ours, theirs = (weight_shapes(tree) for tree in (other, params))
    if not theirs.items() >= ours.items():  # an adapter may add a bias
        raise InvalidRequest("the new weights are those of another model: their shapes differ from the ones being served")


def _check_draft(model: Model, draft: Model, config: EngineConfig) -> None:
    if config.tensor_parallel > 1:
        raise InvalidRequest("a draft model cannot be used together with tensor parallelism")
    if draft.config.vocab_size != model.config.vocab_size:
        raise InvalidRequest(
            f"the draft model {draft.name} has a vocabulary of {draft.config.vocab_size} tokens, but {model.name} one of "
            f"{model.config.vocab_size}; they must be the same"
        )
    if draft.config.context_length < config.max_context:
        raise InvalidRequest(
            f"the draft model {draft.name} reads {draft.config.context_length} tokens, fewer than the context of {config.max_context}; "
            "lower the context"
        )
