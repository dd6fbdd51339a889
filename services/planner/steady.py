"""Steady: what keeps a pool from flapping. More workers at once; fewer only when fewer have been enough for a whole window."""

from collections import deque

from baton.types import Role


class Steady:
    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._advice: dict[Role, deque[tuple[float, int]]] = {}

    def advise(self, now: float, role: Role, serving: int, needed: int) -> int:
        """The most that was needed within the window. What `serving` is when first asked counts as needed: planners may start anew."""
        advice = self._advice.setdefault(role, deque([(now, serving)]))
        while advice and advice[0][0] <= now - self._window_s:
            advice.popleft()
        advice.append((now, needed))
        return max(each for _, each in advice)
