"""model.py: the loss by chunks of the vocabulary, scaled logits, gradients of shards."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.distributed.tensor import DTensor, Shard

import model
from model import World, check_head, load_weights, local, set_gradients, token_losses
from tests.helpers import one_rank_mesh

CPU = torch.device("cpu")


def labelled_rows() -> dict:
    ids = torch.randint(20, 90, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row, prompt in enumerate((2, 5, 9)):
        labels[row, :prompt] = -100
    return {"input_ids": ids, "labels": labels}


def losses_of_all_logits(lm, batch: dict) -> torch.Tensor:
    """The sums over each row from the logits of every position."""
    logits, labels = lm(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return losses.sum(1)


def gradient_of(lm, losses: torch.Tensor) -> torch.Tensor:
    gradients = torch.autograd.grad(
        losses @ losses.new_tensor([1.0, 2.0, -1.0]), list(lm.parameters())
    )
    return torch.cat([g.flatten() for g in gradients])


def test_the_vocabulary_in_chunks(monkeypatch):
    """Losses and gradient are those of all logits at once; few of them are held at a time."""
    lm, batch = load_weights("tiny", torch.float64).eval(), labelled_rows()
    expected = losses_of_all_logits(lm, batch)
    expected_gradient = gradient_of(lm, expected)
    vocabulary, most, plain = lm.config.vocab_size, 5, model.head
    seen = []

    def head(lm, hidden):
        seen.append(len(hidden))
        return plain(lm, hidden)

    by_chunks = model.by_chunks
    monkeypatch.setattr(model, "head", head)
    monkeypatch.setattr(model, "by_chunks", lambda f, _, *x: by_chunks(f, 2**27 // most, *x))
    losses = token_losses(lm, batch)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradient_of(lm, losses), expected_gradient)
    assert max(seen) == most
    assert len(seen) == 2 * -(-20 // most)  # the 20 response tokens, and again in backward
    assert lm(input_ids=batch["input_ids"]).logits.shape == (3, 12, vocabulary)  # as before


SCALED = {
    "granite": (transformers.GraniteConfig, {"logits_scaling": 4.0}),
    "cohere": (transformers.CohereConfig, {"logit_scale": 0.25}),
    "gemma2": (transformers.Gemma2Config, {"final_logit_softcapping": 3.0, "head_dim": 16}),
}


@pytest.mark.parametrize("family", SCALED)
def test_families_that_scale_their_logits(family):
    kind, settings = SCALED[family]
    config = kind(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **settings,
    )
    torch.manual_seed(0)
    lm, batch = transformers.AutoModelForCausalLM.from_config(config).eval(), labelled_rows()
    check_head(lm, World(CPU))
    expected = losses_of_all_logits(lm, batch)
    torch.testing.assert_close(token_losses(lm, batch), expected, rtol=1e-4, atol=1e-4)


def test_all_positions_may_be_used():
    config = transformers.LlamaConfig(max_position_embeddings=8)
    model.check_positions(config, 8, "--max-length")
    with pytest.raises(model.ModelError, match="9 tokens, but the model has 8 .* --max-length"):
        model.check_positions(config, 9, "--max-length")


def test_a_scale_that_is_not_known_is_refused():
    lm = load_weights("tiny")
    plain = lm.forward

    def scaled(**inputs):
        out = plain(**inputs)
        out.logits = 2 * out.logits
        return out

    lm.__class__ = type("Scaled", (type(lm),), {"forward": lambda self, **inputs: scaled(**inputs)})
    with pytest.raises(model.ModelError, match="Scaled makes its logits in a way"):
        check_head(lm, World(CPU))


@pytest.mark.parametrize("mesh_device", ["cpu", "cuda"])
def test_gradients_of_shards_stay_where_the_shard_is(mesh_device, process_group, monkeypatch):
    """cuda: as with --cpu-offload on a GPU, where shards are not on the mesh's device."""
    mesh = one_rank_mesh()["shard"]
    shard, gradient = torch.zeros(4, 3), torch.randn(4, 3)
    p = torch.nn.Parameter(DTensor.from_local(shard, mesh, [Shard(0)]))
    monkeypatch.setattr(type(mesh), "device_type", mesh_device)
    set_gradients([p], [gradient])
    assert local(p.grad).device == CPU
    assert torch.equal(local(p.grad), gradient)
