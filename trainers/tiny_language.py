"""The embedded language model and thumbs: a random two-layer Qwen2 with a tokenizer of its own, and a copying task.

`model.path: tiny` is an ordinary folder of transformers, built in about a second; `data.path: toy` asks to repeat
words, thumbs up for those who do and down for those who say others.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from align.diffusion.digits_data import build_once, cache_directory
from align.preferences import Completion, PreferenceSet
from align.seeding import permutation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WORDS = [
    "red", "blue", "green", "pink", "gray", "gold", "cat", "dog", "fox", "owl", "bee", "ant", "cow", "hen", "one",
    "two", "six", "ten", "sun", "moon", "star", "rain", "snow", "wind", "tea", "milk", "salt", "rice", "corn", "bread",
    "door", "lamp", "desk", "book", "boat", "road", "hill", "lake",
]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def toy_thumbs(pairs: int = 600, *, words: int = 4) -> PreferenceSet:
    """Return two rows a prompt: its words repeated, thumbs up, and other words, thumbs down."""
    rows = []
    for i in range(pairs):
        drawn = [WORDS[j] for j in permutation(len(WORDS), "toy", i)]
        asked, other = " ".join(drawn[:words]), " ".join(drawn[words : 2 * words])
        prompt, place = f"Say: {asked}\nAnswer:", f"toy, row {i}"
        rows.append(Completion(prompt, f" {asked}", True, pair=i, place=place))
        rows.append(Completion(prompt, f" {other}", False, pair=i, place=place))
    return PreferenceSet(tuple(rows), "toy")


def tiny_model() -> Path:
    """Return the folder of the embedded model, built on first use and kept in align's cache."""
    source = hashlib.sha256(Path(__file__).read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    return build_once(cache_directory() / f"tiny-language-{source}", build_tiny)


def build_tiny(folder: Path, *, seed: int = 0, vocabulary: int = 512, hidden: int = 64, layers: int = 2) -> Path:
    """Save a random Qwen2 and a tokenizer trained on the toy words into `folder`.

    Args:
        seed: of the weights.
        vocabulary: tokens; unused ones fill it up.
        hidden, layers: width and depth.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=max(vocabulary, len(tokenizer)),
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=2048,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer with a ChatML template on the toy words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
    lines = [f"Say: {a} {b}\nAnswer: {b} {a}\nuser\nassistant\nsystem\n" for a in WORDS for b in WORDS[:6]]
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=480,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = TEMPLATE
    return fast
