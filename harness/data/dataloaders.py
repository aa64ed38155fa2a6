"""Inspect and change loaders: their sizes, their generators and the samples of a rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, IterableDatasetShard, SeedableRandomSampler
from accelerate.utils import honor_type
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from harness.data.batch_size import are_samples, batch_size
from harness.errors import DataError


def check_size(loader: Any, world_size: int, what: str) -> None:
    """Refuse a data set with fewer samples than ranks, or a loader without a batch. Unknown lengths pass.

    Raises:
        DataError: with the numbers and the remedy.
    """
    try:
        length = len(loader.dataset)
    except (TypeError, AttributeError):
        return
    if length < world_size:
        raise DataError(
            f"the {what} data set has {length} samples for {world_size} ranks; each rank needs at least one: "
            f"start at most {max(1, length)} processes, or use more data"
        )
    try:
        num_batches = len(loader)
    except TypeError:
        return
    if num_batches == 0:
        raise DataError(
            f"the {what} loader has no batch: {length} samples, and its incomplete last batch is dropped; "
            "use a smaller batch_size or drop_last=False"
        )


def first_batches(loader: DataLoader[Any], num_batches: int) -> DataLoader[Any]:
    """Return a loader of only the first batches of a data set, in its order.

    Raises:
        DataError: if the loader has no batch size.
    """
    if loader.batch_size is None:
        raise DataError("trainer.overfit_batches: needs a loader with a batch_size")
    count = min(num_batches * loader.batch_size, len(loader.dataset))  # type: ignore[arg-type]
    subset = Subset(loader.dataset, range(count))
    return DataLoader(
        subset,
        batch_size=loader.batch_size,
        sampler=SequentialSampler(subset),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
    )


def with_batch_size(loader: DataLoader[Any], size: int) -> DataLoader[Any]:
    """Return a loader of the same samples in the same order, with batches of another size."""
    return DataLoader(
        loader.dataset,
        batch_size=size,
        sampler=None if isinstance(loader.dataset, IterableDataset) else loader.sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def global_batch_size(loader: Any, world_size: int) -> int | None:
    """Return the number of samples that all ranks together have in one batch of a prepared loader; None if unknown.

    accelerate's `total_batch_size` is one rank's size if each rank reads an iterable data set itself, and raises for a
    batch sampler without a size.
    """
    base = getattr(loader, "base_dataloader", loader)
    source = base.batch_sampler if getattr(base, "batch_sampler", None) is not None else base
    if isinstance(getattr(base, "dataset", None), IterableDatasetShard):
        source = base.dataset
    size = getattr(source, "batch_size", None)
    if not isinstance(size, int):
        return None
    splits = getattr(source, "split_batches", False) or getattr(loader, "split_batches", False)
    return size if splits else size * world_size


def may_be_uneven(loader: Any, world_size: int) -> bool:
    """Whether ranks may get different numbers of batches from a prepared loader."""
    if world_size == 1 or isinstance(loader, DataLoaderDispatcher) or not hasattr(loader, "base_dataloader"):
        return False
    if isinstance(loader.base_dataloader.dataset, IterableDataset):
        # Each rank reads its own part, which may have any length.
        return True
    shard = _shard_of(loader)
    return shard is not None and not shard.even_batches


def guaranteed_num_batches(loader: Any) -> int | None:
    """Return the smallest number of batches on this rank; None if all ranks have the same number."""
    shard = _shard_of(loader)
    if shard is None or shard.even_batches:
        return None
    # If batches are split, the last one may have no part for this rank, which accelerate's `len` ignores.
    may_miss_last = shard.split_batches and not shard.drop_last
    return max(0, len(loader) - int(may_miss_last))


def _shard_of(loader: Any) -> Any:
    """Return the sampler that selects this rank's batches; None for one rank or another kind of loader."""
    base = getattr(loader, "base_dataloader", loader)
    sampler = getattr(base, "batch_sampler", None)
    if sampler is None:
        sampler = getattr(base, "sampler", None)
    # It may be inside accelerate's wrapper that skips the first batches.
    while sampler is not None and not hasattr(sampler, "even_batches"):
        sampler = getattr(sampler, "batch_sampler", None)
    return None if sampler is None or sampler.num_processes == 1 else sampler


def has_random_order(loader: Any) -> bool:
    """Whether each iteration draws a new order that is not derived from the epoch."""
    sampler = sampler_of(loader)
    return isinstance(sampler, RandomSampler) and not isinstance(sampler, SeedableRandomSampler)


