"""Rollout engines: completions sampled from the current student, with the logprobs they were sampled with."""
