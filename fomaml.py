r"""FOMAML for language models, all parameters: weights from which a few steps on a new task go far.

For each meta-step, with T tasks drawn:
    theta_i <- theta;  K times: theta_i <- theta_i - alpha grad L_support(theta_i)    (inner loop)
    g_i = grad L_query(theta_i)                           (first order: taken at theta_i ...)
    theta <- AdamW(theta, clip(mean_i g_i))               (... applied at theta)
Finn et al. 2017, MAML, arXiv 1703.03400 (section 5.2 for the first order);
Nichol et al. 2018, Reptile, arXiv 1803.02999.

What is done differently, and why:
1. The inner SGD step runs inside backward, on the local FSDP2 shards, gradient by gradient; the
   query gradient goes straight into one accumulator. So memory is five parameter-sized buffers
   (weights, copy of theta, accumulator, Adam's two) for any T and K. A weight may change there, as
   its gradient is complete only once this backward pass has used it for the last time (a tied
   weight after both uses); a test compares the steps with torch.func's.
2. theta is restored by copying, bit for bit, after every task.
3. Episodes are a function of (seed, step, place in the meta-batch); a resumed run equals an
   uninterrupted one bit for bit on CPU.
4. --meta-gradient also takes reptile, maml (exact, second order) and the baselines that a claim
   needs: joint (no inner loop) and in_context (no inner loop, the support rows in the prompt).
5. --learn-inner-lr learns alpha, one or one a tensor, with the gradient that is at hand anyway:
   dL_query / d log alpha = <g_i, theta_i - theta> to first order (Meta-SGD, arXiv 1707.03141).

    python fomaml.py                                # laptop: hidden ciphers, 5 minutes
    FLAGS="--data hub --inner-optimizer sgd --inner-lr 1e-2 --inner-steps 5 --support-batch 4
        --query-batch 4 --shots 0 --outer-lr 3e-5 --steps 5000 --save-every 500 --eval-every 500
        --eval-max-new-tokens 512 --no-eval-curve --activation-checkpointing"   # for MATH, any GPUs
    torchrun --standalone --nproc_per_node 1 fomaml.py --model meta-llama/Llama-3.2-1B $FLAGS
    torchrun --standalone --nproc_per_node 4 fomaml.py --model Qwen/Qwen3-4B-Instruct-2507 $FLAGS
    torchrun --nnodes 2 --nproc_per_node 8 --node_rank $R --master_addr $HOST --master_port 29500 \
        fomaml.py --model Qwen/Qwen3-4B-Instruct-2507 $FLAGS --replicas 4           # two nodes
"""

import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from data import (
    DataError,
    check_numbers,
    collate,
    describe_tasks,
    draw_support,
    encode_in_context,
    episode_tasks,
    load_tasks,
    response_tokens,
    sample_episode,
)
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
    each_gradient,
    flat_like,
    freeze_vision,
    full,
    layers_to_shard,
    learning_rate,
    load_config,
    load_weights,
    local,
    logit_bytes,
    materialize,
    parameter_count,
    set_gradients,
    skeleton,
    token_loss,
    trained_parameters,
)
from run import (
    ModelCheckpoint,
    Needs,
    Run,
    check_space,
    rate_warnings,
    start,
)


