"""Experts: their cards, where they are found, and how their models are opened."""
