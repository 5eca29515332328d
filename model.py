"""Models: ranks and mesh, loading, sharding, the token loss, flat buffers of shards, saving.

Every function works for any Hugging Face causal language model; nothing is written for one family.
"""

import copy
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import template
from sources import reason_of

EMBEDDED = {
    name: Path(__file__).resolve().parent / "tiny" / "models" / name
    for name in ("tiny", "tiny_bare", "tiny_games", "tiny_vision")
}


class ModelError(ValueError):
    """The model cannot be used as asked; the message is one line for the user."""


# --------------------------------------------------------------------------------------------------
# Ranks


@dataclass(frozen=True)
class World:
    """A 2-D mesh replica x shard.

    Ranks of one shard group hold one copy of the weights and work on the same task together.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    replica: int = 0
    replicas: int = 1
    mesh: object = field(default=None, repr=False)

    @property
    def shards(self) -> int:
        return self.size // self.replicas

    @property
    def shard(self) -> int:
        return self.rank % self.shards

    def say(self, text: str) -> None:
        """A line on the terminal, from rank 0 alone, above a progress bar."""
        if self.rank != 0 or sys.stdout is None:  # closed before the start
            return
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:  # nobody reads any more, as after `| head`: the run goes on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all ranks, in float64. Collective."""
        x = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(x)
        return x.tolist()

    def sum_over_replicas(self, flat: Sequence[torch.Tensor]) -> None:
        """Adds up a flat buffer (see flat_like) of all replicas, in place. Collective."""
        if self.replicas > 1:
            dist.all_reduce(flat[0]._base, group=self.mesh.get_group("replica"))


# Ranks wait for each other while one loads weights or plays a long rollout
PATIENCE = timedelta(hours=6)


