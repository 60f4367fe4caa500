"""Writes one SAE of every class as a library saves it today, with the library's results.

    python writes.py sae_lens|dictionary_learning FOLDER

Each case is a folder: the library's files, and io.safetensors with activations `x` [N, d], `features` [N, F] and
`recon` [N, d_out]. SAEs that dictlearn cannot represent are in refused/, without io.safetensors. tests/it/python.rs
runs this script; tests/fixtures/formats/make.py keeps its dictionary_learning output.
"""

import contextlib
import json
import os
import shutil
import sys
import tempfile
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import save_file

D, F, N, OUT, K = 24, 80, 20, 28, 6


def activations(rows=N, seed=1):
    """Sums of a few directions around a mean, like a model's activations."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(40, D, generator=generator)
    mean = torch.randn(D, generator=generator)
    generator.manual_seed(seed)
    strengths = torch.rand(rows, 40, generator=generator) * (torch.rand(rows, 40, generator=generator) < 0.15)
    return (mean + strengths @ directions).contiguous()


def save_io(folder, x, features, recon):
    tensors = {"x": x, "features": features, "recon": recon}
    save_file({name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}, f"{folder}/io.safetensors")


# sae_lens


def fill(sae, seed=0):
    """Sets weights so that every term counts: biases, thresholds, decoder rows with norms other than 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape):
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        for name, tensor in sae.named_parameters():
            if name == "threshold":
                value = torch.rand(tensor.shape, generator=generator) * 0.6
            elif name == "W_dec":
                value = normal(tensor.shape) * (0.3 + torch.rand(tensor.shape[0], 1, generator=generator)) / tensor.shape[1] ** 0.5
            elif tensor.dim() == 2:
                value = normal(tensor.shape) / D**0.5
            else:
                value = normal(tensor.shape) * 0.3
            tensor.copy_(value)


