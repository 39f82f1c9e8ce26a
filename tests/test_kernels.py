"""The CPU kernels against numpy: exactly the same quantisation, written out; and loosely the float product."""

import dataclasses
import itertools
import zlib
from collections.abc import Iterator
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tars_jax import cache, kernels, model, ops, quant
from tars_jax.attention import ragged_attention
from tars_jax.config import ModelConfig
from tars_jax.kernels import native
from tars_jax.loaders.blocks import decode
from tests.test_attention import ragged
from tests.tiny import CONFIG

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no kernels: {kernels.unavailable_reason()}")

QUANTIZED = [(bits, group, affine, dtype) for bits in (4, 8) for group in (16, 32) for affine in (0, 1) for dtype in ("float16", "float32")]
QUANTIZED += [(5, 32, 0, "float16"), (5, 32, 1, "float16"), (5, 32, 1, "float32"), (6, 16, 0, "float32")]
KINDS = [*QUANTIZED, "float32", "float16", "bfloat16"]
ROWS = (0, 1, 2, 3, 7, 16, 17, 33, 130)
EPS = 1e-5


ISAS = ("amx", "avx512", "avx2", "portable")


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = kernels.isa()
    if request.param in ISAS and not native.use_isa(request.param):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    native.use_isa(before)


def weight(kind: Any, outputs: int, inputs: int, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    if isinstance(kind, str):
        return np.asarray(jnp.asarray(rng.normal(size=(outputs, inputs)) * inputs**-0.5, kind))
    bits, group, affine, dtype = kind
    low, high = (0, 1 << bits) if bits < 8 and affine else (-(1 << (bits - 1)), 1 << (bits - 1))
    codes = rng.integers(low, high, (outputs, inputs)).astype(np.int8)
    scales = (rng.uniform(0.5, 2, (outputs, inputs // group)) * inputs**-0.5 / high).astype(dtype)
    mins = rng.normal(size=scales.shape).astype(dtype) * np.asarray(inputs**-0.5, dtype) if affine else None
    return quant.pack(codes, scales, mins, bits=bits, group=group)


def dense(w: Any) -> np.ndarray:
    return np.asarray(quant.dequantize(w if isinstance(w, quant.QArray) else jnp.asarray(w)), np.float32)


def normals(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def numbers(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(normals(*shape, seed=seed))


def as_kernel_reads(x: np.ndarray, w: Any) -> np.ndarray:
    """Activations as the kernel multiplies them: int8 in groups of 32 for quantised weights, else as they are."""
    if not isinstance(w, quant.QArray):
        return x
    rows, inputs = x.shape
    grouped = np.pad(x, ((0, 0), (0, -inputs % 32))).reshape(rows, -(-inputs // 32), 32)
    top = np.abs(grouped).max(-1, keepdims=True, initial=0.0)
    codes = np.rint(grouped * np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0))
    return (codes * (top / np.float32(127))).reshape(rows, grouped.shape[1] * 32)[:, :inputs]


def rounded(x: Any) -> np.ndarray:
    """To bfloat16."""
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)


def prompt_product(x: np.ndarray, w: Any) -> np.ndarray:
    """A prompt's rows times a weight: with AMX quantised ones become bfloat16."""
    if kernels.isa() == "amx" and isinstance(w, quant.QArray):
        return rounded(x) @ rounded(dense(w)).T
    return as_kernel_reads(x, w) @ dense(w).T


def tolerance(w: Any) -> float:
    """bfloat16 weights meet bfloat16 activations where the processor multiplies these."""
    return 2e-2 if getattr(w, "dtype", None) == jnp.bfloat16 else 2e-4


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_tiles_hold_the_weight(kind: Any) -> None:
    w = weight(kind, 37, 80 if isinstance(kind, tuple) and kind[1] == 16 else 96)
    tiled = kernels.pack_tiles(w)
    np.testing.assert_allclose(kernels.untile(tiled), dense(w), atol=1e-6)
    ids = np.array([36, 0, 17, 5], np.int32)
    np.testing.assert_allclose(kernels.take_rows(tiled, jnp.asarray(ids)), dense(w)[ids], atol=1e-6)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
def test_a_file_s_blocks_are_packed_where_they_lie(name: str) -> None:
    type_id = int(gguf.GGMLQuantizationType[name])
    raw = gguf.quants.quantize(normals(37, 96), gguf.GGMLQuantizationType[name])
    blocks = decode(type_id, raw.reshape(-1), (37, 96))
    views = blocks.views()
    w = quant.pack(blocks.codes, blocks.scales, blocks.mins, bits=blocks.bits, group=blocks.group)
    found = kernels.pack_tiles(kernels.Groups(*views, blocks.bits, blocks.group))
    np.testing.assert_array_equal(found.data, kernels.pack_tiles(w).data)


def test_weights_in_one_arena_are_the_weights_alone() -> None:
    ws = {"a": weight((4, 32, 1, "float16"), 37, 96), "b": weight("bfloat16", 16, 64), "c": weight((8, 32, 0, "float16"), 5, 96)}
    alone = {name: jax.tree.map(jnp.asarray, kernels.pack_tiles(w)) for name, w in ws.items()}
    sizes = {name: w.nbytes for name, w in alone.items()} | {"c": 1}  # which has no room, then
    arena = kernels.Arena(sizes)
    together = arena.finish({name: arena.pack(name, w) for name, w in ws.items()})
    assert together["a"].data is together["b"].data is not together["c"].data
    x, ids = numbers(3, 96, seed=1), jnp.array([4, 0], jnp.int32)
    for name, w in together.items():
        assert w.nbytes == alone[name].nbytes
        np.testing.assert_array_equal(kernels.untile(w), kernels.untile(alone[name]))
        np.testing.assert_array_equal(kernels.take_rows(w, ids), kernels.take_rows(alone[name], ids))
    for found, w in zip(kernels.norm_linear(x, None, 0.0, [together["c"], together["a"]]), (alone["c"], alone["a"]), strict=True):
        np.testing.assert_array_equal(found, kernels.norm_linear(x, None, 0.0, [w])[0])


def test_tiles_outside_of_their_array_are_refused() -> None:
    w = kernels.pack_tiles(weight((4, 32, 1, "float16"), 20, 64))
    beyond = dataclasses.replace(w, data=jnp.asarray(w.data).reshape(-1), offset=64)
    with pytest.raises(Exception, match="packed weight has the wrong size"):
        jax.block_until_ready(kernels.norm_linear(jnp.ones((2, 64)), None, 0.0, [beyond]))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_product_of_any_kind(kind: Any) -> None:
    inputs = 112 if isinstance(kind, tuple) and kind[1] == 16 else 101 if isinstance(kind, str) else 128
    w = weight(kind, 45, inputs)
    tiled = jax.tree.map(jnp.asarray, kernels.pack_tiles(w))
    for rows in (1, 7, 29):
        x = normals(rows, inputs)
        y = np.asarray(kernels.norm_linear(jnp.asarray(x), None, 0.0, [tiled])[0])
        np.testing.assert_allclose(y, as_kernel_reads(x, w) @ dense(w).T, atol=tolerance(w))
        np.testing.assert_allclose(y, x @ dense(w).T, atol=0.1)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("prompts_at", [0, 5, 29])
def test_rows_of_a_prompt_and_others_in_one_product(kind: Any, prompts_at: int) -> None:
    inputs = 432 if isinstance(kind, tuple) and kind[1] == 16 else 421 if isinstance(kind, str) else 416  # more than one stretch
    w, x = weight(kind, 45, inputs), normals(29, inputs)
    y = np.asarray(
        kernels.norm_linear(jnp.asarray(x), None, 0.0, [kernels.pack_tiles(w)], prompts_at=jnp.array([prompts_at], jnp.int32))[0]
    )
    np.testing.assert_allclose(y[:prompts_at], as_kernel_reads(x[:prompts_at], w) @ dense(w).T, atol=tolerance(w))
    # A weight that lies between two numbers of bfloat16 may go to the other one.
    np.testing.assert_allclose(y[prompts_at:], prompt_product(x[prompts_at:], w), atol=max(1e-3, tolerance(w)))
    np.testing.assert_allclose(y, x @ dense(w).T, atol=0.15)


@pytest.mark.parametrize("kind", [QUANTIZED[2], QUANTIZED[8], "bfloat16"], ids=str)
def test_a_prompt_s_row_does_not_depend_on_its_batch(kind: Any) -> None:
    x, w = normals(600, 800), kernels.pack_tiles(weight(kind, 40, 800))

    def rows(begin: int, end: int, prompts_at: int) -> np.ndarray:
        at = jnp.array([prompts_at], jnp.int32)
        return np.asarray(kernels.norm_linear(jnp.asarray(x[begin:end]), None, 0.0, [w], prompts_at=at)[0])

    together = rows(0, 600, 7)
    np.testing.assert_array_equal(rows(0, 7, 7), together[:7])
    for begin, end in ((7, 8), (20, 37), (511, 600)):
        np.testing.assert_array_equal(rows(begin, end, 0), together[begin:end])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_number_in_a_prompt_stays_in_its_row(bad: float) -> None:
    x, w, at = normals(19, 64), kernels.pack_tiles(weight((4, 32, 1, "float16"), 20, 64)), jnp.array([3], jnp.int32)
    clean = np.asarray(kernels.norm_linear(jnp.asarray(x), jnp.ones(64), EPS, [w], prompts_at=at)[0])
    x[11, 5] = bad
    y = np.asarray(kernels.norm_linear(jnp.asarray(x), jnp.ones(64), EPS, [w], prompts_at=at)[0])
    assert np.isnan(y[11]).all()
    np.testing.assert_array_equal(np.delete(y, 11, 0), np.delete(clean, 11, 0))


@pytest.mark.parametrize("rows", ROWS)
def test_norm_and_weights_of_several_kinds_in_one_call(rows: int) -> None:
    kinds = [QUANTIZED[2], QUANTIZED[8], "bfloat16"]
    weights = [weight(kind, outputs, 96, seed=outputs) for kind, outputs in zip(kinds, (33, 16, 5), strict=True)]
    x, norm, bias = normals(rows, 96), normals(96, seed=2), normals(16, seed=3)
    tiled = [kernels.pack_tiles(w) for w in weights]
    results = kernels.norm_linear(jnp.asarray(x), jnp.asarray(norm), EPS, tiled, [None, jnp.asarray(bias), None])
    normed = np.asarray(ops.rms_norm(jnp.asarray(x), jnp.asarray(norm), EPS))
    for w, result, b in zip(weights, results, (0, bias, 0), strict=True):
        # The norm's own rounding may move a code by one, which is worth a hundredth of a group's largest activation.
        np.testing.assert_allclose(result, as_kernel_reads(normed, w) @ dense(w).T + b, atol=max(1e-2, tolerance(w)))


@pytest.mark.parametrize("rows", ROWS)
def test_linear_add(rows: int) -> None:
    w, x, residual, bias = weight((4, 32, 1, "float16"), 40, 160), normals(rows, 160), normals(rows, 40, seed=2), normals(40, seed=3)
    y = kernels.linear_add(jnp.asarray(x), kernels.pack_tiles(w), jnp.asarray(bias), jnp.asarray(residual))
    np.testing.assert_allclose(y, residual + as_kernel_reads(x, w) @ dense(w).T + bias, atol=2e-4)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("rows", [0, 1, 9, 33])
def test_gated(rows: int, activation: Any) -> None:
    gate, up = weight((4, 32, 1, "float16"), 50, 64), weight((8, 16, 0, "float16"), 50, 64, seed=5)
    x, bias = 3 * normals(rows, 64), normals(50, seed=3)
    y = kernels.gated(jnp.asarray(x), None, 0.0, kernels.pack_tiles(gate), kernels.pack_tiles(up), activation, jnp.asarray(bias))
    gated = ops.activate(jnp.asarray(as_kernel_reads(x, gate) @ dense(gate).T + bias), activation)
    np.testing.assert_allclose(y, np.asarray(gated) * (as_kernel_reads(x, up) @ dense(up).T), atol=1e-3)


def updated(base: Any, runs: int, rows: int, seed: int) -> quant.LowRank:
    """On a weight [O, K] an update of rank 6, of which each row uses some ranks, and on that one of rank 3 for each run of rows."""
    outputs, inputs = base.shape
    scale = jnp.asarray(np.random.default_rng(seed).integers(0, 2, (rows, 6)).astype(np.float32))
    first = quant.LowRank(base, 0.1 * numbers(6, outputs, seed=seed), 0.1 * numbers(6, inputs, seed=seed + 1), scale)
    return quant.LowRank(first, 0.1 * numbers(runs, 3, outputs, seed=seed + 2), 0.1 * numbers(3, inputs, seed=seed + 3), jnp.float32(0.7))


def added(x: np.ndarray, w: Any) -> np.ndarray:
    """What the updates on a weight add to its product with x."""
    if not isinstance(w, quant.LowRank):
        return np.zeros((len(x), w.shape[0]), np.float32)
    a, b = np.asarray(w.a), np.asarray(w.b)
    rows = a if a.ndim == 3 else a[None]
    inner = np.asarray(w.scale) * (x @ b.T)
    return np.einsum("tr,tro->to", inner, np.repeat(rows, len(x) // len(rows), axis=0)) + added(x, w.base)


@pytest.mark.parametrize("each", [1, 5, 8, 11])
def test_updates_norms_and_biases_of_runs_of_rows(each: int) -> None:
    runs, rows = 3, 3 * each
    x, norm, bias, residual = (normals(*shape, seed=i) for i, shape in enumerate(((rows, 96), (runs, 96), (runs, 37), (rows, 37))))
    ws = weight((4, 32, 1, "float16"), 37, 96), weight((8, 16, 0, "float32"), 37, 96, seed=3)
    tiled = [updated(kernels.pack_tiles(w), runs, rows, seed) for w, seed in zip(ws, (10, 20), strict=True)]
    normed = np.asarray(ops.rms_norm(jnp.asarray(x), jnp.asarray(norm), EPS))
    one, other = (as_kernel_reads(normed, w) @ dense(w).T + added(normed, t) for w, t in zip(ws, tiled, strict=True))
    biases = np.repeat(bias, each, axis=0)
    found = kernels.norm_linear(jnp.asarray(x), jnp.asarray(norm), EPS, tiled, [jnp.asarray(bias), None])
    np.testing.assert_allclose(found[0], one + biases, atol=1e-2)
    np.testing.assert_allclose(found[1], other, atol=1e-2)
    gated = kernels.gated(jnp.asarray(x), jnp.asarray(norm), EPS, tiled[0], tiled[1], "relu", None, jnp.asarray(bias))
    np.testing.assert_allclose(gated, np.maximum(one, 0) * (other + biases), atol=5e-2)
    sums = kernels.linear_add(jnp.asarray(x), tiled[0], jnp.asarray(bias), jnp.asarray(residual))
    expected = as_kernel_reads(x, ws[0]) @ dense(ws[0]).T + added(x, tiled[0]) + biases + residual
    np.testing.assert_allclose(sums, expected, atol=1e-3)


def test_a_row_with_updates_does_not_depend_on_its_batch() -> None:
    x, w = numbers(12, 96, seed=1), updated(kernels.pack_tiles(weight(KINDS[0], 48, 96)), 3, 12, seed=5)
    together = np.asarray(kernels.norm_linear(x, None, 0.0, [w])[0])
    for i in (0, 5, 11):
        below = dataclasses.replace(w.base, scale=w.base.scale[i : i + 1])
        alone = kernels.norm_linear(x[i : i + 1], None, 0.0, [dataclasses.replace(w, base=below, a=w.a[i // 4])])[0]
        np.testing.assert_array_equal(np.asarray(alone)[0], together[i])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_activations(dtype: str) -> None:
    w, x = weight((8, 32, 0, "float16"), 24, 64), jnp.asarray(normals(5, 64), dtype)
    y = kernels.linear_add(x, kernels.pack_tiles(w), None, jnp.ones((5, 24), dtype))
    assert y.dtype == dtype
    expected = 1 + as_kernel_reads(np.asarray(x, np.float32), w) @ dense(w).T
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, atol=4e-2)


@pytest.mark.parametrize("kind", [(4, 32, 1, "float16"), (8, 16, 0, "float16"), "bfloat16"], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_number_stays_in_its_row(kind: Any, bad: float) -> None:
    x, w = normals(19, 64), kernels.pack_tiles(weight(kind, 20, 64))
    clean = np.asarray(kernels.norm_linear(jnp.asarray(x), jnp.ones(64), EPS, [w])[0])
    x[11, 5] = bad
    y = np.asarray(kernels.norm_linear(jnp.asarray(x), jnp.ones(64), EPS, [w])[0])
    assert np.isnan(y[11]).all()
    np.testing.assert_array_equal(np.delete(y, 11, 0), np.delete(clean, 11, 0))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_does_not_depend_on_its_batch(kind: Any) -> None:
    x, w = normals(47, 96), kernels.pack_tiles(weight(kind, 48, 96))
    together = np.asarray(kernels.norm_linear(jnp.asarray(x), None, 0.0, [w])[0])
    for i in (0, 5, 8, 33, 46):
        alone = kernels.norm_linear(jnp.asarray(x[i : i + 1]), None, 0.0, [w])[0]
        np.testing.assert_array_equal(np.asarray(alone)[0], together[i])


@pytest.mark.parametrize("isa", ["each"], indirect=True)
@pytest.mark.parametrize("kind", QUANTIZED, ids=str)
@pytest.mark.parametrize("inputs", [96, 256])
def test_amx_multiplies_codes_as_avx512_does(kind: Any, inputs: int) -> None:
    x, w = normals(32, inputs), kernels.pack_tiles(weight(kind, 40, inputs))
    results = [np.asarray(kernels.norm_linear(jnp.asarray(x), None, 0.0, [w])[0]) for _ in filter(native.use_isa, ("avx512", "amx"))]
    if len(results) < 2:
        pytest.skip("this machine has no AMX")
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("kind", [(4, 32, 0, "float16"), (5, 32, 1, "float16"), (6, 16, 0, "float32"), (8, 32, 0, "float16")], ids=str)
def test_the_largest_codes_overflow_nothing(kind: Any) -> None:
    w, x = weight(kind, 16, 64), np.full((9, 64), 127, np.float32) * np.array([[1], [-1], [1]] * 3, np.float32)
    low, high = (0, (1 << kind[0]) - 1) if kind[2] and kind[0] < 8 else (-(1 << (kind[0] - 1)), (1 << (kind[0] - 1)) - 1)
    for code in (low, high):
        full = quant.pack(np.full((16, 64), code, np.int8), np.ones_like(w.scales), w.mins, bits=kind[0], group=kind[1])
        y = kernels.norm_linear(jnp.asarray(x), None, 0.0, [kernels.pack_tiles(full)])[0]
        np.testing.assert_allclose(y, x @ dense(full).T, rtol=1e-5)


def test_large_products_are_shared_between_threads() -> None:
    x, w = normals(150, 320), weight((4, 32, 1, "float16"), 1000, 320)
    tiled = jax.tree.map(jnp.asarray, kernels.pack_tiles(w))
    call = jax.jit(lambda x, tiled: kernels.norm_linear(x, None, 0.0, [tiled])[0])
    for _ in range(5):
        np.testing.assert_allclose(call(jnp.asarray(x), tiled), as_kernel_reads(x, w) @ dense(w).T, atol=1e-3)


def random_layer(config: ModelConfig, kind: Any, seed: int) -> model.Layer:
    """Tiled matrices, random norms and biases."""

    def draw(path: tuple[Any, ...], leaf: model.ArraySpec) -> Any:
        numbers = zlib.crc32(model.leaf_name(path).encode()) + seed
        if len(leaf.shape) == 1:
            return jnp.asarray(normals(*leaf.shape, seed=numbers))
        return jax.tree.map(jnp.asarray, kernels.pack_tiles(weight(kind, *leaf.shape, seed=numbers)))

    return jax.tree_util.tree_map_with_path(draw, model.spec(config).layers[0])


@pytest.mark.parametrize(
    ("rows", "prompts_at"),
    [([(4, 1)], None), ([(199, 1), (0, 3), (0, 1), (130, 40)], None), ([(199, 1), (8, 1), (0, 3), (130, 40)], 2), ([(0, 40), (0, 1)], 0)],
    ids=["decode", "mixed", "decodes and prompts", "prompts"],
)
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "every feature"])
@pytest.mark.parametrize("kind", [(4, 32, 1, "float16"), (8, 16, 0, "float32"), "bfloat16"], ids=str)
def test_blocks_in_one_call_are_the_calls_one_by_one(kind: Any, plain: bool, rows: list[tuple[int, int]], prompts_at: int | None) -> None:
    biases = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
    every: dict[str, Any] = biases | {"qk_norm": True, "sliding_window": 50, "no_rope_interval": 2}
    config = dataclasses.replace(CONFIG, num_layers=3, **({} if plain else every | {"gated_mlp": False, "activation": "gelu"}))
    layers = [random_layer(config, kind, seed) for seed in range(3)]
    batch = jax.tree.map(jnp.asarray, ragged(rows, 3, 1, 4, np.random.default_rng(0)))
    batch = dataclasses.replace(batch, prompts_at=None if prompts_at is None else jnp.array([prompts_at], jnp.int32))
    x = jnp.asarray(normals(batch.tokens.shape[0], 64))
    pages = int(batch.page_tables.max()) + 1
    start = cache.init_cache(config, pages, 4, jnp.dtype("float16"), lambda shape, dtype: jnp.asarray(normals(*shape), dtype))

    def run(layers: list[model.Layer]) -> Any:
        return model.run_blocks(layers, config, x, batch, start, pages=pages, context=256)

    found = run(layers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "_fuses", lambda layer: False)
        expected = run(layers)
    used = int(batch.query_starts[-1])
    np.testing.assert_array_equal(found[0][:used], expected[0][:used])
    assert not found[0][used:].any()  # padding
    for got, wanted in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        real = [i * pages + page for i in range(3) for page in range(1, pages)]  # padding may be written to page 0
        np.testing.assert_array_equal(got[np.asarray(real)], wanted[np.asarray(real)])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_prompt_s_states_do_not_depend_on_others_in_the_step(dtype: str) -> None:
    layers = [random_layer(CONFIG, (4, 32, 1, "float16"), 0)]

    def states(rows: list[tuple[int, int]], prompts_at: int) -> np.ndarray:
        batch = jax.tree.map(jnp.asarray, ragged(rows, 0, 0, 4, np.random.default_rng(0)))
        batch = dataclasses.replace(batch, prompts_at=jnp.array([prompts_at], jnp.int32))
        pages = int(batch.page_tables.max()) + 1
        start = cache.init_cache(CONFIG, pages, 4, jnp.dtype("float32"))
        x = jnp.asarray(normals(21, 64)[-batch.tokens.shape[0] :], dtype)
        return np.asarray(model.run_blocks(layers, CONFIG, x, batch, start, pages=0, context=256)[0], np.float32)

    np.testing.assert_array_equal(states([(0, 1), (0, 20)], 1)[1:], states([(0, 20)], 0))


@pytest.mark.parametrize("prompts_at", [0, 6, 16])
def test_blocks_with_updates_norms_and_biases_of_runs_are_the_calls_one_by_one(prompts_at: int) -> None:
    config = dataclasses.replace(CONFIG, num_layers=2)
    batch = jax.tree.map(jnp.asarray, ragged([(4, 1), (30, 5), (9, 2), (1, 4)], 4, 1, 4, np.random.default_rng(0)))
    batch = dataclasses.replace(batch, prompts_at=jnp.array([prompts_at], jnp.int32))
    tokens, kind = batch.tokens.shape[0], (4, 32, 1, "float16")

    def change(layer: model.Layer, seed: int) -> model.Layer:
        names = "q", "v", "o", "gate", "up", "down"
        weights = {name: updated(getattr(layer, name), 2, tokens, seed + i) for i, name in enumerate(names)}
        norms = {name: 1 + 0.1 * numbers(2, 64, seed=seed) for name in ("attention_norm", "mlp_norm")}
        return dataclasses.replace(layer, **weights, **norms, down_bias=numbers(2, 64, seed=seed + 9))

    layers = [change(random_layer(config, kind, seed), 10 * seed) for seed in range(2)]
    pages = int(batch.page_tables.max()) + 1
    start = cache.init_cache(config, pages, 4, jnp.dtype("float32"), lambda shape, dtype: jnp.asarray(normals(*shape), dtype))
    x = numbers(tokens, 64, seed=7)
    found, _ = model.run_blocks(layers, config, x, batch, start, pages=pages, context=256)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "_fuses", lambda layer: False)
        expected, _ = model.run_blocks(layers, config, x, batch, start, pages=pages, context=256)
    used = int(batch.query_starts[-1])
    np.testing.assert_array_equal(found[:used], expected[:used])


def test_updates_of_wrong_sizes_are_refused() -> None:
    w = kernels.pack_tiles(weight((4, 32, 1, "float16"), 20, 64))
    for a, b in (((2, 19), (2, 64)), ((2, 20), (2, 63)), ((3, 2, 20), (2, 64))):
        one = quant.LowRank(w, jnp.ones(a), jnp.ones(b), jnp.float32(1))
        with pytest.raises(Exception, match="low-rank update has the wrong shape"):
            jax.block_until_ready(kernels.norm_linear(jnp.ones((2, 64)), None, 0.0, [one]))


def test_wrong_sizes_are_refused() -> None:
    w = kernels.pack_tiles(weight((4, 32, 1, "float16"), 20, 64))
    with pytest.raises(Exception, match="differ in inputs"):
        jax.block_until_ready(kernels.norm_linear(jnp.ones((2, 96)), None, 0.0, [w]))
    with pytest.raises(ValueError, match="cannot tile"):
        kernels.pack_tiles(np.ones((2, 3, 4), np.float32))


def check_attention(
    rows: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    dim: int = 8,
    page: int = 4,
    window: int = 0,
    pad: tuple[int, int] = (0, 0),
    dtype: str = "float32",
    softcap: float = 0.0,
) -> None:
    """Against `ragged_attention` over pools whose unwritten slots are NaN. pad: tokens, rows."""
    rng = np.random.default_rng(len(rows) + window)
    batch = jax.tree.map(jnp.asarray, ragged(rows, pad[0], pad[1], page, rng))
    pool = np.full((2, int(batch.page_tables.max()) + 1, heads[1], page, dim), np.nan, np.float32)
    for r, (old, new) in enumerate(rows):
        for i in range(old + new):
            pool[:, batch.page_tables[r, i // page], :, i % page] = rng.normal(size=(2, heads[1], dim))
    k, v = (cache.encode(jnp.asarray(p), jnp.dtype(dtype)) for p in pool)
    q = jnp.asarray(rng.normal(size=(len(batch.positions), heads[0], dim)), jnp.float32)
    result = np.asarray(kernels.attention(q, k, v, batch, scale=dim**-0.5, window=window, softcap=softcap))
    expected = ragged_attention(q, k, v, batch, scale=dim**-0.5, window=window, softcap=softcap)
    np.testing.assert_allclose(result, expected, atol=2e-2 if dtype == "bfloat16" else 2e-5)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (3, 1), (10, 2), (40, 1)], ids=str)
def test_attention_head_groupings(heads: tuple[int, int]) -> None:
    check_attention([(5, 3), (0, 7), (9, 1)], heads=heads)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
@pytest.mark.parametrize("dim", [8, 64, 80])
def test_attention_cache_types_and_dimensions(dtype: str, dim: int) -> None:
    check_attention([(70, 20), (33, 1), (140, 1)], dim=dim, page=16, heads=(6, 2), dtype=dtype)


def test_attention_of_one_token_per_row() -> None:
    check_attention([(0, 1), (9, 1), (33, 1)], pad=(1, 1))


def test_attention_of_long_rows() -> None:
    check_attention([(300, 70), (0, 40), (500, 1)], page=16)


def test_attention_windows() -> None:
    check_attention([(600, 40), (700, 1), (3, 20)], page=16, window=50)


def test_attention_softcap() -> None:
    check_attention([(20, 4), (50, 1)], softcap=0.5)


@pytest.mark.parametrize("isa", ["each"], indirect=True)  # one after the other on an example: what is compiled serves all
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    length=st.integers(1, 300),
    cuts=st.lists(st.integers(1, 299), max_size=6),
    shape=st.sampled_from([(4, 4, 64), (9, 3, 64), (4, 1, 16), (7, 1, 24), (40, 1, 16), (8, 2, 80), (6, 3, 128)]),
    page=st.sampled_from([4, 16, 32]),
    window=st.sampled_from([0, 0, 1, 30, 130]),
    softcap=st.sampled_from([0.0, 2.0]),
    dtype=st.sampled_from(["float16", "bfloat16", "float32", "int8"]),
    others=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_attention_does_not_depend_on_the_batch(
    length: int, cuts: list[int], shape: tuple[int, int, int], page: int, window: int, softcap: float, dtype: str, others: int, seed: int
) -> None:
    """A prompt in one piece, cut anywhere, and a token at a time: the same bits, wherever its pages lie and whoever is beside it."""
    heads, kv_heads, dim = shape
    rng = np.random.default_rng(seed)

    @jax.jit
    def attention(q: jax.Array, pool: jax.Array, batch: Any) -> jax.Array:
        pages = (cache.encode(p, jnp.dtype(dtype)) for p in pool)
        return kernels.attention(q, *pages, batch, scale=dim**-0.5, window=window, softcap=softcap)

    keys, values = rng.normal(size=(2, length, kv_heads, dim)).astype(np.float32)
    queries = rng.normal(size=(length, heads, dim)).astype(np.float32) * 2

    def attend(pieces: list[tuple[int, int]]) -> np.ndarray:
        """Queries [begin, end) of the sequence as the batch's rows, other sequences between them."""
        rows = [row for begin, end in pieces for row in [*[(3, 1 + seed % 20)] * others, (begin, end - begin)]]
        batch = ragged(rows, 0, 0, page, rng)
        pool = np.full((2, int(batch.page_tables.max()) + 1, kv_heads, page, dim), 0.5, np.float32)
        q = rng.normal(size=(len(batch.positions), heads, dim)).astype(np.float32)
        own = range(others, len(rows), others + 1)
        for row, (begin, end) in zip(own, pieces, strict=True):
            for i in range(end):
                pool[:, batch.page_tables[row, i // page], :, i % page] = keys[i], values[i]
            q[batch.query_starts[row] : batch.query_starts[row + 1]] = queries[begin:end]
        out = np.asarray(attention(q, pool, batch))
        return np.concatenate([out[batch.query_starts[row] : batch.query_starts[row + 1]] for row in own])

    bounds = [0, *sorted({cut for cut in cuts if cut < length}), length]
    last = list(range(max(length - 40, 0), length))
    for _ in filter(native.use_isa, ISAS):
        whole = attend([(0, length)])
        np.testing.assert_array_equal(attend(list(itertools.pairwise(bounds))), whole)
        np.testing.assert_array_equal(attend([(i, i + 1) for i in last]), whole[last])


@pytest.mark.parametrize("seed", range(4))
def test_attention_of_random_batches(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [(int(rng.integers(0, 41)), int(rng.integers(1, 10))) for _ in range(rng.integers(1, 5))]
    check_attention(rows, pad=(seed % 3, seed % 2), window=(0, 1, 5, 0)[seed])


@pytest.mark.parametrize("tokens", [1, 3, 50])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("half", [0, 4, 8])
def test_rope_write(tokens: int, norms: bool, half: int) -> None:
    page, heads, kv_heads, dim = 4, 3, 2, 16
    batch = jax.tree.map(jnp.asarray, ragged([(2, tokens), (0, 2)], 1, 0, page, np.random.default_rng(0)))
    total = len(batch.positions)
    q, k, v = (jnp.asarray(normals(total, h, dim, seed=h + i)) for i, h in enumerate((heads, kv_heads, kv_heads)))
    angles = normals(total, 1, half or 1, seed=9)
    rotation = (jnp.cos(angles), jnp.sin(angles)) if half else None
    q_norm, k_norm = (jnp.asarray(normals(dim, seed=s)) if norms else None for s in (5, 6))
    pages = jnp.zeros((int(batch.page_tables.max()) + 1, kv_heads, page, dim), jnp.float16)
    slots = cache.write_slots(batch, page)
    got = kernels.rope_write(q, k, v, rotation, slots, pages, pages, q_norm=q_norm, k_norm=k_norm, eps=EPS)
    if norms:
        q, k = ops.rms_norm(q, q_norm, EPS), ops.rms_norm(k, k_norm, EPS)
    if rotation is not None:
        q, k = ops.rope(q, *rotation), ops.rope(k, *rotation)
    np.testing.assert_allclose(got[0], q, atol=1e-5)
    for pages_got, value in zip(got[1:], (k, v), strict=True):
        expected = cache.write(pages, slots, value)
        np.testing.assert_allclose(np.asarray(pages_got, np.float32)[1:], np.asarray(expected, np.float32)[1:], atol=4e-3)


@pytest.mark.parametrize("dim", [8, 16, 40])
def test_rope_write_in_8_bits(dim: int) -> None:
    batch = jax.tree.map(jnp.asarray, ragged([(2, 9), (0, 2)], 1, 0, 4, np.random.default_rng(0)))
    q, k, v = (jnp.asarray(normals(len(batch.positions), 2, dim, seed=i)) for i in range(3))
    k, v = k.at[3].set(jnp.nan), v.at[4].set(0.0).at[5, 1, 2].set(jnp.inf)
    pages = cache.encode(jnp.zeros((int(batch.page_tables.max()) + 1, 2, 4, dim)), jnp.dtype("int8"))
    slots = cache.write_slots(batch, 4)
    got = kernels.rope_write(q, k, v, None, slots, pages, pages)[1:]
    for ours, values in zip(got, (k, v), strict=True):
        expected = cache.write(pages, slots, values)
        np.testing.assert_allclose(cache.decode(ours)[1:], cache.decode(expected)[1:], rtol=1e-6)


def test_pages_of_another_width_are_refused() -> None:
    batch = jax.tree.map(jnp.asarray, ragged([(0, 1)], 0, 0, 4, np.random.default_rng(0)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="unsupported pages"):
        kernels.attention(jnp.zeros((1, 1, 16)), *(jnp.zeros((2, 1, 4, 16), jnp.int8),) * 2, batch, scale=1.0)


def test_donated_pages_are_written_in_place() -> None:
    pages = [jnp.zeros((3, 1, 4, 16), jnp.float16) for _ in range(2)]
    pointers = {p.unsafe_buffer_pointer() for p in pages}
    heads, slots = jnp.ones((1, 1, 16)), (jnp.array([2]), jnp.array([1]))
    call = jax.jit(lambda k, v: kernels.rope_write(heads, heads, heads, None, slots, k, v), donate_argnums=(0, 1))
    _, k, v = call(*pages)
    assert {k.unsafe_buffer_pointer(), v.unsafe_buffer_pointer()} == pointers
    assert float(k.astype(jnp.float32).sum()) == 16