def generators_of(loader: Any) -> list[torch.Generator]:
    """Return the distinct generators from which a loader draws its order or its seeds.

    The generator of accelerate's seedable sampler is excluded. Each iteration seeds it by the epoch, so its state has
    no effect, and differs between a resumed and an uninterrupted process.
    """
    sampler = sampler_of(loader)
    places = [(loader, "synchronized_generator"), (getattr(loader, "base_dataloader", loader), "generator")]
    if not isinstance(sampler, SeedableRandomSampler):
        places.insert(1, (sampler, "generator"))
    found = [getattr(holder, name, None) for holder, name in places]
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


def sampler_of(loader: Any) -> Any:
    """Return the innermost sampler of samples or batches, inside accelerate's wrappers."""
    sampler = getattr(getattr(loader, "base_dataloader", loader), "batch_sampler", None)
    while (inner := getattr(sampler, "batch_sampler", None)) is not None:
        sampler = inner
    return getattr(sampler, "sampler", sampler)


def local_batch_size(loader: Any, world_size: int) -> int | None:
    """Return the number of samples in a full batch of a loader on one rank; None if unknown."""
    size = global_batch_size(loader, world_size)
    return None if size is None else size // world_size


def close_iteration(loader: Any, iterator: Any) -> None:
    """End an iteration over a loader early, because accelerate clears its state only after the last batch."""
    if hasattr(iterator, "close"):
        iterator.close()
    gradient_state = getattr(loader, "gradient_state", None)
    if gradient_state is not None and loader in gradient_state.dataloader_references:
        loader.end()


def without_duplicates(accelerator: Accelerator, loader: Any) -> Iterator[tuple[Any, bool]]:
    """Yield the batches of a prepared evaluation loader, with each sample on exactly one rank.

    accelerate repeats samples from the start of the data set, so that every rank has the same number of batches. The
    repeated samples are removed here. A batch of only repeated samples is still yielded, because the collectives in
    forward need every rank, but it does not count.

    Effects: as the loader's own iteration; main thread.

    Yields:
        The batch, and whether it counts.

    Raises:
        DataError: with several ranks, if the repeated samples are unknown.
    """
    iterable = isinstance(loader, DataLoaderDispatcher) or isinstance(loader.dataset, IterableDataset)
    if accelerator.num_processes > 1 and iterable:
        raise DataError(
            "the repeated samples in the last batch of an iterable data set are unknown; evaluate on a data set with "
            "a length, or use accelerator.gather_for_metrics in a loop of your own"
        )
    for batch in loader:
        num_real = _num_real_samples(accelerator, loader, batch)
        if num_real is None:
            yield batch, True
        elif num_real == 0:
            yield batch, False
        else:
            yield _cut(batch, num_real, local_batch_size(loader, accelerator.num_processes)), True


def _num_real_samples(accelerator: Accelerator, loader: Any, batch: Any) -> int | None:
    """Return the number of samples of this batch that are not repeated; None for all."""
    shard: Any = getattr(loader, "batch_sampler", None)
    fills_up = getattr(shard, "even_batches", False) and getattr(shard, "num_processes", 1) > 1
    if not fills_up or getattr(shard, "drop_last", False) or not getattr(loader, "end_of_dataloader", False):
        return None
    # accelerate's `remainder` is that of the data set, of which the sampler may use only a part.
    try:
        num_samples = len(shard.batch_sampler.sampler)
    except (TypeError, AttributeError) as error:
        raise DataError(
            "the evaluation loader's sampler has no length, so the repeated samples in its last batch are unknown; "
            "use a sampler with a length"
        ) from error
    remainder = num_samples % loader.total_batch_size
    if remainder == 0:
        return None
    local_size: int = loader.total_batch_size // accelerator.num_processes
    own: int = remainder - accelerator.process_index * local_size
    return max(0, min(local_size, own))


def _cut(batch: Any, num_samples: int, full_size: int | None) -> Any:
    """Return the first samples of a batch, from its tensors and its lists of samples."""
    size = batch_size(batch, full_size)

    def first(value: Any, is_top: bool = False) -> Any:
        if isinstance(value, torch.Tensor):
            return value[:num_samples] if value.ndim and value.shape[0] == size else value
        if isinstance(value, Mapping):
            return type(value)({key: first(item) for key, item in value.items()})  # type: ignore[call-arg]
        if not isinstance(value, (list, tuple)):
            return value
        if are_samples(value, size, is_top=is_top):
            return value[:num_samples]
        return honor_type(value, (first(item) for item in value))

    return first(batch, is_top=True)
