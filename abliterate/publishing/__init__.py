"""What a finished folder says of itself, and its way to the Hub."""
