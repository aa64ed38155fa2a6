"""Metrics: reduce the values that each rank logs to one number over a window of steps and all ranks.

In reading order:

    values             logged values as numbers and steps
    learning_rates     learning rates of the optimizers
    step_timer         times of optimizer steps
    torchmetrics_sync  torchmetrics objects over all ranks
    reducer            weighted means over steps and ranks, in one reduction
    aggregator         from a batch's values to a window's published ones
    system/            utilization of the nodes of a job
"""
