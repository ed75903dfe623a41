"""What a run trains: adapters where the task uses the model, the head, or for comparison the whole model."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapters import AdapterSet, attach
from ..auto.plan import Plan
from ..auto.presets import preset
from ..core.blocks import blocks, not_recognised
from ..core.errors import RecipeError
from ..core.method import Method
from ..core.targets import Resolution, Targets
from ..data.batches import LengthBucketedBatches
from ..methods.head import Head
from ..methods.lora import OF_DATA, LoRA
from ..methods.selective import Selective
from ..tasks.base import TaskModel, on_device
from ..training.loop import Loop, Settings
from ..training.memory import peak_memory
from ..training.optim import Group
from ..training.progress import Progress
from . import judge
from .choose import Chosen, trial_batches
from .fit import within_memory
from .prepare import Work
from .probing import Base, answers_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.console import Console


def in_top(method: Method, body: nn.Module, layers: int | None) -> Method:
    """The method at those of its places that are in the last blocks of the model, where a number of them is said.

    Raises RecipeError if none is there, if the model has fewer blocks, or if none is recognised.
    """
    if layers is None:
        return method
    if isinstance(method, Selective):
        raise RecipeError(f"train.top_layers: {method.name} chooses among all parameters; name method.targets instead")
    paths, sites = blocks(body), method.resolve(body).sites
    if not paths:
        raise not_recognised(body, "block", "method.targets instead of train.top_layers")
    if layers > len(paths):
        raise RecipeError(f"train.top_layers is {layers}, and the model has {len(paths)} blocks; leave it out for all")
    top = [site for site in sites if any(f"{site.path}.".startswith(f"{path}.") for path in paths[-layers:])]
    if not top:
        raise RecipeError(
            f"train.top_layers: none of the {len(sites)} places of {method.name} is in the last {layers} of "
            f"{len(paths)} blocks (from {paths[-layers:][0]} on); leave it out, or choose another method"
        )
    return dataclasses.replace(method, targets=Targets.at(top))


class HeadAlone(Head):
    """What the task adds is all that is trained, and nothing of the model's own: new users, new classes."""

    def resolve(self, model: nn.Module) -> Resolution:
        return Resolution(model, ())


def attach_used(method: Method, work: Work, chosen: Chosen, plan: Plan) -> AdapterSet:
    """Attach to the layers that the task really uses, after looking at rows where the method does.

    Raises RecipeError for a head alone where the task adds nothing.
    """
    body = work.model.body
    if work.model.heads:
        method = dataclasses.replace(method, heads=tuple(dict.fromkeys([*method.heads, *work.model.heads])))
    if method.targets.is_auto and isinstance(method, Head):
        if not head_parameters(work.model) and not method.heads:
            raise RecipeError(
                f"method.name is head, and {work.task.name} adds nothing to {work.asked.model.name} here that could be "
                'trained alone. Choose a method that changes the model, such as "lora"'
            )
        method = HeadAlone(heads=method.heads)
    elif method.targets.is_auto and not isinstance(method, Selective):
        sites, used = method.resolve(body).sites, within_memory(lambda: used_modules(work, chosen), chosen, plan)
        idle = [site.name for site in sites if site.path not in used]
        if idle:
            method = dataclasses.replace(method, targets=Targets.at([site for site in sites if site.path in used]))
            plan.decide("left out", None, ", ".join(idle), "layers that this task does not use")
    if isinstance(method, Selective) or (isinstance(method, LoRA) and method.start in OF_DATA):
        if chosen.shard:
            raise RecipeError(
                f"{method.name} looks at gradients of whole weights to choose its start, and a base in shards has none "
                "whole; choose another method or start, or leave train.shard out"
            )
        method = method.choose(body, *_loss_of_rows(work, chosen))
    adapters = attach(body, method, seed=chosen.seed)
    plan.decide("sites", None, str(len(adapters.sites("default"))), adapters.report().splitlines()[0])
    if lean := adapters.lean():
        plan.decide("lean", None, len(lean), "frozen norms and feed-forwards that keep less for backward")
    return adapters


