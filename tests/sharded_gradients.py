"""The meta-gradient of FSDP2 models in several settings, on the ranks that there are.

torchrun --nproc_per_node 2 -m tests.sharded_gradients FILE writes what rank 0 has found.
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fomaml
from model import World, full, full_weights, layers_to_shard, materialize, set_gradients, skeleton
from tests.helpers import (
    assert_same_weights,
    meta_gradient,
    random_episodes,
    small_llama,
    weights_of,
)

CASES = (
    "shards", "replicas", "activation_checkpointing", "offload_theta", "adam", "inner_clip",
    "micro_batch",
)  # fmt: skip


def episodes_and_tokens():
    return random_episodes(2, 6, 4)


def args_of(case: str) -> fomaml.Args:
    args = fomaml.Args(inner_lr=0.05, inner_optimizer="sgd", support_batch=2, tasks_per_step=2)
    if case == "adam":
        args.inner_optimizer, args.inner_lr = "adam", 0.002
    args.offload_theta = case == "offload_theta"
    args.inner_clip = 0.5 if case == "inner_clip" else 0.0
    args.micro_batch = 1 if case == "micro_batch" else 0
    return args


def source_of(case: str):
    return small_llama(torch.float32, tie_word_embeddings=case != "shards")


def sharded(case: str) -> tuple:
    """(model, world) of a case."""
    rank, size = dist.get_rank(), dist.get_world_size()
    source = source_of(case)
    replicas = size if case == "replicas" else 1
    shards = size // replicas
    mesh = init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("replica", "shard"))
    model = skeleton(source.config)
    if case == "activation_checkpointing":
        model.activation_checkpointing_enable({"use_reentrant": False})
    for module in (*layers_to_shard(model), model):
        fully_shard(module, mesh=mesh["shard"])
    materialize(model, source if rank == 0 else None, torch.device("cpu"))
    world = World(torch.device("cpu"), rank, size, rank // shards, replicas, mesh)
    return model.train(), world


def measured(case: str) -> dict:
    """losses [T, 3], the meta-gradient and the weights, of the whole model."""
    model, world = sharded(case)
    episodes, tokens = episodes_and_tokens()
    learner = fomaml.MetaLearner(model, args_of(case), world, 0, tokens)
    before = weights_of(model)
    mine = slice(world.replica, None, world.replicas)
    losses = torch.zeros(len(episodes), 3)
    losses[mine] = meta_gradient(learner, learner.fomaml, episodes[mine])
    dist.all_reduce(losses)
    world.sum_over_replicas(learner.meta_gradient)
    assert_same_weights(weights_of(model), before, f"{case}: theta")
    set_gradients(learner.params, learner.meta_gradient)
    gradients = {name: full(p.grad) for name, p in model.named_parameters()}
    weights = full_weights(model, torch.float32)
    return {"losses": losses, "gradients": gradients, "weights": weights}


def main(file: str) -> None:
    dist.init_process_group("gloo")
    results = {case: measured(case) for case in CASES}
    if dist.get_rank() == 0:
        torch.save(results, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
