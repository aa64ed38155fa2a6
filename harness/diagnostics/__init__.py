"""What a run has left, and what it is doing.

In reading order:

    report  as text and as JSON
"""
