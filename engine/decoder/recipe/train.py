"""Training in phases, on one GPU or on every CPU core.

On CPUs each core runs its own process with one thread, and gradients are averaged between them: small matrix products
gain little from threads, and a core that others also use then delays no barrier.
"""

import datetime
import os
import pathlib
import shutil
import time
from dataclasses import dataclass

import torch
import torch._dynamo
import torch.distributed as dist

import start
from config import CONFIG, PLAIN, YARN
from model import Model, Router, Run

BALANCE_STEP = 0.002  # of the routing biases
REPORT_STEPS = 20
SAVE_SECONDS = 120


@dataclass
class Phase:
    name: str
    share: float  # of the whole budget
    context: int
    batch: int  # sequences a step, all processes together
    lr: tuple[float, float]  # at the start and at the end
    rope: dict  # of the layers with compressed rows
    attention: str = "dense"
    index_lr: tuple[float, float] | None = None  # the indexer is trained beside the backbone
    compiled: bool = False  # if there is a C++ compiler
    draft: bool = False  # the draft block is trained, and nothing else
    warmup: int = 5  # steps


PHASES = [
    Phase("pretrain", 0.49, 1024, 8, (3e-3, 1.5e-3), PLAIN, compiled=True, warmup=30),
    Phase("extend-4k", 0.16, 4096, 2, (1.5e-3, 5e-4), YARN, index_lr=(4e-3, 1.5e-3)),
    Phase("extend-8k", 0.09, 8192, 2, (5e-4, 3e-4), YARN, index_lr=(1.5e-3, 1e-3), warmup=1),
    Phase("sparse-4k", 0.12, 4096, 2, (3e-4, 5e-5), YARN, "sparse", index_lr=(1e-3, 2e-4), warmup=2),
    Phase("sparse-16k", 0.04, 16384, 2, (5e-5, 3e-5), YARN, "sparse", index_lr=(3e-4, 1e-4), warmup=1),
    Phase("draft", 0.10, 1024, 8, (2e-3, 2e-4), YARN, draft=True),
]


@dataclass
class Budget:
    minutes: float
    tokens: int  # if not 0, it counts instead of the minutes, and a run is reproducible


def train(ids: torch.Tensor, work: pathlib.Path, budget: Budget, seed: int, source: pathlib.Path | None) -> pathlib.Path:
    """Run the phases that `work` has no checkpoint of; returns the last checkpoint."""
    processes = 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))
    rendezvous = (work / f"rendezvous-{os.getpid()}").resolve()
    arguments = (processes, f"file://{rendezvous}", ids, work, budget, seed, source)
    torch.multiprocessing.spawn(worker, arguments, nprocs=processes)
    rendezvous.unlink(missing_ok=True)
    return checkpoint(work, PHASES[-1])


def checkpoint(work: pathlib.Path, phase: Phase) -> pathlib.Path:
    return work / f"{phase.name}.pt"


def partial(path: pathlib.Path) -> pathlib.Path:
    """The latest state within a phase, for a look at it; a run resumes from finished phases only."""
    return path.with_suffix(".partial")


def with_rope(rope: dict) -> dict:
    return CONFIG | {"rope_parameters": dict(main=PLAIN, compress=rope)}


def worker(rank, processes, address, ids, work, budget, seed, source):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 2 * CONFIG["num_hidden_layers"]  # every layer is its own shape
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=processes,
                            timeout=datetime.timedelta(hours=1))
    torch.manual_seed(seed)
    model = Model(with_rope(PLAIN)).to(device)
    start.initialise(model)
    if source:
        start.convert(model, source)
    torch.manual_seed(seed + 1 + rank)
    ids = ids.to(device)
    for phase in PHASES:
        path = checkpoint(work, phase)
        if path.exists():
            model.load_state_dict(torch.load(path, map_location=device))
            continue
        run_phase(model, phase, ids, budget, rank, processes, path)
        if rank == 0:
            torch.save(model.state_dict(), path)
            partial(path).unlink(missing_ok=True)
        dist.barrier()
    dist.destroy_process_group()