def setup(replicas: int = 1) -> World:
    """Process group (without torchrun too, as the only rank) and mesh."""
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        timeout=PATIENCE,
        device_id=device if cuda else None,
        **({} if "RANK" in os.environ else alone),
    )
    rank, size = dist.get_rank(), dist.get_world_size()
    shards = size // replicas
    mesh = init_device_mesh(device.type, (replicas, shards), mesh_dim_names=("replica", "shard"))
    return World(device, rank, size, rank // shards, replicas, mesh)


def local(p: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a parameter or gradient."""
    p = p.detach()
    return p.to_local() if isinstance(p, DTensor) else p


def full(x: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded. Collective if it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


# --------------------------------------------------------------------------------------------------
# Loading


def resolve(name: str) -> str:
    """An embedded model's name, a local folder or a hub name -> what from_pretrained takes."""
    if name in EMBEDDED:
        return str(EMBEDDED[name])
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ModelError(
                f"{name} is a folder without config.json: not a model in Hugging Face format"
            )
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"no such model folder: {name}")
    return name


def load_config(name: str, trust_remote_code: bool = False):
    """(config, tokenizer) without the weights. Raises ModelError for an unknown model."""
    from transformers import AutoConfig, AutoTokenizer

    path = resolve(name)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as e:  # many kinds: hub, network, JSON, unknown architecture
        raise ModelError(
            f"cannot load model {name}: {reason_of(e)} (use tiny, a local folder, or a hub name)"
        ) from None
    _give_pad_token(tokenizer, name)
    if not hasattr(config.get_text_config(), "num_attention_heads"):
        raise ModelError(
            f"{name} is a {config.model_type} model, without attention layers: not supported"
        )
    return config, tokenizer


def _give_pad_token(tokenizer, name: str) -> None:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{name}: its tokenizer has neither a padding nor an end token")


def load_processor(name: str, trust_remote_code: bool = False):
    """The processor of a vision model: its tokenizer and its image processor.

    Raises ModelError for a model that takes no pictures.
    """
    from transformers import AutoProcessor

    path = resolve(name)
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as e:
        raise ModelError(f"cannot load the processor of {name}: {reason_of(e)}") from None
    if not hasattr(processor, "image_processor"):
        raise ModelError(
            f"{name} takes no pictures: use tiny_vision or a model of AutoModelForImageTextToText"
        )
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template or tokenizer.chat_template
    _give_pad_token(tokenizer, name)
    return processor


def load_readers(name: str, vision: bool, trust_remote_code: bool = False) -> tuple:
    """(config, tokenizer, processor), the processor None without vision. Reads no weights."""
    config, tokenizer = load_config(name, trust_remote_code)
    if not vision:
        return config, tokenizer, None
    processor = load_processor(name, trust_remote_code)
    return config, processor.tokenizer, processor


def auto_class(config):
    """AutoModelForImageTextToText for a model with a vision part, else AutoModelForCausalLM."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    has_vision = hasattr(config, "vision_config")
    return AutoModelForImageTextToText if has_vision else AutoModelForCausalLM


def load_weights(name: str, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False):
    """The model with its weights, on the CPU, in `dtype`. Raises ModelError."""
    from transformers import AutoConfig, logging

    logging.disable_progress_bar()
    path = resolve(name)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        return auto_class(config).from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code
        )
    except Exception as e:  # many kinds: missing, cut or foreign files, shapes unlike the config
        raise ModelError(f"cannot load the weights of {name}: {reason_of(e)}") from None


def skeleton(
    config,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    trust_remote_code: bool = False,
):
    """The model on the meta device: shapes and names without memory."""
    options = {"attn_implementation": attention} if attention else {}
    with torch.device("meta"):
        return auto_class(config).from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code, **options
        )


def layers_to_shard(model) -> list[torch.nn.Module]:
    """The transformer blocks: modules whose class the library names in `_no_split_modules`."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [m for m in model.modules() if type(m).__name__ in names]


@torch.no_grad()
def materialize(model, source, device: torch.device) -> None:
    """Gives a (sharded) skeleton its memory on `device` and the weights of `source`. Collective.

    Only rank 0 of the job needs to hold `source`. One parameter at a time is broadcast and cut, so
    that no other rank ever holds the whole model. Buffers that are not in the state dict (rotary
    frequencies) are copied as well.
    """
    model.to_empty(device=device)
    model.tie_weights()
    rank = dist.get_rank() if dist.is_initialized() else 0
    several = dist.is_initialized() and dist.get_world_size() > 1
    where = device if device.type == "cpu" else torch.device("cuda", torch.cuda.current_device())
    values = {}
    if rank == 0:
        model.generation_config = source.generation_config
        values = dict(source.named_parameters()) | dict(source.named_buffers())
    for name, target in [*model.named_parameters(), *model.named_buffers()]:
        if rank == 0:
            value = values[name].detach().to(where, target.dtype)
        else:
            value = torch.empty(target.shape, dtype=target.dtype, device=where)
        if several:
            dist.broadcast(value, 0)
        if isinstance(target, DTensor):
            value = distribute_tensor(
                value, target.device_mesh, target.placements, src_data_rank=None
            ).to_local()
        local(target).copy_(value)


def parameter_count(config, trust_remote_code: bool = False) -> int:
    model = skeleton(config, trust_remote_code=trust_remote_code)
    return sum(p.numel() for p in model.parameters())


def check_positions(config, tokens: int, flags: str) -> None:
    """Raises ModelError if the model has fewer positions than `tokens`, which `flags` limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and tokens > positions:
        raise ModelError(
            f"rows of up to {tokens} tokens, but the model has {positions} positions: lower {flags}"
        )


def freeze_vision(model) -> None:
    """Of a model with a vision part only what text reaches is trained."""
    if hasattr(model.config, "vision_config"):
        reached = [*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()]
        model.requires_grad_(False)
        for p in reached:
            p.requires_grad_(True)


def turn_off_dropout(model) -> None:
    """For reinforcement learning: the policy that is trained must be the one that was sampled."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


# --------------------------------------------------------------------------------------------------
# Loss and learning rate


def causal_lm(model):
    """The Hugging Face model itself, of a Policy or of PEFT's, whose adapters are in its layers."""
    model = getattr(model, "lm", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_states(model, **inputs) -> torch.Tensor:
    """[B, T, H]: what the output head reads."""
    base = model.base_model
    if base is model:  # Llama 4 does not say which part is without the head
        base = model.model
    return base(use_cache=False, **inputs)[0]


def head(model, hidden: torch.Tensor) -> torch.Tensor:
    """[n, V]: the logits of hidden states [n, H], scaled as the model's family does it."""
    logits = model.get_output_embeddings()(hidden)
    config = model.config.get_text_config()
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        logits = logits * (getattr(config, name, None) or 1)
    logits = logits / (getattr(config, "logits_scaling", None) or 1)  # Granite
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = cap * torch.tanh(logits / cap)
    return logits


def by_chunks(function: Callable, vocabulary: int, *rows: torch.Tensor) -> list:
    """function of so many rows at a time that their logits are 512 MB in fp32.

    Where there is more than one chunk, logits are not kept but made again in backward: those of
    16k tokens over 152k words would be 10 GB, several times.
    """
    size = max(1, 2**27 // vocabulary)
    chunks = list(zip(*(x.split(size) for x in rows), strict=True))
    if len(chunks) == 1:
        return [function(*chunks[0])]
    return [checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks]


def _token_losses(model, input_ids, labels, **pictures) -> torch.Tensor:
    model = causal_lm(model)
    labels = labels[:, 1:]  # [B, T-1]
    wanted = labels != -100
    hidden = hidden_states(model, input_ids=input_ids, **pictures)[:, :-1][wanted]  # [n, H]

    def losses_of(hidden, labels):
        logits = head(model, hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, labels, reduction="none")

    vocabulary = model.config.get_text_config().vocab_size
    losses = torch.cat(by_chunks(losses_of, vocabulary, hidden, labels[wanted]))
    return losses.new_zeros(len(labels)).index_add(0, wanted.nonzero()[:, 0], losses)


def token_losses(model, batch: dict, weights: dict | None = None) -> torch.Tensor:
    """[B]: cross-entropy (nats) summed over each row's response tokens.

    batch: input_ids and labels, each [B, T] (and pixel_values), padded on the right, so that causal
    attention never sees the padding and no mask is needed. Logits are made for response tokens
    only, some at a time. weights: {name: tensor} in place of the model's own.

    It runs as the model's forward: FSDP2 gathers the weights that lie outside of the blocks where
    the model itself is called.
    """
    model.forward = partial(_token_losses, model)
    try:
        return model(**batch) if weights is None else functional_call(model, weights, (), batch)
    finally:
        del model.forward  # the class's own again


def token_loss(model, batch: dict, weights: dict | None = None) -> torch.Tensor:
    """token_losses summed over the batch."""
    return token_losses(model, batch, weights).sum()


@torch.no_grad()
def check_head(model, world: World) -> None:
    """Raises ModelError where the model makes its logits in a way that `head` does not know."""
    lm, ids = causal_lm(model), torch.arange(2, 10, device=world.device)[None]
    with gathered(model):
        ours = token_loss(model, {"input_ids": ids, "labels": ids})
        logits = lm(input_ids=ids, use_cache=False).logits[0, :-1].float()
    theirs = F.cross_entropy(logits, ids[0, 1:], reduction="sum")
    if (ours - theirs).abs() > (0.5 if world.device.type == "cuda" else 1e-3):
        raise ModelError(f"{type(lm).__name__} makes its logits in a way that is not known here")


def learning_rate(step: int, steps: int, warmup_ratio: float) -> float:
    """Fraction of the peak at a step: linear warm-up, cosine to zero."""
    warmup = max(1, round(warmup_ratio * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@contextmanager
def gathered(model):
    """Within the block every rank holds the whole weights and can run forwards alone.

    For generation and evaluation, where ranks have different numbers of forwards to make.
    """
    wrapped = [m for m in model.modules() if isinstance(m, FSDPModule)]
    training = model.training
    model.eval()
    for m in wrapped:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    try:
        yield
    finally:
        for m in wrapped:
            m.reshard()
            m.set_reshard_after_forward(m is not model, recurse=False)
        model.train(training)


# --------------------------------------------------------------------------------------------------
# Buffers of shards


def flat_like(tensors: Sequence[torch.Tensor], offload: bool = False) -> list[torch.Tensor]:
    """Zeros of the tensors' shapes, as views of one flat buffer: one all-reduce, one fill.

    offload: in CPU memory, pinned where the tensors are on a GPU.
    """
    device = torch.device("cpu") if offload else tensors[0].device
    sizes = [t.numel() for t in tensors]
    flat = torch.zeros(
        sum(sizes),
        dtype=tensors[0].dtype,
        device=device,
        pin_memory=offload and tensors[0].is_cuda,
    )
    return [part.view(t.shape) for part, t in zip(flat.split(sizes), tensors, strict=True)]


def trained_parameters(model) -> list[torch.nn.Parameter]:
    """The parameters with a gradient, sharded as the optimizer is to see them.

    After a bare forward the root of an FSDP2 model still shows its gathered weights, which are
    freed later; so it is resharded first.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return [p for p in model.parameters() if p.requires_grad]


@contextmanager
def each_gradient(params: Sequence[torch.nn.Parameter], use: Callable):
    """use(i, gradient) as soon as the gradient of params[i] is complete, still inside backward.

    It is dropped right after, so there is never a gradient of the whole model.
    """

    def hook(i, p):
        use(i, local(p.grad))
        p.grad = None

    hooks = [p.register_post_accumulate_grad_hook(partial(hook, i)) for i, p in enumerate(params)]
    try:
        yield
    finally:
        for h in hooks:
            h.remove()


def set_gradients(params: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
    """p.grad <- this rank's shard of a gradient, without a copy where it is on p's device."""
    for p, g in zip(params, gradients, strict=True):
        if not isinstance(p, DTensor):
            p.grad = g.to(p.device)
        elif local(p).device.type == p.device_mesh.device_type:
            g = g.to(local(p).device)
            layout = {"shape": p.shape, "stride": p.stride()}
            p.grad = DTensor.from_local(g, p.device_mesh, p.placements, **layout)
        else:  # offloaded: from_local would move the shard to the mesh's device
            p.grad = torch.empty_like(p)
            local(p.grad).copy_(g)


# --------------------------------------------------------------------------------------------------
# What a model takes, in bytes


def activation_bytes(config, tokens: int, width: int, checkpointing: bool, adapters=False) -> float:
    """Of a forward and backward over `tokens`, a rough rule: 34 hidden sizes a layer and token.

    52 with adapters beside frozen layers (measured: 28.8 and 51.6 in bf16); with checkpointing the
    blocks' inputs and one block's rest.
    """
    text = config.get_text_config()
    per_layer = 52 if adapters else 34
    layers = text.num_hidden_layers
    kept = layers + per_layer if checkpointing else layers * per_layer
    return tokens * text.hidden_size * width * kept


def logit_bytes(config, tokens: int, width: int) -> float:
    """Logits and their gradient, and both in fp32 for the loss; some tokens at a time."""
    return min(2**30, tokens * config.get_text_config().vocab_size * (2 * width + 8))


def cache_bytes(config, tokens: int, width: int) -> float:
    """Keys and values."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return tokens * 2 * text.num_hidden_layers * heads * size * width


# --------------------------------------------------------------------------------------------------
# Saving


@torch.no_grad()
def full_weights(model, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state dict, gathered tensor by tensor; on rank 0, on the CPU (empty elsewhere)."""
    rank, weights = dist.get_rank() if dist.is_initialized() else 0, {}
    for name, value in model.state_dict().items():
        value = full(value)
        if rank == 0:
            kind = dtype if value.is_floating_point() else None
            weights[name] = value.detach().to("cpu", kind, copy=True)
    return weights


def save_pretrained(
    folder: Path, model, tokenizer, weights: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """config, tokenizer and safetensors, as from_pretrained and vLLM read them. One rank only.

    The source's generation_config is kept; every token that ends a response in training is added to
    its end tokens, else a base model trained on chat turns would never stop.
    """
    plain = skeleton(model.config, dtype=dtype)  # the library's writer, from the class without FSDP
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.generation_config = copy.deepcopy(model.generation_config or plain.generation_config)
    if plain.generation_config is not None:
        _add_end_tokens(plain.generation_config, getattr(tokenizer, "tokenizer", tokenizer))
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _add_end_tokens(generation_config, tokenizer) -> None:
    own = generation_config.eos_token_id
    if own is None:
        own = []
    stop = {own} if isinstance(own, int) else set(own)
    stop = sorted(stop | template(tokenizer).stop)
    generation_config.eos_token_id = stop[0] if len(stop) == 1 else stop
    if generation_config.pad_token_id is None:
        generation_config.pad_token_id = tokenizer.pad_token_id
    try:
        generation_config.validate(strict=True)
    except ValueError:  # some published ones set a temperature without sampling; saving refuses
        generation_config.do_sample = True
