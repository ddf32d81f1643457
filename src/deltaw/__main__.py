"""`python -m deltaw` is the command line, for launchers that start modules."""

from deltaw.cli import main

if __name__ == "__main__":
    main()
