"""Turns at the engine: who wants a few things does not wait for who wants thousands, and nobody waits for ever."""

import asyncio
import random

from mergekit_bio.engine.vllm.turns import Turns


async def ask(turns: Turns, name: str, many: int, order: list[str], running: list[str]) -> None:
    """One after the other, each a step long."""
    for had in range(many):
        async with turns.turn(had):
            running.append(name)
            order.append(name)
            await asyncio.sleep(0)
            running.remove(name)


def asked(at_once: int, **wanted: int) -> tuple[list[str], int]:
    """Who was next, in order, where each wants so many turns; and the most at once."""
    order: list[str] = []
    running: list[str] = []
    most = 0

    async def watch() -> None:
        nonlocal most
        while len(order) < sum(wanted.values()):
            most = max(most, len(running))
            await asyncio.sleep(0)

    async def all_of_them() -> None:
        turns = Turns(at_once)
        await asyncio.gather(watch(), *(ask(turns, name, many, order, running) for name, many in wanted.items()))

    asyncio.run(all_of_them())
    return order, most


def test_no_more_run_at_once_than_may_and_all_are_served():
    order, most = asked(3, a=50, b=20, c=40, d=1, e=30)
    assert most == 3
    assert {name: order.count(name) for name in "abcde"} == {"a": 50, "b": 20, "c": 40, "d": 1, "e": 30}


def test_a_newcomer_waits_briefly_and_the_others_get_on():
    """Beside 30 that want a thousand each, one that wants ten has every other turn, and those have the rest."""
    order: list[str] = []

    async def main() -> None:
        turns = Turns(1)
        long = [asyncio.create_task(ask(turns, f"long {n}", 1000, order, [])) for n in range(30)]
        while len(order) < 300:
            await asyncio.sleep(0)
        start = len(order)
        await ask(turns, "short", 10, order, [])
        between = len(order) - start - 10
        assert 5 <= between <= 40, between
        for task in long:
            task.cancel()
        await asyncio.gather(*long, return_exceptions=True)
        async with asyncio.timeout(10), turns.turn(0):  # those who left have given their turns back
            pass

    asyncio.run(main())


def test_who_leaves_loses_no_turn():
    """Cancelled while they wait, while they run, and at the very moment when they are given a turn."""

    async def main() -> None:
        draw = random.Random(5)
        turns = Turns(4)
        tasks = [asyncio.create_task(ask(turns, str(n), 20, [], [])) for n in range(60)]
        for _ in range(400):
            draw.choice(tasks).cancel()
            await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)
        order: list[str] = []
        async with asyncio.timeout(10):
            async with turns.turn(0), turns.turn(0), turns.turn(0), turns.turn(0):
                order.append("four at once")
        assert order

    asyncio.run(main())
