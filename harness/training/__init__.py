"""The loop: what happens at each batch, step and epoch.

In reading order:

    place                 where training stands
    watching              the models and optimizers of a loop
    step_counter          the steps of one optimizer of several
    checkpoint_entries    a checkpoint's entries in the journal
    checkpoint_scheduler  which moment a checkpoint is of
    resume_manager        what a run continues from
    run_session           a run from its directory to its end
    controller            what is due at each event
    loop_events           the events of any loop
    own_loop              `epochs` and `batches`
    periodic_logger       `PeriodicLogger`
    fit                   the loop over a task
    app                   puts a run together
"""
