"""One private training step, and a whole pass with its loader, against plain SGD and Opacus 1.6, in the same run.

Two models: an MLP 30-128-64-1 (12,289 parameters) and the small attention model over 30 columns of 7 inputs each
(16,321 parameters), at batches of 256 and 2048. A step is gradient, noise and optimizer update. Plain is torch's own
forward, backward and SGD; ours is `PrivateEngine` with production noise; hooks, functorch and ghost are Opacus' modes
with Opacus' optimizer and torch's (not cryptographic) noise, ghost with losses of shape (n,). All take the same batch
in turns, one thread, CPU seconds of the process; the figures are medians over the turns of the ratio within a turn.
End to end is samples per second with each one's loader over 20,000 loans: a vectorised Poisson draw and an index for
ours, `DPDataLoader` for Opacus, a shuffled index for plain. Memory is the peak resident set above that of the same
process after steps on 4 loans, each in a process of its own. Agreement is the largest error of a clipped sum's
coordinate against a float64 loop over the loans, over the sum of the clipped norms.

    python benchmarks/dp_step.py [--json] [--turns N]
"""

import argparse
import copy
import itertools
import json
import logging
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import document, print_document
from torch import nn
from torch.nn import functional

from fedfin.credit.models import Architecture, build, initial_weights, load_weights
from fedfin.privacy.gradients import PerLoanGradients, PrivateEngine
from fedfin.privacy.noise import SecureNoise

warnings.filterwarnings("ignore")  # Opacus' and what it imports
logging.disable(logging.WARNING)

BOUND = 1.0
NOISE_MULTIPLIER = 1.0
LEARNING_RATE = 0.05
BATCHES = (256, 2048)
MODELS = ("mlp", "attention")
VARIANTS = ("plain", "ours", "hooks", "functorch", "ghost")
NUM_LOANS = 20_000
SLOT_S = 0.1  # CPU seconds of one variant in one turn, at least
ATTENTION = Architecture("attention", 210, (32,), (7,) * 30)
NUM_COLUMNS = {"mlp": 30, "attention": 210}

Batch = tuple[np.ndarray, np.ndarray]
Step = Callable[[Batch], None]


def new_model(name: str) -> nn.Module:
    """Return a fresh model, the same each time."""
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        if name == "mlp":
            return nn.Sequential(
                nn.Linear(30, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1)
            )
        module = build(ATTENTION)
        # away from the start, where the last layer is zero and no gradient passes it
        moved = np.random.default_rng(0).normal(0.0, 0.05, len(initial_weights(ATTENTION, 0)))
        load_weights(module, (initial_weights(ATTENTION, 0) + moved).astype(np.float32))
        return module


def new_loans(model: str, num: int) -> Batch:
    """Return made-up loans and labels."""
    rng = np.random.default_rng(1)
    return rng.random((num, NUM_COLUMNS[model]), dtype=np.float32), (rng.random(num) < 0.3).astype(np.int64)


def new_step(variant: str, model: str, batch_size: int) -> Step:
    """Return the function that takes one optimizer step on a batch."""
    module = new_model(model)
    if variant == "plain":
        return plain_step(module)
    if variant == "ours":
        return our_step(module, batch_size)
    return opacus_step(variant, module, batch_size)


def plain_step(module: nn.Module) -> Step:
    """Return torch's ordinary step."""
    optimizer = torch.optim.SGD(module.parameters(), LEARNING_RATE)

    def step(batch: Batch) -> None:
        loans, labels = torch.from_numpy(batch[0]), torch.from_numpy(batch[1]).float()
        optimizer.zero_grad()
        functional.binary_cross_entropy_with_logits(module(loans).squeeze(1), labels).backward()
        optimizer.step()

    return step


