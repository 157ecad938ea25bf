"""Checks of public arguments: arrays of any library in, a checked `Problem` and outputs out."""
