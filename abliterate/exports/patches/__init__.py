"""The edit as a file: exported, applied to a pristine base, taken back."""
