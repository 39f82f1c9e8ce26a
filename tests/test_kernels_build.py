"""Building the kernels' library: cached, checked before it is opened, and never in the way when it cannot be built."""

import json
import platform
import shutil
from pathlib import Path

import pytest

from tars_jax import kernels
from tars_jax.kernels import build, native

needs_kernels = pytest.mark.skipif(not kernels.available(), reason=f"no kernels: {kernels.unavailable_reason()}")


@pytest.fixture
def built(tmp_path: Path) -> Path:
    library_path = build.ensure()
    for name in (build.LIBRARY, f"{build.LIBRARY}.json"):
        shutil.copy(library_path.parent / name, tmp_path / name)
    return tmp_path


@needs_kernels
def test_a_good_library_is_taken(built: Path) -> None:
    assert build.check(built) is None


@needs_kernels
@pytest.mark.parametrize(
    ("field", "value", "why"),
    [("sources", "0", "other sources"), ("machine", "pdp11", "for pdp11"), ("jaxlib", "99.0.0", "newer"), ("sha256", "0", "not the file")],
)
def test_a_foreign_library_is_refused(built: Path, field: str, value: str, why: str) -> None:
    manifest = built / f"{build.LIBRARY}.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {field: value}))
    assert why in (build.check(built) or "")


@needs_kernels
def test_a_truncated_library_is_refused(built: Path) -> None:
    path = built / build.LIBRARY
    path.write_bytes(path.read_bytes()[:1000])
    assert "not the file" in (build.check(built) or "")


def test_no_library_and_no_manifest(tmp_path: Path) -> None:
    assert "no usable library" in (build.check(tmp_path) or "")
    (tmp_path / f"{build.LIBRARY}.json").write_text("[1]")
    assert "no usable library" in (build.check(tmp_path) or "")


def test_without_a_compiler_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "check", lambda directory: "nothing here")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    reason = native.load.__wrapped__()
    assert isinstance(reason, str)
    assert "no C++ compiler" in reason


def test_a_compiler_that_fails_is_a_build_error(tmp_path: Path) -> None:
    with pytest.raises(build.BuildError, match="false"):
        build.build(tmp_path, ["false"])
    assert not (tmp_path / build.LIBRARY).exists()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of x86")
def test_a_compiler_that_does_not_know_amx_builds_without_it(tmp_path: Path) -> None:
    compiler, calls = tmp_path / "old-c++", tmp_path / "calls"
    compiler.write_text(f"""#!/bin/sh
echo "$*" >> {calls}
case "$*" in *-mamx*) echo "unrecognized option" >&2; exit 1;; esac
while [ "$1" != -o ]; do shift; done
: > "$2"
""")
    compiler.chmod(0o755)
    build.build(tmp_path / "out", [str(compiler)])
    of_amx = [line for line in calls.read_text().splitlines() if "isa_amx.cc" in line]
    assert ["-mamx-int8" in line for line in of_amx] == [True, False]
    assert (tmp_path / "out" / build.LIBRARY).exists()


def test_the_named_compiler_comes_first(tmp_path: Path) -> None:
    with pytest.raises(build.BuildError, match="nonesuch"):
        build.find_compiler({"CXX": "nonesuch -O1", "PATH": str(tmp_path)})
