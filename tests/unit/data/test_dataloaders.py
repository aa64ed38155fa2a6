from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader, skip_first_batches
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset

from harness.data import dataloaders
from harness.errors import DataError


class Letters(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(5))


def dataset(num_samples: int) -> TensorDataset:
    return TensorDataset(torch.arange(num_samples))


def rank_of(num_ranks: int, rank: int) -> Any:
    """An Accelerator's rank and number of ranks."""
    return SimpleNamespace(num_processes=num_ranks, process_index=rank)


topologies = st.tuples(st.integers(1, 40), st.integers(1, 7), st.integers(1, 5)).filter(lambda t: t[0] >= t[2])


# ------------------------------------------------------------------------- each sample once


@given(topologies, st.booleans())
def test_each_sample_is_on_one_rank_when_accelerate_repeats_some(topology: tuple[int, int, int], shuffle: bool) -> None:
    num_samples, batch_size, num_ranks = topology
    seen: list[int] = []
    rounds: set[int] = set()
    for rank in range(num_ranks):
        # The order must be the same on all ranks, as accelerate's seedable sampler makes it.
        own = DataLoader(dataset(num_samples), batch_size, shuffle=shuffle, generator=torch.Generator().manual_seed(3))
        loader = prepare_data_loader(own, num_processes=num_ranks, process_index=rank, put_on_device=False)
        taken = list(dataloaders.without_duplicates(rank_of(num_ranks, rank), loader))
        rounds.add(len(taken))
        for (values,), counts in taken:
            assert len(values) > 0  # a batch that does not count still goes through forward
            seen += values.tolist() if counts else []
    assert sorted(seen) == list(range(num_samples))
    assert len(rounds) == 1


@given(topologies.filter(lambda t: t[2] > 1))
def test_own_samples_are_counted_when_the_shard_repeats_some(topology: tuple[int, int, int]) -> None:
    num_samples, batch_size, num_ranks = topology
    seen: list[int] = []
    for rank in range(num_ranks):
        sampler = BatchSampler(SequentialSampler(range(num_samples)), batch_size, drop_last=False)
        shard = BatchSamplerShard(sampler, num_ranks, rank, even_batches=True)
        batches = list(shard)
        total = batch_size * num_ranks
        for index, batch in enumerate(batches):
            loader = SimpleNamespace(
                batch_sampler=shard,
                remainder=num_samples % total,
                total_batch_size=total,
                end_of_dataloader=index == len(batches) - 1,
            )
            num_real = dataloaders._num_real_samples(rank_of(num_ranks, rank), loader, batch)
            seen += batch if num_real is None else batch[:num_real]
    assert sorted(seen) == list(range(num_samples))


def test_incomplete_batch_is_omitted_when_drop_last_is_set() -> None:
    seen: list[int] = []
    for rank in range(2):
        own = DataLoader(dataset(11), 2, drop_last=True)
        loader = prepare_data_loader(own, num_processes=2, process_index=rank, put_on_device=False)
        for (values,), counts in dataloaders.without_duplicates(rank_of(2, rank), loader):
            assert counts
            seen += values.tolist()
    assert sorted(seen) == list(range(8))


def test_batches_are_equal_when_iterated_again() -> None:
    loader = prepare_data_loader(DataLoader(dataset(5), 2), num_processes=2, process_index=1, put_on_device=False)
    passes = [[(b[0].tolist(), c) for b, c in dataloaders.without_duplicates(rank_of(2, 1), loader)] for _ in range(2)]
    assert passes[0] == passes[1]
    assert [counts for _, counts in passes[0]] == [True, False]


def test_nested_tensors_are_cut_when_samples_repeat() -> None:
    def collate(items: list[tuple[torch.Tensor]]) -> dict[str, Any]:
        values = torch.stack([item[0] for item in items])
        return {
            "file": ["a"] * len(items),
            "x": values,
            "pair": [values + 10, values.unsqueeze(1)],
            "scale": torch.tensor(2.0),
            "images": [torch.zeros(3, 5) + value for value in values],
        }

    own = DataLoader(dataset(5), 4, collate_fn=collate)
    loader = prepare_data_loader(own, num_processes=2, process_index=1, put_on_device=False)
    ((batch, counts),) = dataloaders.without_duplicates(rank_of(2, 1), loader)
    assert counts
    assert batch["x"].tolist() == [4]
    assert [image.shape for image in batch["images"]] == [(3, 5)]
    assert batch["pair"][0].tolist() == [14]
    assert batch["pair"][1].shape == (1, 1)
    assert batch["scale"].item() == 2.0


def test_images_are_cut_when_channels_equal_the_batch_size() -> None:
    def cut(batch: Any) -> Any:
        return dataloaders._cut(batch, 2, 3)

    images = [torch.full((3, 32, 32), float(i)) for i in range(3)]
    assert [image.shape for image in cut(images)] == [(3, 32, 32)] * 2
    pictures, labels = cut((images, torch.arange(3)))
    assert [image.shape for image in pictures] == [(3, 32, 32)] * 2 and labels.tolist() == [0, 1]
    # Three fields of a batch of three.
    assert [field.shape for field in cut([torch.zeros(3, 3, 32, 32)] * 3)] == [(2, 3, 32, 32)] * 3


