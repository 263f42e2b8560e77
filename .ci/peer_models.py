"""Stand-ins for the models that tests of sentence-transformers load from a hub: same classes, small, random weights.

They are written as the hub's own cache, so that a test finds them without a network. What a test expects of trained
weights fails with them, whoever's losses run; `peer_suites.py` tells such tests from those that fail with ours alone.

    python .ci/peer_models.py FOLDER TESTS
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

COMMIT = "0" * 40
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def words_of(tests: Path) -> list[str]:
    """All words in the tests: a text has those in common with another that speaks of the same."""
    found = {
        word.lower() for path in sorted(tests.rglob("*.py")) for word in re.findall(r"[A-Za-z]+|\d+", path.read_text())
    }
    return sorted(found)


def tokenizer_of(words: list[str]):  # noqa: ANN201
    """A tokenizer of whole words, and of letters where a word is not known."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(33, 127)]
    entries = dict.fromkeys([*SPECIAL, *words, *letters, *(f"##{letter}" for letter in letters)])
    vocabulary = {word: number for number, word in enumerate(entries)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    names = {f"{name[1:-1].lower()}_token": name for name in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)


def save_bert(folder: Path, tokenizer, kind: str) -> None:  # noqa: ANN001
    """Two layers of a class of transformers."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512
    )
    getattr(transformers, kind)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sentence_bert(folder: Path, words: list[str]) -> None:
    """A BERT with pooling."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    save_bert(folder / "bert", tokenizer_of(words), "BertModel")
    bert = Transformer(str(folder / "bert"))
    SentenceTransformer(modules=[bert, Pooling(bert.get_embedding_dimension())]).save_pretrained(str(folder))


def static_embedding(folder: Path, words: list[str]) -> None:
    """The mean of a vector for each word."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    embedding = StaticEmbedding(tokenizer_of(words).backend_tokenizer, embedding_dim=1024)
    SentenceTransformer(modules=[embedding]).save_pretrained(str(folder))


def splade(folder: Path, words: list[str]) -> None:
    """A BERT that predicts words."""
    save_bert(folder, tokenizer_of(words), "BertForMaskedLM")


MODELS: dict[str, Callable[[Path, list[str]], None]] = {
    "sentence-transformers-testing/stsb-bert-tiny-safetensors": sentence_bert,
    "sentence-transformers/static-retrieval-mrl-en-v1": static_embedding,
    "sparse-encoder-testing/splade-bert-tiny-nq": splade,
}


def main(home: Path, tests: Path) -> None:
    """Write the cache of a hub below a folder, which is then HF_HOME."""
    import torch

    words = words_of(tests)
    for name, make in MODELS.items():
        torch.manual_seed(0)
        repository = home / "hub" / f"models--{name.replace('/', '--')}"
        make(repository / "snapshots" / COMMIT, words)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(COMMIT)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
