"""The tokenizer of the arena: one token per character, shared by the base and every shipped expert."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD_TOKEN = "<pad>"
EOS_TOKEN = "<eos>"
UNKNOWN_TOKEN = "<unk>"
ALPHABET = string.digits + string.ascii_lowercase + string.ascii_uppercase + " !\"'()*+,-./:;<=>?[]_"
"""Every character an arena text may hold."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the character tokenizer (ids: padding, end of sequence, unknown, then `ALPHABET` in order).

    Encoding adds no special token and decoding restores the text byte for byte. The chat template returns the contents
    of the messages as they are, so that a prompt reads the same with and without it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [PAD_TOKEN, EOS_TOKEN, UNKNOWN_TOKEN, *ALPHABET]
    model = models.WordLevel(vocab={word: index for index, word in enumerate(words)}, unk_token=UNKNOWN_TOKEN)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )
