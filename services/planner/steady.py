"""Steady: what keeps a pool from flapping. More workers at once; fewer only when fewer have been enough for a whole window."""

from collections import deque

from baton.types import Role


class Steady:
    def __init__(self, window_s: float, every_s: float = 0.0) -> None:
        """`every_s`: from one look to the next."""
        self._window_s, self._every_s = window_s, every_s
        self._advice: dict[Role, deque[tuple[float, int]]] = {}

    def advise(self, now: float, role: Role, serving: int, needed: int) -> int:
        """The most that was needed within the window. What `serving` is when first asked counts as needed: planners may start anew, or have
        seen nothing for a whole window."""
        advice = self._advice.setdefault(role, deque([(now, serving)]))
        blind_s = now - advice[-1][0]
        while advice and advice[0][0] <= now - self._window_s:
            advice.popleft()
        if not advice and blind_s > 2 * self._every_s:
            advice.append((now, serving))
        advice.append((now, needed))
        return max(each for _, each in advice)
