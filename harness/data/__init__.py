"""Count the samples of batches, and resume within an epoch.

In reading order:

    dataloaders        inspect and change loaders: sizes, generators, the samples of a rank
    batch_size         count the samples in a batch
    rng_state          capture and restore the random states of a rank
    memory_layout      read and write tensors that are not contiguous
    batch_sampler      start a loader's batch sampler at any batch
    resumable_loader   yield an epoch's batches from any position
    pending_iteration  record an iteration until it is known whether it trains
"""
