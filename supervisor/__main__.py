"""`python -m speedlayer.supervisor`: the same as the command `speedlayer`."""

from speedlayer.supervisor.cli import main

if __name__ == "__main__":
    main()
