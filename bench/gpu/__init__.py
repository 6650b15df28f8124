"""The parts of `bench/gpu_suite.py`, and what they share.

A part is a module with `cases(setup)`: (name, function) pairs in order of importance. A function
returns the record of its case, plain values for JSON; a non-empty list under "problems" says that
something is wrong. What is right is the tests' to say: inputs, models and thresholds are theirs.
"""
