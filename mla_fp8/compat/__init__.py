"""Functions under the names, and with the arguments, that other libraries give them."""
