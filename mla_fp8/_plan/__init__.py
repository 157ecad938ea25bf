"""Plans the launches of a call from its shape and device facts. Pure Python; needs no GPU."""
