"""`python -m fedfin`: the command line."""

from fedfin.cli import main

if __name__ == "__main__":
    main()
