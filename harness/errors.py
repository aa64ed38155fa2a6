"""The exceptions of harness and their exit codes.

    HarnessError                 base class; shown to the user as one line                 exit 1
    ├── ConfigError              a key, value or class in the configuration is invalid     exit 2
    ├── LaunchError              the processes that run are not those that were requested  exit 2
    ├── DataError                the data cannot be used for training                      exit 2
    ├── RunDirError              the run directory cannot be used                          exit 2
    ├── MetricError              a metric was logged incorrectly                           exit 1
    ├── NonFiniteLossError       the loss became NaN or infinite                           exit 1
    ├── CheckpointError          a checkpoint could not be written or read                 exit 1
    │   └── DamagedError         the files differ from what was written                    exit 1
    ├── TrackingError            the tracking server or the outbox failed                  exit 1
    ├── PeerFailure              another rank failed, and this rank stops with it          exit 1
    └── Stopped                  a signal or `harness stop` stopped the run                exit 75

A message contains the place, the rule, the given value and the remedy.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_REQUEUE = 75


class HarnessError(Exception):
    """Base class of the errors that the user sees as one line, without a traceback."""

    exit_code = EXIT_FAILED


class ConfigError(HarnessError, ValueError):
    """A configuration value breaks a rule.

    Attributes:
        key: dotted path of the value, such as ``checkpoint.every_n_epochs``.
        rule: what must hold, what was given, and the remedy.
    """

    exit_code = EXIT_USAGE

    def __init__(self, key: str, rule: str) -> None:
        super().__init__(f"{key}: {rule}" if key else rule)
        self.key = key
        self.rule = rule


class LaunchError(HarnessError):
    """Fewer processes, another strategy or another device run than were requested."""

    exit_code = EXIT_USAGE


class DataError(HarnessError):
    """The data set cannot be used."""

    exit_code = EXIT_USAGE


class RunDirError(HarnessError):
    """The run directory cannot be created, written or used."""

    exit_code = EXIT_USAGE


class MetricError(HarnessError):
    """A metric was logged in a way that would produce a wrong value."""


class NonFiniteLossError(HarnessError):
    """The training loss became NaN or infinite.

    Attributes:
        step: last optimizer step of the window with the value.
    """

    def __init__(self, key: str, value: float, step: int) -> None:
        super().__init__(
            f"{key}: must be finite, is {value} in the steps up to {step}; lower the learning rate, "
            "set trainer.max_grad_norm, or find the batch with `harness debug`"
        )
        self.step = step


class CheckpointError(HarnessError):
    """A checkpoint could not be written or read."""


class DamagedError(CheckpointError):
    """The files of a checkpoint are damaged, or of a version that cannot be read; another checkpoint may be valid.

    A failing disk, a lack of memory or another model raise `CheckpointError`: another checkpoint would not help.
    """


class TrackingError(HarnessError):
    """The tracking server refused a request, or the outbox could not be written."""


class PeerFailure(HarnessError):
    """Another rank failed first; the message contains its reason.

    Attributes:
        rank: the rank that failed; None if unknown.
        reason: the message of its error.
        signal_name: the signal that stopped it; None if it failed otherwise.
    """

    def __init__(self, rank: int | None, reason: str, signal_name: str | None = None) -> None:
        who = "a rank" if rank is None else f"rank {rank}"
        super().__init__(f"{who} failed: {reason}" if signal_name is None else f"{who} was {reason}")
        self.rank = rank
        self.reason = reason
        self.signal_name = signal_name


class Stopped(HarnessError, SystemExit):
    """A signal or `harness stop` stopped the run after a checkpoint.

    Uncaught, it ends the process with exit code 75 and no traceback.

    Attributes:
        signal_name: such as ``SIGTERM``, or ``harness stop``.
    """

    exit_code = EXIT_REQUEUE

    def __init__(self, signal_name: str) -> None:
        super().__init__(f"stopped by {signal_name}")
        self.signal_name = signal_name
        self.code = EXIT_REQUEUE


def reason_of(error: BaseException) -> str:
    """Return the message for the user, preceded by the class name if the error is not a `HarnessError`."""
    return str(error) if isinstance(error, HarnessError) else f"{type(error).__name__}: {error}".removesuffix(": ")
