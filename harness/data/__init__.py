"""Batches: their samples, and resuming within an epoch.

In reading order:

    dataloaders        properties of loaders: sizes, generators, the samples of a rank
    batch_size         the number of samples in a batch
    rng_state          the random states of a rank
    memory_layout      tensors that are not contiguous
    batch_sampler      a wrapper that starts a loader's batch sampler at any batch
    resumable_loader   an epoch's batches, from any position
    pending_iteration  an iteration that may turn out to be training
"""
