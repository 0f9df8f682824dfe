"""From Hydra's composed configuration to objects: schema, validation, construction."""
