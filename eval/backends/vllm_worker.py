"""Answers prompts with vLLM, in vLLM's own environment; nothing of ours is imported here.

Usage: python vllm_worker.py. Reads JSON lines: first the settings, then one batch a line; writes one line for each.
"""

import base64
import io
import json
import os
import sys
from typing import Any


def main() -> None:
    """Serve until the input ends; vLLM's own words go to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.stdin.readline())
    import vllm
    from PIL import Image

    llm = vllm.LLM(**settings["engine"])
    print(json.dumps({"version": vllm.__version__}), file=out, flush=True)
    for line in sys.stdin:
        batch = json.loads(line)
        requests, parameters = [], []
        for question in batch["questions"]:
            pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in question["pictures"]]
            request: dict[str, Any] = {"prompt_token_ids": question["ids"]}
            if pictures:
                request["multi_modal_data"] = {"image": pictures}
            requests.append(request)
            bias = {token: -100.0 for token in batch["banned"]}
            parameters.append(vllm.SamplingParams(**batch["sampling"], seed=question["seed"], logit_bias=bias))
        answers = [
            {
                "prompt": list(output.prompt_token_ids),
                "samples": [[list(one.token_ids), one.finish_reason] for one in output.outputs],
            }
            for output in llm.generate(requests, parameters, use_tqdm=False)
        ]
        print(json.dumps(answers), file=out, flush=True)


if __name__ == "__main__":
    main()
