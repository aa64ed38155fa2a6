"""An append-only journal of what is to be delivered, and how far that has come.

In reading order:

    segments        its files
    entries         its lines
    delivery_state  how far it is delivered
    pruning         which of its files may go
    writer          append to it
    logged_points   what earlier attempts have logged
    heartbeat       the publisher's sign of life
    settings        what the publisher needs, for `harness sync`
"""
