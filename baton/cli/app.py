"""The commands of `baton`."""

import asyncio
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from baton.cli.command import run_command
from baton.errors import ConfigError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Baton: disaggregated LLM serving.", pretty_exceptions_enable=False)
model_app = typer.Typer(no_args_is_help=True, help="Make models.")
app.add_typer(model_app, name="model")
Url = Annotated[str, typer.Option(help="The router.")]
ApiKey = Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="Of a tenant, where the router asks for one.")]
DEFAULT_URL = "http://127.0.0.1:8000"


def main() -> None:
    run_command(app, "baton")


@app.command()
def up(
    model: Annotated[Path | None, typer.Option(help="Hugging Face model folder; the demo model if left out.")] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="What clients call the model; its folder's name if left out. Of several, the first is shown."),
    ] = None,
    prefill: Annotated[int | None, typer.Option(min=0, help="Prefill workers; 1, or 0 beside --unified.")] = None,
    decode: Annotated[int | None, typer.Option(min=0, help="Decode workers; 1, or 0 beside --unified.")] = None,
    unified: Annotated[int, typer.Option(min=0, help="Workers that do both.")] = 0,
    routers: Annotated[int, typer.Option(min=1, help="Routers; the second listens on the next ports, and so on.")] = 1,
    kvstore: Annotated[int, typer.Option(min=0, help="Nodes that lend memory to the KV pool; 0: no pool.")] = 1,
    kvstore_masters: Annotated[int, typer.Option(min=1, help="Masters of the KV pool: of several, one leads, by etcd.")] = 1,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="Ranks, on as many GPUs, that share each worker's model.")] = 1,
    policy: Annotated[str, typer.Option(help="How the router chooses workers; a wrong name lists them.")] = "predicted",
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 9000,
    etcd: Annotated[str, typer.Option(help="auto (a private one, if installed), none, or the URL of one that runs.")] = "auto",
    ready_file: Annotated[Path | None, typer.Option(help="Written as JSON when the first request can be served.")] = None,
    set: Annotated[
        list[str] | None, typer.Option(metavar="ROLE.KEY=VALUE", help="Any setting, such as decode.engine.block_size=32.")
    ] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Where the processes' logs go; a temporary folder if left out.")] = None,
    start_timeout: Annotated[float, typer.Option(min=0, help="Seconds to load the model and be ready; 0: no limit.")] = 600,
) -> None:
    """Run a whole cluster on this machine, until Ctrl-C."""
    from baton.cli.cluster import Cluster, Plan, run_until_signal

    logging.basicConfig(level=logging.WARNING, format="baton: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.ERROR)
    plan = Plan(
        model=(model or demo_model()).absolute(),
        served_model_names=tuple(served_model_name or ()),
        prefill=(0 if unified else 1) if prefill is None else prefill,
        decode=(0 if unified else 1) if decode is None else decode,
        unified=unified,
        routers=routers,
        kvstore=kvstore,
        kvstore_masters=kvstore_masters,
        tensor_parallel_size=tensor_parallel_size,
        policy=policy,
        http_port=http_port,
        grpc_port=grpc_port,
        etcd=etcd,
        settings=tuple(set or ()),
        log_dir=log_dir,
        start_timeout_s=start_timeout,
    )

    def on_ready(cluster: Cluster) -> None:
        _print_cluster(cluster)
        if ready_file is not None:
            partial = ready_file.with_name(ready_file.name + ".partial")
            partial.write_text(json.dumps(cluster.describe(), indent=1))
            partial.rename(ready_file)

    try:
        asyncio.run(run_until_signal(plan, on_ready))
    finally:
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)


def demo_model() -> Path:
    """The model that ships with the repository."""
    folder = Path(__file__).resolve().parents[2] / "examples" / "demo-model"
    if not folder.is_dir():
        raise ConfigError("the demo model is part of the repository, not of the package; give --model DIR")
    return folder


@app.command(context_settings={"allow_extra_args": True})
def serve(
    context: typer.Context,
    service: Annotated[str, typer.Argument(help="router, prefill, decode or kvstore.")],
    config: Annotated[Path | None, typer.Option(help="YAML file.")] = None,
) -> None:
    """Run one service in this process. More arguments are settings: key=value."""
    if service not in ("router", "prefill", "decode", "kvstore"):
        unified = "; a unified worker is `baton serve decode` with `role: unified`" if service == "unified" else ""
        raise ConfigError(f"there is no service {service!r}; there are router, prefill, decode and kvstore{unified}")
    arguments = [sys.executable, "-m", f"services.{service}", *(["--config", str(config)] if config else []), *context.args]
    os.execv(sys.executable, arguments)


