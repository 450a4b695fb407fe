"""How many operations a piece of work needs by the mathematics: one row a completion, and with shared prompts.

A multiplication and an addition count as two. Matrix products and attention are counted, attention over visible pairs
only; a backward pass counts twice its forward pass. Element-wise work is left out, on both sides alike.
"""

from dataclasses import dataclass
from typing import Any

UNIT = 4  # patches in a merged picture token


@dataclass(frozen=True)
class Model:
    """The numbers of a configuration that decide."""

    hidden: int
    layers: int
    kv_width: int
    mlp: int
    vocabulary: int
    vision_hidden: int
    vision_depth: int
    vision_mlp: int
    vision_full: int
    window_patches: int

    @classmethod
    def read(cls, config: dict[str, Any]) -> "Model":
        """From the content of a config.json in the released, flat form."""
        vision = config["vision_config"]
        heads = config["num_attention_heads"]
        return cls(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            kv_width=config["hidden_size"] // heads * config["num_key_value_heads"],
            mlp=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            vision_hidden=vision["hidden_size"],
            vision_depth=vision["depth"],
            vision_mlp=vision["intermediate_size"],
            vision_full=len(vision["fullatt_block_indexes"]),
            window_patches=(vision["window_size"] // vision["patch_size"]) ** 2,
        )

    def tokens(self, count: float) -> float:
        """Linear layers of all decoder layers, without the head, over ``count`` tokens."""
        layer = 2 * self.hidden**2 + 2 * self.hidden * self.kv_width + 3 * self.hidden * self.mlp
        return 2 * count * self.layers * layer

    def unread(self, count: float) -> float:
        """What the last layer need not do for tokens of which only keys and values are read."""
        return 2 * count * (2 * self.hidden**2 + 3 * self.hidden * self.mlp)

    def head(self, count: float) -> float:
        """Logits of ``count`` tokens."""
        return 2 * count * self.hidden * self.vocabulary

    def pairs(self, count: float) -> float:
        """Attention over ``count`` pairs of query and key, in all layers."""
        return 4 * count * self.hidden * self.layers

    def picture(self, width: int, height: int) -> float:
        """The tower over one picture, its size in merged tokens."""
        merged = width * height
        patches, wide = merged * UNIT, self.vision_hidden
        block = 4 * wide**2 + 3 * wide * self.vision_mlp
        linear = patches * (1176 * wide + self.vision_depth * block)
        merger = merged * ((UNIT * wide) ** 2 + UNIT * wide * self.hidden)
        full = self.vision_full * patches
        windows = (self.vision_depth - self.vision_full) * min(patches, self.window_patches)
        return 2 * (linear + merger) + 4 * patches * (full + windows) * wide


def operations(model: Model, case: dict[str, Any], *, shared: bool) -> float:
    """Operations of one unit of work of a case, on average prompts; ``shared``: each prompt once for its group."""
    rows, group, new = case["prompts"], case["group"], case["new_tokens"]
    prompt = sum(row["tokens"] for row in case["rows"]) / len(case["rows"])
    times = 1 if shared else group
    picture = model.picture(*case["picture"])
    read = prompt * new + new * (new - 1) / 2  # pairs of a completion with its prompt and itself
    prefill = times * (picture + model.tokens(prompt) + model.pairs(prompt * (prompt + 1) / 2))
    decode = group * (model.tokens(new - 1) + model.head(new) + model.pairs(read))
    if shared:
        prefill -= times * model.unread(prompt - 1)
    once = prefill + decode
    parts = {"rollout": once, "evaluate": once, "sft": 3 * once, "grpo": once + 3 * once}
    total = parts[case["work"]]
    if case["work"] == "sft" and case.get("frozen"):
        total -= 2 * times * picture
    return rows * total
