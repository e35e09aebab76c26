"""The commands, a module or a folder each: chat, data, doctor, export, plan, report, status, stop, supervise and train.

The command line imports each by its name when it is called, so that a help text needs no torch.
"""