def our_step(module: nn.Module, batch_size: int) -> Step:
    """Return the step as `fedfin.client.training` takes it, with plain SGD in the place of AdamW."""
    engine = PrivateEngine(
        module,
        noise_multiplier=NOISE_MULTIPLIER,
        clipping_bound=BOUND,
        expected_batch_size=batch_size,
        noise=SecureNoise(),
    )
    parameters = list(module.parameters())
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    for parameter, part in zip(parameters, flat.split([one.numel() for one in parameters]), strict=True):
        parameter.data = part.view_as(parameter)
    flat = nn.Parameter(flat)
    optimizer = torch.optim.SGD([flat], LEARNING_RATE)

    def step(batch: Batch) -> None:
        flat.grad = torch.from_numpy(engine.gradient(*batch).astype(np.float32))
        optimizer.step()

    return step


def opacus_step(mode: str, module: nn.Module, batch_size: int) -> Step:
    """Return Opacus' step in one of its modes."""
    from opacus.grad_sample.utils import get_gsm_class  # noqa: PLC0415  (slow: seconds, and not in every process)
    from opacus.optimizers import get_optimizer_class  # noqa: PLC0415
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping  # noqa: PLC0415

    extra = {"max_grad_norm": BOUND} if mode == "ghost" else {}
    wrapped = get_gsm_class(mode)(module, batch_first=True, loss_reduction="mean", **extra)
    optimizer = get_optimizer_class(clipping="flat", distributed=False, grad_sample_mode=mode)(
        torch.optim.SGD(module.parameters(), LEARNING_RATE),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=BOUND,
        expected_batch_size=batch_size,
        loss_reduction="mean",
    )
    criterion: Any = nn.BCEWithLogitsLoss()
    if mode == "ghost":
        criterion = DPLossFastGradientClipping(wrapped, optimizer, criterion, "mean")

    def step(batch: Batch) -> None:
        loans, labels = torch.as_tensor(batch[0]), torch.as_tensor(batch[1]).float()
        optimizer.zero_grad()
        criterion(wrapped(loans).squeeze(1), labels).backward()
        optimizer.step()

    return step


def batches(variant: str, loans: Batch, batch_size: int) -> Iterator[Batch]:
    """Yield one pass of batches as each variant's loader makes them."""
    num = len(loans[1])
    num_steps = num // batch_size
    if variant == "ours":
        noise = SecureNoise()
        for _ in range(num_steps):
            rows = np.flatnonzero(noise.bernoulli(num, batch_size / num))
            yield loans[0][rows], loans[1][rows]
    elif variant == "plain":
        order = np.random.default_rng(0).permutation(num)
        for start in range(0, num_steps * batch_size, batch_size):
            rows = order[start : start + batch_size]
            yield loans[0][rows], loans[1][rows]
    else:
        from opacus.data_loader import DPDataLoader  # noqa: PLC0415
        from torch.utils.data import DataLoader, TensorDataset  # noqa: PLC0415

        data = TensorDataset(torch.from_numpy(loans[0]), torch.from_numpy(loans[1]))
        loader = DPDataLoader.from_data_loader(DataLoader(data, batch_size=batch_size))
        yield from itertools.islice(loader, num_steps)


def step_times(model: str, batch_size: int, turns: int) -> dict[str, list[float]]:
    """Return CPU seconds of a step, for each variant and turn."""
    batch = new_loans(model, batch_size)
    steps: dict[str, tuple[Step, int]] = {}
    for variant in VARIANTS:
        step = new_step(variant, model, batch_size)
        step(batch)
        start = time.process_time()
        step(batch)
        steps[variant] = step, max(1, int(SLOT_S / max(time.process_time() - start, 1e-6)))
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(turns):
        for variant, (step, repeats) in steps.items():
            start = time.process_time()
            for _ in range(repeats):
                step(batch)
            times[variant].append((time.process_time() - start) / repeats)
    return times


