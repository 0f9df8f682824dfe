"""Routers weight teachers per prompt, gates per token. Neither is ever trained by the distillation loss."""
