"""One checkpoint, from due to committed.

In reading order:

    hooks          the interface to the owner of a saver
    saver          the main thread's side; the training package calls it
    save_runner    the background thread's side, and the states of a save
    commit_store   the ranks report that their part is written; rank 0 publishes the outcome
    pipeline       what saves of one structure share: plan, staging memory, writer process
    plan           which rank writes which bytes
    snapshot       the copy into staging memory, while training continues
    source_guard   detects tensors that change while they are copied
    fence          holds the next optimizer step back
    writer_client  the trainer's side of the writer process
    writer         the process that writes a rank's part
    transport      whether every rank writes, or rank 0 for all
"""
