"""The campaign: kills, full disks, damaged files and malformed inputs by the hundred, counted and written down."""
