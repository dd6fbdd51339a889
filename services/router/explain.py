"""Explain: why a request went where it went, told afterwards. The latest requests' decisions are kept with all that the policy knew; being
a pure function, it is asked again: for the same answer, and for who would have been next."""

import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from baton.errors import NoWorkers, Overloaded
from services.router.dispatch import Route, not_kept
from services.router.placer import Decision
from services.router.policy import Facts, Placement, Policy
from services.router.view import View, WorkerView

_MOST_ROWS = 65_536  # workers' rows kept, in all decisions
_MOST_SEQUENCES = 8  # kept, of a request
_MOST_OPTIONS = 8  # told, of entrances and of prefill workers
Json = dict[str, Any]


@dataclasses.dataclass(slots=True)
class Record:
    """What is known of a request."""

    routes: list[Route] = dataclasses.field(default_factory=list[Route])  # of its first sequences
    num_sequences: int = 0
    num_rows: int = 0  # of its decisions
    kept: bool = True

    def copy(self) -> "Record":
        """As it stands, for another thread."""
        routes = [
            dataclasses.replace(route, moves=list(route.moves), decisions=[dataclasses.replace(each) for each in route.decisions])
            for route in self.routes
        ]
        return dataclasses.replace(self, routes=routes)


class Records:
    """The latest `limit` requests, by the id that the client knows; fewer where there are many workers."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._records: OrderedDict[tuple[str, str], Record] = OrderedDict()  # by tenant and id
        self._num_rows = 0

    def start(self, request_id: str, tenant: str) -> Record:
        """Where to `add` its sequences. An id that is used again means the later request."""
        record, key = Record(kept=self._limit > 0), (tenant, request_id)
        if key in self._records:
            self._forget(self._records.pop(key))
        if record.kept:
            self._records[key] = record
            if len(self._records) > self._limit:
                self._forget_oldest()
        return record

    def add(self, record: Record, route: Route) -> None:
        """One more of its sequences; of the first ones the decisions are kept, as they are made."""
        record.num_sequences += 1
        if record.kept and len(record.routes) < _MOST_SEQUENCES:
            record.routes.append(route)
            route.on_decision = lambda decision: self._decided(record, route, decision)

    def find(self, request_id: str, tenant: str) -> Record | None:
        """None: not known (any more), or another tenant's."""
        return self._records.get((tenant, request_id))

    def latest(self, tenant: str, limit: int) -> list[tuple[str, Record]]:
        """A tenant's latest requests, by id, newest first."""
        own = ((key[1], record) for key, record in reversed(self._records.items()) if key[0] == tenant)
        return list(itertools.islice(own, limit))

    def _decided(self, record: Record, route: Route, decision: Decision) -> None:
        rows = len(decision.view)
        while record.kept and self._num_rows + rows > _MOST_ROWS:
            self._forget_oldest()
        if record.kept:
            route.decisions.append(decision)
            record.num_rows += rows
            self._num_rows += rows
        else:
            not_kept(decision)

    def _forget_oldest(self) -> None:
        self._forget(self._records.popitem(last=False)[1])

    def _forget(self, record: Record) -> None:
        """Also what a request that still runs holds, or would go on to hold."""
        self._num_rows -= record.num_rows
        record.kept, record.num_rows = False, 0
        for route in record.routes:
            for decision in route.decisions:
                not_kept(decision)
            route.decisions.clear()
            route.on_decision = not_kept


def explain(record: Record, policy: Policy) -> Json:
    """A request's life, as JSON. Takes a while where there are many workers: nothing for an event loop."""
    return {"num_sequences": record.num_sequences, "sequences": [_sequence(route, policy) for route in record.routes]}


def _sequence(route: Route, policy: Policy) -> Json:
    return {
        "policy": route.policy,
        "decode": route.decode,
        "prefill": route.prefill or "local",
        "prompt_tokens": route.num_prompt_tokens,
        "cached_tokens": route.num_cached_tokens,
        "queued_s": route.queued_s,
        "moves": route.moves,
        "hedged": route.hedged or None,
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
        "ttft_s": {"predicted": placement.ttft_s, "beside": placement.beside_s, "actual": decision.ttft_s},
        "cached_tokens_seen": matched,  # by the router, where the prompt was to be computed
        "candidates": [_option(option, placement, decision.view) for option in ranking(policy, decision.facts, decision.view)],
    }


def _option(placement: Placement, chosen: Placement, view: Sequence[WorkerView]) -> Json:
    names = (placement.decode, *placement.prefills[:1])
    return {
        "decode": placement.decode,
        "prefill": placement.prefills[0] if placement.prefills else "local",
        "cost_s": placement.cost_s,
        "forbidden": _forbidden(placement, chosen),
        "ttft_s": placement.ttft_s,
        "missing_tokens": placement.missing_tokens,
        "reason": placement.reason,
        "workers": {name: dataclasses.asdict(View.of(view).worker(name)) for name in names},
    }


def _forbidden(placement: Placement, chosen: Placement) -> str | None:
    """Why what would have cost less was not chosen, which is the least of what is allowed."""
    if placement.cost_s is None or chosen.cost_s is None or placement.cost_s >= chosen.cost_s or placement.prefills or not chosen.prefills:
        return None
    return "a decode worker computes no prompt of which a prefill worker that is idle has as much"


def ranking(policy: Policy, facts: Facts, view: Sequence[WorkerView]) -> list[Placement]:
    """What the policy chooses; what it would have chosen with the same entrance, each time without the prefill worker that was better, and
    with none that has time; then each time without the entrance that was better."""
    view = View.of(view)
    ids, is_prefill = np.array(view.layout.ids), view.layout.is_prefill
    first = policy(facts, view)
    found = [first]
    entrance, prefills = ids == first.decode, is_prefill.copy()
    elsewhere = dataclasses.replace(facts, local_prefill=False)
    for _ in range(min(int(prefills.sum()), _MOST_OPTIONS)):
        option = _try(policy, elsewhere, view.only(np.flatnonzero(entrance | prefills)))
        best = option[0].prefills[:1] if option else ()
        found += option if best else []
        prefills &= ~np.isin(ids, best)
    busy = view.only(np.flatnonzero(entrance | is_prefill))
    busy.pending_tokens[busy.layout.is_prefill] = 1e12
    found += [option for option in _try(policy, facts, busy) if not option.prefills]
    gone = {first.decode}
    while len(gone) < _MOST_OPTIONS and (option := _try(policy, facts, view.only(np.flatnonzero(~np.isin(ids, list(gone)))))):
        found += option
        gone.add(option[0].decode)
    distinct: dict[tuple[str, tuple[str, ...]], Placement] = {}
    for each in found:
        distinct.setdefault((each.decode, each.prefills[:1]), each)
    return list(distinct.values())


def _try(policy: Policy, facts: Facts, view: Sequence[WorkerView]) -> list[Placement]:
    try:
        return [policy(facts, view)]
    except (NoWorkers, Overloaded):
        return []
