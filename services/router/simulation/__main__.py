"""`baton simulate`: policies on simulated workers, under a trace or generated agents."""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from baton.cli.bench import Promise, columns, print_rows
from baton.cli.command import run_command
from baton.cli.trace import Scaling, play, read_trace
from baton.config import POLICY_NAMES, check_policy
from baton.errors import ConfigError
from baton.types import Pace, Role
from services.router.policies import POLICIES
from services.router.simulation.cluster import Plan, SimulatedCluster, everybodys
from services.router.simulation.engine import Shape
from services.router.simulation.workload import Agents, Ask, agents, asks_of

DEFAULT_PACE = Pace(base_s=0.02, token_s=1.2e-4, pair_s=2.2e-9, row_s=5e-5, context_s=3e-8, push_token_s=1.6e-5)
"""Roughly 70 billion parameters on eight A800, and a 20 GB/s link (docs/simulation.md has the sums). Measured by nobody."""
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def simulate(
    policy: Annotated[list[str] | None, typer.Option(help="One, or several; all if left out.")] = None,
    prefill: Annotated[int, typer.Option(min=0, help="Prefill workers.")] = 0,
    decode: Annotated[int, typer.Option(min=0, help="Decode workers.")] = 0,
    unified: Annotated[int, typer.Option(min=0, help="Workers that do both.")] = 0,
    trace: Annotated[Path | None, typer.Option(help="In Mooncake's format (docs/simulation.md); generated agents if left out.")] = None,
    load: Annotated[list[float] | None, typer.Option(help="Of a trace, times its speed; of agents, sessions a second.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="One, or several.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Of the trace, at its own speed; of agents. 0: the whole trace.")] = 600.0,
    copies: Annotated[int, typer.Option(min=1, help="So much of the trace at once, or so many times the agents.")] = 1,
    length_scale: Annotated[float, typer.Option(help="Of the trace's tokens.")] = 1.0,
    longest: Annotated[int, typer.Option(min=0, help="Leave requests of a trace with more tokens out.")] = 0,
    block_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a KV block; 512 × --length-scale for a trace, 64 for agents.")
    ] = None,
    kv_tokens: Annotated[int, typer.Option(min=1, help="KV cache of a worker.")] = 1 << 20,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1)] = 8192,
    max_num_seqs: Annotated[int, typer.Option(min=1)] = 256,
    max_local_prefill_tokens: Annotated[int, typer.Option(min=0)] = 64,
    local_prefill: Annotated[bool, typer.Option(help="As the router's setting.")] = True,
    pace: Annotated[str | None, typer.Option(help="key=seconds,… of a worker, or the URL of a router whose workers know.")] = None,
    hop_ms: Annotated[float, typer.Option(min=0, help="Each message between two processes.")] = 0.5,
    routers: Annotated[int, typer.Option(min=1, help="Each knows of the others' requests only what workers tell.")] = 1,
    news_ms: Annotated[float, typer.Option(min=0, help="That workers' loads and KV events take to the routers.")] = 0.0,
    ttft_slo_ms: Annotated[float | None, typer.Option(help="Goodput: the first token within this.")] = None,
    itl_slo_ms: Annotated[float | None, typer.Option(help="Goodput: a request's mean time between tokens within this.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Routing policies on simulated workers, in virtual time."""
    names = [check_policy(name) for name in policy or POLICY_NAMES]
    if not unified and not (prefill and decode):
        prefill, decode = (8, 8) if not prefill and not decode else (prefill, decode)
        if not (prefill and decode):
            raise ConfigError("a cluster needs prefill and decode workers, or unified ones: --prefill 8 --decode 8, or --unified 16")
    size = block_size or (64 if trace is None else Scaling(length=length_scale).block())
    plan = Plan(
        prefill=prefill,
        decode=decode,
        unified=unified,
        shape=Shape(
            num_blocks=max(kv_tokens // size, 2),
            block_size=size,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
        ),
        paces=parse_paces(pace),
        hop_s=hop_ms / 1e3,
        routers=routers,
        news_s=news_ms / 1e3,
        local_prefill=local_prefill,
        max_local_prefill_tokens=max_local_prefill_tokens,
        ttft_slo_s=None if ttft_slo_ms is None else ttft_slo_ms / 1e3,
        itl_slo_s=None if itl_slo_ms is None else itl_slo_ms / 1e3,
    )
    if any(each <= 0 for each in load or ()):
        raise ConfigError("--load must be above 0")
    if trace is None:
        workloads = {
            (each, each_seed): agents(Agents(rate=each * copies, seconds=seconds or 600.0), size, each_seed)
            for each in load or [1.0]
            for each_seed in seed or [0]
        }
    else:
        lines = read_trace(trace)
        scalings = {
            each: Scaling(length=length_scale, seconds=seconds, copies=copies, speed=each, longest=longest) for each in load or [1.0]
        }
        workloads = {
            (each, each_seed): asks_of(play(lines, scaling, each_seed), scaling.block(), size)
            for each, scaling in scalings.items()
            for each_seed in seed or [0]
        }
    rows = compare(plan, names, workloads)
    if json_file is not None:
        json_file.write_text(json.dumps({"plan": dataclasses.asdict(plan), "rows": rows}, indent=1) + "\n")


def compare(plan: Plan, policies: Sequence[str], workloads: Mapping[tuple[float, int], Sequence[Ask]]) -> list[dict[str, Any]]:
    """A row for each policy under each workload, by load and seed; prints them."""
    rows: list[dict[str, Any]] = []
    for (load, seed), asks in workloads.items():
        for policy in policies:
            rows.append({"load": load, "policy": policy, "seed": seed, **run(plan, policy, asks, seed)})
    print_rows(rows, promised(plan), "load", "policy", "seed", title=f"{plan.prefill}P{plan.decode}D, {plan.unified} unified")
    return rows


def run(plan: Plan, policy: str, asks: Sequence[Ask], seed: int, promise: Promise | None = None) -> dict[str, Any]:
    """One policy under one workload: what `columns` says, and the real seconds that it took. `promise`: what is counted as kept, where the
    policy knows of something else."""
    begun = time.monotonic()
    cluster = SimulatedCluster(plan, POLICIES[check_policy(policy)], first_turn=seed << 32)
    samples = cluster.run(asks)
    span = asks[-1].at - asks[0].at if len(asks) > 1 else 1.0
    preempted = sum(engine.scheduler.num_preemptions for engine in cluster.engines.values())
    pace, served = plan.paces[Role.PREFILL if plan.prefill else Role.UNIFIED], [sample for sample in samples if sample.error is None]
    prompts_s = sum(pace.prompt_s(sample.prompt_tokens - sample.cached_tokens, sample.cached_tokens) for sample in served)
    return {
        **columns(samples, span, promise or promised(plan)),
        "computing": prompts_s / span,  # workers that the prompts keep busy, all the time
        "preemptions": preempted,
        "took_s": time.monotonic() - begun,
    }


def promised(plan: Plan) -> Promise:
    ttft_s, itl_s = plan.ttft_slo_s, plan.itl_slo_s
    return Promise(ttft_ms=None if ttft_s is None else 1e3 * ttft_s, itl_ms=None if itl_s is None else 1e3 * itl_s)


def parse_paces(text: str | None) -> Mapping[Role, Pace]:
    """`token_s=1e-4,base_s=0.01`, or a router's URL: what its workers have learned. Raises ConfigError."""
    if text is None:
        return everybodys(DEFAULT_PACE)
    if text.startswith("http"):
        return paces_of(text)
    names, values = [field.name for field in dataclasses.fields(Pace)], dict[str, float]()
    for part in text.split(","):
        name, _, number = part.partition("=")
        try:
            values[name.strip()] = float(number)
        except ValueError as error:
            raise ConfigError(f"--pace {part!r} must look like token_s=0.0001") from error
    unknown = sorted(values.keys() - set(names))
    if unknown or min(values.values()) < 0:
        raise ConfigError(
            f"--pace {text!r}: {f'there is no {unknown[0]}' if unknown else 'seconds are not negative'}; there are {', '.join(names)}"
        )
    return everybodys(Pace(**values))


def paces_of(url: str) -> dict[Role, Pace]:
    """What a router's workers have learned. Raises ConfigError."""
    try:
        workers = httpx.get(url.rstrip("/") + "/cluster", timeout=5.0).raise_for_status().json()["workers"]
    except httpx.HTTPError as error:
        raise ConfigError(f"no router answers at {url} ({error})") from error
    paces = by_role([(Role(worker["role"]), Pace(**worker["pace"])) for worker in workers])
    if not all(pace.token_s and pace.row_s + pace.context_s for pace in paces.values()):
        raise ConfigError(f"the workers at {url} have not learned their pace yet: send them some requests first")
    return paces


def by_role(workers: Sequence[tuple[Role, Pace]]) -> dict[Role, Pace]:
    """By the clock, the mean of each role's workers; what none of them has met yet is the others', all of it where there are none."""
    known = [(role, pace.by_the_clock()) for role, pace in workers]

    def mean(name: str, role: Role) -> float:
        values = [(each, value) for each, pace in known if (value := getattr(pace, name))]
        own = [value for each, value in values if each is role] or [value for _, value in values]
        return sum(own) / len(own) if own else 0.0

    return {role: Pace(**{field.name: mean(field.name, role) for field in dataclasses.fields(Pace)}) for role in Role}


def main() -> None:
    run_command(app, "baton simulate")


if __name__ == "__main__":
    main()
