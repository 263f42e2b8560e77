"""Adapters of sentence-transformers and transformers against the classes that they replace, on models of a few rows."""

import importlib
import itertools
import random

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("sentence_transformers")

from sentence_transformers import (  # noqa: E402
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    util,
)
from sentence_transformers.sentence_transformer import losses  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer  # noqa: E402
from sentence_transformers.sparse_encoder import losses as sparse  # noqa: E402

import contrastive_ops.integrations.transformers as experts  # noqa: E402
from contrastive_ops.integrations import _originals  # noqa: E402
from contrastive_ops.integrations import sentence_transformers as ours  # noqa: E402

WORDS = [f"w{i}" for i in range(200)]
DIM = 32


def write_bert(path, words):
    """A BERT of two layers with a tokenizer, as files."""
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(path)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=DIM, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    transformers.BertModel(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("bert"), WORDS)


def encoder(folder, seed=0, dropout=0.0):
    """An embedding model whose texts are far enough apart for margins to decide something."""
    options = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    body = Transformer(folder, config_kwargs=options)
    model = SentenceTransformer(modules=[body, Pooling(DIM)], device="cpu").train()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "word_embeddings" in name:
                parameter.normal_()
    return model


@pytest.fixture(scope="module")
def model(folder):
    return encoder(folder)


def texts(count, seed):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) for _ in range(count)]


def step(loss, model, columns, rows=13):
    """The value of a loss and the gradients of its model, of `columns` of texts."""
    model.zero_grad()
    random.seed(0)
    torch.manual_seed(0)
    value = loss([model.preprocess(texts(rows, seed)) for seed in range(columns)], None)
    value.backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return value.detach(), torch.cat(gradients)


def check_same(name, model, columns, *arguments, wrapped=None, **options):
    pair = [getattr(module, name)(model, *arguments, **options) for module in (ours, losses)]
    if wrapped is not None:
        outer, kw = wrapped
        pair = [getattr(module, outer)(model, loss, **kw) for module, loss in zip((ours, losses), pair, strict=True)]
    assert type(pair[0]) is not type(pair[1]) and isinstance(pair[0], type(pair[1]))
    assert pair[0].get_config_dict() == pair[1].get_config_dict()
    (value, gradients), (expected, expected_gradients) = (step(loss, model, columns) for loss in pair)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    size = expected_gradients.abs().max().item()
    assert size > 0
    torch.testing.assert_close(gradients, expected_gradients, rtol=0, atol=1e-4 * size)


ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
DIRECTIONS = [("query_to_doc",), ("query_to_doc", "doc_to_query"), ALL, (*ALL[:2], ALL[3])]


@pytest.mark.parametrize("columns", [2, 3, 4])
def test_ranking_losses(model, columns):
    name = "MultipleNegativesRankingLoss"
    for directions in DIRECTIONS:
        check_same(name, model, columns, directions=directions)
    check_same(name, model, columns, directions=DIRECTIONS[1], partition_mode="per_direction")
    check_same(name, model, columns, scale=0.1, similarity_fct=util.dot_score)
    check_same(name, model, columns, hardness_mode="all_negatives", hardness_strength=5.0)
    check_same("CachedMultipleNegativesRankingLoss", model, columns, mini_batch_size=4)
    check_same("CachedMultipleNegativesRankingLoss", model, columns, mini_batch_size=5, directions=ALL)


@pytest.mark.parametrize("columns", [2, 3])
def test_matryoshka_losses(model, columns):
    name, dims = "MultipleNegativesRankingLoss", {"matryoshka_dims": [DIM, 16, 8], "matryoshka_weights": [1, 0.5, 2]}
    check_same(name, model, columns, wrapped=("MatryoshkaLoss", dims))
    check_same(name, model, columns, wrapped=("MatryoshkaLoss", dims | {"n_dims_per_step": 2}))
    check_same(name, model, columns, directions=ALL, wrapped=("MatryoshkaLoss", dims))
    cached = "CachedMultipleNegativesRankingLoss"
    check_same(cached, model, columns, mini_batch_size=4, wrapped=("MatryoshkaLoss", dims))
    check_same(name, model, columns, wrapped=("Matryoshka2dLoss", dims | {"n_dims_per_step": 2, "kl_div_weight": 0.5}))


@pytest.mark.parametrize("columns", [2, 3])
def test_gist_losses(model, folder, columns):
    guide = encoder(folder, seed=1)
    for strategy, margin in (("absolute", 0.001), ("absolute", 0.1), ("relative", 0.05)):
        for anchors, positives in itertools.product((True, False), repeat=2):
            options = {"margin_strategy": strategy, "margin": margin, "temperature": 0.05}
            options |= {"contrast_anchors": anchors, "contrast_positives": positives}
            check_same("GISTEmbedLoss", model, columns, guide, **options)
    check_same("CachedGISTEmbedLoss", model, columns, guide, mini_batch_size=4, temperature=0.05)


