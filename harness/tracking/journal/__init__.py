"""Store the entries for MLflow in an append-only log, and record how much of it is delivered.

In reading order:

    entries         entries, and the files that hold them
    delivery_state  how much is delivered
    pruning         removal of delivered files
    writer          appends entries
    logged_points   what earlier attempts have logged
"""
