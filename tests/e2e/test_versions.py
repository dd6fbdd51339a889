"""Two versions of a model behind one router, over real gRPC: what is begun with one goes on with it, while it has workers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from baton.config import AdmissionConfig
from baton.errors import Overloaded
from baton.metrics import RouterMetrics
from baton.tokenizer import Tokenizer
from baton.types import Role, SamplingParams
from services.router.admission import Admission, Claim
from services.router.dispatch import Dispatcher, Route
from services.router.generation import Ask, Generator
from services.router.policy import round_robin
from tests.e2e.test_breakers import ask, dispatcher, full
from tests.properties.toy import reference
from tests.workers import LEASE_S, Worker, prompt, worker

PAIRS = {"a": Role.DECODE, "b": Role.DECODE, "c": Role.DECODE, "p": Role.PREFILL, "q": Role.PREFILL}
UNIFIED = dict.fromkeys("abc", Role.UNIFIED)
NEW = "bq"  # the others are old


@asynccontextmanager
async def versions(roles: dict[str, Role], **options: Any) -> AsyncIterator[tuple[Dispatcher, dict[str, Worker]]]:
    """By name. Of equals the first is chosen, so that b would be next after a."""
    async with AsyncExitStack() as stack:
        workers = {
            name: await stack.enter_async_context(worker(role, {}, name=name, fingerprint="new" if name in NEW else "old"))
            for name, role in roles.items()
        }
        members = [(name, role, workers[name]) for name, role in roles.items()]
        yield await stack.enter_async_context(dispatcher(*members, **options)), workers


async def moved(made: Dispatcher, a: Worker) -> Route:
    """The route of a sequence that a begins, and that goes on elsewhere after some tokens."""
    request, route, tokens, stopping = prompt(60, max_tokens=40), made.route(), list[int](), None
    a.runner.step_s = 0.02
    async for output in made.generate(request, route):
        tokens += [token.token_id for token in output.tokens]
        if len(tokens) >= 5 and stopping is None:
            assert route.decode == "a"
            stopping = asyncio.create_task(a.server.stop(0))
    assert stopping is not None
    await stopping
    assert tokens == reference(request)
    return route


async def unusable(made: Dispatcher, *names: str) -> None:
    async with asyncio.timeout(5 * LEASE_S):
        while any(each.usable for each in made.workers.all() if each.member.id in names):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("roles", [PAIRS, UNIFIED])
async def test_a_sequence_goes_on_with_its_own_version(roles: dict[str, Role]) -> None:
    async with versions(roles) as (made, workers):
        route = await moved(made, workers["a"])
        assert (route.decode, len(route.moves)) == ("c", 1)
        assert route.prefill in ("", "p")
        assert "another version" not in str(route)


@pytest.mark.parametrize("roles", [PAIRS, UNIFIED])
async def test_it_goes_on_with_another_one_where_its_own_has_nobody_left(roles: dict[str, Role]) -> None:
    async with versions(roles) as (made, workers):
        made._lease_s = 1.0
        workers["c"].intake.draining = True
        await unusable(made, "c")
        route = await moved(made, workers["a"])  # a may come back: it is waited for
        assert (route.decode, len(route.moves)) == ("b", 1)
        assert "another version of the model, as old has no worker left" in str(route)


async def test_a_worker_that_comes_back_within_a_lease_is_waited_for() -> None:
    async with versions(UNIFIED) as (made, workers):
        made._lease_s = 60.0
        await workers["c"].server.stop(0)
        await unusable(made, "c")
        moving, port = asyncio.create_task(moved(made, workers["a"])), int(workers["c"].address.rpartition(":")[2])
        await unusable(made, "a")
        async with worker(Role.UNIFIED, {}, name="c", port=port, fingerprint="old"):
            assert (await moving).decode == "c"


async def test_own_workers_that_are_full_are_no_reason_to_change_the_version() -> None:
    async with versions(UNIFIED) as (made, workers):
        workers["c"].intake.submit = full  # type: ignore[method-assign]
        with pytest.raises(Overloaded):
            await moved(made, workers["a"])
        assert workers["b"].runner.num_steps == 0


async def test_what_has_no_token_yet_may_go_anywhere() -> None:
    async with versions(UNIFIED) as (made, workers):
        for name in "ac":
            workers[name].intake.submit = full  # type: ignore[method-assign]
        route = await ask(made, "r")
        assert route.decode == "b"
        assert "another version" not in str(route)


async def test_all_sequences_of_a_request_have_one_version(demo_model: Path) -> None:
    async with versions(UNIFIED, policy=round_robin) as (made, _):
        metrics = RouterMetrics("m")
        generator = Generator(Tokenizer(demo_model), made, Admission(AdmissionConfig(), metrics, lease_s=LEASE_S), metrics, frozenset())

        async def placed(*lengths: int, n: int) -> list[str]:
            sampling, at = SamplingParams(max_tokens=8, temperature=0), dict[int, str]()
            asks = [Ask(request_id="r", prompt_token_ids=prompt(length).prompt_token_ids, sampling=sampling, n=n) for length in lengths]
            async for choice, _ in generator.run("r", asks, Claim()):
                at[choice.index] = choice.route.decode
            return [at[index] for index in sorted(at)]

        found = [
            await placed(60, n=2),
            await placed(60, 40, n=1),
            await placed(60, 40, 20, n=3),
            await placed(60, n=1),
            await placed(60, n=1),
        ]
        assert [len(each) for each in found] == [2, 2, 9, 1, 1]
        for each in found:
            assert len({name in NEW for name in each}) == 1, found
        assert {name for each in found for name in each} == {"a", "b", "c"}  # each request is free
