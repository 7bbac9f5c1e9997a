"""`python cli.py …` in a checkout: the `mxkernels` command."""

from mxkernels.cli import main

if __name__ == "__main__":
    main()
