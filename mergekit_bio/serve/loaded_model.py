"""Several models from one engine, one after the other: who needs other weights waits for the ones before to leave."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager


class LoadedModel:
    """Lets requests for the same model in together, and changes the model when nobody is inside.

    First come, first served: a request waits behind an earlier one for another model, so no model starves.

    Args:
        current: The model that is loaded.
        switch: Loads another one; called while nobody is inside. If it fails, nothing is taken to be loaded.
    """

    def __init__(self, current: str, switch: Callable[[str], Awaitable[None]]) -> None:
        self._current: str | None = current
        self._switch = switch
        self._inside = 0
        self._waiting: deque[asyncio.Event] = deque()
        self._busy = False

    @asynccontextmanager
    async def use(self, model: str) -> AsyncIterator[None]:
        """Hold ``model`` loaded for the length of the block."""
        await self._enter(model)
        try:
            yield
        finally:
            self._inside -= 1
            self._wake()

    async def _enter(self, model: str) -> None:
        if self._waiting or self._busy or not self._fits(model):
            turn = asyncio.Event()
            self._waiting.append(turn)
            self._wake()
            try:
                while True:
                    await turn.wait()
                    turn.clear()
                    if not self._busy and self._fits(model):
                        break
            finally:
                self._waiting.remove(turn)
                self._wake()
        if self._current != model:
            self._busy, self._current = True, None
            try:
                await self._switch(model)
                self._current = model
            finally:
                self._busy = False
                self._wake()
        self._inside += 1
        self._wake()

    def _fits(self, model: str) -> bool:
        return self._inside == 0 or self._current == model

    def _wake(self) -> None:
        if self._waiting:
            self._waiting[0].set()
