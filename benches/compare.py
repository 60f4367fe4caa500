"""One side of benches/compare.rs: milliseconds per training step in Python, and the process's memory.

usage: compare.py LIBRARY TRAINER JSON

LIBRARY is `dictionary_learning` or `sae_lens`. JSON has d, f, batch, k, steps, saes, autocast (true for bfloat16
products), few (true for few firing features) and device. On a GPU, a turn is timed as a whole. Prints JSON:
milliseconds of each step, and megabytes of memory at the peak and before anything was built.
"""
import contextlib, json, sys, time

import torch as t

library, name, a = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])


def megabytes(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) / 1e3


def reference(seed):
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gated_anneal import GatedAnnealTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.p_anneal import PAnnealTrainer
    from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
    from dictionary_learning.trainers.top_k import TopKTrainer

    penalty = dict(sparsity_warmup_steps=20)
    trainers = {
        "standard": (StandardTrainer, penalty),
        "standard_april_update": (StandardTrainerAprilUpdate, penalty),
        "p_anneal": (PAnnealTrainer, dict(penalty, anneal_start=900)),
        "gated": (GatedSAETrainer, penalty),
        "gated_anneal": (GatedAnnealTrainer, dict(penalty, anneal_start=900)),
        "jump_relu": (JumpReluTrainer, penalty),
        "top_k": (TopKTrainer, dict(k=a["k"])),
        "batch_top_k": (BatchTopKTrainer, dict(k=a["k"])),
        "matryoshka_batch_top_k": (
            MatryoshkaBatchTopKTrainer,
            dict(k=a["k"], group_fractions=[1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32]),
        ),
    }
    cls, settings = trainers[name]
    trainer = cls(steps=1000, activation_dim=a["d"], dict_size=a["f"], layer=0, lm_name="", device=a["device"],
                  warmup_steps=10, seed=seed, **settings)
    if a["few"]:
        # Lower the biases until one feature in a hundred fires.
        ae = trainer.ae
        with t.no_grad():
            if name == "jump_relu":
                ae.b_enc -= 2.33 * (batches[0] @ ae.W_enc).std()
            elif hasattr(ae, "gate_bias"):
                shift = 2.33 * ae.encoder(batches[0]).std()
                ae.gate_bias -= shift
                ae.mag_bias -= shift
            else:
                ae.encoder.bias -= 2.33 * ae.encoder(batches[0]).std()
    return lambda step, batch: trainer.update(step, batch)


def sae_lens(seed):
    import sae_lens.saes as saes
    from sae_lens.saes.sae import TrainStepInput, TrainCoefficientConfig

    t.manual_seed(seed)
    common = dict(d_in=a["d"], d_sae=a["f"], device=a["device"], dtype="float32")
    sae = {
        "standard": lambda: saes.StandardTrainingSAE(saes.StandardTrainingSAEConfig(l1_coefficient=0.1, **common)),
        "gated": lambda: saes.GatedTrainingSAE(saes.GatedTrainingSAEConfig(l1_coefficient=0.1, **common)),
        "jump_relu": lambda: saes.JumpReLUTrainingSAE(saes.JumpReLUTrainingSAEConfig(l0_coefficient=0.1, **common)),
        "top_k": lambda: saes.TopKTrainingSAE(saes.TopKTrainingSAEConfig(k=a["k"], **common)),
        "batch_top_k": lambda: saes.BatchTopKTrainingSAE(saes.BatchTopKTrainingSAEConfig(k=a["k"], **common)),
    }[name]()
    optimizer = t.optim.Adam(sae.parameters(), lr=1e-4)
    coefficients = sae.get_coefficients()
    values = {
        name: value.value if isinstance(value, TrainCoefficientConfig) else value for name, value in coefficients.items()
    }

    def step(number, batch):
        with autocast():
            out = sae.training_forward_pass(
                TrainStepInput(
                    sae_in=batch, coefficients=values, dead_neuron_mask=None, n_training_steps=number, is_logging_step=False
                )
            )
        optimizer.zero_grad()
        out.loss.backward()
        t.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()

    return step


def autocast():
    return t.autocast(a["device"], dtype=t.bfloat16) if a["autocast"] else contextlib.nullcontext()


t.manual_seed(0)
batches = [t.randn(a["batch"], a["d"], device=a["device"]) for _ in range(4)]
build = {"dictionary_learning": reference, "sae_lens": sae_lens}[library]
build(0)(1, batches[0][:8])  # Excludes imports and the set-up of a first step.
before = megabytes("VmRSS")
steps = [build(seed) for seed in range(a["saes"])]
times = []
gpu = a["device"] != "cpu"
for i in range(a["steps"] + 2):
    if gpu and i == 2:
        t.cuda.synchronize()
        turn = time.perf_counter()
    started = time.perf_counter()
    for step in steps:
        with autocast() if library == "dictionary_learning" else contextlib.nullcontext():
            step(i + 1, batches[i % 4])
    if i >= 2:
        times.append((time.perf_counter() - started) * 1e3)
if gpu:
    t.cuda.synchronize()
    times = [(time.perf_counter() - turn) * 1e3 / a["steps"]]
print(json.dumps({"ms": times, "peak_mb": megabytes("VmHWM"), "before_mb": before}))
