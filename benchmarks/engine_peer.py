"""vLLM on the work of `benchmarks/engine.py`, and both side by side. Needs vLLM importable, which nothing else here does.

python benchmarks/engine.py --json ours.json && python benchmarks/engine_peer.py --ours ours.json
python benchmarks/engine_peer.py --first-token FOLDER     seconds until a checkpoint's first token, from the start of the process
python benchmarks/engine_peer.py --write FOLDER           a random checkpoint for that
"""

import argparse
import time

STARTED = time.perf_counter()

import asyncio
import json
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import engine as ours

os.environ.update(VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_USE_FLASHINFER_SAMPLER="0")


def start(folder: Path, load_format: str):  # noqa: ANN201 - vLLM's own type
    from vllm import LLM  # pyright: ignore[reportMissingImports]

    return LLM(
        model=str(folder),
        load_format=load_format,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=ours.MAX_MODEL_LEN,
        gpu_memory_utilization=0.85,
        enable_prefix_caching=False,
        max_num_seqs=256,
        seed=0,
    )


class Peer:
    def __init__(self, llm, vocab: int) -> None:  # noqa: ANN001
        self._llm, self._vocab, self._rng, self._count = llm, vocab, random.Random(0), 0

    async def run(self, batch: int, length: int, new_tokens: int) -> ours.Times:
        """As `LLM.generate` does it, with an eye on the last request's tokens."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        engine, first, last = self._llm.llm_engine, 0.0, 0.0
        prompts = [{"prompt_token_ids": [self._rng.randrange(10, self._vocab - 300) for _ in range(length)]} for _ in range(batch)]
        started = time.perf_counter()
        for index, prompt in enumerate(prompts):
            kind = RequestOutputKind.DELTA if index == batch - 1 else RequestOutputKind.FINAL_ONLY
            wanted = ours.tokens_of(index, batch, new_tokens)
            params = SamplingParams(temperature=0.0, max_tokens=wanted, ignore_eos=True, detokenize=False, output_kind=kind)
            self._count += 1
            watched = str(self._count)
            engine.add_request(watched, prompt, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.request_id == watched and output.outputs[0].token_ids:
                    last = time.perf_counter()
                    first = first or last
        return ours.Times(time.perf_counter() - started, (last - first) / max(new_tokens - 1, 1))


def write(name: str, folder: Path) -> None:
    """A checkpoint of the model's shape in four files."""
    import torch
    from safetensors.torch import save_file

    shape = ours.MODELS[name]
    hidden, inner, dim = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    q, kv = shape["num_attention_heads"] * dim, shape["num_key_value_heads"] * dim
    sizes = {
        "model.embed_tokens.weight": (shape["vocab_size"], hidden),
        "lm_head.weight": (shape["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(shape["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        sizes |= {f"{at}.self_attn.{part}_proj.weight": (rows, hidden) for part, rows in (("q", q), ("k", kv), ("v", kv))}
        sizes |= {f"{at}.self_attn.o_proj.weight": (hidden, q), f"{at}.mlp.down_proj.weight": (hidden, inner)}
        sizes |= {f"{at}.mlp.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
        sizes |= {f"{at}.{part}_layernorm.weight": (hidden,) for part in ("input", "post_attention")}
        if shape["model_type"] == "qwen3":
            sizes |= {f"{at}.self_attn.{part}_norm.weight": (dim,) for part in ("q", "k")}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape))
    names, index = list(sizes), {}
    for part in range(4):
        chosen = names[part::4]
        tensors = {n: torch.ones(sizes[n]) if len(sizes[n]) == 1 else torch.randn(sizes[n], device="cuda") * 0.02 for n in chosen}
        file = f"model-{part}.safetensors"
        save_file({n: tensor.to(torch.bfloat16).cpu() for n, tensor in tensors.items()}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=ours.MODELS, default="llama-3.1-8b")
    parser.add_argument("--ours", type=Path)
    parser.add_argument("--only", default="", metavar="REGEX", help="as of engine.py")
    parser.add_argument("--first-token", type=Path, metavar="FOLDER")
    parser.add_argument("--write", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.write:
        return write(arguments.model, arguments.write)
    llm = start(arguments.first_token or ours.write_config(arguments.model), "auto" if arguments.first_token else "dummy")
    peer = Peer(llm, ours.MODELS[arguments.model]["vocab_size"])
    await peer.run(1, 128, 1)
    print(f"first token after {time.perf_counter() - STARTED:.1f} s", flush=True)
    if arguments.first_token:
        return None
    theirs = await ours.measure(peer.run, arguments.only)
    if arguments.ours:
        mine = json.loads(arguments.ours.read_text())
        print("\n| work | Baton, ms | vLLM, ms | Baton ÷ vLLM |\n|---|---|---|---|")
        for case, value in mine.items():
            if case in theirs:
                print(f"| {case} | {value:.3f} | {theirs[case]:.3f} | {value / theirs[case]:.3f} |")
    return None


if __name__ == "__main__":
    asyncio.run(main())
