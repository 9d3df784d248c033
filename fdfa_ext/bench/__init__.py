"""Timing: whole training steps beside other ways to make them, and the operators of one step."""
