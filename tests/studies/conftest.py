"""What the tests of studies share: a small text, and a BERT with sentences made up here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

WORDS = ["a", "good", "bad", "film", "plot", "very", "dull", "fine", "scene", "end"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A study sets the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text that is read faster than the standard library."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(20):
        (folder / f"{i}.txt").write_text("".join(f"{n} and {n + 1} are {2 * n + 1}\n" for n in range(i, i + 60)))
    return folder


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as studies.fetch leaves it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("data")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder / "model")
    vocabulary = {word: i for i, word in enumerate(words)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder / "model")
    draw = torch.Generator().manual_seed(1)
    lines = []
    for number in range(120):
        count = int(torch.randint(3, 8, (), generator=draw))
        picked = [WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=draw)]
        rating = 0.0 if number % 40 == 5 else picked.count("good") - picked.count("bad") + 0.5
        lines.append(f"{number}\t{rating}\t{' '.join(picked)}")
    (folder / "reviews.tsv").write_text("\n".join(lines))
    return folder
