"""`python -m sdrt`: the command line, also where the `sdrt` script is not on the PATH."""

from sdrt.cli import main

if __name__ == "__main__":
    main()
