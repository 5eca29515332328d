r"""FOMAML for language models, full parameters: learn weights from which a few gradient steps on a new task go far.

For each meta-step, with T tasks drawn:
    theta_i <- theta;  K times: theta_i <- theta_i - alpha grad L_support(theta_i)      (inner loop, fresh support rows each time)
    g_i = grad L_query(theta_i)                                                        (first order: taken at theta_i ...)
    theta <- AdamW(theta, clip(mean_i g_i))                                            (... applied at theta)
Finn et al. 2017, MAML, arXiv 1703.03400 (section 5.2 for the first order); Nichol et al. 2018, Reptile, arXiv 1803.02999.

What is done differently, and why:
1. The inner SGD step runs inside backward, on the local FSDP2 shards, gradient by gradient; the query gradient goes straight into
   one accumulator. So memory is five parameter-sized buffers (weights, copy of theta, accumulator, Adam's two) for any T and K.
2. theta is restored by copying, bit for bit. Gradients come from plain backward(), so the weights that the forward pass used are
   the weights that the backward pass sees, on every rank.
3. Episodes are a function of (seed, step, place in the meta-batch); a resumed run equals an uninterrupted one bit for bit on CPU.
4. --meta-gradient also takes reptile, maml (exact, second order) and joint (no inner loop: the baseline a claim needs).

    python fomaml.py                                                       # laptop: embedded model and problems, 3 minutes
    torchrun --standalone --nproc_per_node 1 fomaml.py --model meta-llama/Llama-3.2-1B --data hub --inner-lr 1e-2   # one GPU
    torchrun --standalone --nproc_per_node 4 fomaml.py --model Qwen/Qwen3-4B-Instruct-2507 --data hub --activation-checkpointing
    torchrun --nnodes 2 --nproc_per_node 8 --node_rank $R --master_addr $HOST --master_port 29500 fomaml.py --replicas 2 ...
"""

import functools
import sys
import time
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import eval as evaluation
import model as models
from data import DataError, Encoded, Episode, collate, episode_tasks, load_tasks, response_tokens, sample_episode
from model import Stop, World, local


