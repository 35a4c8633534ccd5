"""Proofs on written bytes, from the equation and never from the code that edits; what differs between checkpoints."""
