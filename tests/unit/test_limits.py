"""Keys, and the gate that decides who is next."""

import asyncio
import contextlib
import random

import pytest

from glm52.errors import CapacityError, RequestError
from glm52.server.limits import Gate, Keys


def test_keys_let_in_those_who_have_one() -> None:
    keys = Keys(["alpha", "schlüssel"])
    names = {
        keys.client("Bearer alpha", None, "x"),
        keys.client(None, "alpha", "y"),
        keys.client("bearer  alpha ", "no", "z"),
        keys.client("Bearer ", "alpha", "z"),
    }
    assert len(names) == 1 and "alpha" not in names.pop()
    assert keys.client(None, "schlüssel", "x") != keys.client(None, "alpha", "x")
    for authorization, x_api_key in (
        (None, None),
        ("Bearer beta", None),
        ("Basic alpha", None),
        ("", ""),
        (None, "alph"),
    ):
        with pytest.raises(RequestError) as caught:
            keys.client(authorization, x_api_key, "x")
        assert caught.value.status == 401


def test_keys_of_any_bytes_are_looked_at() -> None:
    """Headers are bytes, read as Latin-1: no such key is one of ours, and none is an error."""
    for sent in ("schlüssel".encode(), "schlüssel".encode("latin-1"), bytes(range(128, 256))):
        text = sent.decode("latin-1")
        assert Keys().client(f"Bearer {text}", None, "x") == Keys().client(None, text, "x") != "x"
        for given in ((f"Bearer {text}", None), (None, text), (text, text)):
            with pytest.raises(RequestError) as caught:
                Keys(["alpha"]).client(*given, "x")
            assert caught.value.status == 401


def test_without_keys_every_key_is_a_client_of_its_own() -> None:
    keys = Keys()
    assert not keys and keys.client(None, None, "10.0.0.1") == "10.0.0.1"
    assert keys.client("Bearer a", None, "x") != keys.client("Bearer b", None, "x")


def test_clients_take_turns_whoever_asks_most() -> None:
    async def main() -> list[str]:
        gate, order = Gate(1, 100), []

        async def reply(client: str) -> None:
            async with gate.slot(client):
                order.append(client)
                await asyncio.sleep(0)

        await asyncio.gather(*(reply(c) for c in "aaaaabbc"))
        assert gate.running == gate.waiting == 0
        return order

    assert "".join(asyncio.run(main())) == "aabcabaa"


def test_a_full_queue_refuses_but_one_request_may_always_come() -> None:
    gate = Gate(1, 2)
    gate.admit(50)
    with pytest.raises(CapacityError):
        gate.admit(1)
    gate.dismiss(50)
    for _ in range(3):
        gate.admit(1)
    with pytest.raises(CapacityError):
        gate.admit(1)
    gate.dismiss(1)
    gate.admit(1)


@pytest.mark.parametrize("seed", range(20))
def test_cancelling_anyone_at_any_time_loses_no_place(seed: int) -> None:
    rng = random.Random(seed)

    async def main() -> None:
        gate, most = Gate(3, 1000), 0

        async def reply(client: str) -> None:
            nonlocal most
            async with gate.slot(client):
                most = max(most, gate.running)
                for _ in range(rng.randrange(3)):
                    await asyncio.sleep(0)

        tasks = [asyncio.ensure_future(reply(rng.choice("abc"))) for _ in range(60)]
        while not all(t.done() for t in tasks):
            await asyncio.sleep(0)
            rng.choice(tasks).cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        assert gate.running == gate.waiting == 0 and most <= 3

    asyncio.run(main())
