"""Start the ranks, connect them, exchange small values between them and propagate failures.

In reading order:

    topology           the processes and hardware of a run
    strategies         create the Accelerator for the requested strategy
    cpu_strategies     run every strategy on a CPU
    model_preparation  checks and changes of a model before and after accelerate prepares it
    broadcast          broadcast tensors of any type and layout
    global_batch       keep the global batch on another number of ranks
    slurm_env          SLURM's environment variables
    launch_identity    the launch that this process belongs to, and its latest rendezvous
    rendezvous         connect ranks that torch's elastic agent starts or restarts
    job_rendezvous     connect the ranks of a SLURM job, without a configured port
    job_secret         the secret of a job, and the handshake that authenticates both peers
    rank_values        encode values for other ranks as JSON and tensors
    collectives        make collective calls that carry small values
    consensus          reduce the ranks' requests without blocking the training loop
    uneven_inputs      detect ranks that run out of batches
    failure_monitor    stop all ranks when one fails
"""
