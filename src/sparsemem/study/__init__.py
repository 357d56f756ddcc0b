"""Measured runs: attach a memory and teach it, with what was learned and what was forgotten."""
