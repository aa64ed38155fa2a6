"""What a script does through accelerate is logged and saved, without a change to the script.

In reading order:

    settings           the settings, and the names of runs
    api                `harness.autolog` and `harness.resume`
    script             what a script has prepared, and its arguments
    user_messages      lines for the user
    replacements       replace functions of other modules, and restore them
    exit_codes         the exit code of a script
    exit_hooks         how a script ends
    iterations         one iteration over a loader: training or not
    pass_end           a stop within the evaluation behind a pass
    script_values      what the script logs through accelerate
    run_opener         open the run of a training
    optimizer_steps    which of a script's optimizers step
    observer           iterations as the epochs and steps of a run
    replay             epochs that are done, replayed with one batch each
    session            one training, from prepare to its end
    patches/           replaced functions of MLflow, TensorBoard and others
    training_registry  the trainings of a process, one after the other
    patcher            autologging on and off: the table of what is replaced
"""