def sae_lens(root):
    from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME
    from sae_lens import saes
    from sae_lens.saes.sae import SAE, SAEMetadata, TrainStepInput
    from sae_lens.training.activation_scaler import ActivationScaler

    def settings(transcodes=False, **more):
        hook = more.pop("hook_name", "blocks.3.ln2.hook_normalized" if transcodes else "blocks.3.hook_resid_post")
        metadata = {"model_name": "gpt2-small", "hook_name": hook, "context_size": 128, "prepend_bos": True}
        if transcodes:
            metadata["hook_name_out"] = "blocks.3.hook_mlp_out"
            more = {"d_out": OUT, "apply_b_dec_to_input": False} | more
        return {"d_in": D, "d_sae": F, "metadata": SAEMetadata(**metadata)} | more

    def computed(folder, sae):
        """Saves the library's results for activations in the SAE's dtype, which skip connections do not convert."""
        x = activations().to(sae.dtype)
        heads = sae.cfg.reshape_activations == "hook_z"
        given = x.unflatten(-1, (2, D // 2)) if heads else x
        with torch.no_grad():
            features, recon = sae.encode(given), sae(given)
        save_io(folder, x, features, recon.flatten(1))

    def save(name, kind, **more):
        made = getattr(saes, kind)(getattr(saes, kind + "Config")(**settings("Transcoder" in kind, **more)))
        fill(made)
        made.save_model(f"{root}/{name}")
        if not name.startswith("refused/"):
            computed(f"{root}/{name}", SAE.load_from_disk(f"{root}/{name}"))

    plain = {
        "standard": ("StandardSAE", {}),
        "gated": ("GatedSAE", {}),
        "topk": ("TopKSAE", {"k": K}),
        "jumprelu": ("JumpReLUSAE", {}),
        "transcoder": ("Transcoder", {}),
        "skip_transcoder": ("SkipTranscoder", {}),
        "jumprelu_transcoder": ("JumpReLUTranscoder", {}),
        "jumprelu_skip_transcoder": ("JumpReLUSkipTranscoder", {}),
    }
    for name, (kind, more) in plain.items():
        save(name, kind, **more)
        for dtype in ["bfloat16", "float16"]:
            save(f"{name}.{dtype}", kind, dtype=dtype, **more)
        for normalize in ["expected_average_only_in", "constant_norm_rescale", "layer_norm"]:
            # A skip connection adds the unnormalised input, which no class of dictlearn does.
            folder = "refused/" if "skip" in name and normalize != "expected_average_only_in" else ""
            save(f"{folder}{name}.{normalize}", kind, normalize_activations=normalize, **more)
        if "transcoder" not in name:
            save(f"{name}.no_b_dec", kind, apply_b_dec_to_input=False, **more)
    save("topk.rescaled", "TopKSAE", k=K, rescale_acts_by_decoder_norm=True)
    save("topk.rescaled_layer_norm", "TopKSAE", k=K, rescale_acts_by_decoder_norm=True, normalize_activations="layer_norm")
    save("standard.hook_z", "StandardSAE", reshape_activations="hook_z", hook_name="blocks.3.attn.hook_z")
    # With equal widths it is still a transcoder.
    save("jumprelu_transcoder.square", "JumpReLUTranscoder", d_out=D)
    save("jumprelu_transcoder.square_layer_norm", "JumpReLUTranscoder", d_out=D, normalize_activations="layer_norm")
    save("refused/covariance_whitening", "StandardSAE", normalize_activations="covariance_whitening")
    save("refused/abstopk", "AbsTopKSAE", k=K)

    def train(name, kind, scale=None, **more):
        """Saves a training SAE as inference model and as checkpoint, which must give the same results."""
        if scale is not None:
            more["normalize_activations"] = "expected_average_only_in"
        made = getattr(saes, kind)(getattr(saes, kind + "Config")(**settings(**more)))
        fill(made)
        # The threshold of batchtopk is a mean over training steps.
        if "BatchTopK" in kind:
            for step in range(20):
                x = activations(64, seed=10 + step) * (scale or 1.0)
                made.training_forward_pass(TrainStepInput(x, {}, None, step, False))
        checkpoint = f"{root}/{name}.checkpoint"
        made.save_model(checkpoint)
        if scale is not None:
            ActivationScaler(scaling_factor=scale).save(f"{checkpoint}/{ACTIVATION_SCALER_CFG_FILENAME}")
            made.fold_activation_norm_scaling_factor(scale)
        made.save_inference_model(f"{root}/{name}")
        sae = SAE.load_from_disk(f"{root}/{name}")
        computed(f"{root}/{name}", sae)
        computed(checkpoint, sae)

    train("training_standard", "StandardTrainingSAE")
    train("training_gated", "GatedTrainingSAE")
    train("training_jumprelu", "JumpReLUTrainingSAE")
    for rescale in [False, True]:
        more = {"rescale_acts_by_decoder_norm": rescale}
        end = "_rescaled" if rescale else ""
        train(f"training_topk{end}", "TopKTrainingSAE", k=K, **more)
        train(f"training_topk{end}_scaled", "TopKTrainingSAE", k=K, scale=1.7, **more)
        batch = {"k": K, "topk_threshold_lr": 0.1} | more
        train(f"training_batchtopk{end}", "BatchTopKTrainingSAE", **batch)
        train(f"training_batchtopk{end}_scaled", "BatchTopKTrainingSAE", scale=1.7, **batch)
        train(f"training_matryoshka{end}", "MatryoshkaBatchTopKTrainingSAE", matryoshka_widths=[20, F], **batch)
    # k is the mean number of features.
    train("training_batchtopk_fraction", "BatchTopKTrainingSAE", k=6.5, topk_threshold_lr=0.1)
    train("training_standard_scaled", "StandardTrainingSAE", scale=1.7)
    train("training_gated_scaled", "GatedTrainingSAE", scale=1.7)
    train("training_jumprelu_scaled", "JumpReLUTrainingSAE", scale=1.7)


# dictionary_learning


class Buffer:
    """Activations, with the config that an ActivationBuffer writes to config.json."""

    config = {
        "d_submodule": D,
        "io": "out",
        "n_ctxs": 3000,
        "ctx_len": 128,
        "refresh_batch_size": 512,
        "out_batch_size": 64,
        "device": "cpu",
    }

    def __iter__(self):
        step = 0
        while True:
            yield activations(64, seed=10 + step)
            step += 1


def dictionary_learning(root):
    from dictionary_learning import training
    from dictionary_learning.dictionary import AutoEncoderNew
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
    from dictionary_learning.trainers.top_k import TopKTrainer
    from dictionary_learning.utils import load_dictionary

    steps = 60
    penalty = {"l1_penalty": 0.02, "sparsity_warmup_steps": 10, "lr": 1e-2}
    largest = {"k": K, "lr": 1e-2, "threshold_beta": 0.9, "threshold_start_step": 10}
    trainers = {
        "AutoEncoder": (StandardTrainer, penalty),
        # Its decoder columns have any norm; loading moves the norms into the encoder.
        "AutoEncoder.april": (StandardTrainerAprilUpdate, penalty),
        "AutoEncoderNew": (StandardTrainerAprilUpdate, penalty | {"dict_class": AutoEncoderNew}),
        "GatedAutoEncoder": (GatedSAETrainer, penalty),
        "AutoEncoderTopK": (TopKTrainer, largest),
        "BatchTopKSAE": (BatchTopKTrainer, largest),
        "JumpReluAutoEncoder": (JumpReluTrainer, {"lr": 1e-2, "bandwidth": 0.05, "sparsity_warmup_steps": 10, "target_l0": K}),
        "MatryoshkaBatchTopKSAE": (MatryoshkaBatchTopKTrainer, largest | {"group_fractions": [0.25, 0.75]}),
    }
    common = {
        "activation_dim": D,
        "dict_size": F,
        "steps": steps,
        "warmup_steps": 5,
        "seed": 0,
        "device": "cpu",
        "layer": 3,
        "lm_name": "EleutherAI/pythia-70m-deduped",
    }
    for name, (trainer, more) in trainers.items():
        config = common | more | {"trainer": trainer, "submodule_name": "resid_post_layer_3"}
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as run:
            training.trainSAE(Buffer(), [config], steps, save_dir=run, device="cpu")
            os.makedirs(f"{root}/{name}", exist_ok=True)
            for file in ["ae.pt", "config.json"]:
                shutil.copyfile(f"{run}/trainer_0/{file}", f"{root}/{name}/{file}")
        if name == "AutoEncoderNew":
            # No trainer writes this class name.
            with open(f"{root}/{name}/config.json") as file:
                config = json.load(file)
            config["trainer"]["dict_class"] = name
            with open(f"{root}/{name}/config.json", "w") as file:
                json.dump(config, file, indent=4)
        dictionary, _ = load_dictionary(f"{root}/{name}", "cpu")
        x = activations()
        with torch.no_grad():
            save_io(f"{root}/{name}", x, dictionary.encode(x), dictionary(x))


if __name__ == "__main__":
    library, folder = sys.argv[1:]
    warnings.simplefilter("ignore")
    # Keeps the libraries' prints out of standard output.
    with contextlib.redirect_stdout(sys.stderr):
        {"sae_lens": sae_lens, "dictionary_learning": dictionary_learning}[library](folder)
