"""Prompts: where they come from, how they are split and in which mixture they are drawn."""
