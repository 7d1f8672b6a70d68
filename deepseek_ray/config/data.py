"""What a run reads: the `data:` section of a run file."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from deepseek_ray.config.base import FrozenConfig

SourceKind = Literal["stdlib", "text", "jsonl", "parquet", "source_tree"]


class DataConfig(FrozenConfig):
    """A corpus, the tokenizer for it, and how it is cut into samples."""

    source: SourceKind = "stdlib"
    """`stdlib`: the running Python's standard library source, which every machine has. `text`: text files, `jsonl`:
    one JSON object a line, `parquet`: one row a document, `source_tree`: all files of a folder with given suffixes."""
    paths: tuple[str, ...] = ()
    """Files, folders or glob patterns (`**` reaches into folders); a folder means every file of the source's kind in
    it. Readable under these names on every node that ingests. Empty for `stdlib`."""
    suffixes: tuple[str, ...] | None = None
    """Endings of the files taken from folders; None takes the usual ones of the source (`.py` for trees of code)."""
    text_field: str = Field(default="text", min_length=1)
    """Field of a JSON line, or column of a Parquet file, that holds the text."""
    document_bytes: int = Field(default=65_536, ge=1)
    """`text` only: longer files are cut at line ends into documents of about this many bytes."""
    include_tests: bool = False
    """`stdlib` only: take the standard library's own tests too (about 19 MB beside 12)."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of the documents (by hash, so the same on every machine and after the corpus grows) kept for validation."""
    tokenizer: str | None = None
    """Folder of a tokenizer to use; None trains one on the training documents."""
    vocab_size: int = Field(default=4096, ge=512, le=1_000_000)
    """Ids of the tokenizer to train, special tokens included; ignored when `tokenizer` is given."""
    tokenizer_training_bytes: int = Field(default=32 * 2**20, ge=1)
    """Most bytes of text the tokenizer is trained on; more text changes little and costs memory."""
    sequence_length: int = Field(default=256, ge=2)
    """Tokens a sample predicts; a sample holds one more."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the order of the samples; each epoch has its own order."""
    cache_dir: str = "~/.cache/deepseek_ray/data"
    """Where prepared data is kept, by content; on storage that all training nodes share when there are several."""
    verify: bool = True
    """Compare the sha256 of cached token files with the recorded one before use (about a second per GB)."""

    @model_validator(mode="after")
    def _paths_fit_the_source(self) -> Self:
        if self.source == "stdlib" and self.paths:
            raise ValueError(f"source stdlib takes no paths, but paths is {list(self.paths)}; use source_tree for them")
        if self.source != "stdlib" and not self.paths:
            raise ValueError(f"source {self.source} needs paths: files, folders or glob patterns")
        return self
