"""The commands, a module or a folder each. deca_ds/cli.py lists them.

The command line imports each by its name when it is called, so that a help text needs no torch.
"""
