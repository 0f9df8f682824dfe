"""Tokenizers of several kinds, built in code; not the project's, so that teachers can have another one than the student."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["the answer is 42 and 17", "alpha 12+5=17", "beta 40+5=45", "naïve café 日本 🙂 the sum", "a b  c\n\n  d"] * 4


def wrapped(backend: Any, **special: Any) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def byte_level(*, vocab_size: int = 330, chat_template: str | None = None, bos: bool = False) -> Any:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have; `<end>` ends a sequence."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<end>", "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<think>", special=False)])
    if bos:
        from tokenizers.processors import TemplateProcessing

        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", special.index("<s>"))])
    extra = {"bos_token": "<s>"} if bos else {}
    return wrapped(backend, pad_token="<pad>", eos_token="<end>", chat_template=chat_template, **extra)


def sentence_pieces() -> Any:
    """BPE on `▁` with byte fallback and a space before every text, as Llama 2 has."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{value:02X}>" for value in range(256)),
        "▁",
        *"abcdehlorstw",
        "he",
        "▁w",
        "or",
    ]
    backend = Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            [("h", "e"), ("▁", "w"), ("o", "r")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def lower_case() -> Any:
    """Byte-level BPE behind a normaliser that writes everything in small letters."""
    found = byte_level()
    found.backend_tokenizer.normalizer = normalizers.Lowercase()
    return found
