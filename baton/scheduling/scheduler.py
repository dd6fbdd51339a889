"""Scheduler: which tokens of which requests the next step computes.

What belongs here: the order of requests, the token budget, memory for the tokens that get scheduled, preemption.
What never will: phases, pools, transfers, speculation, adapters, sampling, clocks. A feature reaches a step as known tokens that are not
computed yet (request.num_tokens - request.num_computed_tokens) or as cached blocks (`KVCache.match`); if it needs a branch in `schedule`,
its design goes back.

A request is added when nothing outside this worker is awaited for it any more, and leaves by finishing or `remove`. One that was just
admitted may be set aside until its blocks have been filled. Only the engine's thread calls it.
"""

from collections import deque

from baton.scheduling.cache import KVCache
from baton.scheduling.plan import ScheduledRequest, StepPlan, StepResult
from baton.scheduling.request import PENDING, Request, RequestStatus


class Scheduler:
    def __init__(self, cache: KVCache, *, max_num_batched_tokens: int, max_num_seqs: int) -> None:
        self.cache = cache
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # by admission, oldest first
        self.fetching: dict[Request, None] = {}  # admitted after those, and set aside
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        request.status = RequestStatus.WAITING
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Ends a request at any moment between two steps; its blocks are free at once. Idempotent."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        elif request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
        elif request.status is RequestStatus.FETCHING:
            del self.fetching[request]
        request.status = RequestStatus.FINISHED
        self.cache.free(request)

    def schedule(self) -> StepPlan:
        """The next step. Requests that miss one token go first, so that a long prompt never holds up those that are generating. Memory for
        who came earlier is taken from who came last; who came last itself waits with what it has, of which a part may be in flight."""
        budget = self.max_num_batched_tokens
        scheduled: dict[Request, int] = {}
        short = False
        for request in sorted(self.running, key=lambda r: r.num_tokens - r.num_computed_tokens > 1):
            count = min(request.num_tokens - request.num_computed_tokens, budget)
            while request.status is RequestStatus.RUNNING and count and not self.cache.extend(request, request.num_computed_tokens + count):
                short = True
                if self.running[-1] is request and not self.fetching:
                    count = 0
                else:
                    budget += scheduled.pop(self._preempt_latest(), 0)
            if request.status is RequestStatus.RUNNING and count:
                scheduled[request] = count
                budget -= count
        while self.waiting and budget and not short and len(self.running) + len(self.fetching) < self.max_num_seqs:
            request = self.waiting[0]
            if not self.cache.admit(request, budget):
                break
            self.waiting.popleft()
            self.running.append(request)
            request.status = RequestStatus.RUNNING
            scheduled[request] = min(request.num_tokens - request.num_computed_tokens, budget)
            budget -= scheduled[request]
        return StepPlan(tuple(_plan(request, count) for request, count in scheduled.items()))

    def advance(self, plan: StepPlan) -> None:
        """The step has been submitted: what it computes counts as computed, what it draws as known, so that the next can be decided."""
        for item in plan.scheduled:
            request = item.request
            request.num_computed_tokens = item.end
            if item.samples:
                request.token_ids.append(PENDING)
                if request.is_full:
                    self.running.remove(request)
                    request.status = RequestStatus.ENDING

    def update(self, plan: StepPlan, result: StepResult) -> None:
        """Takes in what a step gave: computed tokens, new tokens, finished requests (their finish_reason is set, their blocks free). Who
        was removed meanwhile is passed over; who was preempted keeps its token."""
        for item in plan.scheduled:
            request = item.request
            if request.status is RequestStatus.FINISHED:
                continue
            if item.block_ids is request.block_ids:
                self.cache.register(request, item.start, item.end)
            if item.samples:
                request.resolve(item.end, result.tokens[request.request_id].token_id)
                if request.finish_reason is not None:
                    self.remove(request)

    def set_aside(self, request: Request) -> None:
        """Of a plan that is not submitted, one that it admits: it keeps its blocks, and gets those for all of its tokens if there is room,
        but nothing of it is computed until `resume`. Meanwhile it may be preempted."""
        self.running.remove(request)
        self.fetching[request] = None
        request.status = RequestStatus.FETCHING
        self.cache.extend(request, request.num_tokens)

    def resume(self, request: Request, num_computed_tokens: int) -> None:
        """So many tokens' KV is in its blocks now; it gives up the others."""
        del self.fetching[request]
        self.cache.keep(request, num_computed_tokens)
        self.running.append(request)
        request.status = RequestStatus.RUNNING

    def _preempt_latest(self) -> Request:
        request = self.fetching.popitem()[0] if self.fetching else self.running.pop()
        self.cache.free(request)
        request.status = RequestStatus.WAITING
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)
        return request


def _plan(request: Request, count: int) -> ScheduledRequest:
    start = request.num_computed_tokens
    return ScheduledRequest(request, start, count, samples=start + count == request.num_tokens, block_ids=request.block_ids)
