"""The commands: each module has a `main(argv) -> int`, and `hrm-lm NAME` or its `python -m` form runs it."""
