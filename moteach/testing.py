"""Tiny models and a tiny tokenizer, built in code: no network, no files, a few milliseconds.

Public, so that authors of plug-ins can test routers, resolvers and verifiers without a checkpoint.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moteach.types import Prompt

TINY_CHARACTERS = string.digits + string.ascii_lowercase + " +-*/=()[]<>.,:;?!|_#&%$\n"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'][0] + '>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)
"""A chat template of one letter per role, for tests: `<u>1+1=\\n<a>`."""


def tiny_tokenizer(*, vocab_size: int = 64, chat_template: str | None = None) -> Any:
    """Builds a character-level fast tokenizer: `<pad>` 0, `<eos>` 1, `<unk>` 2, then one id per character.

    Args:
        vocab_size: Size of the vocabulary; what the characters leave free is filled with `<extra_N>` tokens.
        chat_template: Jinja template, for instance `CHAT_TEMPLATE`.
    """
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *TINY_CHARACTERS]
    words = [*words[:vocab_size], *(f"<extra_{i}>" for i in range(vocab_size - len(words)))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(
    *,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    vocab_size: int = 64,
    head_dim: int = 32,
    context: int = 256,
    tied: bool = True,
    scale: float = 1.0,
) -> nn.Module:
    """Builds a random Llama causal language model in float32.

    Args:
        seed: Seed of the weights; torch's global generator is left as it was.
        hidden: Hidden size.
        layers: Number of layers.
        vocab_size: Size of the vocabulary; `tiny_tokenizer` has 64 by default.
        head_dim: Size of an attention head; there are `hidden / head_dim` of them.
        context: Longest sequence.
        tied: Share the embedding matrix with the head.
        scale: Standard deviation of the logits is multiplied by about this; larger models are more opinionated.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, hidden // head_dim)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        initializer_range=scale * hidden**-0.5,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = LlamaForCausalLM(config)
    return model.eval()


def tiny_prompts(
    texts: Sequence[str],
    *,
    tokenizer: Any = None,
    domain: str | None = None,
    answers: Sequence[str] | None = None,
    verifier: str | None = None,
) -> list[Prompt]:
    """Makes prompts `p0, p1, ...` out of texts, with `tiny_tokenizer()` unless another one is given."""
    tokenizer = tokenizer or tiny_tokenizer()
    return [
        Prompt(
            prompt_id=f"p{i}",
            text=text,
            token_ids=tuple(tokenizer(text, add_special_tokens=False)["input_ids"]),
            domain=domain,
            answer=None if answers is None else answers[i],
            verifier=verifier,
        )
        for i, text in enumerate(texts)
    ]


@dataclass(frozen=True, kw_only=True)
class TinyWorld:
    """A world on disk that a run of seconds can be made of."""

    student: Path
    """Folder of the student: weights and tokenizer."""
    cards: Path
    """Folder of the expert cards; the weights of expert `alpha` are in `weights/alpha` below it."""
    prompts: Path
    """JSONL file with the columns `prompt`, `domain` and `answer`; the domains are the names of the experts."""
    overrides: list[str]
    """Overrides of `moteach train` that train on it in four steps; add `run_dir=`."""


def write_tiny_world(folder: Path, *, experts: Sequence[str] = ("alpha", "beta")) -> TinyWorld:
    """Writes a tiny student, tiny experts with their cards, and prompts.

    Every model has weights of its own; expert `name` claims the domain `name`.

    Args:
        folder: Where; made when it does not exist.
        experts: Names of the experts, each also the name of its domain.
    """
    tokenizer = tiny_tokenizer()
    cards = folder / "cards"
    student = folder / "student"
    places = {"": student, **{name: cards / "weights" / name for name in experts}}
    for seed, (name, place) in enumerate(places.items()):
        model: Any = tiny_model(seed=seed, hidden=32, layers=1, head_dim=16, scale=2.0 if name else 1.0)
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        if name:
            card = f"model: ./weights/{name}\ndomains: [{name}]\n"
            (cards / f"{name}.yaml").write_text(card, encoding="utf-8")
    prompts = folder / "prompts.jsonl"
    rows = [
        {"prompt": f"{name} {left}+{left % 7}=", "domain": name, "answer": str(left + left % 7)}
        for name in experts
        for left in range(60)
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    overrides = [
        "data=jsonl",
        f"data.path={prompts}",
        "data.evaluation_fraction=0.25",
        f"student.model={student}",
        f"expert_path=[{cards}]",
        f"experts=[{','.join(experts)}]",
        "sampler.prompts_per_step=8",
        "rollout.max_new_tokens=6",
        "max_steps=4",
        "optim.warmup_steps=1",
    ]
    return TinyWorld(student=student, cards=cards, prompts=prompts, overrides=overrides)
