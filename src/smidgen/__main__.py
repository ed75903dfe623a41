"""`python -m smidgen` is the command `smidgen`."""

from smidgen.cli.main import main

if __name__ == "__main__":
    main()
