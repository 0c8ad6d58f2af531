"""Threads of one process take turns: torch's random state and a network's modes and flags are shared by all of them."""

from __future__ import annotations

import threading

TURN = threading.RLock()
"""Held by whoever sets the global random state, or the modes and flags of a network, until they are as they were.

Else a thread would draw another's random numbers, or find a network in train mode, and measure something else without
a word. A thread waits for its turn; work that is to run at the same time needs processes.
"""
