"""Observe each kind of script: one module each, with the table of functions whose calls are events.

In reading order:

    accelerate  scripts with an `accelerate.Accelerator`
"""
