"""Evaluation contracts by name: how answers are decoded, and which keys of an ``evaluation`` section they fill in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

ContractName = Literal["greedy", "paper", "teacher_forced"]
Scorer = Literal["official", "paper_single_label"]


@dataclass(frozen=True)
class Decoding:
    """How an answer comes about.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: Sampling is among the likeliest tokens that reach this share together.
        samples: Answers a row.
        forced: No answer is written: each token of the label is predicted from the label's own tokens before it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    forced: bool = False


@dataclass(frozen=True)
class ContractPreset:
    """A contract by name.

    Attributes:
        decoding: How an answer comes about.
        fills: Values of the keys of an ``evaluation`` section that it does not state.
    """

    decoding: Decoding
    fills: Mapping[str, int] = field(default_factory=dict)


CONTRACTS: Mapping[str, ContractPreset] = {
    "greedy": ContractPreset(Decoding()),
    # Source: RFTvsSFT@7d4f50e EasyR1/examples/test.yaml: val_override_config changes temperature and n, so that top_p
    # stays that of the rollouts. Differs from: a prompt over the limit is refused, where the source drops the row.
    "paper": ContractPreset(
        Decoding(temperature=0.5, top_p=0.99),
        {"max_new_tokens": 1024, "max_prompt_tokens": 6144, "min_pixels": 262144, "max_pixels": 4194304},
    ),
    # Source: RFTvsSFT@7d4f50e LLaMA-Factory/examples/mllm_cl/val.yaml (compute_accuracy_vqa without
    # predict_with_generate). For audits only: the model is shown the label that it is asked for.
    "teacher_forced": ContractPreset(Decoding(forced=True), {"max_new_tokens": 1}),  # nothing is written
}
