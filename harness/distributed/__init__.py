"""Ranks: how they start, find one another, exchange values and fail.

In reading order:

    topology           the processes and hardware of a run
    strategies         create the Accelerator for the requested strategy
    cpu_strategies     every strategy on a CPU
    model_preparation  what a model needs before and after accelerate prepares it
    broadcast          broadcast tensors of any type and layout
    global_batch       the same global batch on another number of ranks
    slurm_env          SLURM's environment variables
    launch_identity    the launch that this process belongs to, and its last rendezvous
    rendezvous         ranks that torch's elastic agent starts or restarts
    job_rendezvous     ranks of a SLURM job, without a configured port
    job_secret         the secret of a job, and the handshake that proves it is known
    rank_values        encode values for other ranks as JSON and tensors
    collectives        collective calls that carry small values
    consensus          requests of any rank, known to all at the same step
    uneven_inputs      ranks with different numbers of batches
    failure_monitor    stop all ranks when one fails
"""
