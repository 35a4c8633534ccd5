"""A plan applied to a checkpoint, streamed: what is planned, a block of a tensor, a shard, a folder."""
