"""View: what a policy sees of the workers, in columns, so that a thousand of them cost it no more than a few array operations.

Rows are in the order of the workers' ids, so that the first of equals is the one with the lowest id. `WorkerView` is one row, for people
and tests; `View.of` makes columns of rows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from baton.errors import NoWorkers
from baton.types import Pace, Role

Column = NDArray[np.float64]
Table = NDArray[np.float64]  # rows of columns
Rows = NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One worker as the router knows it now. `pending_tokens` counts uncomputed tokens, those that were just sent there included."""

    id: str
    role: Role
    fingerprint: str
    block_size: int
    num_requests: int
    pending_tokens: int
    matched_tokens: int  # leading prompt tokens that it finds in its prefix cache; never the last one
    expected_tokens: int = 0  # the same, when it will have computed what was sent there; never less than matched_tokens, whatever is given
    reachable_tokens: int = 0  # the same, when it has fetched too what its other tiers and the pool hold; never less than expected_tokens
    fetch_s: float = 0.0  # of fetching those
    pending_pairs: int = 0  # of tokens that the pending ones attend to, or are attended by
    num_waiting: int = 0  # of num_requests
    num_held: int = 0  # of num_waiting: another worker computes their prompts
    context_tokens: int = 0  # computed tokens of its running requests
    kv_used: float = 0.0  # share of its blocks that requests hold
    kv_tokens: int = 0  # that its blocks hold; 0: not announced
    batched_tokens: int = 0  # of a step at most; 0: not announced
    computing_s: float = 0.0  # since it told of another step, or got something to do: so long it has been at it
    device: str = ""  # the same for workers that compute on the same cores; empty: nobody else does
    pace: Pace = field(default_factory=Pace)


@dataclass(slots=True)
class Paces:
    """`Pace`, of each worker."""

    base_s: Column
    token_s: Column
    pair_s: Column
    row_s: Column
    context_s: Column
    push_token_s: Column
    crowded: Column

    def prompt_s(self, tokens: Column, start: Column) -> Column:
        return self.token_s * tokens + self.pair_s * tokens * (start + tokens / 2)

    def decode_s(self, rows: Column | float, context: Column | float) -> Column:
        return self.row_s * rows + self.context_s * context


PACE_COLUMNS = tuple(f.name for f in fields(Paces))
LEARNED = 5  # of them, the first: what a step takes
LOAD_COLUMNS = (
    "num_requests", "pending_tokens", "pending_pairs", "num_waiting", "num_held", "context_tokens", "kv_used", "kv_tokens",
    "batched_tokens", "computing_s",
)  # fmt: skip


class Pool(NamedTuple):
    """Prefill workers of a fingerprint, and the decode workers that they fit: as rows, and as what takes them from a column, which copies
    nothing where they are next to each other."""

    prefills: Rows
    decodes: Rows
    some: Any  # the prefill workers
    others: Any
    shares: bool  # some of the prefill workers a device with another worker


_KEPT = 8  # layouts of some of the workers, of each layout


