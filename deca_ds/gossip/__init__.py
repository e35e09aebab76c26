"""Decentralized averaging: graphs and weights, the schedule of mixing, transports between clients, the mix itself."""
