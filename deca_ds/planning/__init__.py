"""Will it fit, and how long does it take: memory, traffic, length and time of a run, from shapes alone.

Its modules are imported by their names, by `deca plan` alone.
"""
