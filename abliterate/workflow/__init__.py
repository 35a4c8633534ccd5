"""The stages in their order, what they share, and what a stopped one leaves behind."""
