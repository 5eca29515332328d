"""LoRA adapters beside a frozen model, for one or for T tasks at once, and their files.

Hu et al. 2021, arXiv 2106.09685: y = W x + (alpha / r) B A x in every target layer, B = 0 at the
start. The adapters are added by forward hooks: the base's weights and code are untouched. Files are
in PEFT's format, and can be merged into the base.
"""

import functools
import json
import math
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from model import ModelError, full_weights, save_pretrained


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """F.dropout; on a CPU from 16 random bits an element (p to within 1/65536).

    The library's draws take a fifth of a round there.
    """
    if p == 0 or x.device.type != "cpu":
        return F.dropout(x, p, p > 0)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.long).random_(-(2**63), None)
    bits = bits.view(torch.int16)[: x.numel()].view(x.shape)
    keep = bits >= round(p * 2**16) - 2**15
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


def linear_layers(model) -> dict[str, torch.nn.Linear]:
    """By name; of a model with a vision part only the language model's, which text reaches."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    if not hasattr(model.config, "vision_config"):
        return layers
    language = {id(m) for m in model.get_decoder().modules()}
    return {n: m for n, m in layers.items() if id(m) in language}


class Adapters:
    """The adapters of T tasks on a frozen model, run together in one forward.

    phi: the shared adapter, a list A [r, d_in], B [d_out, r] by layer. stack: the same for T tasks,
    leaves [T, r, d_in], [T, d_out, r]. A forward adds scale * B_t (A_t x) to the output of each
    target layer for the rows of task t; a batch holds the same number of rows for every task,
    ordered by task. training: whether dropout is on. Where phi itself is trained (train_phi), it is
    the adapter of all rows.
    """

    def __init__(
        self,
        model,
        *,
        r: int,
        alpha: float,
        dropout: float,
        target_modules: Sequence[str],
        rank_stabilised: bool,
        seed: int,
        device: torch.device,
    ):
        layers = linear_layers(model).items()
        self.layers = {n: m for n, m in layers if n.split(".")[-1] in target_modules}
        self.r, self.alpha, self.rank_stabilised = r, alpha, rank_stabilised
        self.target_modules = list(target_modules)
        self.scale = alpha / (math.sqrt(r) if rank_stabilised else r)
        self.dropout, self.training = dropout, False
        generator = torch.Generator().manual_seed(seed)
        self.phi: list[torch.Tensor] = []
        self.stack: list[torch.Tensor] = []
        for i, layer in enumerate(self.layers.values()):
            bound = 1 / math.sqrt(layer.in_features)  # as torch.nn.Linear, and PEFT, start A
            A = (torch.rand(r, layer.in_features, generator=generator) * 2 - 1).mul_(bound)
            B = torch.zeros(layer.out_features, r)  # the adapter starts as no change
            self.phi += [A.to(device), B.to(device)]
            layer.register_forward_hook(functools.partial(self._add, i))

    def train_phi(self) -> None:
        """phi becomes leaves with gradients, used as they are."""
        self.stack = self.phi = [p.requires_grad_() for p in self.phi]

    def start(self, tasks: int) -> None:
        """phi_i <- phi for `tasks` tasks."""
        self.stack = [p.expand(tasks, *p.shape).clone().requires_grad_() for p in self.phi]

    @contextmanager
    def with_dropout(self):
        self.training = True
        try:
            yield
        finally:
            self.training = False

    def _add(self, i: int, layer, inputs, output):
        x, (A, B) = inputs[0], self.stack[2 * i : 2 * i + 2]
        if A.dim() == 2:
            A, B = A[None], B[None]
        x = dropout(x, self.dropout if self.training else 0.0)
        x = x.reshape(len(A), -1, x.shape[-1])  # [T, rows x L, d_in]
        # In x's dtype: autograd keeps x anyway, but not a copy of it in fp32
        low = torch.bmm(x, A.to(x.dtype).transpose(1, 2)).to(B.dtype)  # [T, rows x L, r]
        y = output.reshape(len(B), -1, output.shape[-1]).to(B.dtype)
        y = torch.baddbmm(y, low, B.transpose(1, 2), alpha=self.scale)
        return y.view(output.shape).to(output.dtype)


def check_targets(model, target_modules: Sequence[str]) -> None:
    """Raises ModelError where the model has no such layers."""
    names = {name.split(".")[-1] for name in linear_layers(model)}
    if not target_modules:
        raise ModelError("--target-modules: name at least one")
    if unknown := [t for t in target_modules if t not in names]:
        raise ModelError(
            f"--target-modules {' '.join(unknown)}: the model has no such linear layer; it has "
            f"{', '.join(sorted(names))}"
        )


def adapter_size(model, r: int, target_modules: Sequence[str]) -> int:
    """Parameters of an adapter of rank r."""
    targets = [m for n, m in linear_layers(model).items() if n.split(".")[-1] in target_modules]
    return sum(r * (m.in_features + m.out_features) for m in targets)


def write_adapter(folder: Path, adapters: Adapters, base_model: str) -> None:
    """adapter_config.json and adapter_model.safetensors, as PeftModel reads them."""
    from safetensors.torch import save_file

    names = []
    for layer in adapters.layers:
        names += [f"base_model.model.{layer}.lora_{x}.weight" for x in "AB"]
    weights = {n: p.detach().cpu().contiguous() for n, p in zip(names, adapters.phi, strict=True)}
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": adapters.r,
        "lora_alpha": adapters.alpha,
        "lora_dropout": adapters.dropout,
        "target_modules": adapters.target_modules,
        "use_rslora": adapters.rank_stabilised,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))


def write_merged(folder: Path, model, adapters: Adapters, tokenizer, dtype: torch.dtype) -> None:
    """The base with W + scale B A in place of every target W. Collective; rank 0 writes."""
    weights = full_weights(model, torch.float32)
    if dist.get_rank() == 0:
        for i, layer in enumerate(adapters.layers):
            A, B = (p.detach().float().cpu() for p in adapters.phi[2 * i : 2 * i + 2])
            weights[f"{layer}.weight"] += adapters.scale * (B @ A)
        head, words = model.get_output_embeddings(), model.get_input_embeddings()
        if head in adapters.layers.values() and head.weight is words.weight:
            for config in (model.config, model.config.get_text_config()):
                config.tie_word_embeddings = False  # the head is no longer the words' table
        for name, w in weights.items():
            weights[name] = w.to(dtype) if w.is_floating_point() else w
        save_pretrained(folder, model, tokenizer, weights, dtype)
    dist.barrier()


class AdapterCheckpoint:
    """phi in PEFT's format, and with the optimizer in state/ to resume.

    beside: further parameters that are trained, in state/ alone.
    """

    def __init__(self, adapters: Adapters, optimizer, base_model: str, beside=()):
        self.adapters, self.optimizer, self.base_model = adapters, optimizer, base_model
        self.beside = list(beside)

    def write(self, folder: Path) -> None:
        if dist.get_rank() == 0:
            write_adapter(folder, self.adapters, self.base_model)
            phi, beside = ([p.detach() for p in x] for x in (self.adapters.phi, self.beside))
            state = {"phi": phi, "beside": beside, "optimizer": self.optimizer.state_dict()}
            torch.save(state, folder / "state" / "adapter.pt")

    @torch.no_grad()
    def read(self, folder: Path) -> None:
        device = self.adapters.phi[0].device
        file = folder / "state" / "adapter.pt"
        saved = torch.load(file, map_location=device, weights_only=True)
        values = [*saved["phi"], *saved.get("beside", ())]
        for p, q in zip([*self.adapters.phi, *self.beside], values, strict=True):
            p.copy_(q)
        self.optimizer.load_state_dict(saved["optimizer"])