def test_a_guide_with_another_tokenizer_reads_the_texts_again(model, tmp_path):
    guide = encoder(write_bert(tmp_path, list(reversed(WORDS))), seed=1)
    assert ours.GISTEmbedLoss(model, guide).must_retokenize
    check_same("GISTEmbedLoss", model, 2, guide, temperature=0.05)
    check_same("CachedGISTEmbedLoss", model, 2, guide, temperature=0.05)


def test_what_is_not_fused_runs_the_original_and_says_so(model):
    _originals._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="RankingLoss: similarity_fct=manhattan_sim has no fused form"):
        check_same("MultipleNegativesRankingLoss", model, 2, similarity_fct=util.manhattan_sim)
    with pytest.warns(UserWarning, match="hardness_mode='hard_negatives'"):
        options = {"hardness_mode": "hard_negatives", "hardness_strength": 3.0}
        check_same("MultipleNegativesRankingLoss", model, 3, **options)
    with pytest.warns(UserWarning, match="CoSENTLoss: similarity_fct=pairwise_euclidean_sim"):
        ours.CoSENTLoss(model, similarity_fct=util.pairwise_euclidean_sim).compute_loss_from_embeddings(
            [torch.ones(3, 4), torch.zeros(3, 4)], torch.arange(3)
        )
    for name in ("AnglELoss", "MarginMSELoss", "DistillKLDivLoss"):  # nothing of theirs is faster
        assert getattr(ours, name) is getattr(losses, name)
    assert ours.OnlineContrastiveLoss is losses.OnlineContrastiveLoss
    assert ours.SparseTripletLoss is sparse.SparseTripletLoss
    with pytest.raises(AttributeError, match="no attribute 'no_such_loss'"):
        _ = ours.no_such_loss


DOT = {"similarity_fct": util.pairwise_dot_score}
PAIR_LOSSES = [  # name, columns, labels of each row, options
    ("CoSENTLoss", 2, (), {}),
    ("CoSENTLoss", 2, (), {"scale": 3.0} | DOT),
    ("SparseCoSENTLoss", 2, (), {}),
    ("SparseMultipleNegativesRankingLoss", 3, None, {"scale": 0.3}),
]


