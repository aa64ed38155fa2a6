"""The ranks: how they start, meet, agree and fail.

In reading order:

    strategies       the Accelerator, and the facts about this rank
    cpu_strategies   every strategy on a CPU
    fsdp2_layers     transformers models under FSDP2
    precision        mixed precision, by strategy
    buffers          buffers that differ between ranks
    elastic          the same global batch on another number of ranks
    slurm_env        the variables of SLURM
    meeting          how the ranks of this process met
    launch_identity  the launch that this process belongs to
    handshake        two processes prove that they know a secret
    job_secret       the secret of a job
    job_rendezvous   ranks without a given port find each other
    rendezvous       ranks started by torch's elastic agent, for the first time or again
    rank_values      values between ranks, as JSON and tensors
    collectives      decisions that all ranks take alike
    consensus        what one rank asks for, known to all at the same step
    uneven_inputs    ranks with different numbers of batches
    failure_monitor  one rank fails, all stop
"""