@app.command()
def status(url: Url = DEFAULT_URL, as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Show the workers, their load and their caches."""
    from rich.console import Console
    from rich.table import Table

    seen = _get(url, "/cluster")
    if as_json:
        print(json.dumps(seen, indent=1))
        return
    table = Table(title=f"{seen['model']} at {url}, policy {seen['policy']}")
    columns = ("id", "role", "pid", "address", "state", "running", "waiting", "blocks_free", "blocks_total", "blocks_cached")
    for column in columns:
        left = column in ("id", "role", "address", "state")
        table.add_column(column.replace("blocks_", "blocks\n"), justify="left" if left else "right", no_wrap=True)
    for worker in seen["workers"]:
        table.add_row(*(str(worker[column]) for column in columns))
    for other in seen["others"]:
        table.add_row(*(str(other.get(column, "")) for column in columns))
    console = Console()
    console.width = max(console.width, 120)  # a narrow terminal wraps lines, which beats cutting off names
    console.print(table)
    if not seen["ready"]:
        console.print(f"not ready: {seen['problem']}")


@app.command()
def chat(
    question: Annotated[str | None, typer.Argument(help="Ask this and leave; a conversation if left out.")] = None,
    url: Url = DEFAULT_URL,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Annotated[float | None, typer.Option()] = None,
    max_tokens: Annotated[int | None, typer.Option()] = None,
    api_key: ApiKey = "",
) -> None:
    """Talk to the model; after each answer, its route and timings."""
    from baton.cli.chat import Conversation

    conversation = Conversation(url, system, {"temperature": temperature, "max_tokens": max_tokens}, api_key)
    if question is not None:
        conversation.ask(question)
        return
    while True:
        try:
            question = input("> ")
        except (EOFError, KeyboardInterrupt):
            return
        if question.strip():
            conversation.ask(question)


@app.command()
def bench(
    url: Url = DEFAULT_URL,
    num_requests: Annotated[int, typer.Option(min=1)] = 64,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once; ignored with --rate.")] = 8,
    rate: Annotated[float | None, typer.Option(help="Poisson arrivals per second.")] = None,
    input_len: Annotated[str, typer.Option(help="Prompt tokens: a number, or LOW-HIGH.")] = "128",
    output_len: Annotated[str, typer.Option(help="Output tokens: a number, or LOW-HIGH.")] = "64",
    shared_prefix: Annotated[int, typer.Option(min=0, help="Leading prompt tokens that all requests share.")] = 0,
    repeat_prompts: Annotated[int, typer.Option(min=1, help="Send each prompt so often.")] = 1,
    seed: Annotated[int, typer.Option()] = 0,
    ttft_slo_ms: Annotated[float | None, typer.Option(help="Goodput: the first token within this.")] = None,
    itl_slo_ms: Annotated[float | None, typer.Option(help="Goodput: a request's mean time between tokens within this.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    api_key: ApiKey = "",
) -> None:
    """Measure a running cluster: TTFT, ITL, throughput, cache hits."""
    from baton.cli.bench import Load, parse_range, run_bench

    load = Load(
        num_requests=num_requests,
        concurrency=concurrency,
        rate=rate,
        input_len=parse_range(input_len),
        output_len=parse_range(output_len),
        shared_prefix=shared_prefix,
        repeat_prompts=repeat_prompts,
        seed=seed,
        ttft_slo_ms=ttft_slo_ms,
        itl_slo_ms=itl_slo_ms,
    )
    result = run_bench(url, load, api_key)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(1 if result["failures"] else 0)


@app.command()
def replay(
    trace: Annotated[Path, typer.Argument(help="In Mooncake's format (docs/simulation.md).")],
    url: Url = DEFAULT_URL,
    load: Annotated[float, typer.Option(min=1e-3, help="Times the trace's speed.")] = 1.0,
    seconds: Annotated[float, typer.Option(min=0, help="Of the trace, at its own speed. 0: all of it.")] = 60.0,
    copies: Annotated[int, typer.Option(min=1, help="So much of the trace at once.")] = 1,
    length_scale: Annotated[float, typer.Option(help="Of the trace's tokens.")] = 1.0,
    longest: Annotated[int, typer.Option(min=0, help="Leave requests with more tokens out.")] = 0,
    seed: Annotated[int, typer.Option(help="Which part of the trace, and its own tokens.")] = 0,
    ttft_slo_ms: Annotated[float | None, typer.Option(help="Goodput: the first token within this.")] = None,
    itl_slo_ms: Annotated[float | None, typer.Option(help="Goodput: a request's mean time between tokens within this.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
    api_key: ApiKey = "",
) -> None:
    """Play a trace against a running cluster; what it measures is told in the columns of `simulate`."""
    from baton.cli.bench import Promise
    from baton.cli.replay import run_replay
    from baton.cli.trace import Scaling, play, read_trace

    scaling = Scaling(length=length_scale, seconds=seconds, copies=copies, speed=load, longest=longest)
    lines = play(read_trace(trace), scaling, seed)
    result = run_replay(url, lines, scaling.block(), seed, Promise(ttft_ms=ttft_slo_ms, itl_ms=itl_slo_ms), api_key)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(1 if result["failures"] else 0)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def simulate(context: typer.Context) -> None:
    """Compare routing policies on simulated workers; --help lists its options."""
    os.execv(sys.executable, [sys.executable, "-m", "services.router.simulation", *context.args])


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def planner(context: typer.Context) -> None:
    """Say how many prefill and decode workers the load needs, or scale them on Kubernetes; --help lists its options."""
    os.execv(sys.executable, [sys.executable, "-m", "services.planner", *context.args])


@model_app.command("new")
def model_new(
    folder: Annotated[Path, typer.Argument(help="Where to write it.")],
    family: Annotated[str, typer.Option(help="llama, mistral, qwen2 or qwen3.")] = "llama",
    hidden_size: Annotated[int, typer.Option()] = 64,
    num_layers: Annotated[int, typer.Option()] = 2,
    num_heads: Annotated[int, typer.Option()] = 4,
    num_kv_heads: Annotated[int, typer.Option()] = 2,
    max_len: Annotated[int, typer.Option(help="Context in tokens.")] = 2048,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    tokenizer: Annotated[Path | None, typer.Option(help="Copy the tokenizer of this model folder; bytes if left out.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Make a model with random weights, for tests and measurements."""
    try:
        from baton.models.create import create_model
    except ModuleNotFoundError as error:
        raise ConfigError(f"making models needs {error.name}: pip install 'baton[engine]'") from error
    create_model(
        folder,
        family,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        max_len=max_len,
        dtype=dtype,
        tokenizer=tokenizer,
        seed=seed,
    )
    print(f"wrote a random {family} model to {folder}")


def _get(url: str, path: str) -> dict[str, Any]:
    import httpx

    try:
        return httpx.get(url.rstrip("/") + path, timeout=5.0).raise_for_status().json()
    except httpx.HTTPStatusError as error:
        raise ConfigError(f"{url} answers {error.response.status_code}: give the URL of a router's HTTP port") from error
    except httpx.HTTPError as error:
        raise ConfigError(f"no router answers at {url} ({error}); start a cluster with `baton up`, or give --url") from error


def _print_cluster(cluster: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="Baton is ready", show_header=True)
    for column in ("process", "role", "pid"):
        table.add_column(column)
    for process in cluster.describe()["processes"]:
        table.add_row(process["id"], process["role"], str(process["pid"]))
    console.print(table)
    for router in cluster.routers:
        console.print(f"HTTP  {router['http']}/v1     gRPC  {router['grpc']}")
    console.print(f"Console  {cluster.http}/console     metrics  {cluster.http}/metrics", soft_wrap=True, highlight=False)
    console.print("Try:", style="bold")
    body = '{"messages": [{"role": "user", "content": "What is Baton?"}], "stream": true}'
    console.print(f"  curl -N {cluster.http}/v1/chat/completions -d '{body}'", soft_wrap=True, highlight=False)
    program = "baton" if shutil.which("baton") else Path(sys.executable).with_name("baton")
    console.print(f"  {program} chat --url {cluster.http}", soft_wrap=True, highlight=False)
    console.print("Ctrl-C stops everything.")
