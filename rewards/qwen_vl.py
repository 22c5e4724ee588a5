"""What the rewards built on Qwen2-VL share: pixels to patches, tokens, 1-D positions, hidden states at special tokens.

Both rewards were trained, and are scored by their authors, with sequential positions `0, 1, 2, ...` for text and
image tokens alike, not with Qwen2-VL's three-dimensional ones: their models hand embeddings, not tokens, to the
language model, which then cannot know where an image begins. They are given here explicitly. Their authors also
cast the whole model to bfloat16, the tables of rotary frequencies with it, so the tables are rounded here too,
whatever the precision of the rest. (Theirs also rounds the angles of the vision tower, which has short ones; this
does not.)
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.errors import ConfigError, DataError, ModelError, first_line
from align.hub import Weights, locate
from align.weights import load_into, without_storage
from rewards.media import normalise, resize
from rewards.placement import Placement
from rewards.tokens import load_tokenizer

FACTOR = 28  # pixels of one token's side: two patches of 14
PIXELS = 256 * FACTOR * FACTOR
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PADS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}


def smart_resize(height: int, width: int, low: int = PIXELS, high: int = PIXELS) -> tuple[int, int]:
    """Return the size an image is seen at: sides in multiples of 28, `low` to `high` pixels, its shape nearly kept.

    Raises:
        DataError: one side is more than 200 times the other.

    Source: Qwen2-VL (arXiv 2409.12191), its released code.
    """
    if max(height, width) > 200 * min(height, width):
        raise DataError("The image is too narrow", why=f"{height}x{width} has sides more than 200 to 1")
    sides = [max(FACTOR, round(side / FACTOR) * FACTOR) for side in (height, width)]
    if sides[0] * sides[1] > high:
        shrink = math.sqrt(height * width / high)
        sides = [max(FACTOR, math.floor(side / shrink / FACTOR) * FACTOR) for side in (height, width)]
    elif sides[0] * sides[1] < low:
        grow = math.sqrt(low / (height * width))
        sides = [math.ceil(side * grow / FACTOR) * FACTOR for side in (height, width)]
    return sides[0], sides[1]


def picture_tokens(frames: int, height: int, width: int, low: int = PIXELS, high: int = PIXELS) -> int:
    """Return how many tokens a picture of that many frames is: one for 28 x 28 pixels of two frames.

    Raises:
        DataError: see `smart_resize`.
    """
    rows, columns = (side // FACTOR for side in smart_resize(height, width, low, high))
    return max(1, frames // 2) * rows * columns


def patches(frames_BFCHW: Tensor, low: int = PIXELS, high: int = PIXELS) -> tuple[Tensor, Tensor]:
    """Return what the vision tower reads of clips in [0, 1]: patches `[B * N, 1176]` and grids `[B, 3]` of (t, h, w).

    A patch is two frames of 14 x 14 pixels, channel first; the four patches of a token lie next to each other. A single
    frame is seen twice. Gradients reach the frames.

    Raises:
        DataError: an odd number of frames above one, or a size that `smart_resize` refuses.
    """
    batch, count, channels, height, width = frames_BFCHW.shape
    if count > 1 and count % 2:
        raise DataError("A clip needs an even number of frames", why=f"got {count}")
    height, width = smart_resize(height, width, low, high)
    seen = normalise(resize(frames_BFCHW.flatten(0, 1), height, width))
    clips = seen.view(batch, count, channels, height, width).expand(-1, 2 if count == 1 else count, -1, -1, -1)
    grid = (clips.shape[1] // 2, height // 14, width // 14)
    split = clips.reshape(batch, grid[0], 2, channels, grid[1] // 2, 2, 14, grid[2] // 2, 2, 14)
    # [B, t, 2, C, h/2, 2, 14, w/2, 2, 14] -> [B, t, h/2, w/2, 2, 2, C, 2, 14, 14]
    ordered = split.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    return ordered.reshape(-1, channels * 2 * 14 * 14), torch.tensor([grid] * batch, device=seen.device)


def rename(key: str) -> str:
    """Return the name in transformers 5 of a tensor of a checkpoint in the layout of transformers 4.45."""
    if key.startswith(("model.language_model.", "model.visual.")):
        return key
    return re.sub(r"^visual\.", "model.visual.", re.sub(r"^model\.", "model.language_model.", key))


class Network(nn.Module):
    """Qwen2-VL without its language head, and a reward head on its hidden states."""

    def __init__(self, config: Any, head: nn.Module) -> None:
        from transformers import Qwen2VLModel

        super().__init__()
        self.model, self.rm_head = Qwen2VLModel(config), head

    def hidden(self, ids_BT: Tensor, mask_BT: Tensor, patches: Tensor, grids: Tensor, pad: int) -> Tensor:
        """Return the last hidden states `[B, T, D]`, positions `0, 1, 2, ...` for every token."""
        embeddings = self.model.get_input_embeddings()(ids_BT)
        seen = self.model.visual(patches, grid_thw=grids).pooler_output.to(embeddings.dtype)
        embeddings = embeddings.masked_scatter((ids_BT == pad)[..., None], seen)
        return self.model.language_model(
            inputs_embeds=embeddings, attention_mask=mask_BT, position_ids=positions(ids_BT), use_cache=False
        ).last_hidden_state

    def head_at(self, hidden_BTD: Tensor, ids_BT: Tensor, specials: Sequence[int]) -> Tensor:
        """Return the head's output at each of K special tokens, which stand once in a row: `[B, K, out]`, float32."""
        at_BK = torch.stack([(ids_BT == special).int().argmax(1) for special in specials], 1)
        picked = hidden_BTD.gather(1, at_BK[..., None].expand(-1, -1, hidden_BTD.shape[-1]))
        with torch.autocast(picked.device.type, enabled=False):  # trained in float32
            return self.rm_head(picked.float())


