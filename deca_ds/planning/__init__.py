"""Will it fit, and how long does it take: memory, traffic, length and time of a run, from shapes alone."""