@dataclass
class Args:
    """FOMAML with full parameters (also Reptile, exact MAML and joint training).

    For any Hugging Face causal language model.
    """

    # What is trained, on what
    model: str = "tiny"
    """tiny (embedded, 1.2M parameters), a local folder in Hugging Face format, or a hub name."""
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
    """Share of a task's rows for the inner loop."""
    query_ratio: float = 0.40
    """Share of a task's rows for the meta-gradient; the rest is the test split."""
    training_tasks: int = 0
    """Tasks to meta-train on at most, the first ones; 0 for all."""
    max_length: int = 2048
    """Tokens; longer sequences are left out and counted, never cut. The support rows are also shown
    in the prompt, for comparison, where they and the problem fit into so many."""
    output_dir: str = "runs/fomaml"
    """Run folder: args.json, metrics.jsonl, evaluations.jsonl, curves.png, checkpoints. A folder in
    use gets a number appended."""
    seed: int = 42
    """Episodes are a function of (seed, step, place)."""

    # The algorithm (symbols of the MAML paper)
    meta_gradient: Literal["fomaml", "reptile", "maml", "joint", "in_context", "none"] = "fomaml"
    """fomaml; reptile (theta += epsilon mean(theta_i - theta), K+1 inner steps); maml (exact second
    order, one process); joint (no inner loop, one AdamW step on all rows of the meta-batch);
    in_context (no inner loop, the query rows behind the support rows in the prompt); none (no
    training: the evaluation alone)."""
    inner_steps: int = 5
    """K, inner steps per task (the public reference trainer's setting too)."""
    inner_lr: float = 3e-3
    """alpha. Check that it adapts: the tiny model takes 3e-3 with adam and 0.1 with sgd,
    SmolLM2-135M 1e-4 with adam and 1e-2 with sgd; 1e-4 with sgd (the reference setting) moves
    nothing."""
    learn_inner_lr: Literal["no", "scalar", "tensor"] = "no"
    """alpha is learned: one for all weights, or one for each tensor. With fomaml only."""
    rate_lr: float = 0.03
    """Peak learning rate of log alpha (Adam, the schedule of the outer learning rate)."""
    inner_optimizer: Literal["sgd", "adam"] = "adam"
    """adam starts cold for each task and needs two more parameter-sized buffers."""
    inner_clip: float = 0.0
    """Gradient-norm limit of an inner step, 0 for none; costs one more parameter-sized buffer."""
    shots: int = 30
    """Different support rows of an episode; inner steps go through them as often as they need. 0:
    every step takes fresh rows, as long as the task has some."""
    support_batch: int = 30
    """Rows per inner step."""
    query_batch: int = 20
    """Rows of the query loss."""
    tasks_per_step: int = 4
    """T, the meta-batch, over all replicas."""
    steps: int = 120
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
    eval_every: int = 60
    """Meta-steps between evaluations; also before the first and after the last. 0: only those two;
    -1: none."""
    eval_problems: int = 20
    """Test problems per task."""
    eval_tasks: int = 10
    """Tasks evaluated at most, 0 for all."""
    eval_max_new_tokens: int = 12
    """Length of greedy answers; 0 leaves accuracy out. Of a worked solution some hundreds."""
    eval_curve: bool = True
    """At the first and the last evaluation also measure after every inner step, and with the
    support rows in the prompt instead: K times as long, and long prompts."""
    gain_every: int = 10
    """Steps between measurements of the query loss before adaptation (one more forward a task)."""
    save_every: int = 60
    """Meta-steps between checkpoints; also at the end and on Ctrl-C or SIGTERM."""
    keep: int = 5
    """Checkpoints kept."""
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
    replicas: int = 1
    """R: the ranks form R groups; each takes T/R tasks, shards its own copy of the model and adapts
    alone."""
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


# What may differ when a run is resumed: it does not change the mathematics.
FREE = {
    "resume", "output_dir", "wandb", "push_to_hub", "save_every", "keep", "eval_every",
    "eval_problems", "eval_tasks", "eval_max_new_tokens", "eval_curve", "gain_every", "replicas",
    "micro_batch", "activation_checkpointing", "offload_theta", "cpu_offload", "compile",
    "dry_run",
}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# The algorithm


