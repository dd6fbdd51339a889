"""`baton planner`: looks, plans, tells, and with --apply scales; once, or every so many seconds."""

import asyncio
import contextlib
import logging
import math
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from baton.cli.command import run_command
from baton.config import SecurityConfig
from baton.errors import BatonError, ConfigError, Unavailable
from baton.rpc.certificates import Certificates
from baton.types import Role
from services.planner.kubernetes import ACCOUNT, Kubernetes
from services.planner.observe import RATE_S, History, Observer, check_pools, rates_of
from services.planner.plan import Bounds, Plan, Slo, plan
from services.planner.scaling import Drains, deployment_name, scale
from services.planner.steady import Steady

logger = logging.getLogger(__name__)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
POOLS = (Role.PREFILL, Role.DECODE)


@dataclass(frozen=True, slots=True)
class Hands:
    """What changes are made with."""

    kubernetes: Kubernetes
    drains: Drains
    deployments: Mapping[Role, str]


class Planner:
    def __init__(
        self, slo: Slo, bounds: Mapping[Role, Bounds], *, startup_s: float, scale_in_after_s: float, every_s: float, hands: Hands | None
    ) -> None:
        self._slo, self._bounds, self._hands = slo, bounds, hands
        self._goes_on, self._scale_in_after_s = every_s > 0, scale_in_after_s
        self._steady, self._history = Steady(scale_in_after_s, every_s), History(startup_s)
        self._told: list[tuple[int, int | None, str]] = []

    async def look(self, observer: Observer) -> None:
        self._history.add(await observer.look(time.monotonic()))

    async def round(self) -> None:
        """By what was seen last. Raises BatonErrors."""
        cluster = self._history.last.cluster
        check_pools(cluster)
        planned = plan(self._history.load(), rates_of(cluster), self._slo, self._bounds)
        actions = {role: await self._act(role, planned) for role in POOLS}
        there = {role: len([w for w in cluster["workers"] if w["role"] == role and w["state"] == "ready"]) for role in POOLS}
        told = [(there[role], planned[role].workers, actions[role]) for role in POOLS]
        if told != self._told:  # else only the reasons' figures differ
            self._told = told
            table = Table("pool", "there", "needed", "why", title=f"{cluster['model']}, at {time.strftime('%H:%M:%S')}", show_lines=True)
            for role, (ready, needed, action) in zip(POOLS, told, strict=True):
                table.add_row(role, str(ready), "?" if needed is None else str(needed), f"{planned[role].reason}\n{action}".strip())
            console = Console()
            console.width = max(console.width, 120)
            console.print(table)

    async def _act(self, role: Role, planned: Plan) -> str:
        needed, workers = planned[role].workers, [w for w in self._history.last.cluster["workers"] if w["role"] == role]
        if needed is None:
            return "→ left as it is"
        serving = len([worker for worker in workers if worker["state"] == "ready"])
        wanted = self._steady.advise(self._history.last.at, role, serving, needed)
        later = ""
        if wanted > needed and self._goes_on:  # else nobody looks again
            later = f"→ {wanted} for now: fewer when fewer have been enough for {self._scale_in_after_s:g} s (--scale-in-after)"
        if self._hands is None:
            return later
        try:
            done = await scale(
                self._hands.kubernetes, self._hands.drains, self._hands.deployments[role], workers, wanted, self._bounds[role].at_most
            )
        except Unavailable as error:  # the other pool may have better luck
            done = error.message
        if done:
            logger.info("%s: %s", role, done)
        return "\n".join(filter(None, (later, done and f"→ {done}")))


