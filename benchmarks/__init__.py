"""Measurements and drills: what `recofuse bench` and `make drills` run. They need a source tree, not a wheel."""
