"""Loaders: which samples a rank really has, and what cannot be trained on."""

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
    """Refuse a data set that does not give each rank a sample.

    Args:
        loader: a loader, prepared or not.
        world_size: number of ranks.
        what: ``training`` or ``evaluation``, for the message.

    Raises:
        DataError: if the data set is empty, or has fewer samples than there are ranks.
    """
    try:
        length = len(loader.dataset)
    except (TypeError, AttributeError):
        return
    if length < world_size:
        raise DataError(
            f"the {what} data set has {length} samples for {world_size} ranks; each rank needs at least one: "
            f"start at most {max(1, length)} processes, or give it more data"
        )
    try:
        num_batches = len(loader)
    except TypeError:
        return
    if num_batches == 0:
        raise DataError(
            f"the {what} loader gives no batch: {length} samples, and its incomplete last batch is dropped; "
            "use a smaller batch_size or drop_last=False"
        )


def first_batches(loader: DataLoader[Any], num_batches: int) -> DataLoader[Any]:
    """A loader of only the first batches of another, in the data set's order, not shuffled."""
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
    """The same loader with batches of another size, over the same samples in the same order."""
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
    """Samples in a batch of all ranks together, of a prepared loader; None: it has no size that is known.

    Not accelerate's `total_batch_size`, which is one rank's where each rank reads an iterable data set itself, and
    an error where a batch sampler has no size.
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
    """Whether a rank may have fewer batches of a prepared loader than another."""
    if world_size == 1 or isinstance(loader, DataLoaderDispatcher) or not hasattr(loader, "base_dataloader"):
        return False
    if isinstance(loader.base_dataloader.dataset, IterableDataset):
        # Each rank reads its own part, which may be of any length.
        return True
    shard = _shard_of(loader)
    return shard is not None and not shard.even_batches


def guaranteed_num_batches(loader: Any) -> int | None:
    """Batches that this rank has for sure, where accelerate lets the ranks have different numbers of them.

    None: they have as many.
    """
    shard = _shard_of(loader)
    if shard is None or shard.even_batches:
        return None
    # Of a batch that is split the last part of them may be empty, which accelerate's own count leaves out.
    may_miss_last = shard.split_batches and not shard.drop_last
    return max(0, len(loader) - int(may_miss_last))


def _shard_of(loader: Any) -> Any:
    """What gives a rank its batches of an indexed data set; None: there is one rank, or nothing of that kind."""
    base = getattr(loader, "base_dataloader", loader)
    sampler = getattr(base, "batch_sampler", None)
    if sampler is None:
        sampler = getattr(base, "sampler", None)
    # Inside what skips the first batches.
    while sampler is not None and not hasattr(sampler, "even_batches"):
        sampler = getattr(sampler, "batch_sampler", None)
    return None if sampler is None or sampler.num_processes == 1 else sampler


def has_random_order(loader: Any) -> bool:
    """Whether the order of a loader is drawn anew each time, and does not follow from its epoch."""
    sampler = sampler_of(loader)
    return isinstance(sampler, RandomSampler) and not isinstance(sampler, SeedableRandomSampler)


def generators_of(loader: Any) -> list[torch.Generator]:
    """Those that its order or its seeds come from, each once.

    Not that of accelerate's seedable sampler, which makes it in its first pass and seeds it by the epoch in each: its
    state decides nothing, and differs between a process that has just resumed and one that ran on.
    """
    sampler = sampler_of(loader)
    places = [(loader, "synchronized_generator"), (getattr(loader, "base_dataloader", loader), "generator")]
    if not isinstance(sampler, SeedableRandomSampler):
        places.insert(1, (sampler, "generator"))
    found = [getattr(holder, name, None) for holder, name in places]
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


def sampler_of(loader: Any) -> Any:
    """What the order of the samples, or of the batches, comes from, inside all that accelerate puts around it."""
    sampler = getattr(getattr(loader, "base_dataloader", loader), "batch_sampler", None)
    while (inner := getattr(sampler, "batch_sampler", None)) is not None:
        sampler = inner
    return getattr(sampler, "sampler", sampler)


def local_batch_size(loader: Any, world_size: int) -> int | None:
    """Samples in a whole batch of a loader on one rank; None: it has no size that is known."""
    size = global_batch_size(loader, world_size)
    return None if size is None else size // world_size


def close_iteration(loader: Any, iterator: Any) -> None:
    """End an iteration early in good order: accelerate clears its state only at the natural end.

    Args:
        loader: that is iterated over.
        iterator: over it, or over what was made of it.
    """
    if hasattr(iterator, "close"):
        iterator.close()
    gradient_state = getattr(loader, "gradient_state", None)
    if gradient_state is not None and loader in gradient_state.dataloader_references:
        loader.end()


def without_duplicates(accelerator: Accelerator, loader: Any) -> Iterator[tuple[Any, bool]]:
    """The batches of a prepared evaluation loader, each sample of the data set on exactly one rank.

    To keep the ranks in step accelerate fills the last round up with samples from the start. Those are
    cut off here; a rank whose last batch has no sample of its own still runs it, as the strategies'
    collectives in forward need every rank, but the batch is marked as not counting.

    Effects: as the loader's own iteration; main thread.

    Args:
        accelerator: which rank of how many.
        loader: a loader that went through `accelerator.prepare`.

    Yields:
        The batch, and whether it counts.

    Raises:
        DataError: on several ranks, if the loader does not tell which samples repeat.
    """
    iterable = isinstance(loader, DataLoaderDispatcher) or isinstance(loader.dataset, IterableDataset)
    if accelerator.num_processes > 1 and iterable:
        raise DataError(
            "an iterable data set does not tell which samples repeat in the last batch; evaluate on one with a "
            "length, or use accelerator.gather_for_metrics in a loop of your own"
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
    """How many samples of this batch are this rank's own; None: all of them."""
    shard: Any = getattr(loader, "batch_sampler", None)
    fills_up = getattr(shard, "even_batches", False) and getattr(shard, "num_processes", 1) > 1
    if not fills_up or getattr(shard, "drop_last", False) or not getattr(loader, "end_of_dataloader", False):
        return None
    # Not accelerate's own `remainder`: that counts the data set, of which a sampler may take a part.
    try:
        num_samples = len(shard.batch_sampler.sampler)
    except (TypeError, AttributeError) as error:
        raise DataError(
            "the evaluation loader's sampler has no length, so the samples that repeat in the last batch cannot be "
            "told; give it a sampler with a length"
        ) from error
    remainder = num_samples % loader.total_batch_size
    if remainder == 0:
        return None
    of_each_rank: int = loader.total_batch_size // accelerator.num_processes
    own: int = remainder - accelerator.process_index * of_each_rank
    return max(0, min(of_each_rank, own))


def _cut(batch: Any, num_samples: int, usual: int | None) -> Any:
    """The first samples of a batch: of its tensors, and of its lists that have an item for each sample."""
    size = batch_size(batch, usual)

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
