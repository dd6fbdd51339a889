"""How a command line tells its errors: one line, and exit code 2."""

import sys

import typer

from baton.errors import EXIT_CONFIG, BatonError


def run_command(app: typer.Typer, name: str) -> None:
    """`name`: as the user has called it."""
    try:
        app(prog_name=name)
    except BatonError as error:
        print(f"baton: {error.message}", file=sys.stderr)
        raise SystemExit(EXIT_CONFIG) from None
