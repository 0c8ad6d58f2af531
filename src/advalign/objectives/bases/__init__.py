"""Adversarial-training bases, one file each."""
