"""What the device has lost of a request since it was looked up, or was preempted, comes from the tiers again once it is admitted:

    schedule ─▶ admitted ─┬─────────────────────────────────────────────────────────────────────────▶ step
                          └─ has lost blocks ─▶ set aside ─▶ loader fills its blocks ─▶ resume ─▶ a later step

Fetched or computed is decided as for any request, but the blocks are the request's own: nobody evicts what was fetched before it is
scheduled. Only a request that runs and is short of memory takes them, as from any that was admitted after it. The queue goes on meanwhile.
"""

from collections.abc import Mapping

from baton.runtime.entry import Entry
from baton.runtime.feed import Feed
from baton.runtime.loading import Loader
from baton.scheduling.cache import KVCache
from baton.scheduling.plan import StepPlan
from baton.scheduling.scheduler import Scheduler

MAX_PREEMPTIONS = 4  # what is lost once more is computed


def set_aside_lost(plan: StepPlan, scheduler: Scheduler, loader: Loader, entries: Mapping[str, Entry]) -> StepPlan:
    """The plan without those whose blocks are filled first."""
    lost = [
        item
        for item in plan.scheduled
        if (item.num_new_tokens > 1 or not item.samples) and _has_lost(entries[item.request.request_id].feed, item.start, scheduler.cache)
    ]
    if not lost:
        return plan
    for item in lost:
        scheduler.set_aside(item.request)
        loader.fetch_again(entries[item.request.request_id].feed)
    return StepPlan(tuple(item for item in plan.scheduled if item not in lost))


def _has_lost(feed: Feed, num_tokens: int, cache: KVCache) -> bool:
    """Of a request that was admitted with the KV of so many tokens: whether it has had more here, or was to have. Once for each admission:
    the next one follows a preemption."""
    request = feed.request
    if not feed.next_refetch <= request.num_preemptions < MAX_PREEMPTIONS:
        return False
    if request.num_preemptions:
        num_known = min(len(request.block_hashes), cache.num_matchable_blocks(request))
    else:
        num_known = feed.num_loaded + sum(1 for _ in feed.sources_of(range(feed.num_loaded, feed.num_available)))
    return num_tokens // cache.block_size < num_known
