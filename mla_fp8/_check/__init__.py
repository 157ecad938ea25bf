"""Arguments in, a checked problem out, or an error that names the argument."""
