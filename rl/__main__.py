"""`python -m rl`, the same as `imagerl`."""

from rl.cli import main

main()
