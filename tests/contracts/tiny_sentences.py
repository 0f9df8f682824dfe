"""A sentence encoder of a few thousand weights, made on the fly."""

from __future__ import annotations

from pathlib import Path


def make_sentence_encoder(folder: Path, words: list[str]) -> Path:
    """Writes an untrained one that knows these words and takes all others for the same one."""
    import torch
    from sentence_transformers import SentenceTransformer, models
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *words])}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32)
    tokenizer.save_pretrained(str(folder / "bert"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=40,
            initializer_range=0.5,
        )
        bert = BertModel(config)
        bert.embeddings.position_embeddings.weight.data.zero_()  # a word means the same wherever it is
        bert.save_pretrained(str(folder / "bert"))
    layers = models.Transformer(str(folder / "bert"))
    made = SentenceTransformer(modules=[layers, models.Pooling(layers.get_embedding_dimension())], device="cpu")
    made.save_pretrained(str(folder / "sentences"), create_model_card=False)
    return folder / "sentences"
