from __future__ import annotations

import itertools
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness.checkpoint.format.layout import TensorSpec, plan_layout, read_header
from harness.checkpoint.format.tensor_shard import DTYPE_NAMES, DTYPES
from harness.errors import CheckpointError

names = st.text(st.characters(codec="utf-8"), max_size=6).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
kinds = st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=12)
texts = st.dictionaries(names, names, max_size=3)


def random(dtype: str, shape: tuple[int, ...], seed: int) -> Tensor:
    spec = TensorSpec("model", "", dtype, shape)
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 2 if dtype == "BOOL" else 256, (spec.size_bytes,), generator=generator, dtype=torch.uint8)
    return data.view(DTYPES[dtype]).reshape(shape)


def parts(file: bytes) -> tuple[list[tuple[str, Any]], dict[str, str], bytes]:
    """Entries in their order, metadata, and data of a file."""
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    metadata = header.pop("__metadata__", {})
    return list(header.items()), metadata, file[end:]


def data_of(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@given(kinds, texts)
def test_file_is_as_safetensors_writes_it_when_planned(
    kinds: dict[str, tuple[str, tuple[int, ...]]], aliases: dict[str, str]
) -> None:
    tensors = {name: random(*kind, seed) for seed, (name, kind) in enumerate(kinds.items())}
    specs = [TensorSpec("model", name, *kind) for name, kind in kinds.items()]
    layout = plan_layout(specs, aliases)
    (file,) = layout.files
    ours = file.header + b"".join(data_of(tensors[spec.name]) for spec in file.tensors)
    theirs = safetensors.torch.save(tensors, {**aliases, "format": "pt"})
    assert parts(ours) == parts(theirs)
    assert file.size_bytes == layout.size_bytes == len(ours) == len(theirs)
    assert len(file.header) % 8 == 0
    for name, tensor in tensors.items():
        index, begin = layout.places["model", name]
        assert index == 0
        assert ours[begin : begin + tensor.nbytes] == data_of(tensor)


def test_every_type_of_torch_is_there_when_safetensors_has_it() -> None:
    candidates = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    supported = set()
    for dtype in candidates - {torch.float4_e2m1fn_x2}:  # two elements in a byte
        try:
            safetensors.torch.save({"": torch.empty(2, dtype=dtype)})
        except (KeyError, UserWarning):
            continue
        supported.add(dtype)
    assert set(DTYPE_NAMES) == supported


@given(kinds, st.integers(0, 150))
def test_files_respect_the_limit_when_weights_are_split(
    kinds: dict[str, tuple[str, tuple[int, ...]]], limit: int
) -> None:
    specs = [TensorSpec("model", name, *kind) for name, kind in kinds.items()]
    order = {spec.name: position for position, spec in enumerate(specs)}
    layout = plan_layout(specs, {}, limit)
    inside = [sorted(order[spec.name] for spec in file.tensors) for file in layout.files]
    assert list(itertools.chain(*inside)) == list(range(len(specs)))  # in the order of the model
    sizes = [sum(spec.size_bytes for spec in file.tensors) for file in layout.files]
    assert all(size <= limit or len(file.tensors) == 1 for size, file in zip(sizes, layout.files, strict=True))
    # Greedy: a file ends only where its successor's first tensor did not fit.
    for size, following in zip(sizes, inside[1:], strict=False):
        assert size + specs[following[0]].size_bytes > limit
    assert [file.size_bytes - len(file.header) for file in layout.files] == sizes


@given(kinds, st.integers(0, 150))
def test_names_and_index_are_those_of_transformers_when_split(
    kinds: dict[str, tuple[str, tuple[int, ...]]], limit: int
) -> None:
    specs = [TensorSpec("model", name, *kind) for name, kind in kinds.items()]
    layout = plan_layout(specs, {}, limit)
    found = [file.name for file in layout.files]
    if len(found) == 1:
        assert (found, layout.index) == (["model.safetensors"], None)
        return
    matches = [re.fullmatch(r"model-(\d{5})-of-(\d{5})\.safetensors", name) for name in found]
    assert [(int(m[1]), int(m[2])) for m in matches if m] == [(i, len(found)) for i in range(1, len(found) + 1)]
    assert layout.index == {
        "metadata": {"total_size": sum(spec.size_bytes for spec in specs)},
        "weight_map": {spec.name: file.name for file in layout.files for spec in file.tensors},
    }


def test_optimizer_has_its_own_file_when_weights_are_split() -> None:
    specs = [TensorSpec("model", name, "F32", (4,)) for name in "ab"]
    specs += [TensorSpec("optimizer", name, "F32", (100,)) for name in "ab"]
    layout = plan_layout(specs, {"c": "a"}, 16)
    assert [file.name for file in layout.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "optimizer.safetensors",
    ]
    assert layout.places["optimizer", "b"] == (2, len(layout.files[2].header) + 400)
    assert parts(layout.files[2].header)[1] == {"format": "pt"}
    assert layout.index is not None
    assert set(layout.index["weight_map"]) == {"a", "b"}


def test_there_is_one_empty_file_when_there_is_no_tensor() -> None:
    (file,) = plan_layout([], {}, 5).files
    assert safetensors.torch.load(file.header) == {}


def test_no_tensor_is_lost_when_it_has_the_name_of_the_metadata() -> None:
    specs = [TensorSpec("model", name, "F32", (1,)) for name in ("__metadata__", "a")]
    try:
        (file,) = plan_layout(specs, {}).files
    except CheckpointError:
        return  # safetensors has no place for it
    assert len(parts(file.header)[0]) == 2


@given(kinds, texts)
def test_header_is_read_when_safetensors_wrote_the_file(
    tmp_path_factory: pytest.TempPathFactory, kinds: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "read.safetensors"
    tensors = {name: random(*kind, seed) for seed, (name, kind) in enumerate(kinds.items())}
    path.write_bytes(safetensors.torch.save(tensors, metadata or None))  # safetensors 0.8: {} of {} is no JSON
    found, found_metadata = read_header(path)
    assert found_metadata == metadata
    assert set(found) == set(kinds)
    content = path.read_bytes()
    for name, place in found.items():
        assert (place.dtype, place.shape) == kinds[name]
        assert content[place.start : place.end] == data_of(tensors[name])
    assert [place.start for place in found.values()] == sorted(place.start for place in found.values())


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08\0\0",
        with_header(b"{}")[:-1],
        (1 << 63).to_bytes(8, "little"),
        with_header(b"{"),
        with_header(b"[]"),
        with_header(b"\xff\xfe"),
        with_header(b"{}", b"more"),
        with_header(b'{"a": 3}'),
        with_header(b'{"a": {"dtype": "F32", "shape": [1]}}', b"1234"),
        with_header(b'{"a": {"dtype": "F32", "shape": null, "data_offsets": [0, 4]}}', b"1234"),
        with_header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}', b"1234"),
        with_header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"123"),
        with_header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"12345"),
        with_header(b'{"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}', b"1234"),
        with_header(b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}', b"1234"),
        with_header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', b"1234"),
        with_header(b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', b"1234"),
        with_header(b'{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}', b"1234"),
        with_header(b'{"a": {"dtype": "F32", "shape": [0, 9223372036854775808], "data_offsets": [0, 0]}}'),
        with_header(
            b'{"a": {"dtype": "F32", "shape": [' + b"9" * 4000 + b"," + b"9" * 4000 + b'], "data_offsets": [0, 4]}}'
        ),
        with_header(b'{"a": {"dtype": "I8", "shape": [2], "data_offsets": [2, 4]}}', b"1234"),
        with_header(b'{"a": {"dtype": "I8", "shape": [2], "data_offsets": [-2, 0]}}', b"12"),
        with_header(b'{"a": {"dtype": "I8", "shape": [2], "data_offsets": [0.0, 2]}}', b"12"),
        with_header(b'{"a": {"dtype": "I8", "shape": [0], "data_offsets": [0, 0], "more": 1}}'),
        with_header(
            b'{"a": {"dtype": "I8", "shape": [3], "data_offsets": [0, 3]}, '
            b'"b": {"dtype": "I8", "shape": [2], "data_offsets": [2, 4]}}',
            b"1234",
        ),
        with_header(
            b'{"a": {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}, '
            b'"a": {"dtype": "I8", "shape": [2], "data_offsets": [0, 2]}}',
            b"12",
        ),
        with_header(b'{"__metadata__": {"format": 1}}'),
        with_header(b'{"__metadata__": []}'),
        with_header(b'{"\\ud800": {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}'),
        with_header(b"[" * 100_000),
        with_header(b'{"a": NaN}'),
    ],
)
def test_error_has_the_path_when_the_file_is_damaged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        read_header(path)


def test_error_is_raised_when_the_file_is_truncated_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors.torch.save({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.int8)}))
    for size in reversed(range(path.stat().st_size)):
        os.truncate(path, size)
        with pytest.raises(CheckpointError):
            read_header(path)


def test_header_is_not_read_when_it_exceeds_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((100_000_001).to_bytes(8, "little"))
    os.truncate(path, 200_000_000)
    with pytest.raises(CheckpointError, match="more than safetensors allows"):
        read_header(path)


@pytest.mark.parametrize("name", ["missing.safetensors", ""])
def test_error_has_the_path_when_there_is_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / name))):
        read_header(tmp_path / name)


def test_sizes_are_right_when_a_tensor_is_a_scalar_or_empty() -> None:
    for shape in [(), (0,), (2, 0, 3), (2, 3)]:
        spec = TensorSpec("model", "a", "BF16", shape)
        assert (spec.num_items, spec.size_bytes) == (math.prod(shape), 2 * math.prod(shape))
