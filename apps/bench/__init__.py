"""Benchmarks: every claim about speed or quality is a number from one of these."""