@dataclass
class Args:
    """FOMAML with full parameters (also Reptile, exact MAML and joint training) for any Hugging Face causal language model."""

    # What is trained, on what
    model: str = "tiny"
    """tiny (embedded, 1.2M parameters), a local folder in Hugging Face format, or a hub name."""
    data: str = "embedded"
    """embedded, conventions (hidden rules), hub (EleutherAI/hendrycks_math), or a file or folder; see data.py."""
    task_column: str | None = None
    """What makes a task: a column of the data (embedded problems: family or subject)."""
    heldout_subjects: tuple[str, ...] = ()
    """Tasks or subjects kept out of meta-training; evaluation adapts to them. Without: the source's own, else the test rows."""
    support_ratio: float = 0.30
    """Share of a task's rows for the inner loop."""
    query_ratio: float = 0.40
    """Share of a task's rows for the meta-gradient; the rest is the test split."""
    max_length: int = 2048
    """Tokens; longer sequences are left out and counted, never cut."""
    output_dir: str = "runs/fomaml"
    """Run folder: args.json, metrics.jsonl, evaluations.jsonl, curves.png, checkpoints. A folder in use gets a number appended."""
    seed: int = 42
    """Episodes are a function of (seed, step, place)."""

    # The algorithm (symbols of the MAML paper)
    meta_gradient: Literal["fomaml", "reptile", "maml", "joint"] = "fomaml"
    """fomaml; reptile (theta += epsilon mean(theta_i - theta), K+1 inner steps); maml (exact second order, one process);
    joint (no inner loop, one AdamW step on all rows of the meta-batch)."""
    inner_steps: int = 10
    """K, inner steps per task (reference setting: 5)."""
    inner_lr: float = 0.1
    """alpha. Check that it adapts: 0.1 suits the tiny model, 1e-2 SmolLM2-135M, 1e-4 (the reference setting) moves nothing with SGD."""
    inner_optimizer: Literal["sgd", "adam"] = "sgd"
    """adam starts cold for each task and needs two more parameter-sized buffers."""
    inner_clip: float = 0.0
    """Gradient-norm limit of an inner step, 0 for none; costs one more parameter-sized buffer."""
    support_batch: int = 4
    """Rows per inner step."""
    query_batch: int = 8
    """Rows of the query loss."""
    tasks_per_step: int = 4
    """T, the meta-batch, over all replicas."""
    steps: int = 80
    """Meta-steps."""
    outer_lr: float = 1e-3
    """Peak learning rate of AdamW on theta (reference setting for 4B models: 3e-5)."""
    warmup_ratio: float = 0.1
    """Share of the steps with rising learning rate; cosine to zero after it."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW."""
    weight_decay: float = 0.01
    """AdamW."""
    clip: float = 1.0
    """Limit of the meta-gradient's norm."""
    reptile_epsilon: float = 0.5
    """Reptile's step towards the adapted weights (its schedule is the learning rate's)."""

    # Evaluation, logging, checkpoints
    eval_every: int = 40
    """Meta-steps between evaluations; also before the first and after the last. 0: only those two; -1: none."""
    eval_problems: int = 24
    """Test problems per task."""
    eval_tasks: int = 10
    """Tasks evaluated at most, 0 for all."""
    eval_max_new_tokens: int = 80
    """Length of greedy answers; 0 leaves accuracy out."""
    gain_every: int = 10
    """Steps between measurements of the query loss before adaptation (one more forward per task)."""
    save_every: int = 40
    """Meta-steps between checkpoints; also at the end and on Ctrl-C or SIGTERM."""
    keep: int = 5
    """Checkpoints kept."""
    resume: bool = False
    """Continue the newest checkpoint of --output-dir."""
    dry_run: bool = False
    """Check versions, devices, model, data, memory and disk without reading weights; exit status 1 if the run could not finish."""
    wandb: bool = False
    """Log to Weights & Biases as well (pip install wandb; WANDB_MODE=offline works)."""

    # Machine
    replicas: int = 1
    """R: the ranks form R groups; each takes T/R tasks, shards its own copy of the model and adapts alone."""
    micro_batch: int = 0
    """Rows per forward and rank, 0 for all at once."""
    activation_checkpointing: bool = False
    """Recompute activations in backward."""
    offload_theta: bool = False
    """Keep the copy of theta and the accumulator in (pinned) CPU memory."""
    cpu_offload: bool = False
    """FSDP2's offload: parameters and optimizer in CPU memory, streamed to the GPU."""
    compile: bool = False
    """torch.compile each transformer block."""
    trust_remote_code: bool = False
    """Let a hub model run its own code."""


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm


