"""Tasks that come along: real, small, and short enough to be the example of how to write one's own."""

from harness.tasks.byte_lm import ByteLM
from harness.tasks.digits import Digits

__all__ = ["ByteLM", "Digits"]
