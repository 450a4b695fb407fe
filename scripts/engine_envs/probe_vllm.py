"""Generates greedily with vLLM's CPU build from a checkpoint, with nothing of ours imported.

Usage: python -I probe_vllm.py MODEL WORK NAME. Reads WORK/prompts.json and WORK/picture.png; writes WORK/NAME.json.
"""

import json
import sys
from pathlib import Path

import transformers
import vllm
from PIL import Image
from vllm import LLM, SamplingParams

NEW_TOKENS = 12


def main(model_dir: str, work: Path, name: str) -> None:
    """Greedy tokens of every prompt, in one batch."""
    llm = LLM(
        model=model_dir,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=8,
        limit_mm_per_prompt={"image": 1, "video": 0},
        mm_processor_kwargs={"max_pixels": 64 * 28 * 28},
        seed=0,
    )
    tokenizer = llm.get_tokenizer()
    picture = Image.open(work / "picture.png").convert("RGB")
    requests = []
    for question in json.loads((work / "prompts.json").read_text(encoding="utf-8")):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        requests.append({"prompt": text, "multi_modal_data": {"image": picture}})
    outputs = llm.generate(requests, SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS), use_tqdm=False)
    report = {
        "versions": {"vllm": vllm.__version__, "transformers": transformers.__version__},
        "greedy": [list(output.outputs[0].token_ids) for output in outputs],
        "texts": [output.outputs[0].text for output in outputs],
    }
    (work / f"{name}.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
