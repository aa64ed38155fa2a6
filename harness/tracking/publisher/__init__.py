"""The process beside rank zero that delivers the journal.

In reading order:

    launcher         start it
    process          its entry point
    retries          how long to wait between tries
    attempts         the attempts at a run
    artifact_worker  checkpoints and texts
    publisher        all else, entry after entry
    drain            what is left
    sync             `harness sync`
    download         artifacts into a directory
"""
