"""Fuzzers: random calls, nets and files, compared with what must hold for all. CONTRIBUTING.md names the command."""
