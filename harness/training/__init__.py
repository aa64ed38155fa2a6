"""The training loop: its events, what is due at each, and the run around it.

In reading order:

    run_recorder          what is written into a run's journal
    run_session           a run from its directory to its end
    state                 the state of training and what the parts of a run share
    watched               the models and optimizers of a loop
    registered_objects    further objects whose states checkpoints hold
    resume_manager        what a run resumes from
    checkpoint_scheduler  which moment a checkpoint is of, and what follows from its commit
    rank_requests         requests to stop or save, agreed upon by all ranks
    controller            the events of a loop and what is due at each
    own_loop              the generators of `PeriodicLogger`
    periodic_logger       `PeriodicLogger`
    fit                   the loop over a task
    app                   builds a run from its configuration
"""
