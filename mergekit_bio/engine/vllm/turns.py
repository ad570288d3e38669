"""Who is next, where many want to ask the engine many things."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """A bounded number of turns at the same time.

    Of those who wait, every other time the one that has had the fewest turns is next, and else the one that has waited
    longest. So who wants a few things waits briefly, and who wants thousands gets on all the same.

    Args:
        at_once: How many turns.
    """

    def __init__(self, at_once: int) -> None:
        self._free = at_once
        self._waiting: dict[asyncio.Future[None], int] = {}  # in the order in which they came -> turns had before
        self._oldest_next = False

    @asynccontextmanager
    async def turn(self, had: int) -> AsyncIterator[None]:
        """Have a turn; use with ``async with``.

        Args:
            had: The turns that the same one has had before.
        """
        if self._free:
            self._free -= 1
        else:
            given = asyncio.get_running_loop().create_future()
            self._waiting[given] = had
            try:
                await given
            except asyncio.CancelledError:
                if self._waiting.pop(given, None) is None:  # it was given the turn, and does not want it any more
                    self._pass_on()
                raise
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        waiting = [given for given in self._waiting if not given.cancelled()]
        if not waiting:
            self._free += 1
            return
        following = waiting[0] if self._oldest_next else min(waiting, key=self._waiting.__getitem__)
        self._oldest_next = not self._oldest_next
        del self._waiting[following]
        following.set_result(None)
