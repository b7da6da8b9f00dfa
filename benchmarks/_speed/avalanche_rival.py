"""The rival of benchmarks/avalanche.py, for an interpreter that has Avalanche.

    python -P benchmarks/_speed/avalanche_rival.py STREAM.npz SETTINGS.json RESULT.json

-P: this folder has an `avalanche.py` of its own. Knows nothing of JAX: reads arrays,
trains Avalanche's strategies on them, writes accuracies and seconds.
"""

import json
import random
import sys
import time

import avalanche
import numpy as np
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import AGEM, EWC, Naive


class Examples(torch.utils.data.TensorDataset):
    """Tensors with the `targets` that Avalanche asks for."""

    def __init__(self, x, y):
        super().__init__(torch.from_numpy(x), torch.from_numpy(y.astype(np.int64)))
        self.targets = y.tolist()


def network(kernels):
    """The other side's network with its initial weights, (inputs, outputs) each."""
    layers = []
    for kernel in kernels:
        layer = torch.nn.Linear(*kernel.shape, bias=False)
        layer.weight.data = torch.from_numpy(kernel.T.copy())
        layers += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def strategy(name, model, settings):
    common = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=settings["rate"]),
        "criterion": torch.nn.CrossEntropyLoss(),
        "train_mb_size": settings["batch"],
        "train_epochs": 1,
        "eval_mb_size": 512,
        "evaluator": EvaluationPlugin(accuracy_metrics(experience=True), loggers=[]),
    }
    if name == "naive":
        return Naive(**common)
    if name == "ewc":
        return EWC(ewc_lambda=settings["strength"] / 2, **common)
    drawn = settings["batch"] if name == "agem" else int(name.removeprefix("agem_"))
    return AGEM(patterns_per_exp=settings["memory"], sample_size=drawn, **common)


def run(name, stream, seed, settings, tasks):
    """(tasks, tasks) accuracies, training seconds per task, seconds of everything."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    random.seed(seed)
    at = settings["seeds"].index(seed)
    rows = stream["rows"][at]
    train = [Examples(stream["x"][t][rows[t]], stream["y"][t][rows[t]]) for t in tasks]
    test = [Examples(stream["test_x"][t], stream["test_y"][t]) for t in tasks]
    benchmark = benchmark_from_datasets(
        train=[as_classification_dataset(x) for x in train],
        test=[as_classification_dataset(x) for x in test],
    )
    kernels = [stream[f"kernel{i}"][at] for i in range(settings["layers"])]
    learner = strategy(name, network(kernels), settings)
    accuracy, seconds = [], []
    for experience in benchmark.train_stream:
        before = time.perf_counter()
        learner.train(experience, eval_streams=[], shuffle=False)
        seconds.append(time.perf_counter() - before)
        found = learner.eval(benchmark.test_stream)
        accuracy.append([v for k, v in sorted(found.items()) if "Top1_Acc_Exp" in k])
    whole = time.perf_counter() - start
    return {"accuracy": accuracy, "seconds": seconds, "everything": whole}


def faster_threads(stream, settings):
    """1 or all cores: small batches are often slower on several."""
    counts = {1, torch.get_num_threads()}
    spent = {}
    for count in counts:
        torch.set_num_threads(count)
        first = settings["seeds"][0]
        spent[count] = run("naive", stream, first, settings, range(1))["seconds"][0]
    return min(spent, key=spent.get)


def main(stream_path, settings_path, result_path):
    stream = dict(np.load(stream_path))
    with open(settings_path) as file:
        settings = json.load(file)
    torch.set_num_threads(faster_threads(stream, settings))
    tasks = range(len(stream["x"]))
    runs = {
        name: [run(name, stream, seed, settings, tasks) for seed in settings["seeds"]]
        for name in settings["methods"]
    }
    content = {
        "versions": {"avalanche": avalanche.__version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "runs": runs,
    }
    with open(result_path, "w") as file:
        json.dump(content, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
