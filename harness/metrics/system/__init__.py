"""Measure the utilization of a job's nodes in one thread on each node, and reduce it on rank zero.

In reading order:

    nodes      which ranks and GPUs are on which node
    reading    one node's figures, from the system and from NVML
    reduction  the figures of all nodes as metrics, by the names of MLflow's System metrics page
    sampler    the thread on each node, and how nodes report to rank zero
"""