async def run(planner: Planner, observer: Observer, every_s: float | None, window_s: float) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)

    async def pause(seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await stopped.wait()

    if every_s is None:
        await planner.look(observer)
        await pause(window_s)
        await planner.look(observer)
        await planner.round()
        return
    looks = 0
    while not stopped.is_set():
        try:
            await planner.look(observer)
            looks += 1
            if looks > 1:
                await planner.round()
        except BatonError as error:
            logger.error("%s", error.message)
        await pause(every_s)


@app.command()
def planner(
    slo_ttft: Annotated[float, typer.Option(help="Seconds to the first token.")],
    slo_itl: Annotated[float, typer.Option(help="Seconds between tokens.")],
    slo_share: Annotated[float, typer.Option(help="Of the requests, that get them.")] = 0.95,
    router: Annotated[str, typer.Option(help="One of them; the others are found.")] = "http://127.0.0.1:8000",
    prefill: Annotated[str, typer.Option(help="Workers at least and at most.")] = "1-64",
    decode: Annotated[str, typer.Option(help="Workers at least and at most.")] = "1-64",
    every: Annotated[float | None, typer.Option(min=1, help="Plan again after so many seconds, until told to stop; else once.")] = None,
    window: Annotated[float, typer.Option(min=1, help="Without --every: seconds for which the load is watched.")] = RATE_S / 2,
    startup: Annotated[
        float, typer.Option(min=0, help="Seconds that a worker takes to start: a growing load is looked at so far ahead.")
    ] = 60.0,
    scale_in_after: Annotated[float, typer.Option(min=0, help="Seconds for which fewer must have been enough.")] = 300.0,
    apply: Annotated[bool, typer.Option("--apply", help="Scale the Deployments; else only say so.")] = False,
    namespace: Annotated[str | None, typer.Option(help="Of the Deployments; the planner's own if left out.")] = None,
    prefill_deployment: Annotated[str | None, typer.Option(help="Of the prefill workers: RELEASE-MODEL-prefill.")] = None,
    decode_deployment: Annotated[str | None, typer.Option(help="Of the decode workers: RELEASE-MODEL-decode.")] = None,
    cert: Annotated[str, typer.Option(help="Of this planner, where workers ask for one (docs/security.md): PEM file.")] = "",
    key: Annotated[str, typer.Option(help="Its key.")] = "",
    authority: Annotated[str, typer.Option(help="Of who signs the services' certificates: PEM file.")] = "",
    name: Annotated[str, typer.Option(help="That stands in them.")] = SecurityConfig().name,
    kubernetes: Annotated[str, typer.Option(help="The API.")] = "https://kubernetes.default.svc",
    kubernetes_token: Annotated[Path, typer.Option(help="File of the token.")] = ACCOUNT / "token",
    kubernetes_ca: Annotated[Path, typer.Option(help="File of the API's certificate authority.")] = ACCOUNT / "ca.crt",
) -> None:
    """How many prefill and decode workers the load needs to keep the promise, and why. Changes nothing without --apply."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    slo = Slo(ttft_s=slo_ttft, itl_s=slo_itl, share=slo_share)
    bounds = {Role.PREFILL: _bounds("--prefill", prefill), Role.DECODE: _bounds("--decode", decode)}
    if apply and (every is None or not prefill_deployment or not decode_deployment):
        raise ConfigError("--apply needs --every, --prefill-deployment and --decode-deployment: a worker drains over several rounds")
    if any(not math.isfinite(each) for each in (every or 0.0, window, startup, scale_in_after)):
        raise ConfigError("--every, --window, --startup and --scale-in-after are finite seconds")

    if any((cert, key, authority)) and not all((cert, key, authority)):
        raise ConfigError("one is nothing without the others: give --cert, --key and --authority")
    certificates = Certificates(cert, key, authority, name, setting="planner") if cert else None

    async def work() -> None:
        hands = None
        if apply and prefill_deployment and decode_deployment:
            deployments = {Role.PREFILL: deployment_name(prefill_deployment), Role.DECODE: deployment_name(decode_deployment)}
            api = Kubernetes(
                kubernetes, namespace or _own_namespace(), token=kubernetes_token, authority=_authority(kubernetes, kubernetes_ca)
            )
            hands = Hands(api, Drains(certificates), deployments)
        observer = Observer(router)
        try:
            made = Planner(slo, bounds, startup_s=startup, scale_in_after_s=scale_in_after, every_s=every or 0.0, hands=hands)
            await run(made, observer, every, window)
        finally:
            await observer.close()
            if hands is not None:
                await hands.kubernetes.close()
                await hands.drains.close()

    asyncio.run(work())


def _bounds(option: str, text: str) -> Bounds:
    low, dash, high = text.partition("-")
    try:
        return Bounds(int(low), int(high if dash else low))
    except ValueError as error:
        raise ConfigError(f"{option} {text!r} must look like 1-8: workers at least, and at most") from error


def _authority(url: str, file: Path) -> Path | None:
    return file if url.startswith("https:") else None


def _own_namespace() -> str:
    try:
        return (ACCOUNT / "namespace").read_text().strip()
    except OSError as error:
        raise ConfigError("this is no pod of a cluster: give --namespace") from error


def main() -> None:
    run_command(app, "baton planner")


if __name__ == "__main__":
    main()
