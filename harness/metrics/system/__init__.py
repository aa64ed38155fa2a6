"""Utilization of a job's nodes: read in a thread on each node, reduced on rank zero, without the trainers' threads.

In reading order:

    nodes      which ranks and GPUs are on which node
    reading    one node's figures, from the system and from NVML
    reduction  the figures of all nodes as metrics, by the names of MLflow's System metrics page
    sampler    the thread on each node, and how nodes report to rank zero
"""
