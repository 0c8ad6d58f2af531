"""Clean accuracy back after training: settings between a robust and an accurate network, measured adaptively."""
