"""A checked problem and its plan in, kernel launches on CuPy's current stream out."""