def run_phase(model, phase, ids, budget, rank, processes, path):
    device = ids.device
    model.config["rope_parameters"] = with_rope(phase.rope)["rope_parameters"]
    optimizers = make_optimizers(model, phase)
    trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    model.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)
    sequences = max(phase.batch // processes, 1)
    step_tokens = sequences * processes * phase.context
    started, step, progress, saved = time.monotonic(), 0, 0.0, time.monotonic()
    smooth = {}
    while progress < 1:
        for optimizer in optimizers:
            set_lr(optimizer, phase, progress, step)
        losses = gradients(model, phase, batch(ids, sequences, phase.context))
        spent = (step + 1) * step_tokens / budget.tokens if budget.tokens else (time.monotonic() - started) / 60 / budget.minutes
        figures = average(trained, [spent / phase.share, *losses.values()], model, processes)
        progress = figures[0]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if not phase.draft:
            for router in routers(model):
                router.balance(BALANCE_STEP)
        step += 1
        for name, value in zip(losses, figures[1:]):
            smooth[name] = 0.9 * smooth.get(name, value) + 0.1 * value
        if rank == 0 and (step % REPORT_STEPS == 1 or progress >= 1 or phase.context > 4096):
            rate = step * step_tokens / (time.monotonic() - started)
            shown = "  ".join(f"{name} {value:.3f}" for name, value in smooth.items())
            print(f"{phase.name:10} {min(progress, 1):4.0%}  step {step:5}  {shown}  {rate:.0f} tokens/s", flush=True)
            if time.monotonic() - saved > SAVE_SECONDS:
                torch.save(model.state_dict(), partial(path))
                saved = time.monotonic()


def make_optimizers(model, phase):
    """Muon for the matrices inside the layers, AdamW for the rest and for the indexer."""
    indexer, draft = model.indexer_parameters(), model.draft_parameters()
    apart = {id(p) for p in [*indexer, *draft]}
    backbone = [(name, p) for name, p in model.named_parameters() if id(p) not in apart]
    taught = [(name, p) for name, p in model.named_parameters() if name.startswith("mtp.")] if phase.draft else backbone
    inside = [p for name, p in taught if is_matrix(name, p)]
    taken = {id(p) for p in inside}
    rest = [p for _, p in taught if id(p) not in taken]
    optimizers = [torch.optim.Muon(inside, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.01)]
    if phase.index_lr:
        optimizers.append(torch.optim.AdamW(indexer, betas=(0.9, 0.95), weight_decay=0.0))
        optimizers[-1].is_indexer = True
    return optimizers


def is_matrix(name, parameter):
    inside = name.startswith(("layers.", "mtp."))
    return inside and parameter.dim() == 2 and name.endswith(".weight") and ".gate." not in name


def set_lr(optimizer, phase, progress, step):
    start, end = phase.index_lr if hasattr(optimizer, "is_indexer") else phase.lr
    for group in optimizer.param_groups:
        group["lr"] = (start + (end - start) * progress) * min(1, (step + 1) / phase.warmup)


def batch(ids, sequences, context):
    """Random windows, each behind a beginning-of-text token as in use."""
    starts = torch.randint(len(ids) - context, (sequences, 1), device=ids.device)
    windows = ids[starts + torch.arange(context, device=ids.device)]
    return torch.cat([torch.full_like(starts, CONFIG["bos_token_id"]), windows], 1)


def gradients(model, phase, windows):
    """Leaves the gradients of this process' windows; returns the losses by name."""
    losses = {}
    run = Run(phase.attention, phase.index_lr is not None, phase.compiled and shutil.which("c++") is not None)
    with torch.autocast(windows.device.type, dtype=torch.bfloat16):
        if phase.draft:
            total, agreed = model.draft_loss(windows)
            losses |= {"loss": total.item(), "agreed": agreed.item()}
        else:
            total = model.loss(windows, run)
            losses["loss"] = total.item()
    if run.losses:
        index_loss = torch.stack(run.losses).sum()
        total = total + index_loss
        losses["index_kl"] = index_loss.item() / len(run.losses)
    total.backward()
    return losses


def average(trained, figures, model, processes):
    """Average gradients, routing loads and `figures` over the processes; returns the figures."""
    gradients = [p.grad for p in trained if p.grad is not None]
    loads = [router.load for router in routers(model) if router.load is not None]
    tensors = [*gradients, *loads, torch.tensor(figures, device=loads[0].device)]
    flat = torch.cat([t.flatten() for t in tensors])
    if processes > 1:
        dist.all_reduce(flat)
        flat /= processes
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(part.view_as(tensor))
    return tensors[-1].tolist()


def routers(model):
    return [m for m in model.modules() if isinstance(m, Router)]
