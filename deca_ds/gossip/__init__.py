"""Decentralized averaging: graphs and weights, the schedule of mixing, and the averaging itself."""
