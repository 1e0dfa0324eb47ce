"""Files that torch wrote: a committed one, and where torch is installed one of its own, both ways."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jax_deepgemm.checkpoint import Checkpoint, save_safetensors
from tests.checkpoint.data import write as library
from tests.checkpoint.data import write_torch

pytestmark = pytest.mark.any_version


def right(path: Path) -> None:
    tensors = Checkpoint(path)
    for dtype in write_torch.TYPES:
        array = tensors[f"a.{dtype}"]
        assert tensors.dtype(f"a.{dtype}") == dtype
        assert array.tobytes() == library.contents(dtype, library.SHAPE)
        assert list(array.shape) == library.SHAPE
    assert np.array_equal(tensors["turned"], np.arange(6).reshape(2, 3).T)
    assert (tensors["scalar"].shape, tensors["scalar"].item()) == ((), 1.0)


def test_the_committed_file() -> None:
    right(write_torch.FILE)


def test_torch_writes_the_same_and_reads_ours(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    read = pytest.importorskip("safetensors.torch").load_file
    write_torch.save(tmp_path / "theirs.safetensors")
    right(tmp_path / "theirs.safetensors")
    save_safetensors(tmp_path / "ours.safetensors", Checkpoint(write_torch.FILE))
    for name, tensor in read(tmp_path / "ours.safetensors").items():
        want = write_torch.tensors()[name]
        assert tensor.dtype == want.dtype
        assert tensor.shape == want.shape
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8))
