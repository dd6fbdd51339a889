"""A cluster in virtual time, under the router's own code: `python -m services.router.simulation`, or `baton simulate` (docs/simulation.md).

workload ─asks─▶ cluster: fleet, policy ─▶ worker D ─▶ worker P: the engine's own scheduler, steps by a pace
                   ▲ loads, KV events, a moment later │
                   └──────────────────────────────────┘
"""
