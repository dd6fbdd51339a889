"""What the router knows of a sequence that goes on elsewhere, or ends early, and what siblings share; over real gRPC."""

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from baton.config import AdmissionConfig
from baton.metrics import RouterMetrics
from baton.tokenizer import Tokenizer
from baton.types import Role, SamplingParams
from services.router import workers as router_workers
from services.router.admission import Admission, Claim
from services.router.dispatch import Route
from services.router.generation import Ask, Generator
from services.router.placer import Decision
from tests.e2e.test_breakers import dispatcher
from tests.properties.toy import BLOCK_SIZE, reference
from tests.workers import PATIENT_S, generate, prompt, until, worker


async def test_where_it_goes_on_is_decided_by_all_its_tokens() -> None:
    request = prompt(60, max_tokens=40)
    async with (
        worker(Role.UNIFIED, {}, name="a") as a,
        worker(Role.UNIFIED, {}, name="b") as b,
        dispatcher(("a", Role.UNIFIED, a), ("b", Role.UNIFIED, b)) as made,
    ):
        await generate(b, request)  # has the blocks of all but the last token
        await until(lambda: made.workers.num_indexed >= 99 // BLOCK_SIZE)
        a.runner.step_s = 0.1
        decisions = list[Decision]()
        route, tokens, stopping = Route("least_load", on_decision=decisions.append), list[int](), None
        async for output in made.generate(request, route):
            tokens += [token.token_id for token in output.tokens]
            if len(tokens) >= 5 and stopping is None:
                stopping = asyncio.create_task(a.server.stop(0))
        assert stopping is not None
        await stopping
        assert tokens == reference(request)
        assert [decision.placement.decode for decision in decisions] == ["a", "b"]
        first, then = (decision.facts for decision in decisions)
        so_far = then.num_prompt_tokens - first.num_prompt_tokens
        assert 5 <= so_far < 40
        assert then.num_output_tokens == first.num_output_tokens - so_far
        assert then.turn == first.turn
        assert decisions[1].placement.missing_tokens == (59 + so_far) % BLOCK_SIZE + 1  # the last one always
        assert route.num_prompt_tokens == 60


async def test_what_ended_early_is_learned_from_too() -> None:
    async with worker(Role.UNIFIED, {}, name="a") as a, dispatcher(("a", Role.UNIFIED, a)) as made:
        expected = made.placer.expected_tokens(1000)
        async with aclosing(made.generate(prompt(60, max_tokens=1000), made.route())) as outputs:  # as where a stop string was found
            async for _ in outputs:
                break
        assert made.placer.expected_tokens(1000) < expected
        await a.is_idle()


async def test_a_prompt_is_hashed_once_for_all_that_ask_about_it(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, hash_all = list[int](), router_workers.block_hashes

    def counted(token_ids: Any, *arguments: Any) -> list[bytes]:
        hashed.append(len(token_ids))
        return hash_all(token_ids, *arguments)

    monkeypatch.setattr(router_workers, "block_hashes", counted)
    async with worker(Role.UNIFIED, {}, name="a") as a, dispatcher(("a", Role.UNIFIED, a)) as made:
        metrics = RouterMetrics("m")
        admission = Admission(AdmissionConfig(max_running=1, backlog_s=1.0), metrics, lease_s=PATIENT_S)
        generator = Generator(Tokenizer(demo_model), made, admission, metrics, frozenset())
        sampling = SamplingParams(max_tokens=2, temperature=0)
        asks = [Ask(request_id="r", prompt_token_ids=prompt(length).prompt_token_ids, sampling=sampling, n=3) for length in (60, 40)]
        async for _ in generator.run("r", asks, Claim(ttft_slo_s=60.0)):
            pass
    assert sorted(hashed) == [40, 60]
