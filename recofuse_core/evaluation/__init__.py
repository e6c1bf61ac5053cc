"""How good it is: the seeded protocol, its scores, baselines to beat, reports, plots, and sets for downstream tasks."""
