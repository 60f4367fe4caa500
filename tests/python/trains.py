"""Trains the reference with random settings and records the results.

    python trains.py dictionary_learning FOLDER COUNT

Each case is a folder like those in tests/fixtures/trainers: case.json, init.safetensors, final.safetensors, log.json
and config.json, with its activations in batches.safetensors. `noise` in case.json is the change of the reference's own
weights when its batches' rows are reordered or differ in the last bit. tests/it/golden.rs runs this script.
"""

import contextlib
import json
import os
import random
import sys
import warnings

import torch
from dictionary_learning.dictionary import AutoEncoderNew
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gated_anneal import GatedAnnealTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.p_anneal import PAnnealTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from safetensors.torch import save_file

TRAINERS = {
    StandardTrainer: "AutoEncoder",
    StandardTrainerAprilUpdate: "AutoEncoderNew",
    GatedSAETrainer: "GatedAutoEncoder",
    JumpReluTrainer: "JumpReluAutoEncoder",
    PAnnealTrainer: "AutoEncoder",
    GatedAnnealTrainer: "GatedAutoEncoder",
    TopKTrainer: "AutoEncoderTopK",
    BatchTopKTrainer: "BatchTopKSAE",
    MatryoshkaBatchTopKTrainer: "MatryoshkaBatchTopKSAE",
}


