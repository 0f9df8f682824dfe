"""Divergences between the student and a target, and the chunked kernel that evaluates them in little memory.

A torch-only room: usable as a library, without a config.
"""
