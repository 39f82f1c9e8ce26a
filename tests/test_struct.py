"""`tars_jax.struct` leaves flax's layers alone until somebody asks for them."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "later",
    [
        "import flax; flax.linen.Dense(3); assert flax.struct.dataclass is struct.dataclass; assert flax.__version__",
        "import flax.linen as nn; nn.Dense(3)",
        "from flax import serialization, traverse_util; assert traverse_util.flatten_dict",
        "import flax; tree = struct.dataclass(type('T', (), {'__annotations__': {'x': int}}))(x=1); "
        "from flax.serialization import to_state_dict; assert to_state_dict(tree) == {'x': 1}",
    ],
    ids=["attributes", "a module", "names", "our dataclasses"],
)
def test_flax_is_whole_for_whoever_imports_it_later(later: str) -> None:
    code = f"import sys; from tars_jax import struct; import tars_jax.model; assert 'flax.linen' not in sys.modules; {later}"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
