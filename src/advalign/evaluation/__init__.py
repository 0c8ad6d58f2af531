"""Evaluation: accuracy under attack, its checks, transfer, comparison."""
