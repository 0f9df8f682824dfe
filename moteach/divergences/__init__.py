"""Divergences between the student and a target, their estimators, and the kernels that evaluate them in little memory.

A torch-only room: usable as a library, without a config. `full` has every divergence as a function of logits; `topk` reads one
on k tokens; `sampled` and `advantages` are of the token that was written; `chunked`, `chunked_topk` and `logprobs` compute from
hidden states and heads, `measure` without a gradient.
"""
