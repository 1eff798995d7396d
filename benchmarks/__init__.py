"""Measure Stepwell on this machine, beside Postgres itself: `make bench`."""
