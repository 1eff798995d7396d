"""Stepwell beside other systems: `python -m benchmarks.peers`.

- `systems` finds the programs of this directory and installs what each needs;
- `stage` gives each measurement a fresh database, workers and a count of what took effect;
- `scenarios` are what is measured;
- `report` makes tables and charts of it.

README.md says what a program of a system has to do.
"""
