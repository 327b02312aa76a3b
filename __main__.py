"""`python -m openvla`: the command `openvla` of this Python, also where no script of it is on the path."""

from openvla.cli import main


if __name__ == "__main__":  # not in processes that it starts
    main()
