"""The stock model's ``generate``: prompts batched in order of length, pictures and text prepared by the processor."""

from typing import Any

import torch
from PIL import Image
from serve import Gate, settings, synchronise, versions
from transformers import AutoProcessor, GenerationConfig, Qwen2_5_VLForConditionalGeneration


def main() -> None:
    """Serve rollouts (sampled, ``num_return_sequences``) or evaluation (greedy)."""
    gate = Gate()
    folder, case = settings()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model", dtype=getattr(torch, case["dtype"]))
    model = model.to(case["device"]).eval()
    processor = AutoProcessor.from_pretrained(folder / "model", padding_side="left")
    rows = sorted(case["rows"], key=lambda row: row["tokens"])
    batch = case["batch"] or len(rows)
    sampled: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "num_return_sequences": case["group"]}
    config = GenerationConfig(
        max_new_tokens=case["new_tokens"],
        suppress_tokens=case["never"],
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        **({"do_sample": False} if case["work"] == "evaluate" else sampled),
    )
    gate.ready(**versions("torch", "transformers"))

    @torch.no_grad()
    def unit() -> dict[str, Any]:
        tokens = 0
        for start in range(0, len(rows), batch):
            chosen = rows[start : start + batch]
            content = [
                [{"type": "image"}, {"type": "text", "text": row["problem"][7:] + case["suffix"]}] for row in chosen
            ]
            turns = [[{"role": "user", "content": each}] for each in content]
            texts = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            pictures = [Image.open(folder / row["picture"]).convert("RGB") for row in chosen]
            inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt").to(case["device"])
            out = model.generate(**inputs, generation_config=config)
            tokens += out[:, inputs["input_ids"].shape[1] :].numel()
        synchronise(case["device"])
        return {"tokens": tokens}

    gate.loop(unit)


if __name__ == "__main__":
    main()
