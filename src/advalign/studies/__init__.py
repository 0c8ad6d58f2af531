"""Studies: declared sets of runs and evaluations."""
