"""Checkpoints as bytes: headers, shards, folders.  Nothing here knows what a tensor means."""