def drawn(draw, trainer):
    """Constructor arguments of a trainer, attributes to set afterwards, and the batch size."""
    one_of = lambda *choices: draw.choice(choices)
    steps, batch = one_of(30, 60, 90), one_of(16, 64, 100)
    args = {
        "steps": steps,
        "activation_dim": one_of(8, 17, 32, 48),
        "dict_size": one_of(40, 96, 130, 257),
        "layer": 0,
        "lm_name": "drawn",
        "device": "cpu",
        "seed": draw.randrange(1000),
        "lr": one_of(3e-4, 1e-3, 2e-3),
        "warmup_steps": one_of(0, 1, 5, 10),
        "decay_start": one_of(None, None, 2 * steps // 3, steps - 5),
    }
    overrides = {}
    if trainer in (TopKTrainer, BatchTopKTrainer, MatryoshkaBatchTopKTrainer):
        args |= {
            "k": one_of(1, 3, 6, 8),
            "lr": one_of(None, 1e-3, 2e-3),
            "auxk_alpha": one_of(0, 1 / 32, 0.5),
            "threshold_beta": one_of(0.5, 0.9, 0.999),
            "threshold_start_step": one_of(0, 5, 20),
        }
        overrides["dead_feature_threshold"] = one_of(batch, 4 * batch, 10 * batch, 10_000_000)
    else:
        args["sparsity_warmup_steps"] = one_of(None, 1, 10, 19)
    if trainer is MatryoshkaBatchTopKTrainer:
        fractions = one_of([1.0], [0.3, 0.7], [0.125, 0.125, 0.25, 0.5], [0.1, 0.2, 0.3, 0.4])
        args["group_fractions"] = fractions
        args["group_weights"] = one_of(None, [round(draw.uniform(0.1, 1.1), 2) for _ in fractions])
    if trainer in (StandardTrainer, StandardTrainerAprilUpdate, GatedSAETrainer):
        args["l1_penalty"] = one_of(0.01, 0.05, 0.2)
    if trainer is StandardTrainerAprilUpdate:
        args["dict_class"] = "AutoEncoderNew"
    if trainer is JumpReluTrainer:
        args |= {
            # No threshold reaches half of it, where all features that are 0 would enter the window at once.
            "bandwidth": one_of(0.2, 0.4),
            "sparsity_penalty": one_of(0.1, 1.0),
            "target_l0": one_of(4.0, 20.0),
        }
    if trainer in (PAnnealTrainer, GatedAnnealTrainer):
        args |= {
            "initial_sparsity_penalty": one_of(0.01, 0.05),
            "sparsity_function": one_of("Lp", "Lp^p"),
            "anneal_start": one_of(5, steps // 3),
            "anneal_end": one_of(None, 2 * steps // 3, steps - 5),
            "p_start": one_of(1.0, 0.9),
            "p_end": one_of(0.9, 0.8, 0.6),
            "n_sparsity_updates": one_of(3, 5, 10, "continuous"),
            "sparsity_queue_length": one_of(1, 4, 10),
        }
    return args, overrides, batch


def activations(generator, rows, d):
    """Sums of a few directions around a mean, like a model's activations."""
    rand = lambda *size: torch.rand(*size, generator=generator)
    randn = lambda *size: torch.randn(*size, generator=generator)
    directions = torch.nn.functional.normalize(randn(3 * d, d), dim=1)
    strengths = (rand(rows, 3 * d) < 0.08) * rand(rows, 3 * d) * 2
    return strengths @ directions + 0.3 * randn(d) + 0.01 * randn(rows, d)


def weights(trainer):
    return {name: tensor.clone().contiguous() for name, tensor in trainer.ae.state_dict().items()}


class Differs(Exception):
    """Raised where dictlearn deliberately differs from the reference."""


def trained(trainer, batches):
    """The final weights, and the figures logged after each step."""
    log = []
    for step, batch in enumerate(batches):
        trainer.update(step, batch.clone())
        if isinstance(trainer, JumpReluTrainer) and trainer.ae.threshold.min() < 0:
            raise Differs("a threshold is negative")
        values = {name: getattr(trainer, name) for name in getattr(trainer, "logging_parameters", [])}
        numbers = {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in values.items()}
        if getattr(trainer, "auxk_alpha", None) == 0:
            # Not every trainer computes a loss that is then multiplied by 0.
            numbers = {"effective_l0": numbers["effective_l0"]}
        with torch.no_grad():
            numbers["mse_after"] = (batch - trainer.ae(batch)).pow(2).sum(dim=-1).mean().item()
        numbers["lr_next"] = trainer.optimizer.param_groups[0]["lr"]
        log.append({"step": step, **numbers})
    return weights(trainer), log


def apart(ours, theirs):
    """The largest norm of a tensor's difference, relative to the tensor's norm."""
    differences = [(a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12) for a, b in zip(ours, theirs)]
    return max(differences).item()


def case(number):
    """The files of one run."""
    draw = random.Random(number)
    cls = draw.choice(list(TRAINERS))
    args, overrides, rows = drawn(draw, cls)
    generator = torch.Generator().manual_seed(number)
    x = activations(generator, args["steps"] * rows, args["activation_dim"])
    batches = x.split(rows)

    def trainer():
        classes = {"dict_class": AutoEncoderNew} if "dict_class" in args else {}
        torch.manual_seed(args["seed"])  # Not every trainer seeds torch.
        made = cls(**args | classes)
        for name, value in overrides.items():
            setattr(made, name, value)
        # With the decoder's transpose as encoder, a feature that fires alone has gradients of pure rounding, which Adam
        # scales to full steps.
        draw_weights = torch.Generator().manual_seed(args["seed"])
        for name, parameter in made.ae.named_parameters():
            if name in ("W_enc", "encoder.weight"):
                parameter.data *= 1 + 0.2 * torch.randn(parameter.shape, generator=draw_weights)
        return made

    first = trainer()
    init = weights(first)
    final, log = trained(first, batches)
    if not all(tensor.isfinite().all() for tensor in final.values()):
        raise Differs("a row without features makes the threshold infinite")
    reordered = [batch[torch.randperm(rows, generator=generator)] for batch in batches]
    nudged = [batch * (1 + 6e-8 * torch.randn(batch.shape, generator=generator)) for batch in batches]
    noise = max(apart(trained(trainer(), again)[0].values(), final.values()) for again in (reordered, nudged))
    settings = {
        "trainer": cls.__name__,
        "dict_class": TRAINERS[cls],
        "batch_size": rows,
        "noise": noise,
        "args": args,
        "overrides": overrides,
    }
    return {
        "case.json": settings,
        "log.json": log,
        "config.json": {"trainer": first.config},
        "init.safetensors": init,
        "final.safetensors": final,
        "batches.safetensors": {"activations": x},
    }


def main():
    _, _, folder, count = sys.argv
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for number in range(int(count)):
        try:
            with contextlib.redirect_stdout(sys.stderr):
                files = case(number)
        except Differs:
            continue
        for name, content in files.items():
            path = os.path.join(folder, f"{number:04}", name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if name.endswith(".json"):
                with open(path, "w") as file:
                    json.dump(content, file)
            else:
                save_file(content, path)


main()
