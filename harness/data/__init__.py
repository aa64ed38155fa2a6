"""Batches: which samples they hold, and continuing in the middle of an epoch.

In reading order:

    dataloaders        the samples that a rank really has
    batch_size         the number of samples in a batch
    rng_state          the random number generators of a rank
    memory_layout      tensors that do not lie in C order
    batch_sampler      the sampler around a loader's own
    resumable_loader   one epoch's batches, from any position
    pending_iteration  a pass that may turn out to be training
"""
