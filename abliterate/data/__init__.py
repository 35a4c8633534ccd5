"""What ships with the package: the bundled model and prompts, and shapes of released models to rehearse with."""
