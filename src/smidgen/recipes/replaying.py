"""Whether the rows of the frozen part are kept in a run, where, and what that saves: decided by a measurement.

    p passes through N rows, at a and replayed at b < a seconds a row:     N (a - b) + p N b    against    p N a

so without a limit of time it pays as soon as p > 1; within a limit, where more rows are seen.  What the linear probe's
pass has recorded costs nothing more.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import __version__
from ..auto.plan import Plan
from ..core.errors import CheckpointError
from ..core.fingerprint import fingerprint_as_held
from ..core.method import Method
from ..methods.head import head_sites
from ..methods.selective import Selective
from ..tasks.base import Examples
from ..training.memory import rows_at_once
from ..training.replay import Replay, find_replay, size_of
from ..training.replay_cut import Unit
from ..training.replay_store import Store, room_in_memory, room_on_disk
from ..training.trials import as_if_trained
from .choose import Chosen, Speed, agreed, measure, measure_replay
from .prepare import Work, digest_rows
from .schema import TrainPart

if TYPE_CHECKING:
    from accelerate import Accelerator

_ROUNDED = "bfloat16"  # where what was computed is too large: the range of fp32 in half its size
_LEAST_GAIN = 0.9  # of a step's time; less is not worth the room
_FOLDER = "replay"  # beside the checkpoints


@dataclass(frozen=True)
class Place:
    """What is kept and where.   folder: None for memory.   dtype: "" as computed.   size_bytes: about, of the sets."""

    units: list[Unit]
    device: torch.device
    folder: Path | None
    dtype: str
    sets: Mapping[str, Examples]
    size_bytes: int
    limit_bytes: int

    @property
    def name(self) -> str:
        return "memory" if self.folder is None else "disk"


@dataclass(frozen=True)
class Foreseen:
    """What is recorded while the base is judged, before it is settled whether it is used."""

    place: Place
    replay: Replay

    def serves(self, units: list[Unit]) -> bool:
        """True if it is these units that are recorded."""
        return self.place.units == units and self.replay.store.takes("train")


def foresee(
    said: TrainPart,
    method: Method,
    work: Work,
    chosen: Chosen,
    accelerator: "Accelerator",
    checkpoints: Path,
    *,
    resumed: bool,
) -> Foreseen | None:
    """What the linear probe's pass over the rows is to record, where targets are said and memory holds it."""
    known = not (method.targets.is_auto or isinstance(method, Selective))
    if not (known and work.task.probed and accelerator.num_processes == 1) or said.replay in ("off", "disk"):
        return None
    if resumed and (chosen.replay == "off" or chosen.replay_dtype):
        return None
    body = work.model.body
    heads = tuple(dict.fromkeys([*method.heads, *work.model.heads]))
    sites = [*method.resolve(body).sites, *head_sites(body, heads, [name for name, _ in body.named_parameters()])]
    trained = [parameter for site in sites for parameter in site.layer.parameters()]
    with as_if_trained(work.model, [*trained, *work.model.head.parameters()]):
        units, _ = find_replay(work.model, work.task, work.train, accelerator)
    place = next(_places("memory", "", units, work, accelerator, checkpoints), None) if units else None
    return Foreseen(place, _replay(place, work, chosen)) if place else None


def settle(
    said: TrainPart,
    work: Work,
    chosen: Chosen,
    accelerator: "Accelerator",
    plan: Plan,
    foreseen: Foreseen | None,
    checkpoints: Path,
    spent_s: float,
) -> tuple[Place | None, Speed, float]:
    """Decide for or against, enter it in the plan and in `chosen`; with the speed of a step as it will be, and the
    seconds that recording takes.

    checkpoints: the folder of the run's, where files would go.   spent_s: of the run's time.
    """
    plain = measure(work, chosen, accelerator)
    if chosen.shard or chosen.recompute != "off":
        units, why = list[Unit](), "the base is in shards" if chosen.shard else "memory is short: blocks run again"
    elif said.replay == "off":
        units, why = [], ""
    else:
        units, why = find_replay(work.model, work.task, work.train, accelerator)
    place, speed, recording_s = None, plain, 0.0
    if units:
        speed = agreed(measure_replay(work, chosen, accelerator, plain, units))
        place = _place(said.replay, None, units, work, accelerator, checkpoints, foreseen)
        recorded = foreseen is not None and place is foreseen.place and foreseen.replay.store.is_whole("train")
        if not recorded:
            recording_s = len(work.train) / chosen.batch * (plain.step - speed.step) / chosen.accumulate
        asked_for = said.replay in ("memory", "disk")
        if place is None:
            size, room = _size(units, work, _ROUNDED), room_in_memory(accelerator.device, accelerator.num_processes)
            why = f"its rows take {_in_words(size)} in 16 bit, and {_in_words(room)} of memory may be used"
        elif not asked_for and speed.step > _LEAST_GAIN * plain.step:
            place, why = None, f"a replayed step took {speed.step / plain.step:.0%} of the time"
        elif not (asked_for or recorded or _pays(said, work, chosen, accelerator, plain, speed, recording_s, spent_s)):
            place, why = None, "rows are not seen again often enough to pay for recording them"
        else:
            why = _found(place, plain, speed)
    chosen.replay = agreed("off" if place is None else place.name)
    chosen.replay_dtype = agreed("" if place is None else place.dtype)
    plan.decide("replay", None, chosen.replay, why or "you said so")
    if place is None or chosen.replay == "off":
        return None, plain, 0.0
    return place, speed, recording_s


