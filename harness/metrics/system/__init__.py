"""What the nodes of a job are busy with: read on each node, reduced on rank zero, without the trainers' threads.

In reading order:

    nodes      who is on which node, and which GPUs are the job's
    reading    one node's figures, from the system and from NVML
    reduction  the figures of all nodes as metrics, by the names that MLflow's System metrics page knows
    sampler    the thread on each node, and how the nodes tell rank zero
"""
