"""Clients that die and come back: who is in, new connections, and the handover of training's state."""
