"""Log and checkpoint the training of an unchanged script by observing its calls.

In reading order:

    settings           the settings, and the names of runs
    api                `harness.autolog` and `harness.resume`
    script             the script's prepared objects and its arguments
    replacements       replace functions of other modules, and restore them
    exit_hooks         observe how a script ends
    context            state shared by the trainings of a process
    iterations         decide whether an iteration over a loader trains
    autolog_state      autologging's part of a checkpoint
    run_opener         open the run of a training
    optimizer_steps    observe which of a script's optimizers step
    observer           the state machine of epochs
    replay             replay completed epochs
    session            one training, from prepare to its end
    training_registry  the trainings of a process, one after the other
    sources/           events of each kind of script
    patches/           replacements of MLflow's functions
    patcher            turn autologging on and off
"""