@pytest.mark.parametrize(("name", "columns", "shape", "options"), PAIR_LOSSES)
def test_losses_of_pairs_and_of_lists(name, columns, shape, options):
    """From embeddings, as Matryoshka and SPLADE losses call them."""
    labels = None if shape is None else torch.rand(9, *shape).mul(8).round() / 8  # some labels are equal
    found = []
    for module in (ours, sparse if name.startswith("Sparse") else losses):
        torch.manual_seed(1)
        embeddings = [torch.randn(9, 12, requires_grad=True) for _ in range(columns)]
        loss = getattr(module, name)(torch.nn.Module(), **options)
        value = loss.compute_loss_from_embeddings(embeddings, labels)
        value.backward()
        found.append((value.detach(), *(each.grad for each in embeddings), loss.get_config_dict()))
    assert type(loss) is not getattr(ours, name) and issubclass(getattr(ours, name), type(loss))
    assert found[0][-1] == found[1][-1]
    for mine, theirs in zip(found[0][:-1], found[1][:-1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threshold", [None, 5])
def test_splade_losses(threshold):
    found = []
    for module in (ours, sparse):
        torch.manual_seed(1)
        embeddings = [torch.randn(7, 20).relu().requires_grad_() for _ in range(2)]
        inner = module.SparseMultipleNegativesRankingLoss(torch.nn.Module(), scale=0.3)
        thresholds = {"document_regularizer_threshold": 9, "query_regularizer_threshold": threshold}
        loss = module.SpladeLoss(torch.nn.Module(), inner, 0.1, 0.2, **thresholds)
        regularizers = loss.document_regularizer, loss.query_regularizer
        assert all(type(each) is module.FlopsLoss for each in regularizers)
        values = [each.compute_loss_from_embeddings(embeddings[0]) for each in regularizers]
        sum([loss.loss.compute_loss_from_embeddings(embeddings, None), *values]).backward()
        found.append([*(value.detach() for value in values), *(each.grad for each in embeddings)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_a_trainer_follows_the_curve_of_the_original(folder, steps):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    anchors = texts(96, 1)
    positives = [
        " ".join(text.split()[:1] + other.split()[1:]) for text, other in zip(anchors, texts(96, 2), strict=True)
    ]
    data = datasets.Dataset.from_dict({"anchor": anchors, "positive": positives, "negative": texts(96, 3)})
    curves = []
    for module in (losses, ours):
        model = encoder(folder, dropout=0.1)
        loss = module.CachedMultipleNegativesRankingLoss(model, mini_batch_size=8)
        loss = module.MatryoshkaLoss(model, loss, [DIM, 16])
        args = {
            "per_device_train_batch_size": 16,
            "max_steps": steps,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(output_dir=f"{folder}/out", **args),
            train_dataset=data,
            loss=loss,
        )
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    expected, found, half = torch.tensor(curves[0]), torch.tensor(curves[1]), steps // 2
    assert len(expected) == steps and expected[half:].sum() < expected[:half].sum()
    # Later steps amplify the last digits of the first ones.
    torch.testing.assert_close(found[:8], expected[:8], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "eos_token_id": 1,
}
MODELS = {
    "Mixtral": {"num_local_experts": 6, "output_router_logits": True, "router_aux_loss_coef": 0.1},
    "Qwen3Moe": {"num_experts": 6, "moe_intermediate_size": 24},
    "Olmoe": {"num_experts": 6},
    "GptOss": {"num_local_experts": 6, "head_dim": 8},
}


@pytest.mark.parametrize("name", MODELS)
def test_experts_of_transformers(name):
    config = getattr(transformers, f"{name}Config")(**SMALL, **MODELS[name])
    ids, results = torch.randint(0, 64, (3, 20)), []
    for implementation in ("eager", experts.NAME):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")._from_config(config)
        model.set_experts_implementation(implementation)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "bias" in key:
                    parameter.normal_()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients))
    (expected, theirs), (value, mine) = results
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert mine.keys() == theirs.keys() and any("experts" in key for key in mine)
    for key, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[key], rtol=1e-4, atol=1e-6)


BLOCKS = {  # configuration, and the names of a layer in checkpoints
    "Mixtral": ({"num_local_experts": 6}, "block_sparse_moe.", ("w1", "w3", "w2")),
    "Qwen3Moe": ({"num_experts": 6, "moe_intermediate_size": 24, "norm_topk_prob": True}, "mlp.", None),
    "Olmoe": ({"num_experts": 6}, "mlp.", ("gate_proj", "up_proj", "down_proj")),
    "DeepseekV3": (
        {"n_routed_experts": 8, "moe_intermediate_size": 24, "n_group": 4, "topk_group": 2, "n_shared_experts": 2},
        "mlp.",
        ("gate_proj", "up_proj", "down_proj"),
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_layers_of_checkpoints(name):
    """From one tensor of all experts, as transformers has them, and from a matrix of each, as files do."""
    more, prefix, names = BLOCKS[name]
    config = getattr(transformers, f"{name}Config")(**SMALL, **more)
    module = getattr(
        transformers.models, {"Qwen3Moe": "qwen3_moe", "DeepseekV3": "deepseek_v3"}.get(name, name.lower())
    )
    kind = "DeepseekV3MoE" if name == "DeepseekV3" else f"{name}SparseMoeBlock"
    modeling = importlib.import_module(f"{module.__name__}.modeling_{module.__name__.rpartition('.')[2]}")
    block = getattr(modeling, kind)(config)
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.normal_(std=0.3)
    state = block.state_dict()
    forms = [state]
    if names:
        gate, up = state["experts.gate_up_proj"].chunk(2, 1)
        apart = {key: value for key, value in state.items() if not key.startswith("experts.")}
        for matrices, key in zip((gate, up, state["experts.down_proj"]), names, strict=True):
            apart |= {f"experts.{e}.{key}.weight": matrix for e, matrix in enumerate(matrices)}
        forms.append(apart)
    tokens = torch.randn(2, 9, 32)
    for form in forms:
        whole = {f"model.layers.1.{prefix}{key}": value for key, value in form.items()} | {"lm_head.weight": tokens}
        layer = experts.sparse_moe(config, whole, f"model.layers.1.{prefix}", router={"losses": ["switch"]})
        out, routing = layer(tokens)
        torch.testing.assert_close(out, block(tokens), rtol=1e-4, atol=1e-5)
        assert routing.loss is not None


def test_layers_that_have_no_such_form():
    config = transformers.Qwen2MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=24)
    state = {"experts.down_proj": torch.empty(0), "shared_expert_gate.weight": torch.empty(0)}
    with pytest.raises(NotImplementedError, match="state must have no shared_expert_gate, got one"):
        experts.sparse_moe(config, state)
    with pytest.raises(ValueError, match="must have weights of experts with the prefix, got none with 'mlp.'"):
        experts.sparse_moe(config, state, "mlp.")
    with pytest.raises(ValueError, match="config must be of one of mixtral, .*, got 'bert'"):
        experts.sparse_moe(transformers.BertConfig(), state)


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_contrastive_loss_of_outputs(name):
    towers = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = towers | {"vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 2, "projection_size": 16}
    vision = towers | {"image_size": 8, "patch_size": 4}
    extra = {"projection_dim": 12} if name == "CLIP" else {}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **extra)
    model = getattr(transformers, f"{name}Model")(config).eval()
    inputs = {"input_ids": torch.randint(3, 50, (5, 8)), "pixel_values": torch.randn(5, 3, 8, 8)}
    expected = model(**inputs, return_loss=True)
    value = experts.contrastive_loss(model)(expected)
    torch.testing.assert_close(value, expected.loss.detach() + 0 * value, rtol=1e-5, atol=1e-5)
    value.backward()
    assert model.logit_scale.grad is not None
