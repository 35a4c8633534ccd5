"""Running a model: the only package that imports transformers and accelerate."""
