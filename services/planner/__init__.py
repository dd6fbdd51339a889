"""The planner: how many prefill and decode workers the load needs, and the hand that makes them so many (docs/planner.md)."""
