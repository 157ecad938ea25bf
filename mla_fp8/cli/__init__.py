"""The command line: ``python -m mla_fp8 COMMAND``."""
