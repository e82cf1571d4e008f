"""Loading: both layouts, any number of files, each rank its slices only, and a clear message for everything that can be wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints.tiny import make_tiny_model, write_tiny_checkpoint
from support.ranks.rank_threads import run_ranks
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from workers.checkpoint.model_config import load_model_config
from workers.errors import CheckpointError
from workers.layers.linear import RowParallelLinear
from workers.model.mistral import MistralForCausalLM
from workers.parallel.group import SingleRank
from workers.quant import dense
from workers.weights import safetensors as checkpoint
from workers.weights.interleaved import InterleavedRows
from workers.weights.loader import load_weights


@pytest.fixture(autouse=True)
def plain_weights(monkeypatch):
    """Weights stay readable; what packing does is tested with the layers."""
    monkeypatch.setattr(dense, "CAN_PACK", False)


def load(folder, *, tp=None, progress=None, dtype=torch.float32):
    """The parameters of a model that held NaN everywhere before loading."""
    config = load_model_config(folder)
    tp = tp or SingleRank()
    model = MistralForCausalLM(config, tp=tp, backends=[None], dtype=dtype, device="cpu", max_positions=8)
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    load_weights(model, folder, config, progress=progress)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def expected_parameters(*, rank=0, size=1, **overrides):
    """This rank's parameters, sliced out of transformers' model with code of its own."""
    whole = dict(make_tiny_model(**overrides).named_parameters())
    expected = {}
    for name, tensor in whole.items():
        tensor = tensor.detach()
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            expected[name] = tensor.chunk(size, dim=1)[rank]
        elif tensor.dim() == 2:
            expected[name] = tensor.chunk(size, dim=0)[rank]
        else:
            expected[name] = tensor
    for name in [name for name in expected if name.endswith(("q_proj.weight", "gate_proj.weight"))]:
        names = (name, name.replace("q_proj", "k_proj"), name.replace("q_proj", "v_proj"))
        packed = name.replace("q_proj", "qkv_proj")
        if "gate_proj" in name:
            names, packed = (name, name.replace("gate", "up")), name.replace("gate", "gate_up")
        expected[packed] = torch.cat([expected.pop(n) for n in names])
    return expected


def assert_same(parameters, expected):
    assert parameters.keys() == expected.keys()
    for name, tensor in parameters.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("layout", ["huggingface", "mistral"])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_both_layouts_in_any_number_of_files(tmp_path, layout, num_shards, index, size):
    even = {"intermediate_size": 128}
    write_tiny_checkpoint(tmp_path, layout=layout, num_shards=num_shards, **even)
    if not index:
        for path in tmp_path.glob("*.index.json"):
            path.unlink()
    results = run_ranks(size, lambda tp: load(tmp_path, tp=tp))
    for rank, parameters in enumerate(results):
        assert_same(parameters, expected_parameters(rank=rank, size=size, **even))


@pytest.mark.parametrize("layout", ["huggingface", "mistral"])
def test_eight_ranks_and_one_head_each(tmp_path, layout):
    sizes = {"num_key_value_heads": 8, "intermediate_size": 256}
    write_tiny_checkpoint(tmp_path, layout=layout, **sizes)
    for rank, parameters in enumerate(run_ranks(8, lambda tp: load(tmp_path, tp=tp))):
        assert_same(parameters, expected_parameters(rank=rank, size=8, **sizes))


@pytest.mark.parametrize("layout", ["huggingface", "mistral"])
def test_tied_embedding(tmp_path, layout):
    write_tiny_checkpoint(tmp_path, layout=layout, tie_word_embeddings=True)
    expected = expected_parameters(tie_word_embeddings=True)
    assert "lm_head.weight" not in expected
    assert_same(load(tmp_path), expected)
    # Some conversions repeat the tensor.
    embedding, head = (
        ("model.embed_tokens.weight", "lm_head.weight")
        if layout == "huggingface"
        else ("tok_embeddings.weight", "output.weight")
    )
    change(tmp_path, lambda t: t.update({head: t[embedding].clone()}))
    assert_same(load(tmp_path), expected)
    # transformers 5 does not tie them then, transformers 4 drops the head; neither may happen silently.
    change(tmp_path, lambda t: t[head][-1].add_(1))
    with pytest.raises(CheckpointError, match=rf"'{head}' .* differs from the embedding") as e:
        load(tmp_path)
    assert e.value.remedy == "Set tie_word_embeddings to false in config.json."


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, dtype, bad):
    write_tiny_checkpoint(tmp_path, dtype=dtype)
    name = "model.layers.1.mlp.up_proj.weight"
    change(tmp_path, lambda t: t[name].view(-1)[-1:].fill_(bad))
    with pytest.raises(CheckpointError, match=rf"Tensor '{name}' of .* has NaN or infinite values"):
        load(tmp_path)


def test_finite_weights_whose_sum_overflows_are_loaded(tmp_path):
    write_tiny_checkpoint(tmp_path, dtype=torch.float16)
    change(tmp_path, lambda t: t["model.norm.weight"].fill_(60_000))
    assert load(tmp_path)["model.norm.weight"].max() == 60_000 - 60_000 % 32


def test_llama_checkpoint_of_the_same_structure(tmp_path):
    write_tiny_checkpoint(tmp_path, sliding_window=None)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    )
    assert isinstance(LlamaForCausalLM.from_pretrained(tmp_path), LlamaForCausalLM)  # transformers agrees
    assert_same(load(tmp_path), expected_parameters(sliding_window=None))


def test_the_dtype_is_converted(tmp_path):
    write_tiny_checkpoint(tmp_path, dtype=torch.bfloat16)
    expected = {name: tensor.to(torch.bfloat16).float() for name, tensor in expected_parameters().items()}
    assert_same(load(tmp_path, dtype=torch.float32), expected)


def test_computed_buffers_are_ignored(tmp_path):
    write_tiny_checkpoint(tmp_path)
    change(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert_same(load(tmp_path), expected_parameters())
    write_tiny_checkpoint(tmp_path / "mistral", layout="mistral")
    change(tmp_path / "mistral", lambda t: t.update({"rope.freqs": torch.ones(4)}))
    assert_same(load(tmp_path / "mistral"), expected_parameters())


@pytest.mark.parametrize("layout", ["huggingface", "mistral"])
def test_a_rank_reads_no_more_than_its_part(tmp_path, layout, monkeypatch):
    write_tiny_checkpoint(tmp_path, layout=layout)
    real_open, num_read = checkpoint.safe_open, []

    class Slice:
        def __init__(self, inner):
            self.inner = inner
            self.get_shape, self.get_dtype = inner.get_shape, inner.get_dtype

        def __getitem__(self, index):
            part = self.inner[index]
            num_read.append(part.numel())
            return part

    class File:
        """Only what may be used: no get_tensor, which would read whole tensors."""

        def __init__(self, path, framework):
            self.inner = real_open(path, framework=framework)

        def __enter__(self):
            self.inner.__enter__()
            return self

        def __exit__(self, *exception):
            self.inner.__exit__(*exception)

        def keys(self):
            return self.inner.keys()

        def get_slice(self, name):
            return Slice(self.inner.get_slice(name))

    monkeypatch.setattr(checkpoint, "safe_open", File)
    sizes = [
        sum(p.numel() for p in parameters.values()) for parameters in run_ranks(4, lambda tp: load(tmp_path, tp=tp))
    ]
    assert sum(num_read) == sum(sizes)


def test_a_layer_gets_its_final_form_as_soon_as_it_is_loaded(tmp_path, monkeypatch):
    """Else a model would take the memory of both forms at a time."""
    write_tiny_checkpoint(tmp_path)
    progress, finished = [0], []
    monkeypatch.setattr(RowParallelLinear, "finish_loading", lambda layer: finished.append(progress[-1]))
    load(tmp_path, progress=lambda done, total: progress.append(done))
    assert len(finished) == 4, "two in each layer"
    assert len(set(finished)) == 4 and all(0 < done < progress[-1] for done in finished)


def test_progress_counts_this_ranks_bytes(tmp_path):
    write_tiny_checkpoint(tmp_path, num_shards=2)

    def program(tp):
        calls = []
        parameters = load(tmp_path, tp=tp, progress=lambda done, total: calls.append((done, total)))
        return calls, sum(p.nbytes for p in parameters.values())

    for calls, num_bytes in run_ranks(2, program):
        assert calls[-1] == (num_bytes, num_bytes)
        done = [d for d, _ in calls]
        assert done == sorted(set(done))
        assert {total for _, total in calls} == {num_bytes}


def test_interleaved_rows_worked_example():
    """The docstring's numbers, and a second head read alone."""
    column = torch.tensor([[0.0], [10.0], [1.0], [11.0], [20.0], [30.0], [21.0], [31.0]])  # a0 b0 a1 b1, twice

    class Source:
        name, shape = "w", (8, 1)

        def __getitem__(self, index):
            return column[index]

    rows = InterleavedRows(Source(), 4)
    assert rows[0:4].flatten().tolist() == [0, 1, 10, 11]
    assert rows[4:8].flatten().tolist() == [20, 21, 30, 31]
    assert rows[:].flatten().tolist() == [0, 1, 10, 11, 20, 21, 30, 31]


