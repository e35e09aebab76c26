"""Clients that die and come back: agreements on who is in, the failure policy, new connections, and the handover."""
