"""What every process of a cluster does around its work: arguments, logging, signals, a parent to die with."""

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

from baton.cluster.machine import die_with_parent, is_loopback
from baton.config import KVStoreConfig, RouterConfig, SecurityConfig, ServerConfig, WorkerConfig, load_config
from baton.errors import BatonError, ConfigError, exit_code
from baton.hosting.logs import LogFormat, start_logging
from baton.rpc.certificates import Certificates

C = TypeVar("C", bound=RouterConfig | WorkerConfig | KVStoreConfig)
LoopFactory = Callable[[], asyncio.AbstractEventLoop] | None


def run_service(name: str, config_class: type[C], serve: Callable[[C], Awaitable[None]], *, loop_factory: LoopFactory = None) -> None:
    """Parses `--config FILE key=value …`, runs `serve` until it returns, and exits: 0, or with an error's `exit_code` after one
    clear line where it can't start. `loop_factory`: of another event loop than asyncio's own."""

    parser = argparse.ArgumentParser(prog=f"services.{name}", description=f"Baton's {name} service")
    parser.add_argument("--config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file, such as engine.block_size=32")
    arguments = parser.parse_args()
    form: LogFormat = "text"
    start_logging(name)
    parent = os.environ.get("BATON_DIE_WITH_PARENT")  # the supervisor's process id
    if parent:
        die_with_parent(int(parent))
    try:
        config = load_config(config_class, arguments.config, arguments.overrides)
        form = config.server.log_format
        start_logging(name, form)
        check_exposure(config.server, config.security)
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(_serve(serve, config))
    except BatonError as error:
        logging.debug("cannot start", exc_info=True)
        if form == "json":
            logging.critical(error.message)
        else:
            print(f"{name}: {error.message}", file=sys.stderr, flush=True)
        code = exit_code(error)
    else:
        code = 0
    logging.shutdown()
    os._exit(code)  # all is done: what foreign libraries do at an interpreter's end takes up to 30 s (Mooncake with several masters)


def check_exposure(server: ServerConfig, security: SecurityConfig) -> None:
    """Without certificates a service is this machine's alone, unless it is told otherwise. Raises ConfigError."""
    if security.cert or is_loopback(server.host):
        return
    if not security.insecure:
        raise ConfigError(
            f"server.host={server.host} is reached from other machines, and without certificates whoever calls is believed: give "
            "security.cert, key and authority (docs/security.md); or security.insecure=true, where a firewall or a NetworkPolicy keeps "
            "others out"
        )
    logging.warning("calls at server.host=%s are neither encrypted nor authenticated (security.insecure): keep others out", server.host)


def certificates_of(security: SecurityConfig) -> Certificates | None:
    """None where services speak without. Raises ConfigError."""
    return Certificates(security.cert, security.key, security.authority, security.name) if security.cert else None


async def _serve(serve: Callable[[C], Awaitable[None]], config: C) -> None:
    await serve(config)
