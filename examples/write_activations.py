"""Write activations of any PyTorch model to a folder that dictlearn's source `activation_cache` reads.

Use it for models that dictlearn does not run. From your own code:

    from write_activations import write_activations
    batches = ((ids, mask) for ids, mask in ...)  # token ids [B, L]; mask [B, L], True at text positions, or None
    write_activations(model, batches, ["encoder.layers.3"], "activations")

Or, for a causal language model of transformers and a text file:

    python write_activations.py MODEL --submodule model.layers.3 --text FILE --out activations

Then train on it: `source: {type: activation_cache, path: activations}`. Needs torch and safetensors.
"""

import argparse
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def write_whole(path, data):
    """Writes under a temporary name and renames, so that readers never see a partial file."""
    partial = path.with_name(f".partial-{path.name}")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


class Writer:
    """Writes shards of activations, then the manifest."""

    def __init__(self, out, dtype="float32", shard_rows=65_536):
        self.out, self.dtype, self.shard_rows = Path(out), dtype, shard_rows
        self.pending, self.rows, self.shards = [], 0, []
        self.out.mkdir(parents=True, exist_ok=True)
        if any(self.out.iterdir()):
            raise SystemExit(f"{self.out} is not empty: choose another folder")

    def add(self, activations, token_ids, contexts, positions):
        """Adds rows: `activations` maps tensor names to values [n, d]; the other arguments are [n]."""
        tensors = {}
        for name, value in activations.items():
            tensors[name] = value.detach().to("cpu", DTYPES[self.dtype])
            if not tensors[name].isfinite().all():
                raise SystemExit(f"{name} has values that are not finite in {self.dtype}")
        tensors["token_ids"] = token_ids.to("cpu", torch.int32)
        tensors["contexts"] = contexts.to("cpu", torch.int64)
        tensors["positions"] = positions.to("cpu", torch.int32)
        at, count = 0, len(token_ids)
        while at < count:
            rows = min(count - at, self.shard_rows - self.rows)
            self.pending.append({name: tensor[at : at + rows] for name, tensor in tensors.items()})
            self.rows += rows
            at += rows
            if self.rows == self.shard_rows:
                self.write_shard()

    def write_shard(self):
        if self.rows == 0:
            return
        names = self.pending[0]
        data = save({name: torch.cat([part[name] for part in self.pending]) for name in names}, {"format": "pt"})
        file = f"activations-{len(self.shards):05}.safetensors"
        write_whole(self.out / file, data)
        self.shards.append({"file": file, "activations": self.rows, "bytes": len(data), "sha256": sha256(data)})
        self.pending, self.rows = [], 0

    def finish(self, sites, source):
        """Writes `meta.json`, which dictlearn needs to read the folder."""
        self.write_shard()
        manifest = {
            "activations": sum(shard["activations"] for shard in self.shards),
            "complete": True,
            "dtype": self.dtype,
            "sites": sites,
            "tokens": True,
            "source": source,
            "shards": self.shards,
            "sha256": sha256("".join(shard["sha256"] + "\n" for shard in self.shards).encode()),
        }
        write_whole(self.out / "meta.json", json.dumps(manifest, indent=2).encode())


def first_tensor(value):
    """Returns the tensor of a module's value, which may be a tuple or a transformers output."""
    return value if isinstance(value, torch.Tensor) else value[0]


@torch.no_grad()
def write_activations(
    model, batches, submodules, out, io="out", run=None, source=None, dtype="float32", shard_rows=65_536
):
    """Runs `model` on every batch and writes its submodules' inputs or outputs at text positions.

    `io` is "in", "out" or "in_to_out", as in dictlearn. `run(ids, mask)` calls the model; the default is `model(ids)`.
    `source` is a map that describes the model and the text; it goes into each SAE's config.json.
    """
    run = run or (lambda ids, mask: model(ids))
    wanted = {"in": ["in"], "out": ["out"], "in_to_out": ["in", "out"]}[io]
    seen, hooks = {}, []
    for name in submodules:
        module = model.get_submodule(name)

        # Clone: later modules may change the value in place.
        def read_input(_module, args, kwargs, name=name):
            seen[name, "in"] = first_tensor(args[0] if args else next(iter(kwargs.values()))).clone()

        def read_output(_module, _args, result, name=name):
            seen[name, "out"] = first_tensor(result).clone()

        if "in" in wanted:
            hooks.append(module.register_forward_pre_hook(read_input, with_kwargs=True))
        if "out" in wanted:
            hooks.append(module.register_forward_hook(read_output))

    def tensor_name(name, which):
        own = which if len(wanted) == 2 else "activations"
        return own if len(submodules) == 1 else f"{name}/{own}"

    writer, contexts, widths = Writer(out, dtype, shard_rows), 0, {}
    try:
        for ids, mask in batches:
            mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
            seen.clear()
            run(ids, mask)
            rows = mask.nonzero()
            activations = {}
            for name in submodules:
                for which in wanted:
                    value = seen[name, which][mask.to(seen[name, which].device)]
                    widths[name, which] = value.shape[-1]
                    activations[tensor_name(name, which)] = value
            writer.add(activations, ids[mask], rows[:, 0] + contexts, rows[:, 1])
            contexts += len(ids)
    finally:
        for hook in hooks:
            hook.remove()
    if contexts == 0:
        raise SystemExit("`batches` is empty")
    sites = [
        {
            "name": name,
            "activation_dim": widths[name, wanted[0]],
            "output_dim": widths[name, wanted[-1]],
            "settings": {"submodule": name, "d_submodule": widths[name, wanted[-1]]},
            "tensors": [tensor_name(name, which) for which in wanted],
        }
        for name in submodules
    ]
    writer.finish(sites, {"io": io, **(source or {})})


def main():
    parser = argparse.ArgumentParser(description="Write a transformers model's activations for dictlearn.")
    parser.add_argument("model", help="model folder or Hub repository")
    parser.add_argument("--submodule", action="append", required=True, help="module path; repeat for several modules")
    parser.add_argument("--io", choices=["in", "out", "in_to_out"], default="out")
    parser.add_argument("--text", required=True, help="text file to read")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--ctx-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16, help="contexts per forward pass")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--shard-rows", type=int, default=65_536)
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = torch.tensor(tokenizer(Path(args.text).read_text(encoding="utf-8"))["input_ids"], device=device)
    whole = len(ids) // args.ctx_len * args.ctx_len
    if whole == 0:
        parser.error(f"{args.text} has {len(ids)} tokens, fewer than one context of {args.ctx_len}: lower --ctx-len")
    batches = list(ids[:whole].view(-1, args.ctx_len).split(args.batch_size))
    batches += [ids[whole:].unsqueeze(0)] if whole < len(ids) else []
    write_activations(
        model,
        ((batch, None) for batch in batches),
        args.submodule,
        args.out,
        io=args.io,
        run=lambda ids, mask: model(input_ids=ids, attention_mask=mask.long()),
        source={"model": args.model, "text": {"path": args.text}, "ctx_len": args.ctx_len},
        dtype=args.dtype,
        shard_rows=args.shard_rows,
    )


if __name__ == "__main__":
    main()
