"""`python -m lowvram`."""

from lowvram.cli import main

main()
