"""A training run: its folder, log, progress bar and checkpoints, and the ways in which it ends.

What every script needs to survive a cluster. Nothing here decides anything about an algorithm.
"""

import importlib.util
import json
import os
import platform
import resource
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

from card import check_hub, model_card, push_to_hub
from model import (
    EMBEDDED,
    ModelError,
    World,
    full_weights,
    save_pretrained,
    setup,
)
from sources import DataError, reason_of

# --------------------------------------------------------------------------------------------------
# The run folder and its checkpoints


def run_folder(output_dir: str, settings: dict, resume: bool, free: set[str], rank: int) -> Path:
    """The run folder, the same on all ranks, with args.json (settings, command, versions) in it.

    A used folder is never written over: without `resume` a number is appended. With it the settings
    must be those of the first start, but for the names in `free`; else ModelError. Collective.
    """
    answer: list = [None]
    if rank == 0:
        try:
            answer[0] = str(_claim_folder(output_dir, settings, resume, free))
        except ModelError as e:
            answer[0] = e
    dist.broadcast_object_list(answer, 0)
    if isinstance(answer[0], ModelError):
        raise answer[0]
    return Path(answer[0])


def _claim_folder(output_dir: str, settings: dict, resume: bool, free: set[str]) -> Path:
    import transformers

    if not output_dir:
        raise ModelError("--output-dir must name a folder")
    folder, number = Path(output_dir).expanduser(), 2
    if (folder / "state").is_dir():
        raise ModelError(f"{folder} is a checkpoint: give the run folder, {folder.parent}")
    while not resume and (folder / "args.json").exists():
        folder, number = Path(f"{output_dir}-{number}").expanduser(), number + 1
    settings = json.loads(json.dumps(settings))
    if (folder / "args.json").exists():
        _check_same(folder, settings, free)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    record = {
        "args": settings,
        "command": sys.argv,
        "ranks": dist.get_world_size(),
        "versions": versions,
        "id": f"{folder.name}-{secrets.token_hex(4)}",  # Weights & Biases must not join two runs
    }
    (folder / "args.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    return folder


def _check_same(folder: Path, settings: dict, free: set[str]) -> None:
    """Raises ModelError where a run is to be resumed with other settings than it was started."""
    try:
        old = json.loads((folder / "args.json").read_text(encoding="utf-8"))["args"]
        changed = [k for k, v in settings.items() if k not in free and old.get(k, v) != v]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"--resume: {folder / 'args.json'} is damaged") from None
    if changed:
        flags = ", ".join(f"--{k.replace('_', '-')} {old[k]}" for k in changed)
        why = " (the schedule is made for --steps)" if "steps" in changed else ""
        raise ModelError(f"--resume: {folder} was started with {flags}; give the same{why}")


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("step-*") if not p.name.endswith(".tmp")]
    return sorted(p for p in found if (p / "state" / "extra.json").exists())


