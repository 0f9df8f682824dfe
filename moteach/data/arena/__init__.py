"""The built-in world: tasks that a laptop learns in seconds, each with a verifier."""
