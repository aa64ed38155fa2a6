"""What a script does through accelerate is logged and saved, without a change to the script.

In reading order:

    script           what a script has prepared, and its arguments
    settings         what was asked for
    notes            lines for the user
    replacing        replace functions of other modules, and put them back
    exit_codes       the exit code of a script
    ending           how a script ends
    passes           one iteration over a loader: training or not
    api              `harness.autolog`, `harness.resume`
    opening          open the run of a training
    own_values       what the script logs through accelerate
    pass_end         a stop within the evaluation behind a pass
    steps            which of a script's optimizers step
    epochs           passes as the epochs and steps of a run
    replay           epochs that are done go by again
    session          one training, from prepare to its end
    saved_states     `accelerator.save_state` in a script that is run again
    joins            `Accelerator.join_uneven_inputs`
    other_ranks      MLflow on ranks other than zero
    fluent           what the script logs to MLflow itself
    summary_writers  TensorBoard's writers where MLflow listens
    trainings        the trainings of a process, one after the other
    switch           autologging on and off: the table of what is replaced
"""
