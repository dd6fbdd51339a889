"""What every process of a cluster does around its work: arguments, logging, signals, a parent to die with."""

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

from baton.cluster.machine import die_with_parent
from baton.config import KVStoreConfig, RouterConfig, WorkerConfig, load_config
from baton.errors import BatonError, exit_code
from baton.hosting.logs import LogFormat, start_logging

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


async def _serve(serve: Callable[[C], Awaitable[None]], config: C) -> None:
    await serve(config)
