"""A problem's shape and the facts of a GPU in, a plan of launches out. Pure: needs no GPU."""
