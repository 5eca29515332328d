r"""MeTA-LoRA: one adapter from which a few steps on a new task's few samples go far. Frozen base.

A round, with T tasks drawn and phi the shared adapter (A, B of every target layer:
y = W x + (alpha / r) B A x):
    phi_i <- phi;  K times: phi_i <- phi_i - lr step(grad L_support(phi_i))             (stage 1)
    g_i = grad L_query(phi_i)                               (stage 2: taken at phi_i ...)
    phi <- AdamW(phi, clip(mean_i g_i))                     (... applied at phi, to first order)
Stage 1 takes SGD steps, or AdamW steps with a cold state for each task.
MeTA-LoRA, arXiv 2510.11598; Hu et al. 2021, LoRA, arXiv 2106.09685.

What is done differently, and why:
1. As the base is frozen, tasks are independent: the T adapters run in ONE forward. A is [T, r, d],
   B is [T, d, r], the rows of a batch are ordered by task, so K inner steps of all tasks cost K
   forwards instead of K x T. The loss is the sum over tasks of each task's own token mean (a mean
   over all tokens would scale each task's gradient), clipping is per task: the same numbers as task
   after task, to float tolerance.
2. Adapters live beside the model, added by forward hooks (lora.py): the base's weights and code are
   untouched, nothing is copied per task.
3. Ranks take different tasks. FSDP2 shards the frozen base over all of them; adapters are
   replicated, and one all-reduce per round adds up their meta-gradients.
4. Evaluation adapts before it measures, as training does. Checkpoints are in PEFT's format; --merge
   also writes the whole model.

    python meta_lora.py                                     # laptop: hidden ciphers, 3 minutes
    FLAGS="--data hub --inner-steps 10 --inner-lr 1e-4 --support-batch 4 --query-batch 4 --shots 0
        --dropout 0.05 --outer-lr 5e-5 --steps 3000 --save-every 300 --eval-every 300
        --eval-max-new-tokens 512 --no-eval-curve --activation-checkpointing"   # MATH, any GPUs
    torchrun --standalone --nproc_per_node 1 meta_lora.py --model meta-llama/Llama-3.2-1B $FLAGS
    torchrun --standalone --nproc_per_node 4 meta_lora.py --model Qwen/Qwen3-4B-Instruct-2507 $FLAGS
    torchrun --nnodes 2 --nproc_per_node 8 --node_rank $R --master_addr $HOST --master_port 29500 \
        meta_lora.py --model Qwen/Qwen3-4B-Instruct-2507 $FLAGS --tasks-per-step 16  # two nodes
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from torch.distributed.fsdp import fully_shard

from data import (
    DataError,
    check_numbers,
    collate,
    describe_tasks,
    draw_support,
    episode_tasks,
    load_tasks,
    response_tokens,
    sample_episode,
)
from lora import AdapterCheckpoint, Adapters, check_targets, write_merged
from measure import (
    adaptation,
    adaptation_lines,
    average,
    results_table,
    rows_to_answer,
    rows_to_score,
    step_metrics,
)
from model import (
    World,
    activation_bytes,
    cache_bytes,
    check_head,
    check_positions,
    layers_to_shard,
    learning_rate,
    load_config,
    load_weights,
    logit_bytes,
    materialize,
    parameter_count,
    resolve,
    set_gradients,
    skeleton,
    token_losses,
)
from run import (
    Needs,
    Run,
    check_space,
    rate_warnings,
    start,
)


@dataclass
class Args:
    """MeTA-LoRA (also Reptile on adapters, joint LoRA and LoRA from scratch).

    For any Hugging Face causal language model.
    """

    # What is trained, on what
    model: str = "tiny"
    """tiny (embedded), a local folder in Hugging Face format, or a hub name: the frozen base."""
    data: str = "ciphers"
    """ciphers (1,000 tasks that hide a digit cipher), changes (64 that hide a change of digits),
    embedded (generated problems of MATH's subjects), hub (EleutherAI/hendrycks_math), or a file or
    folder; see data.py."""
    task_column: str | None = None
    """What makes a task: a column of the data (embedded problems: family or subject)."""
    heldout_subjects: tuple[str, ...] = ()
    """Tasks or subjects kept out of meta-training; evaluation adapts to them. Default: the source's
    own; if it has none, the test rows of all tasks."""
    support_ratio: float = 0.30
    """Share of a task's rows for stage 1."""
    query_ratio: float = 0.40
    """Share of a task's rows for stage 2; the rest is the test split."""
    max_length: int = 2048
    """Tokens; longer sequences are left out and counted, never cut. The support rows are also shown
    in the prompt, for comparison, where they and the problem fit into so many."""
    output_dir: str = "runs/meta_lora"
    """Run folder: args.json, metrics.jsonl, evaluations.jsonl, curves.png, checkpoints. A folder in
    use gets a number appended."""
    seed: int = 42
    """The adapter's start, dropout and episodes are functions of it."""

    # The adapter
    lora_r: int = 16
    """Rank of every adapter."""
    alpha: float = 32
    """Scale: alpha / r (alpha / sqrt(r) with --rank-stabilised)."""
    dropout: float = 0.0
    """On the adapter's input, while training (the reference setting's: 0.05)."""
    target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Linear layers that get an adapter, by the last part of their names."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(r), rsLoRA, arXiv 2312.03732."""

    # The algorithm
    meta_gradient: Literal["fomaml", "reptile", "joint", "none"] = "fomaml"
    """fomaml (MeTA-LoRA); reptile (phi += epsilon mean(phi_i - phi), K+1 inner steps); joint (one
    AdamW step on all rows of the round: plain multi-task LoRA); none (no training: LoRA from
    scratch on each task, the evaluation alone)."""
    inner_steps: int = 5
    """K, steps of stage 1 (the reference setting's: 10)."""
    inner_lr: float = 5e-3
    """Stage 1's learning rate: 5e-3 suits the tiny model, 3e-4 SmolLM2-135M; the reference setting
    is 1e-4."""
    inner_optimizer: Literal["sgd", "adam"] = "adam"
    """Stage 1: AdamW without weight decay, cold for each task, or plain SGD."""
    inner_clip: float = 0.0
    """Limit of each task's gradient norm in stage 1, 0 for none."""
    shots: int = 30
    """Different support rows of an episode; inner steps go through them as often as they need. 0:
    every step takes fresh rows, as long as the task has some."""
    support_batch: int = 30
    """Rows per task and inner step."""
    query_batch: int = 20
    """Rows per task of the query loss."""
    tasks_per_step: int = 4
    """T, tasks of a round, over all ranks."""
    tasks_per_forward: int = 0
    """Tasks run together, 0 for all of a rank: bounds memory."""
    steps: int = 120
    """Rounds."""
    outer_lr: float = 2e-3
    """Peak learning rate of AdamW on phi (reference setting: 5e-5)."""
    warmup_ratio: float = 0.1
    """Share of the rounds with rising learning rate; cosine to zero after it."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW, both stages."""
    weight_decay: float = 0.01
    """AdamW of stage 2."""
    clip: float = 1.0
    """Limit of the meta-gradient's norm."""
    reptile_epsilon: float = 0.5
    """Reptile's step towards the adapted adapters (its schedule is the learning rate's)."""

    # Evaluation, logging, checkpoints
    eval_every: int = 60
    """Rounds between evaluations; also before the first and after the last. 0: only those two; -1:
    none."""
    eval_problems: int = 20
    """Test problems per task."""
    eval_tasks: int = 10
    """Tasks evaluated at most, 0 for all."""
    eval_max_new_tokens: int = 12
    """Length of greedy answers; 0 leaves accuracy out. Of a worked solution some hundreds."""
    eval_curve: bool = True
    """At the first and the last evaluation also measure after every step of stage 1, and with the
    support rows in the prompt instead: K times as long, and long prompts."""
    gain_every: int = 10
    """Rounds between measurements of the query loss before adaptation (one more forward)."""
    save_every: int = 60
    """Rounds between checkpoints; also at the end and on Ctrl-C or SIGTERM."""
    keep: int = 5
    """Checkpoints kept."""
    merge: bool = False
    """At the end also write the base with phi merged into its weights (Hugging Face format) to
    merged/ of the run folder."""
    resume: bool = False
    """Continue the newest checkpoint of --output-dir."""
    dry_run: bool = False
    """Check versions, devices, model, data, memory and disk without reading weights; exit status 1
    if the run could not finish."""
    wandb: bool = False
    """Log to Weights & Biases as well (pip install wandb; WANDB_MODE=offline works)."""
    push_to_hub: str | None = None
    """Upload the last checkpoint to this repository of the hub (after hf auth login)."""

    # Machine
    activation_checkpointing: bool = False
    """Recompute activations in backward."""
    trust_remote_code: bool = False
    """Let a hub model run its own code."""

    @property
    def replicas(self) -> int:
        """Every rank holds the whole adapter and its own tasks; the base is sharded over all."""
        return 1


# What may differ when a run is resumed: it does not change the mathematics.
FREE = {
    "resume", "output_dir", "wandb", "push_to_hub", "save_every", "keep", "eval_every",
    "eval_problems", "eval_tasks", "eval_max_new_tokens", "eval_curve", "gain_every",
    "tasks_per_forward", "activation_checkpointing", "dry_run", "merge",
}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# The algorithm


class AdapterLearner:
    """The shared adapter phi, the adapters phi_i of the tasks at hand, and the meta-gradient.

    Tasks run together: what is "of each task" is a tensor [T], in the order of the episodes. All
    losses are in nats a response token. tokens: {example.id: its Encoded token ids}.
    """

    def __init__(self, model, adapters: Adapters, args: Args, world: World, pad_id: int, tokens):
        self.model, self.adapters, self.args, self.world = model, adapters, args, world
        self.pad_id, self.tokens = pad_id, tokens
        self.meta_gradient = [torch.zeros_like(p) for p in adapters.phi]
        self.tokens_seen = 0  # of this rank, through forward and backward

    def token_losses(self, batches: list) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each task the summed loss of its batch and its number of response tokens, [T] each.

        batches: of each task a list of examples, all of the same length; one forward for all.
        """
        rows = [[self.tokens[e.id] for e in examples] for examples in batches]
        in_order = [row for task_rows in rows for row in task_rows]
        if torch.is_grad_enabled():  # not where query losses are only measured
            self.tokens_seen += sum(len(row.ids) for row in in_order)
        batch = collate(in_order, self.pad_id)
        batch = {name: x.to(self.world.device) for name, x in batch.items()}
        sums = token_losses(self.model, batch).view(len(rows), -1).sum(1)
        counts = [response_tokens(task_rows) for task_rows in rows]
        return sums, torch.tensor(counts, device=sums.device)

    def mean_losses(self, batches: list) -> torch.Tensor:
        """[T]: the mean loss of each task on its batch."""
        sums, counts = self.token_losses(batches)
        return sums / counts

    def union_tokens(self, episodes: list) -> int:
        """Response tokens of all support and query rows."""
        return sum(
            response_tokens([self.tokens[e.id] for e in episode.support + episode.query])
            for episode in episodes
        )

    # Stage 1

    @torch.no_grad()
    def inner_step(self, t: int) -> None:
        """phi_i <- phi_i - lr step(gradient in p.grad) for all tasks, at step t from 1."""
        args, stack = self.args, self.adapters.stack
        gradients = [p.grad for p in stack]
        if args.inner_clip:
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)  # [T]
            factors = (args.inner_clip / (norms + 1e-6)).clamp(max=1)[:, None, None]
            gradients = [g * factors for g in gradients]
        for i, (p, g) in enumerate(zip(stack, gradients, strict=True)):
            if args.inner_optimizer == "sgd":
                p.add_(g, alpha=-args.inner_lr)
            else:  # Adam, bias-corrected, as torch.optim.Adam starts
                (beta1, beta2), (m, v) = args.betas, self.moments[i]
                m.lerp_(g, 1 - beta1)
                v.lerp_(g.square(), 1 - beta2)
                root = (v / (1 - beta2**t)).sqrt_().add_(1e-8)
                p.addcdiv_(m, root, value=-args.inner_lr / (1 - beta1**t))
            p.grad = None

    def inner_loop(self, steps: list, watch=None) -> torch.Tensor:
        """phi_i <- phi, then a step on each of `steps` (batches as in token_losses).

        watch(k) is called after k steps, for measurements. Returns [K, T]: the losses before each
        step.
        """
        self.adapters.start(len(steps[0]))
        if self.args.inner_optimizer == "adam":  # cold for each task
            self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.adapters.stack]
        history = []
        for t, batches in enumerate(steps, 1):
            losses = self.mean_losses(batches)
            losses.sum().backward()  # a task's gradient is that of its own mean
            self.inner_step(t)
            history.append(losses.detach())
            if watch:
                watch(t)
        return torch.stack(history)

    def adapt(self, support: list, watch) -> None:
        """The inner loop of one task, as evaluation needs it: watch measures without dropout."""

        def watch_without_dropout(k: int) -> None:
            self.adapters.training = False
            watch(k)
            self.adapters.training = True

        steps = [[rows] for rows in chunks(support, self.args.support_batch)]
        with self.adapters.with_dropout():
            self.inner_loop(steps, watch_without_dropout)

    def restore(self) -> None:
        """Back to phi, for one task."""
        self.adapters.start(1)

    @torch.no_grad()
    def query_losses(self, episodes: list) -> torch.Tensor:
        """[T]: the query loss before adaptation, without dropout."""
        self.adapters.start(len(episodes))
        return self.mean_losses([e.query for e in episodes])

    # Stage 2: the tasks' part of the meta-gradient; each returns support and query losses, [T]

    @torch.no_grad()
    def add_gradients(self, factor: float) -> None:
        """meta-gradient += factor x the sum over tasks of the gradients at phi_i."""
        for g, p in zip(self.meta_gradient, self.adapters.stack, strict=True):
            g.add_(p.grad.sum(0), alpha=factor)

    def fomaml(self, episodes: list):
        """g_i / T with g_i = grad L_query(phi_i), for all episodes at once."""
        history = self.inner_loop(support_steps(episodes, self.args.support_batch))
        query = self.mean_losses([e.query for e in episodes])
        query.sum().backward()
        self.add_gradients(1 / self.args.tasks_per_step)
        return history[-1], query.detach()

    def reptile(self, episodes: list):
        """(phi_i - phi) / T after K + 1 steps, the last on the query rows (1803.02999)."""
        steps = support_steps(episodes, self.args.support_batch)
        history = self.inner_loop([*steps, [e.query for e in episodes]])
        with torch.no_grad():
            for g, p, phi in zip(
                self.meta_gradient, self.adapters.stack, self.adapters.phi, strict=True
            ):
                g.add_((p - phi).sum(0), alpha=1 / self.args.tasks_per_step)
        return history[-2], history[-1]

    def joint(self, union: int, episodes: list):
        """No inner loop: the gradient at phi of the mean over the round's `union` tokens."""
        self.adapters.start(len(episodes))
        history = []
        steps = support_steps(episodes, self.args.support_batch)
        for batches in (*steps, [e.query for e in episodes]):
            sums, counts = self.token_losses(batches)
            (sums / union).sum().backward()
            history.append(sums.detach() / counts)
        self.add_gradients(1.0)
        return history[-2], history[-1]


def chunks(rows, size: int) -> list:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def support_steps(episodes: list, size: int) -> list:
    """Of each inner step the batches of all tasks."""
    by_task = [chunks(e.support, size) for e in episodes]
    return [list(batches) for batches in zip(*by_task, strict=True)]


# --------------------------------------------------------------------------------------------------
# Checks before anything expensive


# Where the numbers must lie
NUMBERS = {
    "[1, 1e9]": (
        "lora_r", "inner_steps", "support_batch", "query_batch", "tasks_per_step", "steps", "keep",
        "save_every", "max_length", "eval_problems",
    ),
    "[0, 1e9]": (
        "shots", "eval_tasks", "eval_max_new_tokens", "gain_every", "tasks_per_forward",
    ),
    "[-1, 1e9]": ("eval_every",),
    "(0, 100]": ("inner_lr", "outer_lr"),
    "(0, 1e6]": ("alpha",),
    "(0, inf)": ("clip",),
    "[0, inf)": ("inner_clip",),
    "(0, 10]": ("reptile_epsilon",),
    "[0, 10]": ("weight_decay",),
    "[0, 1]": ("warmup_ratio",),
    "(0, 1]": ("support_ratio", "query_ratio"),
    "[0, 1)": ("betas", "dropout"),
    "(-9e18, 9e18)": ("seed",),
}  # fmt: skip


def check(args: Args, ranks: int) -> None:
    """Raises DataError for arguments that cannot work."""
    check_numbers(args, NUMBERS)
    if args.tasks_per_step % ranks:
        raise DataError(
            f"--tasks-per-step {args.tasks_per_step} cannot be shared equally by the {ranks} ranks"
        )
    if 0 < args.shots < args.support_batch:
        raise DataError(
            f"--support-batch {args.support_batch} is more than the --shots {args.shots} of an "
            "episode"
        )


def prepare(args: Args, world: World) -> tuple:
    """(config, tokenizer, tasks to train on, tasks to evaluate on, {example.id: token ids}).

    All that can be known without weights. Raises DataError or ModelError.
    """
    config, tokenizer = load_config(args.model, args.trust_remote_code)
    base = skeleton(config, trust_remote_code=args.trust_remote_code)
    check_targets(base, args.target_modules)
    tasks = load_tasks(
        args.data,
        task_column=args.task_column,
        heldout=args.heldout_subjects,
        support_ratio=args.support_ratio,
        query_ratio=args.query_ratio,
        seed=args.seed,
    )
    tasks, test_tasks, tokens, report = episode_tasks(
        tokenizer,
        tasks,
        args.max_length,
        args.inner_steps,
        args.support_batch,
        args.query_batch,
        args.eval_tasks,
        shots=args.shots,
    )
    longest = max(len(row.ids) for row in tokens.values())
    check_positions(config, longest, "--max-length")
    world.say(report)
    return config, tokenizer, tasks, test_tasks, tokens


def examine(args: Args, world: World) -> list[str]:
    """--dry-run: prints what there is and what it needs; returns what would not work."""
    config, _, tasks, test_tasks, tokens = prepare(args, world)
    rows = args.tasks_per_step * (args.inner_steps * args.support_batch + args.query_batch)
    world.say(describe_tasks(tasks, test_tasks, tokens, rows))
    return check_space(world, needs(args, config, world, tokens), args.output_dir, int(args.merge))


def needs(args: Args, config, world: World, tokens: dict) -> Needs:
    """Bytes on each rank: the frozen base, and what the batch of all its tasks takes."""
    n, cuda = parameter_count(config, args.trust_remote_code), world.device.type == "cuda"
    width = 2 if cuda else 4
    longest = max(len(row.ids) for row in tokens.values())
    tasks_at_once = args.tasks_per_forward or args.tasks_per_step // world.size
    at_once = tasks_at_once * max(args.support_batch, args.query_batch) * longest
    checkpointing = args.activation_checkpointing
    answer = longest + args.eval_max_new_tokens
    answers = rows_to_answer(config, answer, width) * answer if args.eval_max_new_tokens else 0
    return Needs(
        device={"weights": width * n / world.size},
        host={"weights while loading": width * n} if cuda and world.rank == 0 else {},
        training={
            "activations": activation_bytes(config, at_once, width, checkpointing, adapters=True),
            "logits": logit_bytes(config, at_once, width),
        },
        evaluation={
            "gathered weights": width * n if world.size > 1 else 0,
            "cache": cache_bytes(config, answers, width),
            "logits": logit_bytes(config, rows_to_score(config, longest) * longest, width),
        },
        disk=width * n,
    )


# --------------------------------------------------------------------------------------------------


def build(args: Args, config, world: World):
    """The frozen base, sharded over all ranks: bf16 on GPUs."""
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    source = None
    if world.rank == 0:
        source = load_weights(args.model, dtype, args.trust_remote_code)
    model = skeleton(config, dtype, trust_remote_code=args.trust_remote_code)
    model.requires_grad_(False)
    if args.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if world.size > 1:
        for module in (*layers_to_shard(model), model):
            fully_shard(module, mesh=world.mesh["shard"])
    materialize(model, source, world.device)
    check_head(model, world)
    return model.train()


def add_adapters(args: Args, model, world: World) -> Adapters:
    """phi, beside the frozen model's target layers."""
    return Adapters(
        model,
        r=args.lora_r,
        alpha=args.alpha,
        dropout=args.dropout,
        target_modules=args.target_modules,
        rank_stabilised=args.rank_stabilised,
        seed=args.seed,
        device=world.device,
    )


def main(args: Args, world: World) -> int:
    config, tokenizer, tasks, test_tasks, tokens = prepare(args, world)
    run = Run(  # folder, log, progress bar, Ctrl-C, checkpoints
        "meta_lora",
        args,
        world,
        FREE,
        title=args.meta_gradient,
        shows={"query": "meta/loss", "gain": "meta/adaptation_gain", "tok_s": "tokens_per_second"},
        advice="lower --inner-lr or --outer-lr",
        steps=0 if args.meta_gradient == "none" else args.steps,
    )
    run.warn(rate_warnings(args, {"outer_lr": 2e-3, "inner_lr": 2e-3}))
    model = build(args, config, world)
    adapters = add_adapters(args, model, world)
    learner = AdapterLearner(model, adapters, args, world, tokenizer.pad_token_id, tokens)
    optimizer = torch.optim.AdamW(
        adapters.phi, lr=args.outer_lr, betas=args.betas, weight_decay=args.weight_decay
    )
    size = sum(p.numel() for p in adapters.phi)
    base_size = sum(p.numel() for p in model.parameters())
    run.start(
        AdapterCheckpoint(adapters, optimizer, resolve(args.model)),
        f"{size / 1e6:.2f}M adapter parameters on {len(adapters.layers)} layers of a base of "
        f"{base_size / 1e6:.1f}M",
    )
    support_rows = args.inner_steps * args.support_batch
    per_rank = args.tasks_per_step // world.size
    together = args.tasks_per_forward or per_rank

    for step in run.steps():
        # Measurement only: test loss and exact answers before and after K steps on new tasks
        if run.evaluation_due(step):
            torch.manual_seed(args.seed)  # dropout: the same on every rank, as all adapt together
            learner.restore()
            result = adaptation(
                model,
                test_tasks,
                tokens,
                tokenizer,
                world,
                adapt=learner.adapt,
                restore=learner.restore,
                draw=partial(draw_support, size=support_rows, shots=args.shots),
                curve=args.inner_steps if args.eval_curve and step in (0, run.last_step) else 0,
                max_length=args.max_length,
                problems=args.eval_problems,
                max_new_tokens=args.eval_max_new_tokens,
                seed=args.seed,
                stop=run.stop,
            )
            lines = adaptation_lines(step, result, run.evaluations)
            run.evaluation(step, result, lines, average(result) if result else None)
        if run.is_over(step):
            break

        # Sample the round's tasks, a function of (seed, step); this rank takes T / ranks of them
        torch.manual_seed(hash((args.seed, step, world.rank)) % 2**31)  # dropout
        meta_batch = [
            sample_episode(
                tasks, args.seed, step, place, support_rows, args.query_batch, args.shots
            )
            for place in range(args.tasks_per_step)
        ]
        measure_gain = args.gain_every > 0 and (step == 0 or (step + 1) % args.gain_every == 0)
        measure_gain = measure_gain and args.meta_gradient != "joint"
        one_group = {
            "fomaml": learner.fomaml,
            "reptile": learner.reptile,
            "joint": partial(learner.joint, learner.union_tokens(meta_batch)),
        }[args.meta_gradient]

        # Stage 1, phi_i by K steps from phi, and stage 2, g_i = grad L_query(phi_i), tasks together
        tokens_before = learner.tokens_seen
        torch._foreach_zero_(learner.meta_gradient)
        losses = torch.zeros(args.tasks_per_step, 3, device=world.device)  # support, query, before
        first = world.rank * per_rank
        for places in chunks(range(first, first + per_rank), together):
            if run.stop_agreed():
                break
            episodes = [meta_batch[i] for i in places]
            rows = losses[places.start : places.stop]
            if measure_gain:
                rows[:, 2] = learner.query_losses(episodes)
            with adapters.with_dropout():
                rows[:, 0], rows[:, 1] = one_group(episodes)
        if run.stopped:
            break
        dist.all_reduce(losses)
        if world.size > 1:
            for g in learner.meta_gradient:
                dist.all_reduce(g)

        # phi <- AdamW(phi, clip(mean_i g_i))
        schedule = learning_rate(step, args.steps, args.warmup_ratio)
        if args.meta_gradient == "reptile":  # phi <- phi + epsilon mean_i (phi_i - phi)
            norm = torch.nn.utils.get_total_norm(learner.meta_gradient)
            if run.finite(norm, losses):
                for p, direction in zip(adapters.phi, learner.meta_gradient, strict=True):
                    p.add_(direction, alpha=args.reptile_epsilon * schedule)
        else:
            set_gradients(adapters.phi, learner.meta_gradient)
            norm = torch.nn.utils.clip_grad_norm_(adapters.phi, args.clip)
            if run.finite(norm, losses):
                optimizer.param_groups[0]["lr"] = args.outer_lr * schedule
                optimizer.step()
            optimizer.zero_grad()

        metrics = step_metrics(losses.tolist(), [e.task for e in meta_batch], measure_gain)
        metrics |= {"meta/grad_norm": norm.item(), "lr": args.outer_lr * schedule}
        processed = (learner.tokens_seen - tokens_before) * world.size
        # 4 FLOPs a parameter and token: no gradient of the frozen weights
        run.log(step, metrics, tokens=processed, flops_per_token=4 * base_size)
    if args.merge and run.completed:
        dtype = next(model.parameters()).dtype
        write_merged(run.folder / "merged", model, adapters, tokenizer, dtype)
    return run.finish(results_table, "curves.png")


def cli() -> int:
    if any(flag.split("=")[0] == "--r" for flag in sys.argv[1:]):  # torchrun takes it for its own
        print("meta_lora.py: --r is now --lora-r", file=sys.stderr)
        return 2
    return start("meta_lora.py", tyro.cli(Args), check, examine, main)


if __name__ == "__main__":
    sys.exit(cli())
