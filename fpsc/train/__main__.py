"""`python -m fpsc.train CONFIG`, for launchers of several processes: the command `fpsc train`."""

import sys

from fpsc.cli import app

if __name__ == "__main__":
    app(["train", *sys.argv[1:]])
