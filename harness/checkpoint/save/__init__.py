"""One checkpoint, from due to committed.

In reading order:

    hooks         what a save asks of its owner, and reports to it
    plan          which rank writes which bytes
    source_guard  detect tensors that change while they are copied
    fence         hold the next optimizer step back
    staging       the host memory that a rank copies into
    snapshot      the copy, while training goes on
    direct_io     write around the page cache
    writer        the process that writes a rank's part
    write         the trainer's side of it
    pipeline      plan, memory and writer of one structure, made once
    transport     whether every rank may write, or rank zero writes for all
    gather        ranks that share no disk send their part to rank zero
    commit_store  ranks say that their part is written
    save_runner   the thread beside training
    saver         the main thread's side: what `PeriodicLogger` calls
"""
