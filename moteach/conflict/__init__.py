"""Conflict between teachers: pools that turn several distributions into one target.

A torch-only room: usable as a library, without a config.
"""
