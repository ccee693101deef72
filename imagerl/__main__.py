"""`python -m imagerl`: the command line, for where the `imagerl` script is not on the path, as under `torchrun -m`."""

from imagerl.rl.commands.cli import main

if __name__ == "__main__":
    main()