def used_modules(work: Work, chosen: Chosen) -> set[str]:
    """Paths in the body of the modules that the task's loss depends on.

    A zero that requires a gradient is added to each module's output, which tells whether its gradient is all zero: then
    the module is there in vain, as is the part of a detector for sizes that no image of a few batches has.
    """
    zeros: list[Tensor] = []

    def hook(path: str) -> Callable[[nn.Module, Any, Any], Any]:
        def add_zero(module: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                used.add(path)
                return None
            zeros.append(torch.zeros((), requires_grad=True))
            output = output + zeros[-1].to(output)
            output.register_hook(lambda gradient: used.add(path) if gradient.any() else None)
            return output

        return add_zero

    used: set[str] = set()
    hooks = [module.register_forward_hook(hook(path)) for path, module in work.model.body.named_modules()]
    try:
        for batch in trial_batches(work, chosen, next(work.model.parameters()).device):
            zeros.clear()
            loss, _ = work.task.loss(work.model(batch), batch)
            torch.autograd.grad(loss, zeros, allow_unused=True)
            if len(used) == len(hooks):
                break
    finally:
        for handle in hooks:
            handle.remove()
    return used


def groups_of(adapters: AdapterSet, model: TaskModel, chosen: Chosen) -> list[Group]:
    """The adapter's parameters, in two by LoRA+ where it was asked for, and the head's."""
    own, rate, decay = adapter_parameters(adapters), chosen.learning_rate, chosen.weight_decay
    head = Group(
        parameters=head_parameters(model), learning_rate=chosen.head_learning_rate, weight_decay=chosen.weight_decay
    )
    if chosen.lora_plus is None:
        return [Group(parameters=own, learning_rate=rate, weight_decay=decay), head]
    names = {id(parameter): name for name, parameter in own.items()}
    split = adapters.parameter_groups(rate, weight_decay=decay, ratio=chosen.lora_plus)
    return [
        *(
            Group(
                parameters={names[id(parameter)]: parameter for parameter in group["params"]},
                learning_rate=group["lr"],
                weight_decay=group["weight_decay"],
            )
            for group in split
        ),
        head,
    ]


def adapter_parameters(adapters: AdapterSet) -> dict[str, nn.Parameter]:
    return dict(adapters.named_parameters())


def head_parameters(model: TaskModel) -> dict[str, nn.Parameter]:
    return {f"head.{name}": p for name, p in model.head.named_parameters()}


def settings_of(chosen: Chosen, fingerprint: str) -> Settings:
    fields = {f.name for f in dataclasses.fields(Settings)} & {f.name for f in dataclasses.fields(Chosen)}
    return Settings(**{name: getattr(chosen, name) for name in fields}, fingerprint=fingerprint)


def fully_tuned(
    work: Work, chosen: Chosen, base: Base, accelerator: "Accelerator", console: "Console | None"
) -> judge.Full:
    """Full fine-tuning of a fresh copy of the model: same start of the head, same steps, its own learning rate."""
    rates = preset("full")
    model = work.task.build(work.asked).to(accelerator.device)
    body = model.body
    base.start(model)
    full = dataclasses.replace(work, model=model)
    reached = used_modules(full, chosen)
    used = {name: p for name, p in body.named_parameters() if name.rpartition(".")[0] in reached}
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(name in used)
    groups = [
        Group(parameters=used, learning_rate=rates.learning_rate, weight_decay=rates.weight_decay),
        Group(
            parameters=head_parameters(model), learning_rate=rates.head_learning_rate, weight_decay=rates.weight_decay
        ),
    ]
    loop = Loop(model, work.task, groups, work.train, work.valid, settings_of(chosen, ""), accelerator, None)
    shown = Progress(console, "full fine-tuning", chosen.steps, unit=work.task.unit)
    with peak_memory(accelerator.device) as peak, shown as bar:
        outcome = loop.run(bar)
    if outcome.stopped == "interrupted":
        raise KeyboardInterrupt("stopped while training the model to compare with; continue with --resume")
    found = answers_of(full, dataclasses.replace(chosen, split=outcome.split), accelerator)
    other = sum(p.nbytes for p in work.model.parameters())  # the tuned model, in memory all the while
    row = judge.row(
        "full",
        work,
        found.test,
        trainable=sum(p.numel() for p in loop.trained.values()),
        peak_bytes=peak.size_bytes and peak.size_bytes - other,
        seconds=outcome.seconds,
        disk_bytes=sum(p.nbytes for p in model.parameters()),
    )
    return judge.Full(row, found, outcome.curves)


def _loss_of_rows(work: Work, chosen: Chosen) -> tuple[Callable[[], Tensor], int]:
    """The task's loss on the next batch of training rows, the same in each run, and for how many batches to ask."""
    batches = iter(LengthBucketedBatches(work.train.lengths, batch_size=chosen.batch, seed=chosen.seed))
    device = next(work.model.parameters()).device

    def loss() -> Tensor:
        batch = on_device(work.task.collate(work.train, next(batches)), device)
        total, count = work.task.loss(work.model(batch), batch)
        return total / count

    return loss, min(8, max(1, len(work.train) // chosen.batch))
