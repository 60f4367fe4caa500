"""Measures the speed of harvesting in Python, as `cargo bench --bench harvest` does for dictlearn.

    python benches/harvest.py MODEL SUBMODULE PRECISION --text plugins/embedded-austen/text/train.txt

MODEL is a folder or a Hub name, SUBMODULE a path (`model.layers.9`), PRECISION float32 or bfloat16. A pass runs 64
contexts of 128 tokens. After one warm-up pass, ten passes are timed. Prints the best and median activations per second
of two methods:

- `transformers`: tokenises text and runs the model with a forward hook that keeps the value and ends the pass. This
  is the best that Python can do.
- `dictionary_learning`: the reference's `ActivationBuffer`, which runs the model through nnsight, stops after the
  submodule, and draws shuffled batches. One batch is the whole buffer, so each batch refills it.

Needs torch and transformers. The second method needs dictionary_learning and is skipped without it. Set --threads to
the number of threads of the other side.
"""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PASSES, ROWS, CTX_LEN = 10, 64, 128


class Stop(Exception):
    pass


def transformers_alone(args, dtype, texts):
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
    value = None

    def keep(module, inputs, output):
        nonlocal value
        value = output[0] if isinstance(output, tuple) else output
        raise Stop

    model.get_submodule(args.submodule).register_forward_hook(keep)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    while True:
        rows = [next(texts) for _ in range(ROWS)]
        batch = tokenizer(rows, return_tensors="pt", max_length=CTX_LEN, padding=True, truncation=True)
        try:
            model(**batch, use_cache=False)
        except Stop:
            pass
        yield value[batch["attention_mask"] != 0]


def reference(args, dtype, texts):
    from dictionary_learning import ActivationBuffer
    from nnsight import LanguageModel

    model = LanguageModel(args.model, device_map="cpu", dtype=dtype, dispatch=True)
    submodule = model
    for name in args.submodule.split("."):
        submodule = submodule[int(name)] if name.isdigit() else getattr(submodule, name)
    buffer = ActivationBuffer(
        texts,
        model,
        submodule,
        d_submodule=model.config.hidden_size,
        n_ctxs=ROWS,
        ctx_len=CTX_LEN,
        refresh_batch_size=ROWS,
        out_batch_size=ROWS * CTX_LEN,
    )
    while True:
        yield next(buffer)


def chunks(path):
    """Yields pieces of the text, somewhat longer than a context, endlessly."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    while True:
        yield from (text[at : at + 8 * CTX_LEN] for at in range(0, len(text) - 8 * CTX_LEN, 8 * CTX_LEN))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("submodule")
    parser.add_argument("precision", choices=["float32", "bfloat16"])
    parser.add_argument("--text", required=True)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", choices=["transformers", "dictionary_learning"])
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    for name, harvest in [("transformers", transformers_alone), ("dictionary_learning", reference)]:
        if args.only not in (None, name):
            continue
        try:
            batches = harvest(args, getattr(torch, args.precision), chunks(args.text))
            speeds = []
            with torch.no_grad():
                for _ in range(PASSES + 1):
                    start = time.perf_counter()
                    rows = len(next(batches))
                    speeds.append(rows / (time.perf_counter() - start))
        except ImportError as error:
            print(f"{name}: skipped: {error}")
            continue
        speeds = sorted(speeds[1:])
        print(
            f"{name}, {args.precision}: best {speeds[-1]:.0f}, median {speeds[PASSES // 2]:.0f} activations per second"
        )


if __name__ == "__main__":
    main()