class Buffers:
    """A flat copy of theta, a flat accumulator of the meta-gradient, and the hooks that consume each gradient inside backward.

    `use` says what becomes of a gradient: "inner" (the inner step, in place), "meta" (add weight * gradient to the accumulator),
    "keep" (stay in p.grad: more micro-batches of the same inner step follow).
    """

    def __init__(self, model, inner_lr: float, inner_optimizer: str = "sgd", inner_clip: float = 0.0, offload: bool = False):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward alone the root still shows its gathered weights, which are freed later
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.inner_lr, self.adam, self.inner_clip = inner_lr, inner_optimizer == "adam", inner_clip
        self.use, self.weight, self.inner_step = "keep", 1.0, 0
        self.theta, self.meta = (self._flat(offload) for _ in range(2))  # lists of views
        self.moments = (self._flat(False), self._flat(False)) if self.adam else None
        for i, p in enumerate(self.params):
            p.register_post_accumulate_grad_hook(functools.partial(self._consume, i))

    def _flat(self, offload: bool) -> list[torch.Tensor]:
        shards = [local(p) for p in self.params]
        pin = offload and shards[0].is_cuda
        flat = torch.zeros(sum(s.numel() for s in shards), dtype=shards[0].dtype, device="cpu" if offload else shards[0].device, pin_memory=pin)
        return [v.view(s.shape) for v, s in zip(flat.split([s.numel() for s in shards]), shards, strict=True)]

    def save(self) -> None:
        for saved, p in zip(self.theta, self.params, strict=True):
            saved.copy_(local(p))

    def restore(self) -> None:
        for saved, p in zip(self.theta, self.params, strict=True):
            local(p).copy_(saved)

    def start_task(self) -> None:
        self.inner_step = 0
        for flat in self.moments or ():
            flat[0]._base.zero_()

    def add_difference(self, weight: float) -> None:
        """accumulator += weight (theta_i - theta), Reptile's direction."""
        for total, saved, p in zip(self.meta, self.theta, self.params, strict=True):
            total.add_(local(p).to(total.device) - saved, alpha=weight)

    def _consume(self, i: int, p: torch.Tensor) -> None:
        if self.use == "keep":
            return
        if self.use == "meta":
            self.meta[i].add_(local(p.grad).to(self.meta[i].device), alpha=self.weight)
        else:
            self._inner_update(i, p, 1.0)
        p.grad = None

    @torch.no_grad()
    def _inner_update(self, i: int, p: torch.Tensor, scale: float) -> None:
        grad = local(p.grad)
        if scale != 1.0:
            grad = grad * scale
        if self.adam:  # bias-corrected, betas (0.9, 0.999), as torch.optim.Adam's first steps
            m, v, t = self.moments[0][i], self.moments[1][i], self.inner_step + 1
            m.lerp_(grad, 0.1)
            v.lerp_(grad.square(), 0.001)
            local(p).addcdiv_(m, (v / (1 - 0.999**t)).sqrt_().add_(1e-8), value=-self.inner_lr / (1 - 0.9**t))
        else:
            local(p).add_(grad, alpha=-self.inner_lr)

    def finish_inner_step(self) -> None:
        """After the backward passes of an inner step: with --inner-clip the kept gradients are scaled and applied here."""
        if self.inner_clip:
            norm = full(torch.nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])).item()
            for i, p in enumerate(self.params):
                if p.grad is not None:
                    self._inner_update(i, p, min(1.0, self.inner_clip / (norm + 1e-6)))
                    p.grad = None
        self.inner_step += 1


