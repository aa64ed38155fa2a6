"""One file for each kind of script, with the table of the functions whose calls are the script's events.

In reading order:

    accelerate  scripts with an `accelerate.Accelerator`
"""
