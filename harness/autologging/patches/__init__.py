"""Replaced functions of other libraries that are no source of events.

In reading order:

    mlflow            what the script logs to MLflow itself
    other_ranks       MLflow on ranks other than zero
    summary_writers   TensorBoard's writers where MLflow's autologging listens
    saved_states      `accelerator.save_state` in a script that is resumed
    joins             `Accelerator.join_uneven_inputs`
"""
