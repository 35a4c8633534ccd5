"""How a memory budget is shared out where files are read and written."""

DEFAULT_BYTES = 512 * 2**20
"""The memory budget of an edit or a proof where none is given."""

MOST_BYTES = 2**30
"""A larger memory budget makes nothing faster."""

RESERVED_BYTES = 96 * 2**20
"""Of the memory budget: float buffers, held rows, headers, threads."""

COPY_BYTES = 32 * 2**20
"""The largest piece that is copied or compared at a time."""

SMALLEST_PIECE = 2**16
