"""`python -m everstep`: the command line."""

from everstep.cli import main

if __name__ == "__main__":
    main()
