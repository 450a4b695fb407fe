"""vLLM: the same prompts, ``n`` completions each, in one call, after which nothing of it is remembered."""

from typing import Any

from PIL import Image
from serve import Gate, settings, versions


def main() -> None:
    """Serve rollouts."""
    gate = Gate()
    folder, case = settings()
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(folder / "model"),
        dtype=case["dtype"],
        enforce_eager=case["device"] == "cpu",
        max_model_len=1024,
        max_num_seqs=case["prompts"] * case["group"],
        limit_mm_per_prompt={"image": 1, "video": 0},
        mm_processor_cache_gb=0,
        seed=0,
    )
    tokenizer = llm.get_tokenizer()
    words = [number for number in range(len(tokenizer)) if number not in case["never"]]
    params = SamplingParams(
        n=case["group"], temperature=1.0, max_tokens=case["new_tokens"], ignore_eos=True, allowed_token_ids=words
    )
    gate.ready(**versions("torch", "transformers", "vllm"))

    def unit() -> dict[str, Any]:
        requests = []
        for row in case["rows"]:
            content = [{"type": "image"}, {"type": "text", "text": row["problem"][7:] + case["suffix"]}]
            turn = [{"role": "user", "content": content}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            picture = Image.open(folder / row["picture"]).convert("RGB")
            requests.append({"prompt": text, "multi_modal_data": {"image": picture}})
        llm.reset_prefix_cache()
        outputs = llm.generate(requests, params, use_tqdm=False)
        return {"tokens": sum(len(one.token_ids) for output in outputs for one in output.outputs)}

    gate.loop(unit)


if __name__ == "__main__":
    main()
