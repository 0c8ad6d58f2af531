"""Training: plan, loop, step, recipes. Nothing is imported here, so that recipes need no torch."""
