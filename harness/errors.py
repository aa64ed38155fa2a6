"""The errors of harness, in one tree.

    HarnessError                 anything a user should read as one line
    ├── ConfigError              a key, value or class in the configuration            exit 2
    ├── LaunchError              what runs is not what was asked of the launcher       exit 2
    ├── DataError                the data cannot be trained on                         exit 2
    ├── RunDirError              the run directory cannot be used                      exit 2
    ├── MetricError              a metric was logged in a way that cannot be right     exit 1
    ├── NonFiniteLossError       the loss became NaN or infinite                       exit 1
    ├── CheckpointError          a checkpoint could not be written or read             exit 1
    │   └── DamagedError         what is on disk is not what was written: another may hold
    ├── TrackingError            the tracking server or the outbox                     exit 1
    ├── PeerFailure              another rank failed; this one stops with it           exit 1
    └── Stopped                  a signal, or `harness stop`, asked the run to stop    exit 75

A message has the place, the rule, what was given, and the remedy.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_REQUEUE = 75


class HarnessError(Exception):
    """Base of all errors that are told to the user as one line, without a traceback."""

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
    """Fewer processes, another strategy or another device run than were asked for."""

    exit_code = EXIT_USAGE


class DataError(HarnessError):
    """The data set cannot be used as it is."""

    exit_code = EXIT_USAGE


class RunDirError(HarnessError):
    """The run directory cannot be made, written or used."""

    exit_code = EXIT_USAGE


class MetricError(HarnessError):
    """A metric was logged in a way that would give a wrong number."""


class NonFiniteLossError(HarnessError):
    """The training loss became NaN or infinite.

    Attributes:
        step: the last optimizer step of the window in which it was seen.
    """

    def __init__(self, key: str, value: float, step: int) -> None:
        super().__init__(
            f"{key}: must be finite, is {value} in the steps up to {step}; lower the learning rate, "
            "set trainer.max_grad_norm, or find the batch with `harness debug`"
        )
        self.step = step


class CheckpointError(HarnessError):
    """A checkpoint could not be written, or what is on disk is not one."""


class DamagedError(CheckpointError):
    """A checkpoint is not what was written, or not what this version reads: another one may hold.

    A disk that does not answer, too little memory or another model are none of it: they would be the same
    with another checkpoint, or pass.
    """


class TrackingError(HarnessError):
    """The tracking store refused, or the outbox could not be written."""


class PeerFailure(HarnessError):
    """Another rank failed first; its reason is the message.

    Attributes:
        rank: the rank that failed, or None where it could not say so.
        signal_name: the signal that stopped it, where it was one.
    """

    def __init__(self, rank: int | None, reason: str, signal_name: str | None = None) -> None:
        who = "a rank" if rank is None else f"rank {rank}"
        super().__init__(f"{who} failed: {reason}" if signal_name is None else f"{who} was {reason}")
        self.rank = rank
        self.reason = reason
        self.signal_name = signal_name


class Stopped(HarnessError, SystemExit):
    """A signal, or `harness stop`, asked the run to stop.

    Not caught, it ends the process with exit code 75 and no traceback.

    Attributes:
        signal_name: such as ``SIGTERM``, or ``harness stop``.
    """

    exit_code = EXIT_REQUEUE

    def __init__(self, signal_name: str) -> None:
        super().__init__(f"stopped by {signal_name}")
        self.signal_name = signal_name
        self.code = EXIT_REQUEUE


def reason_of(error: BaseException) -> str:
    """What a user reads of it: ours say all, of others the name tells the most, and may be all there is."""
    return str(error) if isinstance(error, HarnessError) else f"{type(error).__name__}: {error}".removesuffix(": ")
