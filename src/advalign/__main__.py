"""`python -m advalign`, for running from source."""

from advalign.cli.commands import main

main()