def again(
    said: TrainPart,
    work: Work,
    chosen: Chosen,
    accelerator: "Accelerator",
    foreseen: Foreseen | None,
    checkpoints: Path,
) -> Place | None:
    """Of a run that is resumed: the same numbers, wherever they fit now.  Raises CheckpointError."""
    if chosen.replay == "off":
        return None
    units, why = find_replay(work.model, work.task, work.train, accelerator)
    place = _place(said.replay, chosen.replay_dtype, units, work, accelerator, checkpoints, foreseen)
    if not units or place is None:
        size = _size(units, work, chosen.replay_dtype)
        raise CheckpointError(
            "the run replays the frozen part of the model, and cannot here: "
            f"{why or f'it takes {_in_words(size)}, more than may be used of memory and disk'}. "
            "Make room, or start anew with --fresh"
        )
    return place


def fill(
    place: Place | None, foreseen: Foreseen | None, work: Work, chosen: Chosen, accelerator: "Accelerator"
) -> Replay | None:
    """Record the training rows that are not there yet; None, and so in `chosen`, if they turn out not to fit."""
    if place is None:
        return None
    replay = foreseen.replay if foreseen is not None and place is foreseen.place else _replay(place, work, chosen)
    replay.fill("train", work.task, accelerator, rows_at_once(2 * chosen.batch, chosen.split))
    if replay.store.is_whole("train"):
        return replay
    chosen.replay = "off"
    return None


def _pays(
    said: TrainPart,
    work: Work,
    chosen: Chosen,
    accelerator: "Accelerator",
    plain: Speed,
    replayed: Speed,
    recording_s: float,
    spent_s: float,
) -> bool:
    """True if recording all training rows, by each process, costs less than replaying them saves."""
    per_step = chosen.batch * chosen.accumulate * accelerator.num_processes
    steps = said.steps or chosen.epochs * len(work.train) / per_step
    if chosen.minutes is None:
        return recording_s + steps * replayed.step < steps * plain.step
    left = 60 * chosen.minutes - spent_s
    fitting = min(steps, left / plain.step), min(steps, (left - recording_s) / replayed.step)
    return fitting[1] > fitting[0] or recording_s + steps * replayed.step < steps * plain.step <= left


def _place(
    said: str | None,
    dtype: str | None,
    units: list[Unit],
    work: Work,
    accelerator: "Accelerator",
    checkpoints: Path,
    foreseen: Foreseen | None,
) -> Place | None:
    """Where the rows are already, else the best place that they fit; None if there is none."""
    if foreseen is not None and foreseen.serves(units):
        return foreseen.place
    return next(_places(said, dtype, units, work, accelerator, checkpoints), None)


def _places(
    said: str | None,
    dtype: str | None,
    units: list[Unit],
    work: Work,
    accelerator: "Accelerator",
    checkpoints: Path,
) -> Iterator[Place]:
    """Where the rows fit, the best first: as computed before rounded, memory before disk.

    said: "memory" or "disk" for that alone.   dtype: for that alone; None for any.
    What is rounded serves training and the choice of the best step; the test rows are judged with what was computed.
    """
    folder = checkpoints / _FOLDER
    if accelerator.num_processes > 1:
        folder /= str(accelerator.process_index)
    learned = {"train": work.train, "valid": work.valid}
    whole = learned | {"test": work.test} | {f"shift-{i}": rows for i, rows in enumerate(work.shift.values())}
    count, cpu = accelerator.num_processes, torch.device("cpu")
    rooms = [("memory", device, room_in_memory(device, count)) for device in dict.fromkeys((accelerator.device, cpu))]
    rooms.append(("disk", cpu, room_on_disk(folder, count)))
    for kept_as in ("", _ROUNDED):
        for name, device, room in rooms:
            for sets in (whole, learned) if not kept_as else (learned,):
                size = sum(size_of(units, work.train, rows, kept_as) for rows in sets.values())
                if size <= room and said in (None, "auto", name) and dtype in (None, kept_as):
                    yield Place(units, device, folder if name == "disk" else None, kept_as, sets, size, room)


def _replay(place: Place, work: Work, chosen: Chosen) -> Replay:
    digest = hashlib.sha256(
        repr((__version__, torch.__version__, chosen.precision, chosen.batch, place.dtype)).encode()
    )
    if place.folder is not None:
        digest.update(fingerprint_as_held(work.model.body).encode())
        digest.update(repr([(u.path, u.call, u.sides, u.shape, u.dtype, u.read) for u in place.units]).encode())
        for examples in place.sets.values():
            digest_rows(digest, examples)
    store = Store(
        {name: len(rows) for name, rows in place.sets.items()},
        limit_bytes=place.limit_bytes,
        dtype=getattr(torch, place.dtype) if place.dtype else None,
        device=place.device,
        folder=place.folder,
        fingerprint=digest.hexdigest(),
    )
    return Replay(work.model, place.units, store, place.sets)


def _size(units: list[Unit], work: Work, dtype: str) -> int:
    """Bytes of the rows that training needs."""
    return sum(size_of(units, work.train, rows, dtype) for rows in (work.train, work.valid))


def _found(place: Place, plain: Speed, replayed: Speed) -> str:
    last = [unit.path for unit in place.units if unit.read][-1]
    rounded = f", rounded to {place.dtype}" if place.dtype else ""
    return (
        f"what is frozen up to {last} runs once; a step then takes {replayed.step / plain.step:.0%} of the time; "
        f"{_in_words(place.size_bytes)}{rounded}"
    )


def _in_words(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"
