"""What advalign gains over plain loops, measured side by side: `python -m benchmarks`."""
