"""The training loop: its events, the actions due at each, and the run around it.

In reading order:

    run_recorder          writes into a run's journal
    run_session           a run from its directory to its end
    state                 the state of training and the context shared by the parts of a run
    watched               the models and optimizers of a loop
    registered_objects    further objects whose states checkpoints hold
    resume_manager        finds and restores what a run resumes from
    checkpoint_scheduler  decides when a checkpoint is taken; publishes and prunes committed ones
    rank_requests         requests to stop or save, agreed upon by all ranks
    controller            the events of a loop and the actions due at each
    own_loop              the generators of `PeriodicLogger`
    periodic_logger       `PeriodicLogger`
    fit                   the loop over a task
    app                   builds a run from its configuration
"""
