"""Opens a tokenizer's file by its name. Knows the kinds of files; not which of a folder's files is the right one."""

from pathlib import Path

from workers.tokenizer_files.pieces import TokenizerModel


def open_model(path: Path) -> TokenizerModel:
    """The vocabulary in a file. Raises ConfigError for a file that it cannot use.

    tekken.json: Mistral's; another .json: Hugging Face's; .gguf: the metadata of one; anything else: SentencePiece.
    """
    # Late: each kind needs another package.
    if path.suffix == ".json":
        if path.name.startswith("tekken"):
            from workers.tokenizer_files.tekken_model import TekkenModel

            return TekkenModel(path)
        from workers.tokenizer_files.tokenizer_json import open_tokenizer_json

        return open_tokenizer_json(path)
    if path.suffix == ".gguf":
        from workers.checkpoint.gguf.gguf_file import read_gguf
        from workers.tokenizer_files.gguf_model import gguf_model

        return gguf_model(read_gguf(path).metadata, name=str(path))
    from workers.tokenizer_files.sentencepiece_model import SentencePieceModel

    return SentencePieceModel(path)
