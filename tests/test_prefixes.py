"""Prefix pages on disk: restored as they were, or not at all."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tars_jax import Engine, SamplingParams
from tars_jax.engine.pages import PageAllocator
from tars_jax.engine.prefixes import Prefixes, PrefixFolder, PrefixPage
from tests.test_engine import CONFIG, text
from tests.tiny import tiny_model

SHAPES = [((2, 3), np.dtype(np.float16))]
KEY = {"model": "m"}


def prefixes(count: int, value: float = 1.0) -> Prefixes:
    pages = [PrefixPage(i - 1, (i, i)) for i in range(count)]
    return Prefixes(pages, [np.full((count, 2, 3), value, np.float16)])


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    folder = PrefixFolder(tmp_path / "new", 1 << 20)
    folder.save(KEY, prefixes(3))
    found = folder.load(KEY, SHAPES, page_size=2)
    assert found is not None
    assert list(found.pages) == list(prefixes(3).pages)
    np.testing.assert_array_equal(found.arrays[0], prefixes(3).arrays[0])


def test_another_key_finds_nothing(tmp_path: Path) -> None:
    folder = PrefixFolder(tmp_path, 1 << 20)
    folder.save(KEY, prefixes(3))
    assert folder.load({"model": "other"}, SHAPES, page_size=2) is None


@pytest.mark.parametrize("damage", [lambda data: data[:40], lambda data: b"\xff" * 64, lambda data: data[:-6]])
def test_a_damaged_file_is_deleted(tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture) -> None:
    folder = PrefixFolder(tmp_path, 1 << 20)
    folder.save(KEY, prefixes(3))
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert folder.load(KEY, SHAPES, page_size=2) is None
    assert not list(tmp_path.iterdir())
    assert "unusable" in caplog.text


def test_a_cache_of_another_shape_is_not_loaded(tmp_path: Path) -> None:
    folder = PrefixFolder(tmp_path, 1 << 20)
    folder.save(KEY, prefixes(3))
    assert folder.load(KEY, [((2, 4), np.dtype(np.float16))], page_size=2) is None


def test_the_oldest_files_make_room(tmp_path: Path) -> None:
    folder = PrefixFolder(tmp_path, 1000)
    for name in "abc":
        folder.save({"model": name}, prefixes(20))
    assert [folder.load({"model": name}, SHAPES, page_size=2) is not None for name in "abc"] == [False, False, True]


def test_a_folder_that_cannot_be_written_costs_only_the_prefixes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    PrefixFolder(tmp_path / "file", 1000).save(KEY, prefixes(2))
    assert "could not keep" in caplog.text


def test_kept_pages_come_back_in_the_order_of_their_use() -> None:
    pages = PageAllocator(8, 2)
    held = pages.allocate(4)
    root, other = (pages.match([], name)[1] for name in ("root", "other root"))
    pages.share(pages.share(root, (1, 2), held[0]), (3, 4), held[1])
    pages.share(root, (5, 6), held[2])
    pages.share(other, (5, 6), held[3])
    pages.free(held[2:])
    pages.free(held[:2])
    kept = pages.kept("root", 2)
    assert [(before, tokens) for _, before, tokens in kept] == [(-1, (1, 2)), (0, (3, 4))]
    fresh = PageAllocator(8, 2)
    numbers = fresh.restore([(before, tokens) for _, before, tokens in kept], "new root")
    assert fresh.match([1, 2, 3, 4, 5], "new root")[0] == numbers
    assert fresh.num_free == 5


def test_a_new_engine_goes_on_where_the_old_one_was(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, prefix_folder=str(tmp_path), prefix_bytes=1 << 20)
    prompt = "what is the meaning of this text, exactly?"
    params = SamplingParams(max_tokens=12, temperature=0)
    model = tiny_model()
    first = Engine(model, config)
    expected = text(first, prompt, params)
    first.close()
    second = Engine(model, config)
    assert text(second, prompt, params) == expected
    assert second.stats().reused_tokens == 32
    second.close()


def test_other_weights_leave_nothing(tmp_path: Path) -> None:
    engine = Engine(tiny_model(), dataclasses.replace(CONFIG, prefix_folder=str(tmp_path), prefix_bytes=1 << 20))
    engine.swap(tiny_model(seed=1).params)
    text(engine, "what is the meaning of this text, exactly?")
    engine.close()
    assert not list(tmp_path.iterdir())
