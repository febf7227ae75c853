"""Write the bundled model's GGUF file at another precision, so that llama.cpp can run it at this service's."""

from __future__ import annotations

from pathlib import Path

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize

FILE_TYPES = {"F32": LlamaFileType.ALL_F32, "Q8_0": LlamaFileType.MOSTLY_Q8_0}
"""The formats that `convert` writes → their numbers in the metadata."""


def convert(original: Path, converted: Path, format: str) -> None:
    """Write the model in `original` to `converted`, with all matrices in `format`, a key of `FILE_TYPES`.

    Vectors are written in F32, as llama.cpp's own conversion does. The metadata and the tokenizer stay as they are.
    """
    reader = GGUFReader(original)
    writer = GGUFWriter(converted, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, *element = field.types
        writer.add_key_value(name, field.contents(), kind, sub_type=element[0] if kind is GGUFValueType.ARRAY else None)
    writer.add_file_type(FILE_TYPES[format])
    for tensor in reader.tensors:
        type = GGMLQuantizationType[format] if len(tensor.shape) > 1 else GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, quantize(dequantize(tensor.data, tensor.tensor_type), type), raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