def positions(ids_BT: Tensor) -> Tensor:
    """Return the 1-D positions `[3, B, T]` of tokens: 0, 1, 2, ... in all three dimensions of the rotary embedding."""
    return torch.arange(ids_BT.shape[1], device=ids_BT.device).expand(3, *ids_BT.shape)


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt text that belongs to trained weights: known here by its hash, read from a file beside them.

    Args:
        parts: (characters, sha256) of each of its parts, in order; the file is their concatenation.
        source: what the parts are called, and where they are published.
    """

    parts: tuple[tuple[int, str], ...]
    source: str
    file: str = "prompt_template.txt"

    def read(self, folders: Sequence[Path]) -> str:
        """Return the text of the file in the first folder that has it.

        Raises:
            ModelError: no such file, or another text, naming the part that differs.
        """
        found = next((folder / self.file for folder in folders if (folder / self.file).is_file()), None)
        hashes = " and ".join(f"{count:,} characters of sha256 {digest}" for count, digest in self.parts)
        make = f"Write {self.source}, to that file, UTF-8 and unchanged: {hashes}"
        if found is None:
            raise ModelError(
                "The prompt template of these weights is not there", where=str(folders[0] / self.file),
                why="it is theirs, and is not shipped here", do=make,
            )  # fmt: skip
        text, start = found.read_bytes().decode("utf-8", "replace"), 0
        for number, (count, digest) in enumerate(self.parts, 1):
            got = hashlib.sha256(text[start : start + count].encode()).hexdigest()
            start += count
            if got != digest or (number == len(self.parts) and len(text) != start):
                raise ModelError(
                    "This is not the prompt template of these weights", where=str(found),
                    why=f"it has {len(text):,} characters, and the sha256 of part {number} begins {got[:12]}", do=make,
                )  # fmt: skip
        return text


class Reader:
    """Turns prompts into tokens, as the trained model reads them.

    Args:
        base: folder or hub repository of the base model's tokenizer, with its chat template.
        template: the user's text, with `{text_prompt}` and each special token once.
        specials: the special tokens, added to the tokenizer in this order.
        kind: "image" or "video".

    Raises:
        ModelError: a tokenizer without a chat template for that kind.
        ConfigError: a template that lacks its prompt or a special token, or has one twice.
    """

    def __init__(self, base: str, template: str, specials: Sequence[str], kind: str) -> None:
        self.tokenizer = load_tokenizer(base)
        self.tokenizer.add_tokens(list(specials), special_tokens=True)
        self.template, self.kind = template, kind
        for part in ("{text_prompt}", *specials):
            if template.count(part) != 1:
                raise ConfigError(
                    f"The prompt template needs {part} once", why=f"it has it {template.count(part)} times"
                )
        if not self.tokenizer.chat_template:
            raise ModelError(
                "The tokenizer has no chat template", where=base, do="Give the folder of Qwen2-VL-Instruct"
            )
        self.specials = self.tokenizer.convert_tokens_to_ids(list(specials))
        self.pad = self.tokenizer.convert_tokens_to_ids(_PADS[kind])
        self._reserved = sorted(self.tokenizer.get_added_vocab())
        if self.text("").count(_PADS[kind]) != 1:
            raise ModelError(
                "The chat template is another model's", where=base, why=f"it writes no {_PADS[kind]} for one {kind}"
            )
        self.tokens = functools.lru_cache(maxsize=4096)(self._tokens)

    def problem(self, prompt: str, picture: int) -> str:
        """Return why a prompt with a picture of that many tokens cannot be read, empty when it can."""
        held = [token for token in self._reserved if token in prompt]
        if held:
            return f"the prompt holds {held[0]}, which is one of the model's own tokens"
        count, most = len(self.tokens(prompt)) + picture - 1, self.tokenizer.model_max_length
        return f"the prompt and the picture are {count:,} tokens, the model reads {most:,}" if count > most else ""

    def text(self, prompt: str) -> str:
        """Return the whole conversation as text: one user turn, the picture first, then an open assistant turn."""
        content = [{"type": self.kind}, {"type": "text", "text": self.template.replace("{text_prompt}", prompt)}]
        turns = [{"role": "user", "content": content}]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def batch(self, prompts: Sequence[str], grid: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return tokens and mask `[B, T]`, padded on the right; the picture has `t * h * w / 4` tokens."""
        rows = []
        for prompt in prompts:
            ids = self.tokens(prompt)
            at = ids.index(self.pad)
            rows.append(torch.tensor([*ids[:at], *[self.pad] * (math.prod(grid) // 4), *ids[at + 1 :]]))
        longest = max(map(len, rows))
        mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
        filler = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)
        return ids_BT.to(device), mask.long().to(device)

    def _tokens(self, prompt: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(self.text(prompt), verbose=False)["input_ids"])


def load_config(base: str) -> Any:
    """Return the configuration of a Qwen2-VL, from a folder or a hub repository.

    Raises:
        ModelError: there is none, or it is another model's.
    """
    from transformers import Qwen2VLConfig

    try:
        found, _ = Qwen2VLConfig.get_config_dict(base)
        if found.get("model_type") != "qwen2_vl":
            raise ValueError(f"its model_type is {found.get('model_type')!r}, not 'qwen2_vl'")
        config = Qwen2VLConfig.from_dict(found)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            "The configuration of Qwen2-VL cannot be read", where=base, why=first_line(error),
            do="Give a folder with its config.json and tokenizer, or a hub repository that can be reached",
        ) from error  # fmt: skip
    vision: Any = config.vision_config
    if (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size) != (14, 2, 2):
        raise ModelError("This is another vision tower than Qwen2-VL's", where=base, why="its patches are not 2x14x14")
    return config


def find_checkpoint(weights: Weights, path: str | None, own: bool) -> Path:
    """Return the file of weights: the published one, checked against its hash, or at `path` one of one's own.

    Raises:
        ModelError: see `align.hub.locate`.
    """
    return locate(replace(weights, bytes=0, sha256="") if own and path is not None else weights, path)


def build(
    base: str, tokens: int, head: Callable[[int], nn.Module], state: dict[str, Tensor], where: str, placement: Placement
) -> Network:
    """Return the network of a full checkpoint, in the placement's precision, the head in float32.

    Args:
        base: folder or hub repository of the base model, of which only the configuration is read.
        tokens: how many tokens the tokenizer has, special ones included: the rows of the embedding.
        head: makes the reward head for states of that width.
        state: the checkpoint's tensors, named as in transformers 4.45 or 5; its language head is not used. It is
            emptied on the way, so that nothing is held twice.

    Raises:
        ModelError: weights of another model.
    """
    config = load_config(base)
    config.text_config.vocab_size = tokens
    with without_storage():
        network = Network(config, head(config.text_config.hidden_size))
    named = {}
    for key in list(state):  # copied: the tensors of a file are a view of it, and would change with it
        half = torch.float32 if key.startswith("rm_head.") else _DTYPES[placement.dtype]
        named[rename(key)] = state.pop(key).to(half, copy=True)
    load_into(network, named, where, unused=("lm_head.weight",))
    for name, buffer in network.named_buffers():
        if name.endswith("inv_freq"):
            buffer.copy_(buffer.bfloat16())
    placement.settle(network)
    return network
