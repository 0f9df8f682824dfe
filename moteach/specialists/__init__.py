"""Making an expert: supervised training, then a verifier's reward."""