def save_checkpoint(folder: Path, write: Callable[[Path], None], extra: dict, keep: int) -> None:
    """write(tmp) fills a temporary folder, which is then renamed to step-NNNNNN beside `folder`.

    `folder`, a link, is moved to it: a kill at any moment leaves the last good one usable. The
    newest `keep` are kept. extra, which must hold "step", is what resuming needs. Collective.
    """
    rank = dist.get_rank()
    final = folder.parent / f"step-{extra['step']:06d}"
    tmp = final.with_name(final.name + ".tmp")
    if rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        (tmp / "state").mkdir(parents=True)
    dist.barrier()
    write(tmp)
    if rank == 0:
        (tmp / "state" / "extra.json").write_text(json.dumps(extra), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        tmp.rename(final)
        link = folder.with_name(folder.name + ".tmp")
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        link.replace(folder)
        for old in checkpoints(final.parent)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


# What reading and writing may raise; the library's own is no Exception
CHECKPOINT_ERRORS = (Exception, CheckpointException)


def checkpoint_reason(error: BaseException) -> str:
    """What such an error says, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error, _ = next(iter(error.failures.values()))  # of some rank
    return reason_of(error)


class ModelCheckpoint:
    """A sharded model and its optimizer: full weights in Hugging Face format, and state/ to resume.

    lm: the part of the model that is a Hugging Face model (default: all of it).
    """

    def __init__(self, model, tokenizer, optimizer, lm=None):
        self.model, self.tokenizer, self.optimizer, self.lm = model, tokenizer, optimizer, lm
        cuda = torch.cuda.is_available()
        self.dtype = torch.bfloat16 if cuda else torch.float32

    def write(self, folder: Path) -> None:
        """Collective; rank 0 writes the full weights, every rank its shards."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict

        lm = self.lm or self.model
        weights = full_weights(lm, self.dtype)
        if dist.get_rank() == 0:
            save_pretrained(folder, lm, self.tokenizer, weights, self.dtype)
        del weights
        model_state, optimizer_state = get_state_dict(self.model, self.optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.save(state, checkpoint_id=folder / "state")

    def read(self, folder: Path) -> None:
        """Into the sharded model and its optimizer, whatever number of ranks wrote it."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

        model_state, optimizer_state = get_state_dict(self.model, self.optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=folder / "state")
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


# --------------------------------------------------------------------------------------------------
# The log


class Log:
    """metrics.jsonl, evaluations.jsonl and samples.jsonl, and Weights & Biases if asked for.

    Rows after the step that a run resumes at are cut off. Rank 0 writes.
    """

    FILES = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl")

    def __init__(self, project: str, settings: dict, folder: Path, active: bool, step: int):
        self.folder, self.active, self.wandb = folder, active, None
        kept = {name: self._rows_until(step, name) for name in self.FILES}
        self.evaluations = {row["step"]: row["tasks"] for row in kept["evaluations.jsonl"]}
        dist.barrier()  # all ranks have read
        if active:
            for name, rows in kept.items():
                if rows or name != "samples.jsonl":  # only amft.py has samples
                    lines = "".join(json.dumps(row) + "\n" for row in rows)
                    (folder / name).write_text(lines, encoding="utf-8")
            if settings["wandb"]:
                import wandb

                record = json.loads((folder / "args.json").read_text(encoding="utf-8"))
                self.wandb = wandb.init(
                    project=project, name=folder.name, id=record.get("id", folder.name),
                    resume="allow", config=settings, dir=folder,
                )  # fmt: skip
        dist.barrier()

    def _rows_until(self, step: int, name: str) -> list[dict]:
        file = self.folder / name
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        rows = []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # a kill may cut a line
            if row["step"] <= step:
                rows.append(row)
        return rows

    def append(self, name: str, row: dict) -> None:
        if self.active:
            with open(self.folder / name, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")

    def send(self, values: dict, step: int) -> None:
        """To Weights & Biases."""
        if self.wandb:
            self.wandb.log(values, step=step)


# --------------------------------------------------------------------------------------------------
# The run


class Stop:
    """Ctrl-C and SIGTERM become a request that all ranks agree on; a second one ends at once."""

    def __init__(self, world: World):
        self.world, self.requested = world, False
        signal.signal(signal.SIGINT, self._request)
        signal.signal(signal.SIGTERM, self._request)

    def _request(self, signum, frame):
        self.requested = True
        signal.signal(signum, signal.SIG_DFL)

    def is_requested(self) -> bool:
        """Whether this rank was asked to stop: for work that it can break off alone."""
        return self.requested

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. Collective."""
        flag = torch.tensor(float(self.requested), device=self.world.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())


class Run:
    """The passive object that a script's main leans on; one for each process.

    shows: the progress bar's words -> the metrics that they stand for. steps: the last step
    (default: --steps). advice: what to do where losses are not finite.
    """

    MOST_SKIPPED = 5  # steps running that are not finite, after which a run gives up

    def __init__(self, project, args, world, free, *, title, shows, advice, steps=None):
        self.project, self.args, self.world = project, args, world
        self.title, self.shows, self.advice = title, shows, advice
        self.last_step = args.steps if steps is None else steps
        self.began = time.time()
        self.stopped, self.failed = False, None
        self.state = {"step": 0, "skipped": 0, "skipped_in_a_row": 0}
        self.latest: dict[str, float] = {}
        self.warned: set[str] = set()
        self.folder = run_folder(args.output_dir, asdict(args), args.resume, free, world.rank)

    def start(self, checkpoint, parameters: str, own_state: dict | None = None) -> None:
        """Reads the newest checkpoint with --resume. From here on signals only ask to stop.

        checkpoint: has write(folder) and read(folder). own_state: what the script itself remembers
        from step to step; saved with every checkpoint and updated here. parameters: for the line
        that says what is trained.
        """
        self.checkpoint, self.own_state = checkpoint, {} if own_state is None else own_state
        resumed = self._read_newest() if self.args.resume else False
        step = self.state["step"]
        self.saved_at = step if resumed else -1
        self.stop = Stop(self.world)
        self.world.say(
            f"{self.title}: {parameters}, {self.world.size} rank(s), run folder {self.folder}"
            + (f", resumed at step {step}" if resumed else "")
        )
        self.log_files = Log(
            self.project, asdict(self.args), self.folder, self.world.rank == 0, step
        )
        self.evaluations = self.log_files.evaluations
        self.bar = tqdm(
            total=self.last_step,
            initial=step,
            disable=self.world.rank != 0,
            desc=self.title,
            mininterval=0.5,
        )

    def _read_newest(self) -> bool:
        """The newest checkpoint that is whole; False if there is none yet. Collective.

        Raises ModelError if there are some, but all are damaged.
        """
        found = checkpoints(self.folder)
        for folder in reversed(found):
            try:
                saved = json.loads((folder / "state" / "extra.json").read_text(encoding="utf-8"))
                self.state = {k: saved[k] for k in self.state}
                self.own_state.update({k: saved[k] for k in self.own_state})
                self.checkpoint.read(folder)
            except CHECKPOINT_ERRORS as e:  # whatever a half-written or overwritten file leads to
                self.world.say(f"warning: {folder} is damaged ({checkpoint_reason(e)})")
                continue
            return True
        if found:
            raise ModelError(f"--resume: every checkpoint of {self.folder} is damaged")
        return False

    def steps(self):
        """The numbers of the steps to take, and the last one's successor, which only evaluates.

        Ends early where a signal asked for it, or where losses stay not finite.
        """
        for step in range(self.state["step"], self.last_step + 1):
            if self.stop_agreed() or self.failed:
                return
            self.step_began = self.lap_began = time.perf_counter()
            yield step

    def is_over(self, step: int) -> bool:
        """After a step's evaluation: whether there is nothing to train any more."""
        return self.stopped or step == self.last_step

    def stop_agreed(self) -> bool:
        """Whether a signal asked any rank to stop. Collective: also for use within long steps."""
        self.stopped = self.stopped or self.stop.agreed()
        return self.stopped

    def lap(self) -> float:
        """Seconds of this step since the last lap."""
        now = time.perf_counter()
        seconds, self.lap_began = now - self.lap_began, now
        return seconds

    def evaluation_due(self, step: int, *also: int) -> bool:
        """Before the first step, after the last, every --eval-every steps, and at `also`."""
        every = self.args.eval_every
        if every < 0 or step in self.evaluations:
            return False
        return step in (0, self.last_step, *also) or (every > 0 and step % every == 0)

    def evaluation(self, step, result, lines, mean=None, samples=()) -> None:
        """Writes an evaluation: {task or test set: its numbers}, and `lines` for the terminal.

        result None: it was broken off, as a stop was agreed on. mean: over the tasks. samples:
        responses for samples.jsonl, which people read.
        """
        if result is None:
            self.stopped = True
            return
        self.evaluations[step] = result
        row = {"step": step} | ({"mean": mean} if mean else {}) | {"tasks": result}
        self.log_files.append("evaluations.jsonl", row)
        for sample in samples:
            self.log_files.append("samples.jsonl", sample)
        for line in lines:
            self.world.say(line)
        if mean:
            self.log_files.send({f"eval/{k}": v for k, v in mean.items()}, step)
        else:
            for name, numbers in result.items():
                self.log_files.send({f"{name}/{k}": v for k, v in numbers.items()}, step)
        self.step_began = self.lap_began = time.perf_counter()

    def warn(self, warnings: dict[str, str]) -> None:
        """Says each kind of warning once."""
        for kind, text in warnings.items():
            if kind not in self.warned:
                self.warned.add(kind)
                self.world.say(f"warning: {text}")

    def finite(self, *values) -> bool:
        """Whether all numbers are finite; else the step is to be skipped, which is counted.

        The values must be the same on all ranks.
        """
        good = all(bool(torch.isfinite(torch.as_tensor(v)).all()) for v in values)
        self.state["skipped"] += not good
        self.state["skipped_in_a_row"] = 0 if good else self.state["skipped_in_a_row"] + 1
        return good

    def log(self, step: int, metrics: dict, tokens: int = 0, flops_per_token: int = 0) -> None:
        """One line of metrics.jsonl, and a checkpoint where one is due.

        tokens: of this rank's step over all ranks, for the speed (0: metrics say it themselves).
        """
        self.state["step"] = step + 1
        seconds = time.perf_counter() - self.step_began
        if tokens:
            speed = tokens / seconds
            metrics |= {"tokens_per_second": speed}
            if peak := peak_flops(self.world.device):
                metrics["mfu"] = flops_per_token * speed / self.world.size / peak
        metrics |= {
            "step": step + 1,
            "skipped_steps": self.state["skipped"],
            "seconds": seconds,
            "peak_memory_gb": peak_memory(self.world.device) / 1e9,
        }
        self.log_files.append("metrics.jsonl", metrics)
        self.log_files.send(metrics, step + 1)
        self.latest |= metrics
        self.bar.update()
        self.bar.set_postfix({word: self._shown(name) for word, name in self.shows.items()})
        in_a_row = self.state["skipped_in_a_row"]
        if in_a_row >= self.MOST_SKIPPED:
            last = checkpoints(self.folder)[-1:] or ["none"]
            self.failed = (
                f"the loss or gradient was not finite in {in_a_row} steps running (to step "
                f"{step + 1}): {self.advice}. Last good checkpoint: {last[0]}"
            )
        elif (step + 1) % self.args.save_every == 0 and in_a_row == 0:
            self.save()

    def _shown(self, name: str) -> str:
        value = self.latest.get(name)
        if value is None:
            return "-"
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"

    def save(self) -> None:
        """A checkpoint, if there is none of this step. Collective."""
        if self.saved_at != self.state["step"]:
            extra = self.state | self.own_state
            link = self.folder / "checkpoint"
            try:
                save_checkpoint(link, self._write, extra, self.args.keep)
            except CHECKPOINT_ERRORS as e:  # a full disk is an error of many classes
                good = checkpoints(self.folder)[-1:] or ["none"]
                raise ModelError(
                    f"cannot write a checkpoint: {checkpoint_reason(e)}. Last good one: {good[0]}"
                ) from None
            self.saved_at = self.state["step"]

    def _write(self, folder: Path) -> None:
        self.checkpoint.write(folder)
        if self.world.rank == 0:
            adapter = (folder / "adapter_config.json").exists()
            text = model_card(self.folder, self.project, self.state["step"], adapter)
            (folder / "README.md").write_text(text, encoding="utf-8")

    @property
    def completed(self) -> bool:
        return not self.stopped and not self.failed

    def finish(self, table: Callable[[dict, dict], str], picture: str, files: str = "") -> int:
        """The last checkpoint; table(first, last evaluation) and the picture. The exit status."""
        self.bar.close()
        if self.failed:
            if self.world.rank == 0:
                print(f"{self.project}.py: {self.failed}", file=sys.stderr)
            return 1
        self.save()
        if self.stopped:
            self.world.say(
                f"stopped at step {self.state['step']} and saved; to go on: the same command with "
                f"--output-dir {self.folder} --resume"
            )
        elif self.world.rank == 0:
            if self.evaluations:
                first, last = min(self.evaluations), max(self.evaluations)
                self.world.say("\n" + table(self.evaluations[first], self.evaluations[last]))
            line = f"\n{time.time() - self.began:.0f} s; model: {self.folder / 'checkpoint'}"
            if importlib.util.find_spec("plots"):  # a fork may leave it out
                import plots

                plots.figure([self.folder], self.folder / picture)
                line += f"; picture: {self.folder / picture}"
            self.world.say(line + files)
            if self.args.push_to_hub:
                address = push_to_hub(self.folder / "checkpoint", self.args.push_to_hub)
                self.world.say(f"uploaded to {address}")
        return 0


# --------------------------------------------------------------------------------------------------
# The machine

# Dense bf16, from the vendors' data sheets
PEAK_TFLOPS = {
    "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165, "3090": 71, "L4": 121,
}  # fmt: skip


def peak_memory(device: torch.device) -> float:
    """Bytes: of the GPU's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the GPU, where its name is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * t for n, t in PEAK_TFLOPS.items() if n in name), None)


# --------------------------------------------------------------------------------------------------
# Before anything expensive


def rate_warnings(args, limits: dict[str, float]) -> dict[str, str]:
    """Warnings of learning rates that suit 1.2M parameters, where another model is trained."""
    if args.model in EMBEDDED:
        return {}
    return {
        name: f"--{name.replace('_', '-')} {getattr(args, name):g} is a rate for the embedded "
        f"models: a real one wants less than {limit:g}, or its weights are lost"
        for name, limit in limits.items()
        if getattr(args, name) >= limit
    }


def check_ranks(world: World) -> list[str]:
    """Prints versions and devices, tries a collective; returns what is wrong."""
    import datasets
    import transformers

    world.say(
        f"python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, datasets {datasets.__version__}"
    )
    if world.device.type == "cuda":
        device = torch.cuda.get_device_name()
    else:
        device = f"CPU with {torch.get_num_threads()} thread(s)"
    works = world.sum(1.0)[0] == world.size
    world.say(
        f"{world.size} rank(s), {device}; {world.replicas} replica(s) of {world.shards} shard(s); "
        f"all-reduce {'works' if works else 'FAILED'}"
    )
    return [] if works else ["the all-reduce gave a wrong sum"]


@dataclass
class Needs:
    """Bytes that a run needs at once on each rank, by what they are for.

    device: on the GPU (without one: in memory). host: in the memory beside a GPU. training and
    evaluation come in turn, the rest is always there. disk: of one checkpoint.
    """

    device: dict[str, float]
    host: dict[str, float]
    training: dict[str, float]
    evaluation: dict[str, float]
    disk: float


def check_space(
    world: World, needs: Needs, output_dir: str, kept: int, have: dict | None = None
) -> list[str]:
    """Compares what a run needs with what is there; returns what is not enough.

    have: bytes {"device", "host", "disk"}, for tests; by default this machine's.
    """
    have = have or _space(world, output_dir)
    by_phase = {"training": needs.training, "evaluation": needs.evaluation}
    phase = max(by_phase, key=lambda name: sum(by_phase[name].values()))
    device = needs.device | by_phase[phase]
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in device.items())
    need = sum(device.values())
    world.say(
        f"memory per rank about {need / 1e9:.2f} GB in {phase} ({parts}) "
        f"of {have['device'] / 1e9:.1f} GB"
    )
    reasons = []
    if need > have["device"]:
        reasons.append(
            f"about {need / 1e9:.1f} GB per rank are needed, {have['device'] / 1e9:.1f} are there: "
            f"the largest part is {max(device, key=device.get)}"
        )
    host = sum(needs.host.values())
    if "host" in have and host:
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in needs.host.items())
        world.say(
            f"CPU memory per rank about {host / 1e9:.2f} GB ({parts}) of {have['host'] / 1e9:.1f}"
        )
        if host > have["host"]:
            reasons.append(
                f"about {host / 1e9:.1f} GB of CPU memory per rank are needed, "
                f"{have['host'] / 1e9:.1f} are there"
            )
    disk = needs.disk * kept
    world.say(f"disk: up to {disk / 1e9:.2f} GB of checkpoints, {have['disk'] / 1e9:.1f} GB free")
    if disk > have["disk"]:
        reasons.append(
            f"checkpoints need {disk / 1e9:.1f} GB of disk, {have['disk'] / 1e9:.1f} are free: "
            "lower --keep"
        )
    return reasons


def _space(world: World, output_dir: str) -> dict[str, float]:
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = pages / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    folder = Path(output_dir).resolve()
    while not folder.exists():
        folder = folder.parent
    have = {"device": memory, "disk": shutil.disk_usage(folder).free}
    if world.device.type == "cuda":
        have |= {"device": torch.cuda.mem_get_info()[0], "host": memory}
    return have


def dry_run(args, world: World, examine: Callable) -> int:
    """The environment test: examine(args, world) says what could not work. The exit status."""
    reasons = check_ranks(world)
    try:
        reasons += examine(args, world)
    except (DataError, ModelError) as e:
        reasons.append(str(e))
    world.say("\n".join(f"cannot finish: {r}" for r in reasons) or "ready")
    return 1 if reasons else 0


def start(script: str, args, check: Callable, examine: Callable, main: Callable) -> int:
    """Runs a script: check(args, ranks), then main(args, world) or, with --dry-run, examine.

    Input that cannot work is one line and exit status 2, before any weight is read.
    """
    rank = int(os.environ.get("LOCAL_RANK", 0))
    try:
        check(args, int(os.environ.get("WORLD_SIZE", 1)))
        if args.wandb and importlib.util.find_spec("wandb") is None:
            raise DataError("--wandb needs the package: pip install wandb")
        if args.push_to_hub and rank == 0:
            check_hub()
        world = setup(args.replicas)
        return dry_run(args, world, examine) if args.dry_run else main(args, world)
    except (DataError, ModelError, OSError) as e:
        if rank == 0:
            print(f"{script}: {e}", file=sys.stderr, flush=True)
        else:
            time.sleep(5)  # torchrun ends all ranks when one fails: rank 0 may have said it by then
            print(f"{script}, rank {rank}: {e}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        if rank == 0:
            print(f"{script}: interrupted, nothing new is saved", file=sys.stderr, flush=True)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
