"""The command line, `baton`. Commands import what they need when they run, so that it starts quickly and works without torch."""

from baton.cli.app import main

__all__ = ["main"]