def full(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def local_batches(rows: list[Encoded], world: World, pad_id: int, micro_batch: int = 0) -> list[dict]:
    """This rank's share of a batch in micro-batches, padded, on the device. Every rank of a shard group gets equally many."""
    rows = sorted(rows, key=lambda r: len(r.ids))[world.shard :: world.shards]
    size = micro_batch or len(rows)
    return [{k: v.to(world.device) for k, v in collate(rows[i : i + size], pad_id).items()} for i in range(0, len(rows), size)]


class Learner:
    """Model, buffers and batches together: what the loops below need at every step."""

    def __init__(self, model, buffers: Buffers, world: World, pad_id: int, tokens: dict[str, Encoded], micro_batch: int = 0):
        self.model, self.buffers, self.world, self.pad_id, self.tokens, self.micro_batch = model, buffers, world, pad_id, tokens, micro_batch
        self.seen = 0  # tokens through forward and backward on this rank's replica

    def backward(self, examples, use: str, total_tokens: int | None = None) -> torch.Tensor:
        """One batch forward and backward; gradients go where `use` says. Returns this rank's part of the mean token loss.

        The mean is over the response tokens of the whole batch (or over total_tokens): local sum x shards / tokens, as FSDP
        averages gradients over the shard group.
        """
        rows = [self.tokens[e.id] for e in examples]
        self.seen += sum(len(r.ids) for r in rows)
        total = total_tokens or response_tokens(rows)
        batches = local_batches(rows, self.world, self.pad_id, self.micro_batch)
        part = torch.zeros((), device=self.world.device)
        for j, batch in enumerate(batches):
            last = j == len(batches) - 1
            self.buffers.use = "keep" if use == "inner" and (not last or self.buffers.inner_clip) else use
            loss = models.token_loss(self.model, batch)
            (loss * (self.world.shards / total)).backward()
            part += loss.detach().float() / total
        self.buffers.use = "keep"
        return part

    @torch.no_grad()
    def loss(self, examples) -> torch.Tensor:
        """This rank's part of the mean token loss, forward only."""
        rows = [self.tokens[e.id] for e in examples]
        batches = local_batches(rows, self.world, self.pad_id, self.micro_batch)
        return sum(models.token_loss(self.model, b).float() for b in batches) / response_tokens(rows)

    def inner_loop(self, support, batch_size: int) -> torch.Tensor:
        """theta_i <- theta_i - alpha grad L_support(theta_i), len(support) / batch_size times. Returns the last step's loss."""
        self.buffers.start_task()
        for k in range(0, len(support), batch_size):
            last = self.backward(support[k : k + batch_size], "inner")
            self.buffers.finish_inner_step()
        return last

    def maml_gradient(self, episode: Episode, batch_size: int, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds weight x the exact meta-gradient, through the K inner steps. One process; attention with second derivatives."""
        theta = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        fast = theta

        def mean_loss(weights, examples):
            rows = [self.tokens[e.id] for e in examples]
            self.seen += sum(len(r.ids) for r in rows)
            (batch,) = local_batches(rows, self.world, self.pad_id)
            return models.token_loss(lambda **kw: torch.func.functional_call(self.model, weights, (), kw), batch) / response_tokens(rows)

        for k in range(0, len(episode.support), batch_size):
            support = mean_loss(fast, episode.support[k : k + batch_size])
            grads = torch.autograd.grad(support, list(fast.values()), create_graph=True)
            fast = {n: p - self.buffers.inner_lr * g for (n, p), g in zip(fast.items(), grads, strict=True)}
        query = mean_loss(fast, episode.query)
        for total, g in zip(self.buffers.meta, torch.autograd.grad(query, list(theta.values())), strict=True):
            total.add_(g, alpha=weight)
        return support.detach(), query.detach()


def meta_gradient(learner: Learner, episodes: list[Episode], method: str, support_batch: int, total_tasks: int, union_tokens: int = 0,
                  measure_gain: bool = False, stop: Stop | None = None) -> torch.Tensor | None:
    """Adds this replica's episodes to the accumulator; theta is as before afterwards, bit for bit.

    union_tokens: response tokens of the whole meta-batch (for joint). Returns [len(episodes), 3]: this rank's part of the support
    loss (last inner step, on its own batch at theta_{K-1}), the query loss after adaptation, and the query loss before it (0 when
    not measured); None if a stop was agreed on.
    """
    buffers = learner.buffers
    buffers.meta[0]._base.zero_()
    buffers.weight = 1.0 if method == "joint" else 1.0 / total_tasks  # joint is a token mean over the union
    buffers.save()
    losses = torch.zeros(len(episodes), 3, device=learner.world.device)
    for i, episode in enumerate(episodes):
        if stop is not None and stop.agreed():
            return None
        if measure_gain and method != "joint":
            losses[i, 2] = learner.loss(episode.query)
        if method == "maml":
            losses[i, 0], losses[i, 1] = learner.maml_gradient(episode, support_batch, buffers.weight)
        elif method == "joint":
            for k in range(0, len(episode.support), support_batch):
                rows = episode.support[k : k + support_batch]
                part = learner.backward(rows, "meta", union_tokens)
            losses[i, 0] = part * union_tokens / response_tokens([learner.tokens[e.id] for e in rows])
            part = learner.backward(episode.query, "meta", union_tokens)
            losses[i, 1] = part * union_tokens / response_tokens([learner.tokens[e.id] for e in episode.query])
        else:
            losses[i, 0] = learner.inner_loop(episode.support, support_batch)  # theta_i
            if method == "reptile":
                losses[i, 1] = learner.backward(episode.query, "inner")
                buffers.finish_inner_step()
                buffers.add_difference(buffers.weight)
            else:
                losses[i, 1] = learner.backward(episode.query, "meta")  # g_i = grad L_query(theta_i)
            buffers.restore()
    if learner.world.replicas > 1:
        dist.all_reduce(buffers.meta[0]._base, group=learner.world.mesh.get_group("replica"))
    return losses


def set_gradients(buffers: Buffers) -> None:
    """The accumulator becomes p.grad (views, no copy)."""
    for p, g in zip(buffers.params, buffers.meta, strict=True):
        g = g.to(local(p).device)
        p.grad = DTensor.from_local(g, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()) if isinstance(p, DTensor) else g


# ---------------------------------------------------------------------------------------------------------------------
# Checks before anything expensive


def check(args: Args, size: int) -> None:
    """Raises DataError for arguments that cannot work."""
    models.check_positive(args, ("inner_steps", "support_batch", "query_batch", "tasks_per_step", "steps", "replicas", "keep", "save_every", "max_length"),
                          ("inner_lr", "outer_lr", "clip"))
    if size % args.replicas:
        raise DataError(f"--replicas {args.replicas} does not divide the {size} ranks")
    if args.tasks_per_step % args.replicas:
        raise DataError(f"--tasks-per-step {args.tasks_per_step} cannot be shared equally by {args.replicas} replicas")
    shards = size // args.replicas
    for name in ("support_batch", "query_batch"):
        if getattr(args, name) % shards:
            raise DataError(f"--{name.replace('_', '-')} {getattr(args, name)} is not a multiple of the {shards} ranks that share a task: raise it, or raise --replicas")
    if args.meta_gradient == "maml" and (size > 1 or args.inner_optimizer != "sgd" or args.inner_clip or args.micro_batch):
        raise DataError("--meta-gradient maml runs in one process, with plain SGD inner steps and whole batches")


def prepare(args: Args, say) -> tuple:
    """Config, tokenizer, tasks and their token ids: all that can be known without weights. Raises DataError or ModelError."""
    config, tokenizer = models.load_config(args.model, args.trust_remote_code)
    tasks, evaluated, tokens, report = episode_tasks(
        tokenizer, load_tasks(args.data, task_column=args.task_column, heldout=args.heldout_subjects, support_ratio=args.support_ratio,
                              query_ratio=args.query_ratio, seed=args.seed),
        args.max_length, args.inner_steps, args.support_batch, args.query_batch, args.eval_tasks)
    say(report)
    return config, tokenizer, tasks, evaluated, tokens


def dry_run(args: Args, world: World) -> int:
    """The environment test. Returns the exit status: 1 if the run could not finish."""
    say = functools.partial(print, flush=True) if world.rank == 0 else lambda *a: None
    reasons = models.check_ranks(world, say)
    try:
        config, tokenizer, tasks, evaluated, tokens = prepare(args, say)
        for t in tasks + [t for t in evaluated if t.heldout]:
            say(f"  {t.name}{' (held out)' if t.heldout else ''}: {len(t.support)} support, {len(t.query)} query, {len(t.test)} test")
        lengths = [len(r.ids) for r in tokens.values()]
        rows = args.tasks_per_step * (args.inner_steps * args.support_batch + args.query_batch)
        say(f"about {rows * sum(lengths) / len(lengths):,.0f} tokens per meta-step; mean sequence {sum(lengths) / len(lengths):.0f}, longest {max(lengths)}")
        buffers = 5 + 2 * (args.inner_optimizer == "adam") + (args.micro_batch > 0 or args.inner_clip > 0)
        batch = (args.micro_batch or max(args.support_batch, args.query_batch) // world.shards) * max(lengths)
        reasons += models.check_space(config, world, say, buffers, batch, args.activation_checkpointing, args.output_dir,
                                      min(args.keep, -(-args.steps // args.save_every)) + 1)
    except (DataError, models.ModelError) as e:
        reasons.append(str(e))
    say("\n".join(f"cannot finish: {r}" for r in reasons) or "ready")
    return 1 if reasons else 0


# ---------------------------------------------------------------------------------------------------------------------

def build(args: Args, config, world: World):
    """The sharded model with its weights: fp32 master weights, bf16 compute on GPUs."""
    source = models.load_weights(args.model, trust_remote_code=args.trust_remote_code) if world.rank == 0 else None
    model = models.skeleton(config, attention="eager" if args.meta_gradient == "maml" else None, trust_remote_code=args.trust_remote_code)
    if args.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    blocks = models.layers_to_shard(model)
    if args.compile:
        for block in blocks:
            block.compile()
    cuda = world.device.type == "cuda"
    # One CPU rank has nothing to shard or cast, and FSDP's hooks cost a small model half its speed; maml's functional_call wants plain tensors.
    if (cuda or world.shards > 1) and args.meta_gradient != "maml":
        sharding = {"mesh": world.mesh["shard"], "offload_policy": CPUOffloadPolicy() if args.cpu_offload else OffloadPolicy(),
                    "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if cuda else MixedPrecisionPolicy()}
        for block in blocks:
            fully_shard(block, **sharding)
        fully_shard(model, **sharding)
    models.materialize(model, source, torch.device("cpu") if args.cpu_offload else world.device)
    return model.train()


# What may differ when a run is resumed: it does not change the mathematics.
FREE = {"resume", "output_dir", "wandb", "save_every", "keep", "eval_every", "replicas", "micro_batch", "activation_checkpointing", "offload_theta",
        "cpu_offload", "compile", "dry_run"}


def main(args: Args, world: World) -> int:
    rank0 = world.rank == 0
    say = functools.partial(tqdm.write, file=sys.stdout) if rank0 else lambda *a: None
    config, tokenizer, tasks, evaluated, tokens = prepare(args, say)
    run = models.run_folder(args.output_dir, asdict(args), args.resume, FREE, world.rank)
    resume_from = models.checkpoints(run)[-1] if args.resume and models.checkpoints(run) else None
    start_time = time.time()

    torch.manual_seed(args.seed)
    model = build(args, config, world)
    buffers = Buffers(model, args.inner_lr, args.inner_optimizer, args.inner_clip, args.offload_theta)
    optimizer = torch.optim.AdamW(buffers.params, lr=args.outer_lr, betas=args.betas, weight_decay=args.weight_decay, fused=True)
    learner = Learner(model, buffers, world, tokenizer.pad_token_id, tokens, args.micro_batch)
    stop = Stop(world)
    n = sum(p.numel() for p in buffers.params)
    state = models.load_checkpoint(resume_from, model, optimizer) if resume_from else {"step": 0, "skipped": 0, "skipped_in_a_row": 0}
    say(f"{args.meta_gradient}: {n / 1e6:.1f}M parameters, {world.size} rank(s), run folder {run}" + (f", resumed at step {state['step']}" if resume_from else ""))
    log = evaluation.Log("fomaml", asdict(args), run, rank0, state["step"])
    saved_at = state["step"] if resume_from else -1
    save_dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32

    def save():
        nonlocal saved_at
        if saved_at != state["step"]:
            models.save_checkpoint(run / "checkpoint", lambda tmp: models.write_training_state(tmp, model, tokenizer, optimizer, save_dtype), state, args.keep)
            saved_at = state["step"]

    per_replica = args.tasks_per_step // world.replicas
    bar = tqdm(total=args.steps, initial=state["step"], disable=not rank0, desc=args.meta_gradient, mininterval=0.5)
    failed, stopped = None, False
    for step in range(state["step"], args.steps + 1):
        last = step == args.steps
        due = args.eval_every >= 0 and (step == 0 or last or (args.eval_every and step % args.eval_every == 0))
        if due and step not in log.evaluations:
            buffers.save()
            result = evaluation.adaptation(model, evaluated, tokens, tokenizer, world, adapt=lambda rows: learner.inner_loop(rows, args.support_batch),
                                           restore=buffers.restore, shots=args.inner_steps * args.support_batch, problems=args.eval_problems,
                                           max_new_tokens=args.eval_max_new_tokens, seed=args.seed, stop=stop)
            if stopped := result is None:
                break
            log.evaluation(step, result)
        if last:
            break
        began, seen = time.perf_counter(), learner.seen
        torch.manual_seed(hash((args.seed, step, world.replica)) % 2**31)  # dropout, where a model has it
        meta_batch = [sample_episode(tasks, args.seed, step, i, r, per_replica, args.inner_steps * args.support_batch, args.query_batch)
                      for r in range(world.replicas) for i in range(per_replica)]
        mine = range(world.replica * per_replica, (world.replica + 1) * per_replica)
        union = response_tokens([tokens[e.id] for ep in meta_batch for e in ep.support + ep.query])
        gain = args.gain_every > 0 and (step == 0 or (step + 1) % args.gain_every == 0)
        part = meta_gradient(learner, [meta_batch[i] for i in mine], args.meta_gradient, args.support_batch, args.tasks_per_step, union, gain, stop)
        if stopped := part is None:
            buffers.restore()
            break
        losses = torch.zeros(args.tasks_per_step, 3, device=world.device)
        losses[mine.start : mine.stop] = part
        dist.all_reduce(losses)  # parts of all ranks: support, query, query before

        lr = args.outer_lr * models.learning_rate(step, args.steps, args.warmup_ratio)
        set_gradients(buffers)
        if args.meta_gradient == "reptile":  # p.grad is the mean of theta_i - theta
            norm = full(torch.nn.utils.get_total_norm([p.grad for p in buffers.params]))
        else:
            norm = full(torch.nn.utils.clip_grad_norm_(buffers.params, args.clip))
        finite = bool(torch.isfinite(norm)) and bool(torch.isfinite(losses).all())  # summed over all ranks: they agree
        if finite and args.meta_gradient == "reptile":
            with torch.no_grad():
                for p, direction in zip(buffers.params, buffers.meta, strict=True):
                    local(p).add_(direction.to(local(p).device), alpha=args.reptile_epsilon * models.learning_rate(step, args.steps, args.warmup_ratio))
        elif finite:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        optimizer.zero_grad()
        state["step"], state["skipped"] = step + 1, state["skipped"] + (not finite)
        state["skipped_in_a_row"] = 0 if finite else state["skipped_in_a_row"] + 1

        seconds = time.perf_counter() - began
        metrics = evaluation.step_metrics(losses.tolist(), [ep.task for ep in meta_batch], gain and args.meta_gradient != "joint")
        speed = (learner.seen - seen) * world.replicas / seconds
        metrics |= {"step": step + 1, "meta/grad_norm": norm.item(), "lr": lr, "skipped_steps": state["skipped"], "seconds": seconds, "tokens_per_second": speed,
                    "peak_memory_gb": models.peak_memory(world.device) / 1e9}
        if peak := models.peak_flops(world.device):
            metrics["mfu"] = 6 * n * speed / world.size / peak
        log.step(metrics)
        bar.update()
        bar.set_postfix(query=f"{metrics['meta/loss']:.3f}", gain=f"{log.last_gain:+.3f}" if log.last_gain is not None else "-", tok_s=f"{speed:,.0f}")
        if state["skipped_in_a_row"] >= 5:
            failed = (f"the loss or meta-gradient was not finite in 5 steps running (to step {step + 1}): lower --inner-lr or --outer-lr. "
                      f"Last good checkpoint: {models.checkpoints(run)[-1] if models.checkpoints(run) else 'none'}")
            break
        if (step + 1) % args.save_every == 0 and state["skipped_in_a_row"] == 0:
            save()
    bar.close()
    if failed:
        print(f"fomaml.py: {failed}", file=sys.stderr) if rank0 else None
        return 1
    save()
    if stopped:
        say(f"stopped at step {state['step']} and saved; to go on: the same command with --output-dir {run} --resume")
        return 0
    if rank0:
        log.finish(start_time)
    return 0


def cli() -> int:
    return models.run_script("fomaml.py", Args, check, lambda args, world: dry_run(args, world) if args.dry_run else main(args, world))


if __name__ == "__main__":
    sys.exit(cli())
