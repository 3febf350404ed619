from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dinov2_fast.train.tensor_file import write_tensors


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "odd": torch.randn(3, 5, generator=generator),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "strided": torch.arange(12).reshape(3, 4).t(),
    }


def test_the_library_reads_back_every_tensor_exactly(tmp_path):
    tensors = _tensors()
    write_tensors(tmp_path / "a.safetensors", tensors)
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_equal_tensors_in_any_order_give_equal_bytes_whose_hash_and_size_are_returned(tmp_path):
    tensors = _tensors()
    metadata = {"b": "1", "a": "2", "c": "\u00e9"}
    first = write_tensors(tmp_path / "a", tensors, metadata)
    second = write_tensors(
        tmp_path / "b", dict(reversed(tensors.items())), dict(reversed(metadata.items()))
    )
    content = (tmp_path / "a").read_bytes()
    assert content == (tmp_path / "b").read_bytes()
    assert first == second == (hashlib.sha256(content).hexdigest(), len(content))


def test_metadata_is_found_in_the_header(tmp_path):
    write_tensors(tmp_path / "a", _tensors(), {"arch": "debug"})
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata() == {"arch": "debug"}


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "a", _tensors())
    assert (tmp_path / "a").read_text() == "mine"
