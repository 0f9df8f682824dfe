"""Held-out accuracy by verifiers, and the closing table."""