def passing_rates(model: str, batch_size: int, turns: int) -> dict[str, list[float]]:
    """Return samples per CPU second with each variant's loader, for each variant and turn."""
    num_loans = NUM_LOANS if model == "mlp" else 2 * batch_size  # attention: two steps a turn
    loans = new_loans(model, num_loans)
    steps = {variant: new_step(variant, model, batch_size) for variant in VARIANTS}
    rates: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(turns):
        for variant, step in steps.items():
            start, seen = time.process_time(), 0
            for batch in batches(variant, loans, batch_size):
                step(batch)
                seen += len(batch[1])
            rates[variant].append(seen / (time.process_time() - start))
    return rates


def peak_memory_mib(model: str, batch_size: int, variant: str) -> float:
    """Return the peak resident set of steps at this batch above a warm baseline, in MiB, from a process of its own."""
    command = [sys.executable, str(Path(__file__)), "--memory-of", model, str(batch_size), variant]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))


def measure_memory(model: str, batch_size: int, variant: str) -> float:
    """The body of that process."""
    torch.set_num_threads(1)
    step, batch = new_step(variant, model, batch_size), new_loans(model, batch_size)
    for _ in range(3):
        step((batch[0][:4], batch[1][:4]))
    # Linux: 5 sets the peak back to what is resident now
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident_kib("VmRSS")
    for _ in range(12):
        step(batch)
    return (_resident_kib("VmHWM") - before) / 1024


def _resident_kib(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        msg = f"/proc/self/status has no {name}; run this benchmark on Linux"
        raise OSError(msg)
    return int(found[1])


def agreement(model: str, num: int) -> float:
    """Return the largest error of a clipped sum's coordinate over the sum of the clipped norms."""
    loans, labels = new_loans(model, num)
    module = new_model(model)
    exact = copy.deepcopy(module).double()
    rows = []
    for loan, label in zip(torch.from_numpy(loans).double(), torch.from_numpy(labels).double(), strict=True):
        loss = functional.binary_cross_entropy_with_logits(exact(loan[None]).reshape(()), label)
        parts = torch.autograd.grad(loss, list(exact.parameters()))
        rows.append(torch.cat([part.reshape(-1) for part in parts]).numpy())
    gradients = np.array(rows)
    norms = np.linalg.norm(gradients, axis=1)
    bound = float(np.median(norms))
    expected = np.minimum(1.0, bound / norms) @ gradients
    found = PerLoanGradients(module).clipped_sum(loans, labels, bound)
    return float(np.abs(found - expected).max() / np.minimum(norms, bound).sum())


def _ratio(one: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        model, batch_size, variant = arguments.memory_of
        print(json.dumps(measure_memory(model, int(batch_size), variant)))
        return
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for model, batch_size in itertools.product(MODELS, BATCHES):
        times = step_times(model, batch_size, arguments.turns)
        rates = passing_rates(model, batch_size, min(arguments.turns, 5))
        # Opacus' share at the small batch says nothing new
        measured = VARIANTS if batch_size == max(BATCHES) else ("plain", "ours")
        memory = {variant: peak_memory_mib(model, batch_size, variant) for variant in measured}
        name = f"dp_step.{model}_{batch_size}"
        figures[f"{name}.over_sgd"] = _ratio(times["ours"], times["plain"])
        figures[f"{name}.hooks_over_ours"] = _ratio(rates["ours"], rates["hooks"])
        figures[f"{name}.memory_over_plain"] = memory["ours"] / memory["plain"]
        rows += [
            {
                "model": model,
                "batch": batch_size,
                "variant": variant,
                "step_ms": round(1e3 * statistics.median(times[variant]), 3),
                "over_sgd": round(_ratio(times[variant], times["plain"]), 2),
                "samples_per_s": round(statistics.median(rates[variant])),
                "memory_mib": round(memory[variant], 1) if variant in memory else "",
            }
            for variant in VARIANTS
        ]
    figures["dp_step.agreement"] = max(agreement(model, num) for model in MODELS for num in (1, 256))
    print_document(document("dp_step", figures, rows), as_json=arguments.json)


if __name__ == "__main__":
    main()
