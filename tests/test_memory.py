"""Free memory: what the system says, and what a container's limit leaves."""

from pathlib import Path

import pytest

from tars_jax import memory


def group(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")
    return folder


def test_a_limit_counts_what_can_be_reclaimed(tmp_path: Path) -> None:
    folder = group(tmp_path, memory__max="1000", memory__current="700", memory__stat="anon 500\ninactive_file 150")
    assert memory._left(folder) == [450]


def test_the_older_control_groups(tmp_path: Path) -> None:
    files = {"memory__limit_in_bytes": "1000", "memory__usage_in_bytes": "900", "memory__stat": "total_inactive_file 50"}
    assert memory._left(group(tmp_path, **files)) == [150]


@pytest.mark.parametrize("files", [{}, {"memory__max": "max", "memory__current": "5", "memory__stat": ""}, {"memory__max": "10"}])
def test_no_limit(tmp_path: Path, files: dict[str, str]) -> None:
    assert memory._left(group(tmp_path, **files)) == []


def test_a_limit_that_is_exceeded_leaves_nothing(tmp_path: Path) -> None:
    folder = group(tmp_path, memory__max="10", memory__current="30", memory__stat="inactive_file 5")
    assert memory._left(folder) == [0]


def test_the_smallest_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_system_free_bytes", lambda: 100)
    monkeypatch.setattr(memory, "_cgroup_free_bytes", lambda root: [70, 200])
    assert memory.free_bytes() == 70


def test_free_memory_is_there() -> None:
    assert memory.free_bytes() > 1 << 20


@pytest.mark.parametrize(("count", "text"), [(6_012_954_214, "5.6 GiB"), (1 << 20, "1.0 MiB"), (0, "0.0 MiB")])
def test_sizes_read_like_ollamas(count: int, text: str) -> None:
    assert memory.show(count) == text
