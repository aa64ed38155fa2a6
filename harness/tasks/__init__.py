"""Provide two small tasks on real data, which are also examples for your own tasks.

In reading order:

    digits   a convolutional network on images of handwritten digits
    byte_lm  a GPT over the bytes of text files
"""

from harness.tasks.byte_lm import ByteLM
from harness.tasks.digits import Digits

__all__ = ["ByteLM", "Digits"]