def test_samples_are_cut_when_one_has_the_size_by_chance() -> None:
    targets = [{"boxes": torch.zeros(n, 4), "label": torch.tensor(n)} for n in (3, 8, 1, 2, 8, 5, 4, 6)]
    words = [list(range(n)) for n in (2, 8, 1, 3, 4, 5, 6, 7)]
    images, cut_targets, cut_words = dataloaders._cut([torch.zeros(8, 3, 9, 9), targets, words], 3, 8)
    assert (len(images), cut_targets, cut_words) == (3, targets[:3], words[:3])
    assert dataloaders._cut(targets, 3, 8) == targets[:3]


def test_fields_stay_when_their_number_equals_the_size() -> None:
    fields = [torch.zeros(3, 3, 9, 9), torch.zeros(40, 4), torch.zeros(3)]
    assert [field.shape for field in dataloaders._cut(fields, 2, 3)] == [(2, 3, 9, 9), (40, 4), (2,)]


def test_error_when_repeats_of_an_iterable_are_unknown() -> None:
    loader = prepare_data_loader(
        DataLoader(Letters(), 2),
        torch.device("cpu"),
        num_processes=2,
        process_index=0,
        put_on_device=True,
        dispatch_batches=True,
    )
    with pytest.raises(DataError, match="iterable data set"):
        next(dataloaders.without_duplicates(rank_of(2, 0), loader))


# ------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(("length", "world_size"), [(0, 1), (1, 2), (7, 8)])
def test_error_has_both_numbers_when_samples_are_too_few(length: int, world_size: int) -> None:
    loader = DataLoader(dataset(length), sampler=SequentialSampler(range(length)))
    with pytest.raises(DataError, match=f"evaluation data set has {length} samples for {world_size} ranks"):
        dataloaders.check_size(loader, world_size, "evaluation")


def test_error_when_the_only_batch_is_dropped() -> None:
    with pytest.raises(DataError, match="training loader has no batch: 3 samples"):
        dataloaders.check_size(DataLoader(dataset(3), 4, drop_last=True), 1, "training")


def test_size_passes_when_sufficient_or_unknown() -> None:
    dataloaders.check_size(DataLoader(dataset(2), 4), 2, "training")
    dataloaders.check_size(DataLoader(Letters(), 4), 2, "training")
    dataloaders.check_size([1, 2], 2, "training")


@pytest.mark.parametrize(("num_batches", "expected"), [(1, [0, 1, 2]), (2, [0, 1, 2, 3, 4, 5]), (9, list(range(7)))])
def test_first_batches_are_in_order_when_the_loader_shuffles(num_batches: int, expected: list[int]) -> None:
    loader = dataloaders.first_batches(DataLoader(dataset(7), 3, shuffle=True), num_batches)
    for _ in range(2):
        assert [value for (batch,) in loader for value in batch.tolist()] == expected
    assert loader.batch_size == 3


def test_error_when_first_batches_have_no_size() -> None:
    with pytest.raises(DataError, match="overfit_batches"):
        dataloaders.first_batches(DataLoader(dataset(3), batch_size=None), 1)


# ------------------------------------------------------------------------- ranks with fewer batches


@given(topologies, st.booleans(), st.booleans(), st.integers(0, 3))
def test_rank_has_the_guaranteed_batches_when_uneven(
    topology: tuple[int, int, int], splits: bool, drops_last: bool, num_skipped: int
) -> None:
    num_samples, batch_size, num_ranks = topology
    size = batch_size * num_ranks if splits else batch_size
    lengths = []
    for rank in range(num_ranks):
        loader = prepare_data_loader(
            DataLoader(dataset(num_samples), size, drop_last=drops_last),
            num_processes=num_ranks,
            process_index=rank,
            put_on_device=False,
            split_batches=splits,
            even_batches=False,
        )
        if 0 < num_skipped < len(loader):
            loader = skip_first_batches(loader, num_skipped)
        assert dataloaders.may_be_uneven(loader, num_ranks) == (num_ranks > 1)
        lengths.append((dataloaders.guaranteed_num_batches(loader), len(list(loader))))
    assert all(found is None if num_ranks == 1 else 0 <= found <= real <= found + 1 for found, real in lengths)


def test_ranks_may_be_uneven_when_each_reads_a_stream() -> None:
    def prepared(**how: Any) -> Any:
        given = DataLoader(Letters(), 2)
        return prepare_data_loader(given, torch.device("cpu"), num_processes=2, process_index=0, **how)

    assert dataloaders.may_be_uneven(prepared(dispatch_batches=False), 2)
    assert not dataloaders.may_be_uneven(prepared(dispatch_batches=True, put_on_device=True), 2)
    assert not dataloaders.may_be_uneven(prepare_data_loader(DataLoader(dataset(5), 2), put_on_device=False), 1)
    assert not dataloaders.may_be_uneven(range(5), 2)