class Layout:
    """Who the workers are; made anew when one comes or goes. What is made of it is kept: a breaker stays open for many decisions."""

    def __init__(
        self,
        ids: Sequence[str],
        roles: Sequence[Role],
        fingerprints: Sequence[str],
        block_sizes: Sequence[int],
        devices: Sequence[str],
    ) -> None:
        self.ids, self.roles, self.fingerprints, self.devices = tuple(ids), tuple(roles), tuple(fingerprints), tuple(devices)
        self.block_size = np.array(block_sizes, dtype=np.float64)
        self.block_sizes, self.versions = frozenset(block_sizes), frozenset(fingerprints)
        self.is_prefill = np.array([role is Role.PREFILL for role in roles], dtype=bool)
        self.is_decode = np.array([role is Role.DECODE for role in roles], dtype=bool)
        self.decodes, self.nothing = ~self.is_prefill, np.zeros(len(self.ids))
        rows = range(len(self.ids))
        self._fitting = {
            name: np.array([row for row in rows if roles[row] is Role.PREFILL and fingerprints[row] == name], dtype=np.intp)
            for name in {fingerprints[row] for row in rows if roles[row] is Role.PREFILL}
        }
        numbers: dict[str, int] = {}
        sharing: dict[int, list[int]] = {}
        self.device = np.array([numbers.setdefault(devices[row] or f"of {ids[row]}", len(numbers)) for row in rows], dtype=np.intp)
        for row in rows:
            sharing.setdefault(int(self.device[row]), []).append(row)
        mates = [[other for other in sharing[int(self.device[row])] if other != row] for row in rows]
        most = max(map(len, mates), default=0)
        self.has_mates, self.shares = most > 0, np.array([bool(each) for each in mates], dtype=bool)
        self.mates = np.array([each + [len(self.ids)] * (most - len(each)) for each in mates], dtype=np.intp)  # rows; one too many: nobody
        self._nobody = np.zeros(0, dtype=np.intp)
        self.entrances = np.array(
            [row for row in rows if roles[row] is Role.UNIFIED or (roles[row] is Role.DECODE and fingerprints[row] in self._fitting)],
            dtype=np.intp,
        )
        decodes = {
            name: np.array([row for row in self.entrances if roles[row] is Role.DECODE and fingerprints[row] == name], dtype=np.intp)
            for name in self._fitting
        }
        self.pools = tuple(
            Pool(rows, decodes[name], _together(rows), _together(decodes[name]), bool(self.shares[rows].any()))
            for name, rows in self._fitting.items()
        )
        self.unified = np.array([row for row in rows if roles[row] is Role.UNIFIED], dtype=np.intp)
        self._parts: dict[frozenset[str] | str, tuple[Layout, Rows]] = {}

    def only(self, rows: Sequence[int], role: Role | None = None) -> "Layout":
        """Those of these rows; all with this role, if it is given."""
        return Layout(
            [self.ids[row] for row in rows],
            [role or self.roles[row] for row in rows],
            [self.fingerprints[row] for row in rows],
            [int(self.block_size[row]) for row in rows],
            [self.devices[row] for row in rows],
        )

    def without(self, names: frozenset[str]) -> "tuple[Layout, Rows]":
        """All others, and which rows they are here."""
        return self._part(names, lambda row: self.ids[row] not in names)

    def version(self, fingerprint: str) -> "tuple[Layout, Rows]":
        """Those of this KV fingerprint, and which rows they are here."""
        return self._part(fingerprint, lambda row: self.fingerprints[row] == fingerprint)

    def _part(self, key: frozenset[str] | str, has: Callable[[int], bool]) -> "tuple[Layout, Rows]":
        if key not in self._parts:
            if len(self._parts) == _KEPT:
                self._parts.clear()
            rows = [row for row in range(len(self.ids)) if has(row)]
            self._parts[key] = self.only(rows), np.array(rows, dtype=np.intp)
        return self._parts[key]

    @cached_property
    def alone(self) -> "tuple[Layout, Rows]":
        """The decode workers, taken for unified ones, and which rows they are here."""
        rows = np.flatnonzero(self.is_decode)
        return self.only(rows.tolist(), Role.UNIFIED), rows

    @cached_property
    def problem(self) -> str:
        """Why there is no entrance, where there is none."""
        return _explain(self)

    def fitting(self, entrance: int) -> Rows:
        """The prefill workers of its KV fingerprint; none for a unified worker, which needs none."""
        return self._nobody if self.roles[entrance] is Role.UNIFIED else self._fitting[self.fingerprints[entrance]]


