"""`python -P -m coserve.server.cli`: the command line where its script is not on the path."""

from coserve.server.cli import main

main(prog_name="coserve")
