"""Explain: why a request went where it went, told afterwards. The latest requests' decisions are kept with all that the policy knew; being
a pure function, it is asked again: for the same answer, and for who would have been next."""

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from baton.errors import NoWorkers
from baton.types import Role
from services.router.dispatch import Route
from services.router.placer import Decision
from services.router.policy import Facts, Placement, Policy
from services.router.view import View, WorkerView

_MOST_ROWS = 65_536  # workers' rows kept, in all decisions
_MOST_OPTIONS = 8  # told, of entrances and of prefill workers
Json = dict[str, Any]


class Records:
    """The latest `limit` requests, by the id that the client knows; fewer where there are many workers."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._records: OrderedDict[tuple[str, str], list[Route]] = OrderedDict()  # by tenant and id
        self._latest: list[Route] = []

    def start(self, request_id: str, tenant: str) -> list[Route]:
        """Where to put the routes of its sequences. An id that is used again means the later request."""
        routes: list[Route] = []
        rows = len(self._latest[0].decisions[0].view) if self._latest and self._latest[0].decisions else 0
        limit = min(self._limit, _MOST_ROWS // max(rows, 1))
        self._records.pop((tenant, request_id), None)
        self._records[tenant, request_id] = routes
        while len(self._records) > limit:
            self._records.popitem(last=False)
        self._latest = routes
        return routes

    def find(self, request_id: str, tenant: str) -> list[Route] | None:
        """None: not known (any more), or another tenant's."""
        return self._records.get((tenant, request_id))


def explain(route: Route, policy: Policy) -> Json:
    """One sequence's life, as JSON."""
    return {
        "policy": route.policy,
        "decode": route.decode,
        "prefill": route.prefill or "local",
        "prompt_tokens": route.num_prompt_tokens,
        "cached_tokens": route.num_cached_tokens,
        "queued_s": route.queued_s,
        "moves": route.moves,
        "reason": route.reason,
        "decisions": [_decision(decision, policy) for decision in route.decisions],
    }


def _decision(decision: Decision, policy: Policy) -> Json:
    placement = decision.placement
    computes = (placement.prefills or (placement.decode,))[0]
    matched = View.of(decision.view).worker(computes).matched_tokens
    return {
        "at": decision.at,
        "degraded": decision.degraded or None,
        "facts": dataclasses.asdict(decision.facts),
        "chosen": dataclasses.asdict(placement),
        "ttft_s": {"predicted": placement.ttft_s, "actual": decision.ttft_s},
        "cached_tokens_seen": matched,  # by the router, where the prompt was to be computed
        "candidates": [_option(option, decision.view) for option in ranking(policy, decision.facts, decision.view)],
    }


def _option(placement: Placement, view: Sequence[WorkerView]) -> Json:
    names = (placement.decode, *placement.prefills[:1])
    return {
        "decode": placement.decode,
        "prefill": placement.prefills[0] if placement.prefills else "local",
        "cost_s": placement.cost_s,
        "ttft_s": placement.ttft_s,
        "missing_tokens": placement.missing_tokens,
        "reason": placement.reason,
        "workers": {name: dataclasses.asdict(View.of(view).worker(name)) for name in names},
    }


def ranking(policy: Policy, facts: Facts, view: Sequence[WorkerView]) -> list[Placement]:
    """What the policy chooses; what it would have chosen with the same entrance, each time without the prefill worker that was better, and
    with none that has time; then each time without the entrance that was better."""
    first = policy(facts, view)
    found = [first]
    entrance = [worker for worker in view if worker.id == first.decode]
    prefills = [worker for worker in view if worker.role is Role.PREFILL]
    elsewhere = dataclasses.replace(facts, local_prefill=False)
    for _ in range(min(len(prefills), _MOST_OPTIONS)):
        option = _try(policy, elsewhere, [*entrance, *prefills])
        best = option[0].prefills[:1] if option else ()
        found += option if best else []
        prefills = [worker for worker in prefills if worker.id not in best]
    busy = [dataclasses.replace(worker, pending_tokens=10**12) for worker in view if worker.role is Role.PREFILL]
    found += [option for option in _try(policy, facts, [*entrance, *busy]) if not option.prefills]
    gone = {first.decode}
    while len(gone) < _MOST_OPTIONS and (option := _try(policy, facts, [worker for worker in view if worker.id not in gone])):
        found += option
        gone.add(option[0].decode)
    distinct: dict[tuple[str, tuple[str, ...]], Placement] = {}
    for each in found:
        distinct.setdefault((each.decode, each.prefills[:1]), each)
    return list(distinct.values())


def _try(policy: Policy, facts: Facts, view: Sequence[WorkerView]) -> list[Placement]:
    try:
        return [policy(facts, view)]
    except NoWorkers:
        return []