def change(folder, edit):
    """Rewrites a one-file checkpoint."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def truncate(folder, keep):
    (path,) = folder.glob("*.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def rename_all(folder, suffix):
    for path in folder.glob("*.safetensors"):
        path.rename(path.with_suffix(suffix))


Q = "model.layers.1.self_attn.q_proj.weight"
ERRORS = {
    "missing": (lambda f: change(f, lambda t: t.pop(Q)), rf"lacks the tensor {Q}\."),
    "several missing": (lambda f: change(f, lambda t: [t.pop(Q), t.pop("model.norm.weight")]), r"and 1 more"),
    "extra": (
        lambda f: change(f, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})),
        r"Tensor 'model\.layers\.0\.self_attn\.q_proj\.bias' of .*model\.safetensors has no place in a 2-layer",
    ),
    "one layer too many": (
        lambda f: change(f, lambda t: t.update({Q.replace("1", "2"): torch.ones(64, 64)})),
        r"layers\.2\..* has no place in a 2-layer",
    ),
    "wrong shape": (
        lambda f: change(f, lambda t: t.update({Q: torch.ones(64, 32)})),
        rf"Tensor '{Q}' of .*model\.safetensors has shape \[64, 32\], but the model's configuration asks for \[64, 64\]",
    ),
    "wrong shape of a norm": (
        lambda f: change(f, lambda t: t.update({"model.norm.weight": torch.ones(63)})),
        r"'model\.norm\.weight' of .* has shape \[63\]",
    ),
    "truncated data": (lambda f: truncate(f, 0.7), r"model\.safetensors is truncated or not a safetensors file"),
    "truncated header": (lambda f: truncate(f, 0.001), r"model\.safetensors is truncated or not a safetensors file"),
    "empty": (lambda f: truncate(f, 0), r"model\.safetensors is truncated or not a safetensors file"),
    "not safetensors": (
        lambda f: (f / "model.safetensors").write_text("<html>404</html>" * 9),
        r"model\.safetensors is truncated or not a safetensors file",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"has no model\*\.safetensors"),
    "pickle": (lambda f: rename_all(f, ".bin"), r"model\.bin is a pickle file.* Convert it to safetensors"),
    "twice": (
        lambda f: save_file({"model.norm.weight": torch.ones(64)}, f / "model-2.safetensors"),
        r"Tensor 'model\.norm\.weight' is in both .*\. Remove one of the files",
    ),
    "absent file": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}})
        ),
        r"index\.json names model-00002-of-00002\.safetensors, which does not exist\. Download it too",
    ),
    "bad index": (
        lambda f: (f / "model.safetensors.index.json").write_text("[]"),
        r"index\.json is not a JSON object",
    ),
}


@pytest.mark.parametrize(("damage", "message"), ERRORS.values(), ids=ERRORS)
def test_damage_is_named(tmp_path, damage, message):
    write_tiny_checkpoint(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_damage_in_mistrals_layout_is_named_as_the_file_names_it(tmp_path):
    write_tiny_checkpoint(tmp_path, layout="mistral")
    change(tmp_path, lambda t: t.update({"layers.0.attention.wk.weight": torch.ones(31, 64)}))
    with pytest.raises(
        CheckpointError, match=r"'layers\.0\.attention\.wk\.weight' of .*consolidated\.safetensors has shape \[31, 64\]"
    ):
        load(tmp_path)
    change(tmp_path, lambda t: t.update({"layers.0.attention.wk.weight": torch.ones(24, 64)}))
    with pytest.raises(CheckpointError, match=r"'layers\.0\.attention\.wk\.weight' of .* has shape \[24, 64\]"):
        load(tmp_path)
    rename_all(tmp_path, ".00.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth is a pickle file"):
        load(tmp_path)
