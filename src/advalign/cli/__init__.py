"""The command line."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command of this process's arguments; Ctrl-C while it is being imported is a line as well."""
    try:
        from advalign.cli import commands
    except KeyboardInterrupt:
        print("advalign: stopped at once, before anything was done", file=sys.stderr)
        sys.exit(130)
    commands.main()
