"""Define, parse and check the configuration of a run.

In reading order:

    schema       the configuration as frozen dataclasses
    parsing      command line and YAML -> RunConfig
    cadence      when checkpoints are due, and when early stopping ends training
    task         the protocol that a user implements
    instantiate  class paths -> task, optimizer and scheduler
"""
