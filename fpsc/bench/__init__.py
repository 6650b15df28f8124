"""Benchmarks of compiled models: what is measured, how, and the record that is kept of it."""
