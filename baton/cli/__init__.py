"""The command line, `baton`."""


def main() -> None:
    raise SystemExit("baton: no commands yet")
