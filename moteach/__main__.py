"""`python -m moteach` equals `moteach`."""

from moteach.cli.main import entry

if __name__ == "__main__":
    entry()
