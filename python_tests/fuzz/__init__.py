"""Fuzzers: random arguments against the definitions, for as long as one likes."""
