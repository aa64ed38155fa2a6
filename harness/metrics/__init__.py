"""From values on each rank to one number.

In reading order:

    values             what a user logs, as numbers and steps
    learning_rates     the learning rates of an optimizer
    step_timer         times of optimizer steps
    torchmetrics_sync  torchmetrics objects over all ranks
    reducer            weighted means over steps and ranks, in one reduction
    aggregator         from a batch's values to a window's
    history            the latest values, and those that wait for their epoch's end
    system/            what the nodes of a job are busy with
"""
