from __future__ import annotations

import itertools
import re

from hypothesis import given
from hypothesis import strategies as st

from harness.checkpoint.layout import FilePlan, plan_files

sizes = st.dictionaries(st.text(max_size=4), st.integers(0, 100), max_size=30)


@given(sizes, st.one_of(st.none(), st.integers(1, 150)))
def test_each_tensor_is_in_one_file_and_no_file_is_too_large_when_planned(
    sizes_bytes: dict[str, int], limit: int | None
) -> None:
    plans = plan_files(sizes_bytes, "model", limit)
    assert [name for plan in plans for name in plan.tensors] == list(sizes_bytes)
    for plan in plans:
        assert limit is None or len(plan.tensors) <= 1 or sum(sizes_bytes[n] for n in plan.tensors) <= limit
    assert all(plan.tensors for plan in plans) or not sizes_bytes
    # Greedy: a file ends only where its successor's first tensor did not fit.
    for plan, following in itertools.pairwise(plans):
        assert limit is not None
        assert sum(sizes_bytes[n] for n in plan.tensors) + sizes_bytes[following.tensors[0]] > limit


@given(sizes, st.integers(1, 150))
def test_names_count_the_files_when_there_are_several(sizes_bytes: dict[str, int], limit: int) -> None:
    names = [plan.name for plan in plan_files(sizes_bytes, "model", limit)]
    if len(names) == 1:
        assert names == ["model.safetensors"]
        return
    found = [re.fullmatch(r"model-(\d{5})-of-(\d{5})\.safetensors", name) for name in names]
    assert [(int(m[1]), int(m[2])) for m in found if m] == [(i, len(names)) for i in range(1, len(names) + 1)]


def test_tensor_has_a_file_of_its_own_when_it_is_over_the_limit() -> None:
    plans = plan_files({"a": 3, "huge": 50, "b": 3, "c": 3}, "model", 6)
    assert [plan.tensors for plan in plans] == [("a",), ("huge",), ("b", "c")]


def test_there_is_one_empty_file_when_there_is_no_tensor() -> None:
    assert plan_files({}, "model", 5) == (FilePlan("model.safetensors", ()),)
