"""Sending items in one request where the store takes all of them, and finding those that it does not take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def send_in_halves(
    items: Sequence[Item],
    send: Callable[[Sequence[Item]], None],
    is_permanent: Callable[[Exception], bool],
    refused: Callable[[Item, Exception], None],
) -> None:
    """Send items together. What is refused for good is sent again in halves, until the refused items are alone.

    One item that is refused among n takes about 2 log2(n) requests. Items may be sent again after an error that is not
    permanent, so that `send` leaves the same when it is called twice.

    Args:
        items: in their order.
        send: sends some of them.
        is_permanent: whether an error means that trying again is of no use.
        refused: called with each item that is refused, and why.

    Raises:
        Exception: of `send`, where it is not permanent.
    """
    try:
        send(items)
    except Exception as error:
        if not is_permanent(error):
            raise
        if len(items) <= 1:
            for item in items:
                refused(item, error)
            return
        middle = len(items) // 2
        send_in_halves(items[:middle], send, is_permanent, refused)
        send_in_halves(items[middle:], send, is_permanent, refused)
