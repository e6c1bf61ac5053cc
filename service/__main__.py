"""`python -m service` is the `recofuse` command."""

from service.command.cli import main

if __name__ == "__main__":
    main()
