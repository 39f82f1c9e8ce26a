"""Builds the CPU kernels into the package where there is a C++ compiler; without one the package installs all the same."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

KERNELS = Path("tars_jax") / "kernels"


def load_builder() -> Any:
    """tars_jax/kernels/build.py by its path: the package itself needs jax, which a build environment does not have."""
    spec = importlib.util.spec_from_file_location("tars_kernels_build", Path(__file__).parent / KERNELS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


builder = load_builder()


def has_compiler() -> bool:
    try:
        builder.find_compiler()
    except builder.BuildError as error:
        print(f"tars-jax installs without CPU kernels: {error}", file=sys.stderr)
        return False
    return True


class BuildWithKernels(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode or not has_compiler():  # an editable install builds into the user's cache when first used
            return
        try:
            builder.build(Path(self.build_lib) / KERNELS)
            (Path(self.build_lib) / KERNELS / "lock").unlink(missing_ok=True)
        except builder.BuildError as error:
            print(f"tars-jax installs without CPU kernels: {error}", file=sys.stderr)


class KernelDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        """A wheel that holds a library belongs to one platform."""
        return has_compiler()


setup(cmdclass={"build_py": BuildWithKernels}, distclass=KernelDistribution)
