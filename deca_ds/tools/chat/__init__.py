"""`deca chat`: the same questions to several models, such as the base, a client's and the mean.

speaker.py is one model with its side of the conversation; show.py puts the answers on the screen as they come.
"""
