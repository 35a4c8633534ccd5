"""What a model is made of, as data: one TOML file per family, read by ``registry``, applied by ``model_map``."""
