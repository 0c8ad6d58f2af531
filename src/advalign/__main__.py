"""`python -m advalign`, for running from source."""

from advalign.cli import main

main()
