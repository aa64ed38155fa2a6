"""Reports on a run's state.

In reading order:

    report  a run's checkpoints and MLflow page, as text and as JSON
"""
