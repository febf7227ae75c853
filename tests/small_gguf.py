"""The bundled model's GGUF file, cut down so that a test converts it in seconds instead of half a minute."""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFReader, GGUFValueType, GGUFWriter

VOCABULARY = 1000


def write_small_gguf(original: Path, small: Path) -> None:
    """Write the first layer and the first 1000 tokens of `original` to `small`, with all its other metadata."""
    reader = GGUFReader(original)
    tokens, merges = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
    # each merge makes one token, in order, after the single bytes and the special tokens
    unmerged = len(reader.fields[tokens].data) - len(reader.fields[merges].data)
    lengths = {tokens: VOCABULARY, "tokenizer.ggml.token_type": VOCABULARY, merges: VOCABULARY - unmerged}
    numbers = {"llama.block_count": 1, "llama.vocab_size": VOCABULARY}

    writer = GGUFWriter(small, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind, *element = field.types
        if kind is GGUFValueType.ARRAY:
            values = field.contents(slice(lengths.get(name)))
            writer.add_key_value(name, values, kind, sub_type=element[0])
        else:
            writer.add_key_value(name, numbers.get(name, field.contents()), kind)
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.") and not tensor.name.startswith("blk.0."):
            continue
        rows = VOCABULARY if tensor.name == "token_embd.weight" else None
        writer.add_tensor(tensor.name, tensor.data[:rows], raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
