"""The configuration of a run.

In reading order:

    schema       frozen dataclasses
    parsing      from the command line and YAML to these
    cadence      at which epochs and steps something is due
    task         what a user implements: model, data, loss, metrics
    instantiate  from class paths to objects
"""
