"""Measurements of speed, memory and error, each a command of its own."""