class MetaLearner:
    """theta, the weights adapted to a task, and the meta-gradient: lists of this rank's shards.

    weights are the model's own (theta, or theta_i in the inner loop), theta the copy to go back to.
    tokens: {example.id: its Encoded token ids}. All losses are in nats a response token.
    """

    def __init__(self, model, args: Args, world: World, pad_id: int, tokens: dict):
        self.model, self.args, self.world = model, args, world
        self.pad_id, self.tokens = pad_id, tokens
        self.params = trained_parameters(model)
        self.weights = [local(p) for p in self.params]
        self.theta = flat_like(self.weights, args.offload_theta)
        self.meta_gradient = flat_like(self.weights, args.offload_theta)
        if args.inner_optimizer == "adam":
            self.moments = flat_like(self.weights), flat_like(self.weights)
        self.inner_lr = [args.inner_lr] * len(self.params)  # alpha of each tensor
        self.rate_gradient = torch.zeros(len(self.params), dtype=torch.float64, device=world.device)
        self.tokens_seen = 0  # of this replica, through forward and backward

    def keep(self) -> None:
        """theta <- the weights."""
        torch._foreach_copy_(self.theta, self.weights)

    def restore(self) -> None:
        """The weights <- theta, bit for bit."""
        torch._foreach_copy_(self.weights, self.theta)

    def micro_batches(self, rows) -> list[dict]:
        """This rank's part of the rows, padded, on the device; equally many on every rank."""
        rows = sorted(rows, key=lambda row: len(row.ids))[self.world.shard :: self.world.shards]
        batches = []
        for chunk in chunks(rows, self.args.micro_batch or len(rows)):
            batch = collate(chunk, self.pad_id)
            batches.append({name: x.to(self.world.device) for name, x in batch.items()})
        return batches

    def backward(self, examples, use=None, denominator=None, tokens=None) -> torch.Tensor:
        """Gradient of the mean token loss into use(i, gradient), or into p.grad without `use`.

        The mean is over the tokens of all examples, on all ranks of the shard group, or over
        `denominator`; FSDP2 averages over the group, hence x shards. tokens: the examples' ids,
        where they are others than self.tokens. Returns this rank's part of the examples' mean loss.
        """
        rows = [(tokens or self.tokens)[e.id] for e in examples]
        self.tokens_seen += sum(len(row.ids) for row in rows)
        denominator = denominator or response_tokens(rows)
        batches = self.micro_batches(rows)
        mean = torch.zeros((), device=self.world.device)
        for batch in batches:
            loss = token_loss(self.model, batch)
            last = batch is batches[-1]  # the others' gradients add up in p.grad: one more buffer
            with each_gradient(self.params, use) if use and last else nullcontext():
                (loss * (self.world.shards / denominator)).backward()
            mean += loss.detach().float() / response_tokens(rows)
        return mean

    @torch.no_grad()
    def loss(self, examples) -> torch.Tensor:
        """This rank's part of the mean token loss, forward only."""
        rows = [self.tokens[e.id] for e in examples]
        losses = [token_loss(self.model, batch).float() for batch in self.micro_batches(rows)]
        return sum(losses) / response_tokens(rows)

    def union_tokens(self, episodes: list) -> int:
        """Response tokens of all support and query rows."""
        return sum(
            response_tokens([self.tokens[e.id] for e in episode.support + episode.query])
            for episode in episodes
        )

    # The inner loop

    @torch.no_grad()
    def inner_step(self, k: int, i: int, gradient: torch.Tensor) -> None:
        """theta_i <- theta_i - alpha grad L_support(theta_i) for one parameter, at step k."""
        if self.args.inner_optimizer == "sgd":
            self.weights[i].add_(gradient, alpha=-self.inner_lr[i])
            return
        beta1, beta2, t = 0.9, 0.999, k + 1  # Adam, bias-corrected, as torch.optim.Adam starts
        m, v = self.moments[0][i], self.moments[1][i]
        m.lerp_(gradient, 1 - beta1)
        v.lerp_(gradient.square(), 1 - beta2)
        root = (v / (1 - beta2**t)).sqrt_().add_(1e-8)
        self.weights[i].addcdiv_(m, root, value=-self.inner_lr[i] / (1 - beta1**t))

    def clipped_inner_step(self, k: int, examples) -> torch.Tensor:
        """The same where the norm of the whole gradient must be known first: one more buffer."""
        loss = self.backward(examples)
        gradients = [p.grad for p in self.params if p.grad is not None]
        norm = full(torch.nn.utils.get_total_norm(gradients)).item()
        scale = min(1.0, self.args.inner_clip / (norm + 1e-6))
        for i, p in enumerate(self.params):
            if p.grad is None:  # not reached by this batch
                continue
            self.inner_step(k, i, local(p.grad) * scale if scale < 1 else local(p.grad))
            p.grad = None
        return loss

    def step_on(self, k: int, examples) -> torch.Tensor:
        """Inner step k on the examples; returns this rank's part of their loss before it."""
        if self.args.inner_clip:
            return self.clipped_inner_step(k, examples)
        return self.backward(examples, partial(self.inner_step, k))

    def adapt(self, support, watch=None) -> torch.Tensor:
        """The inner loop: from theta, where the weights are on entry, to theta_i, a step a batch.

        watch(k) is called after k steps, for measurements. Returns the last step's loss.
        """
        if self.args.inner_optimizer == "adam":  # cold for each task
            for moment in self.moments:
                torch._foreach_zero_(moment)
        for k, examples in enumerate(chunks(support, self.args.support_batch)):
            loss = self.step_on(k, examples)
            if watch:
                watch(k + 1)
        return loss

    # One task's part of the meta-gradient; each returns its support and query loss

    def add_to_meta_gradient(self, factor: float, i: int, gradient: torch.Tensor) -> None:
        self.meta_gradient[i].add_(gradient.to(self.meta_gradient[i].device), alpha=factor)

    def add_to_rate_gradient(self, factor: float, i: int, gradient: torch.Tensor) -> None:
        """d L_query / d log alpha of one tensor, <g_i, theta_i - theta>: to first order, as its K
        changes are all proportional to alpha."""
        change = self.weights[i] - self.theta[i].to(self.weights[i].device)
        self.rate_gradient[i] += factor * (gradient * change).sum()

    def fomaml(self, episode):
        """g_i / T with g_i = grad L_query(theta_i): how theta_i depends on theta is left out."""
        support_loss = self.adapt(episode.support)
        factor = 1 / self.args.tasks_per_step

        def add(i: int, gradient: torch.Tensor) -> None:
            self.add_to_meta_gradient(factor, i, gradient)
            if self.args.learn_inner_lr != "no":
                self.add_to_rate_gradient(factor, i, gradient)

        query_loss = self.backward(episode.query, add)
        self.restore()
        return support_loss, query_loss

    def reptile(self, episode):
        """(theta_i - theta) / T after K + 1 steps, the last on the query rows (1803.02999)."""
        support_loss = self.adapt(episode.support)
        query_loss = self.step_on(len(episode.support) // self.args.support_batch, episode.query)
        for i, (w, t) in enumerate(zip(self.weights, self.theta, strict=True)):
            self.add_to_meta_gradient(1 / self.args.tasks_per_step, i, w.to(t.device) - t)
        self.restore()
        return support_loss, query_loss

    def joint(self, union: int, episode):
        """No inner loop: the gradient at theta of the mean over the meta-batch's `union` tokens."""
        add = partial(self.add_to_meta_gradient, 1.0)
        for examples in chunks(episode.support, self.args.support_batch):
            support_loss = self.backward(examples, add, union)
        return support_loss, self.backward(episode.query, add, union)

    def in_context(self, tokenizer, episode):
        """No inner loop: the gradient at theta of the query loss behind the support rows in the
        prompt (MetaICL, 2110.15943; in-context tuning, 2110.07814). It has no support loss."""
        tokens = encode_in_context(tokenizer, episode.support, episode.query)
        add = partial(self.add_to_meta_gradient, 1 / self.args.tasks_per_step)
        query_loss = self.backward(episode.query, add, tokens=tokens)
        return query_loss, query_loss

    def maml(self, episode):
        """The exact gradient, through the K inner steps. One process, plain SGD, whole batches."""
        theta = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        theta_i = theta

        def mean_loss(weights, examples):
            rows = [self.tokens[e.id] for e in examples]
            self.tokens_seen += sum(len(row.ids) for row in rows)
            (batch,) = self.micro_batches(rows)
            return token_loss(self.model, batch, weights) / response_tokens(rows)

        for examples in chunks(episode.support, self.args.support_batch):
            support_loss = mean_loss(theta_i, examples)
            gradients = torch.autograd.grad(support_loss, list(theta_i.values()), create_graph=True)
            theta_i = {
                name: w - self.args.inner_lr * g
                for (name, w), g in zip(theta_i.items(), gradients, strict=True)
            }
        query_loss = mean_loss(theta_i, episode.query)
        for i, g in enumerate(torch.autograd.grad(query_loss, list(theta.values()))):
            self.add_to_meta_gradient(1 / self.args.tasks_per_step, i, g)
        return support_loss.detach(), query_loss.detach()


def chunks(rows, size: int) -> list:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


class InnerRates:
    """The learned alpha: its logarithm, of all tensors or of each, and the state of its Adam.

    state: lists of numbers, as checkpoints keep them.
    """

    def __init__(self, args: Args, tensors: int):
        self.args, self.tensors = args, tensors
        count = tensors if args.learn_inner_lr == "tensor" else 1
        self.state = {"log_inner_lr": [math.log(args.inner_lr)] * count}
        self.state |= {"rate_moment_1": [0.0] * count, "rate_moment_2": [0.0] * count}

    def values(self) -> list[float]:
        """alpha of every tensor."""
        rates = [math.exp(x) for x in self.state["log_inner_lr"]]
        return rates if len(rates) == self.tensors else rates * self.tensors

    def move(self, gradient: list[float], step: int, schedule: float) -> None:
        """Adam on log alpha. gradient: d L_query / d log alpha of every tensor."""
        if self.args.learn_inner_lr == "scalar":
            gradient = [sum(gradient)]
        beta1, beta2 = self.args.betas
        logs, m, v = self.state.values()
        for i, g in enumerate(gradient):
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            root = math.sqrt(v[i] / (1 - beta2 ** (step + 1))) + 1e-12
            change = m[i] / (1 - beta1 ** (step + 1)) / root
            logs[i] -= self.args.rate_lr * schedule * change


# --------------------------------------------------------------------------------------------------
# Checks before anything expensive


# Where the numbers must lie
NUMBERS = {
    "[1, 1e9]": (
        "inner_steps", "support_batch", "query_batch", "tasks_per_step", "steps", "replicas",
        "keep", "save_every", "max_length", "eval_problems",
    ),
    "[0, 1e9]": (
        "training_tasks", "shots", "eval_tasks", "eval_max_new_tokens", "gain_every",
        "micro_batch",
    ),
    "[-1, 1e9]": ("eval_every",),
    "(0, 100]": ("inner_lr", "outer_lr"),
    "(0, 1]": ("rate_lr", "support_ratio", "query_ratio"),
    "(0, inf)": ("clip",),
    "[0, inf)": ("inner_clip",),
    "(0, 10]": ("reptile_epsilon",),
    "[0, 10]": ("weight_decay",),
    "[0, 1]": ("warmup_ratio",),
    "[0, 1)": ("betas",),
    "(-9e18, 9e18)": ("seed",),
}  # fmt: skip


def check(args: Args, ranks: int) -> None:
    """Raises DataError for arguments that cannot work."""
    check_numbers(args, NUMBERS)
    if ranks % args.replicas:
        raise DataError(f"--replicas {args.replicas} does not divide the {ranks} ranks")
    if args.tasks_per_step % args.replicas:
        raise DataError(
            f"--tasks-per-step {args.tasks_per_step} cannot be shared equally by {args.replicas} "
            "replicas"
        )
    shards = ranks // args.replicas
    for flag, rows in (
        ("--support-batch", args.support_batch),
        ("--query-batch", args.query_batch),
    ):
        if rows % shards:
            raise DataError(
                f"{flag} {rows} is not a multiple of the {shards} ranks that share a task: raise "
                "it, or raise --replicas"
            )
    if 0 < args.shots < args.support_batch:
        raise DataError(
            f"--support-batch {args.support_batch} is more than the --shots {args.shots} of an "
            "episode"
        )
    if args.learn_inner_lr != "no" and args.meta_gradient != "fomaml":
        raise DataError("--learn-inner-lr needs --meta-gradient fomaml")
    plain = args.inner_optimizer == "sgd" and not args.inner_clip and not args.micro_batch
    if args.meta_gradient == "maml" and (ranks > 1 or not plain):
        raise DataError(
            "--meta-gradient maml runs in one process, with whole batches and plain SGD inner "
            "steps (--inner-optimizer sgd --inner-lr 0.1)"
        )


def prepare(args: Args, world: World) -> tuple:
    """(config, tokenizer, tasks to train on, tasks to evaluate on, {example.id: token ids}).

    All that can be known without weights. Raises DataError or ModelError.
    """
    config, tokenizer = load_config(args.model, args.trust_remote_code)
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
    check_positions(config, longest_row(tokens), "--max-length")
    if args.meta_gradient == "in_context":
        check_positions(config, longest_prompt(args, tokens), "--shots")
    world.say(report)
    return config, tokenizer, tasks[: args.training_tasks or None], test_tasks, tokens


def longest_row(tokens: dict) -> int:
    return max(len(row.ids) for row in tokens.values())


def longest_prompt(args: Args, tokens: dict) -> int:
    """Tokens at most of a row behind the support rows of an episode."""
    shown = args.inner_steps * args.support_batch
    return (1 + min(args.shots or shown, shown)) * longest_row(tokens)


def examine(args: Args, world: World) -> list[str]:
    """--dry-run: prints what there is and what it needs; returns what would not work."""
    config, _, tasks, test_tasks, tokens = prepare(args, world)
    rows = args.tasks_per_step * (args.inner_steps * args.support_batch + args.query_batch)
    world.say(describe_tasks(tasks, test_tasks, tokens, rows))
    return check_space(world, needs(args, config, world, tokens), args.output_dir, kept(args))


def kept(args: Args) -> int:
    """Checkpoints on disk at most, the one that is being written included."""
    steps = 0 if args.meta_gradient == "none" else args.steps
    return min(args.keep, -(-steps // args.save_every)) + 1


def needs(args: Args, config, world: World, tokens: dict) -> Needs:
    """Bytes on each rank: five parameter-sized fp32 buffers, and what a batch takes."""
    n, cuda = parameter_count(config, args.trust_remote_code), world.device.type == "cuda"
    width, shard = 2 if cuda else 4, 4 * n / world.shards
    longest = longest_row(tokens)
    rows, length = max(args.support_batch, args.query_batch), longest
    if args.meta_gradient == "in_context":
        rows, length = args.query_batch, longest_prompt(args, tokens)
    at_once = (args.micro_batch or rows // world.shards) * length
    weights = {"weights": shard, "Adam": 2 * shard}
    if args.inner_optimizer == "adam":
        weights["inner Adam"] = 2 * shard
    if args.micro_batch > 0 or args.inner_clip > 0:
        weights["gradients"] = shard
    copies = {"theta and accumulator": 2 * shard}
    device, host = weights | copies, {}
    if cuda and args.cpu_offload:
        device, host = {}, device
    elif cuda and args.offload_theta:
        device, host = weights | {"gradients": shard}, copies
    if cuda and world.rank == 0:
        host["weights while loading"] = 4 * n
    checkpointing = args.activation_checkpointing
    answer = longest + args.eval_max_new_tokens
    answers = rows_to_answer(config, answer, width) * answer if args.eval_max_new_tokens else 0
    return Needs(
        device,
        host,
        training={
            "activations": activation_bytes(config, at_once, width, checkpointing),
            "logits": logit_bytes(config, at_once, width),
        },
        evaluation={
            "gathered weights": width * n if cuda or world.shards > 1 else 0,
            "cache": cache_bytes(config, answers, width),
            "logits": logit_bytes(config, rows_to_score(config, longest) * longest, width),
        },
        disk=(12 + width) * n,
    )


# --------------------------------------------------------------------------------------------------


def build(args: Args, config, world: World):
    """The sharded model with its weights: fp32 master weights, bf16 compute on GPUs."""
    source = None
    if world.rank == 0:
        source = load_weights(args.model, trust_remote_code=args.trust_remote_code)
    attention = "eager" if args.meta_gradient == "maml" else None  # it has second derivatives
    model = skeleton(config, attention=attention, trust_remote_code=args.trust_remote_code)
    freeze_vision(model)
    if args.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    blocks = layers_to_shard(model)
    if args.compile:
        for block in blocks:
            block.compile()
    cuda = world.device.type == "cuda"
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # One CPU rank has nothing to shard or cast, and FSDP's hooks cost a small model half its speed;
    # maml's functional_call wants plain tensors.
    if (cuda or world.shards > 1) and args.meta_gradient != "maml":
        for module in (*blocks, model):
            fully_shard(
                module,
                mesh=world.mesh["shard"],
                mp_policy=bf16 if cuda else MixedPrecisionPolicy(),
                offload_policy=CPUOffloadPolicy() if args.cpu_offload else OffloadPolicy(),
            )
    materialize(model, source, torch.device("cpu") if args.cpu_offload else world.device)
    check_head(model, world)
    return model.train()


def main(args: Args, world: World) -> int:
    config, tokenizer, tasks, test_tasks, tokens = prepare(args, world)
    run = Run(  # folder, log, progress bar, Ctrl-C, checkpoints
        "fomaml",
        args,
        world,
        FREE,
        title=args.meta_gradient,
        shows={"query": "meta/loss", "gain": "meta/adaptation_gain", "tok_s": "tokens_per_second"},
        advice="lower --inner-lr or --outer-lr",
        steps=0 if args.meta_gradient == "none" else args.steps,
    )
    too_much = 2e-3 if args.inner_optimizer == "adam" else 0.05
    run.warn(rate_warnings(args, {"outer_lr": 3e-4, "inner_lr": too_much}))
    torch.manual_seed(args.seed)
    model = build(args, config, world)
    learner = MetaLearner(model, args, world, tokenizer.pad_token_id, tokens)
    optimizer = torch.optim.AdamW(
        learner.params,
        lr=args.outer_lr,
        betas=args.betas,
        weight_decay=args.weight_decay,
        fused=True,
    )
    size = sum(p.numel() for p in learner.params)
    checkpoint, text = ModelCheckpoint(model, tokenizer, optimizer), f"{size / 1e6:.1f}M parameters"
    rates = InnerRates(args, len(learner.params))
    learn_rates = args.learn_inner_lr != "no"
    run.start(checkpoint, text, rates.state if learn_rates else None)
    support_rows = args.inner_steps * args.support_batch
    per_replica = args.tasks_per_step // world.replicas
    mine = slice(world.replica * per_replica, (world.replica + 1) * per_replica)

    for step in run.steps():
        learner.keep()  # theta: where every task starts from
        if learn_rates:
            learner.inner_lr = rates.values()

        # Measurement only: test loss and exact answers before and after K steps on new tasks
        if run.evaluation_due(step):
            torch.manual_seed(args.seed)  # dropout
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

        # Sample the meta-batch, a function of (seed, step)
        torch.manual_seed(hash((args.seed, step, world.replica)) % 2**31)  # dropout of its tasks
        meta_batch = [
            sample_episode(
                tasks, args.seed, step, place, support_rows, args.query_batch, args.shots
            )
            for place in range(args.tasks_per_step)
        ]
        measure_gain = args.gain_every > 0 and (step == 0 or (step + 1) % args.gain_every == 0)
        measure_gain = measure_gain and args.meta_gradient != "joint"
        one_task = {
            "fomaml": learner.fomaml,
            "reptile": learner.reptile,
            "maml": learner.maml,
            "joint": partial(learner.joint, learner.union_tokens(meta_batch)),
            "in_context": partial(learner.in_context, tokenizer),
        }[args.meta_gradient]

        # For all tasks of this replica: theta_i by K inner steps, g_i = grad L_query(theta_i). The
        # losses are parts of all ranks; gradients FSDP2 has already reduced within a replica
        tokens_before = learner.tokens_seen
        torch._foreach_zero_(learner.meta_gradient)
        learner.rate_gradient.zero_()
        losses = torch.zeros(args.tasks_per_step, 3, device=world.device)  # support, query, before
        for row, episode in zip(losses[mine], meta_batch[mine], strict=True):
            if run.stop_agreed():
                break
            if measure_gain:
                row[2] = learner.loss(episode.query)
            row[0], row[1] = one_task(episode)
        if run.stopped:
            break
        dist.all_reduce(losses)
        if learn_rates:
            dist.all_reduce(learner.rate_gradient)
        world.sum_over_replicas(learner.meta_gradient)

        # theta <- AdamW(theta, clip(mean_i g_i))
        set_gradients(learner.params, learner.meta_gradient)
        schedule = learning_rate(step, args.steps, args.warmup_ratio)
        if args.meta_gradient == "reptile":  # theta <- theta + epsilon mean_i (theta_i - theta)
            norm = full(torch.nn.utils.get_total_norm([p.grad for p in learner.params]))
            if run.finite(norm, losses):
                for w, direction in zip(learner.weights, learner.meta_gradient, strict=True):
                    w.add_(direction.to(w.device), alpha=args.reptile_epsilon * schedule)
        else:
            norm = full(torch.nn.utils.clip_grad_norm_(learner.params, args.clip))
            if run.finite(norm, losses, learner.rate_gradient):
                optimizer.param_groups[0]["lr"] = args.outer_lr * schedule
                optimizer.step()
                if learn_rates:  # log alpha <- Adam(log alpha, mean_i <g_i, theta_i - theta>)
                    rates.move(learner.rate_gradient.tolist(), step, schedule)
        optimizer.zero_grad()

        metrics = step_metrics(losses.tolist(), [e.task for e in meta_batch], measure_gain)
        metrics |= {"meta/grad_norm": norm.item(), "lr": args.outer_lr * schedule}
        if learn_rates:
            alpha = rates.values()
            metrics |= {"inner_lr/lowest": min(alpha), "inner_lr/highest": max(alpha)}
        processed = (learner.tokens_seen - tokens_before) * world.replicas
        run.log(step, metrics, tokens=processed, flops_per_token=6 * size)
    return run.finish(results_table, "curves.png")


def cli() -> int:
    return start("fomaml.py", tyro.cli(Args), check, examine, main)


if __name__ == "__main__":
    sys.exit(cli())
