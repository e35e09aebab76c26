"""`deca data`: what each client of a configuration trains on and is scored on, before a job is started.

look.py prepares the data as a run does and collects the facts; repeats.py finds what occurs more than once; show.py and
as_json.py write it down. Of private files only those are opened that lie on this machine, or only one client's.
"""
