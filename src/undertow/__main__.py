"""`python -m undertow` is the command."""

from .cli import main

main()
