"""Loads SAEs that dictlearn exported, in the library they were exported for, and encodes activations.

    python reads.py sae_lens|dictionary_learning FOLDER

Each folder in FOLDER is a case: the exported SAE in exported/ and activations `x` [N, d] in x.safetensors. The script
writes the library's `features` and `recon` to theirs.safetensors beside them. tests/it/python.rs runs it.
"""

import contextlib
import os
import sys
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import load_file, save_file


def sae_lens():
    from sae_lens import SAE

    def run(folder, x):
        sae = SAE.load_from_disk(folder)
        x = x.to(sae.dtype)
        if sae.cfg.reshape_activations == "hook_z":
            x = x.unflatten(-1, (2, -1))
        return sae.encode(x), sae(x).flatten(1)

    return run


def dictionary_learning():
    from dictionary_learning.utils import load_dictionary

    def run(folder, x):
        # The file must hold only tensors.
        state = torch.load(f"{folder}/ae.pt", weights_only=True)
        assert all(isinstance(value, torch.Tensor) for value in state.values()), state
        dictionary, _ = load_dictionary(folder, "cpu")
        return dictionary.encode(x), dictionary(x)

    return run


if __name__ == "__main__":
    library, root = sys.argv[1:]
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(sys.stderr), torch.no_grad():
        run = {"sae_lens": sae_lens, "dictionary_learning": dictionary_learning}[library]()
        for case in sorted(os.listdir(root)):
            print(case)
            features, recon = run(f"{root}/{case}/exported", load_file(f"{root}/{case}/x.safetensors")["x"])
            found = {"features": features, "recon": recon}
            save_file({name: t.float().contiguous() for name, t in found.items()}, f"{root}/{case}/theirs.safetensors")
