"""Remove, add or measure a linear direction in an open-weight model, and prove what was written."""

__version__ = "0.1.0"
