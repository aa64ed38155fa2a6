"""Log and checkpoint the training of an unchanged script, from the calls that it makes.

In reading order:

    settings           the settings, and the names of runs
    api                `harness.autolog` and `harness.resume`
    script             the objects that a script has prepared, and its arguments
    replacements       replace functions of other modules, and restore them
    exit_hooks         how a script ends
    context            what the trainings of a process share
    iterations         one iteration over a loader: training or not
    autolog_state      what autologging adds to a checkpoint
    run_opener         open the run of a training
    optimizer_steps    which of a script's optimizers step
    observer           the state machine of epochs
    replay             replay of completed epochs
    session            one training, from prepare to its end
    training_registry  the trainings of a process, one after the other
    sources/           the events of each kind of script
    patches/           replaced functions of MLflow and TensorBoard
    patcher            autologging on and off
"""
