"""Where `tars bench` says the time goes. What it measures is not tested, only that it is measured."""

import math

from tars_jax.bench import measure_bandwidth, measure_roofline, measure_stages
from tests.tiny import tiny_model

STAGES = ["tokenise", "embed", "blocks", "output head and sampling", "detokenise"]


def test_every_stage_of_a_request_is_timed() -> None:
    model = tiny_model()
    for count in (1, 20):
        stages = measure_stages(model, count, repetitions=3)
        assert list(stages) == STAGES
        assert all(ms >= 0 for ms in stages.values())
        assert stages["output head and sampling"] > 0


def test_the_roofline_counts_bytes_and_products_of_the_weights() -> None:
    model = tiny_model()
    config = model.config
    in_block = (
        2 * config.hidden_size**2 + 2 * config.hidden_size * config.hidden_size // 2 + 3 * config.hidden_size * config.intermediate_size
    )
    roofline = measure_roofline(model, 8, prefill=100.0, decode=dict.fromkeys(STAGES, 1.0))
    assert roofline.macs_per_token == config.num_layers * in_block
    assert roofline.bytes_per_token == 4 * (roofline.macs_per_token + config.vocab_size * config.hidden_size)
    assert math.isclose(roofline.decode_share * roofline.bandwidth_gb, roofline.bytes_per_token / 2e-3 / 1e9)
    assert math.isclose(roofline.prefill_share * roofline.gmacs, 100.0 * roofline.macs_per_token / 1e9)


def test_bandwidth_is_a_rate() -> None:
    assert 0.1 < measure_bandwidth(megabytes=16) < 100_000
