"""The machine: device, seeds, interrupts, progress, CUDA graphs."""
