"""`python -m qdq`: the command line."""

from qdq.cli.entry import main

if __name__ == "__main__":  # a process that calibration starts imports this file too
    main()
