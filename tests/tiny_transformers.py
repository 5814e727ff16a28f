"""Tiny networks of transformers, from configuration, with tokenizers: as `save_pretrained` leaves them in a folder."""

from pathlib import Path
from typing import Any

import tokenizers
import torch

from undertow.frameworks.torch.zoo.importing import import_torchvision

import_torchvision()
import transformers  # noqa: E402  it imports torchvision

WORDS = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "the", "food", "was", "not", "bad", "##ly", "cat", ".", "good")
LABELS = {0: "negative", 1: "positive"}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def seeded(make: Any, config: Any, spread: float = 0.2) -> Any:
    """A network with random weights far enough from zero that each word counts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * spread)
    return model


def wordpiece() -> Any:
    """BERT's kind: lower case, special tokens around."""
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    around = [("[CLS]", 1), ("[SEP]", 2)]
    made.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def byte_level() -> Any:
    """GPT-2's kind: bytes, and a space before a word."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("c", "a"), ("ca", "t"), ("Ġ", "cat"), ("Ġ", "s"), ("o", "n"), ("Ġ", "on")]
    pieces = ["<unk>", *letters, *("".join(pair) for pair in merges)]
    made = tokenizers.Tokenizer(tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def bert(**more: Any) -> Any:
    labels = {"id2label": LABELS, "label2id": {name: i for i, name in LABELS.items()}}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=12, **SIZES, **labels, **more)
    return seeded(transformers.BertForSequenceClassification, config)


def gpt2(**more: Any) -> Any:
    size = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return seeded(transformers.GPT2LMHeadModel, transformers.GPT2Config(vocab_size=265, **size, **more))


def llama(**more: Any) -> Any:
    size = {"num_key_value_heads": 1, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0}
    return seeded(transformers.LlamaForCausalLM, transformers.LlamaConfig(vocab_size=265, **SIZES, **size, **more))


def t5(**more: Any) -> Any:
    size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
    special = {"decoder_start_token_id": 3, "pad_token_id": 3, "eos_token_id": 2}
    config = transformers.T5Config(vocab_size=len(WORDS), **size, **special, **more)
    return seeded(transformers.T5ForConditionalGeneration, config)


def bart(**more: Any) -> Any:
    size = {"d_model": 16, "max_position_embeddings": 12, "scale_embedding": True}
    for part in ("encoder", "decoder"):
        size |= {f"{part}_layers": 2, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 32}
    special = {"decoder_start_token_id": 2, "bos_token_id": 1, "pad_token_id": 3, "eos_token_id": 2}
    config = transformers.BartConfig(vocab_size=len(WORDS), **size, **special, **more)
    return seeded(transformers.BartForConditionalGeneration, config)


def vit(**more: Any) -> Any:
    names = {0: "tench", 1: "tabby, tabby cat", 2: "tiger cat"}
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, id2label=names, label2id={name: i for i, name in names.items()}, **SIZES, **more
    )
    return seeded(transformers.ViTForImageClassification, config)


def saved(folder: Path, *parts: Any) -> Path:
    for part in parts:
        part.save_pretrained(folder)
    return folder
