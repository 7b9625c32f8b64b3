"""Fakes: for time, faults and scale."""