class View(Sequence[WorkerView]):
    num_requests: Column
    pending_tokens: Column
    pending_pairs: Column
    num_waiting: Column
    num_held: Column
    context_tokens: Column
    kv_used: Column
    kv_tokens: Column
    batched_tokens: Column
    computing_s: Column
    matched_tokens: Column
    expected_tokens: Column
    reachable_tokens: Column
    fetch_s: Column

    def __init__(self, layout: Layout, load: Table, paces: Table, found: Table) -> None:
        """By worker: LOAD_COLUMNS; PACE_COLUMNS; matched, expected and reachable tokens, and the seconds of fetching."""
        self.layout, self.load, self.paces, self.found = layout, load, paces, found
        (
            self.num_requests, self.pending_tokens, self.pending_pairs, self.num_waiting, self.num_held, self.context_tokens,
            self.kv_used, self.kv_tokens, self.batched_tokens, self.computing_s,
        ) = load  # fmt: skip
        self.matched_tokens, self.expected_tokens, self.reachable_tokens, self.fetch_s = found
        self.pace = Paces(*paces)

    @staticmethod
    def of(workers: "Sequence[WorkerView]") -> "View":
        if isinstance(workers, View):
            return workers
        ordered = sorted(workers, key=lambda w: w.id)
        ids, roles = [w.id for w in ordered], [w.role for w in ordered]
        prints, sizes = [w.fingerprint for w in ordered], [w.block_size for w in ordered]
        layout = Layout(ids, roles, prints, sizes, [w.device for w in ordered])
        load, paces, found = (np.empty((num, len(ordered))) for num in (len(LOAD_COLUMNS), len(PACE_COLUMNS), 4))
        for row, worker in enumerate(ordered):
            load[:, row] = [getattr(worker, name) for name in LOAD_COLUMNS]
            paces[:, row] = [getattr(worker.pace, name) for name in PACE_COLUMNS]
            found[:, row] = worker.matched_tokens, worker.expected_tokens, worker.reachable_tokens, worker.fetch_s
        np.maximum.accumulate(found[:3], out=found[:3])
        return View(layout, load, paces, found)

    def only(self, rows: Rows) -> "View":
        return self._of(self.layout.only(rows.tolist()), rows)

    def version(self, fingerprint: str) -> "View":
        """The workers of this KV fingerprint."""
        return self if self.layout.versions <= {fingerprint} else self._of(*self.layout.version(fingerprint))

    def alone(self) -> "View":
        """The decode workers, taken for unified ones."""
        return self._of(*self.layout.alone)

    def _of(self, layout: Layout, rows: Rows) -> "View":
        return View(layout, self.load[:, rows], self.paces[:, rows], self.found[:, rows])

    def worker(self, name: str) -> WorkerView:
        """Of the one with this id. Raises ValueError where there is none."""
        return self._row(self.layout.ids.index(name))

    def entrances(self) -> Rows:
        """Rows of the workers that a request may be sent to: unified ones, and decode workers that a prefill worker fits. Raises NoWorkers
        where there is none."""
        if not len(self.layout.entrances):
            raise NoWorkers(self.layout.problem)
        return self.layout.entrances

    def __len__(self) -> int:
        return len(self.layout.ids)

    def __getitem__(self, row: Any) -> Any:
        rows = range(len(self))
        return [self._row(each) for each in rows[row]] if isinstance(row, slice) else self._row(rows[int(row)])

    def _row(self, row: int) -> WorkerView:
        layout, load = self.layout, dict(zip(LOAD_COLUMNS, self.load[:, row].tolist(), strict=True))
        numbers = {name: value if name in ("kv_used", "computing_s") else int(value) for name, value in load.items()}
        pace = dict(zip(PACE_COLUMNS, self.paces[:, row].tolist(), strict=True))
        return WorkerView(
            id=layout.ids[row],
            role=layout.roles[row],
            fingerprint=layout.fingerprints[row],
            block_size=int(layout.block_size[row]),
            device=layout.devices[row],
            matched_tokens=int(self.matched_tokens[row]),
            expected_tokens=int(self.expected_tokens[row]),
            reachable_tokens=int(self.reachable_tokens[row]),
            fetch_s=float(self.fetch_s[row]),
            pace=Pace(**pace),
            **numbers,
        )

    def __iter__(self) -> Iterator[WorkerView]:
        return (self._row(row) for row in range(len(self)))


def _together(rows: Rows) -> Any:
    return slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) and rows[-1] - rows[0] == len(rows) - 1 else rows


def _explain(layout: Layout) -> str:
    prefills = sorted({p[:8] for p, role in zip(layout.fingerprints, layout.roles, strict=True) if role is Role.PREFILL})
    decodes = sorted({p[:8] for p, role in zip(layout.fingerprints, layout.roles, strict=True) if role is Role.DECODE})
    if decodes and prefills:
        return (
            f"no prefill worker has the KV fingerprint of a decode worker (prefill: {', '.join(prefills)}; decode: {', '.join(decodes)}): "
            "give both pools the same model folder and engine settings"
        )
    missing = "prefill" if decodes else "decode" if prefills else "prefill and decode (or unified)"
    return f"no {missing} worker is ready; start one, or wait until it has loaded its model"
