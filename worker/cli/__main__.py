"""`python -m worker.cli`, the same as `stepwell`."""

from worker.cli import main

main(prog_name="stepwell")
