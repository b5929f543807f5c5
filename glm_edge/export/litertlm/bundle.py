"""Header of a `.litertlm` bundle: reading its sections, and making it reproducible."""

import hashlib
import os
import struct
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from glm_edge import files
from glm_edge.errors import ExportError, require
from glm_edge.export.common.parsing import PARSE_ERRORS, EntryCounter

EXTRA = "litertlm"
MAX_HEADER = 1 << 20
MAX_METADATA = 1 << 24
# The builder writes the current time, which would make the bytes of equal bundles differ.
NO_TIME = {b"creation_timestamp": "1970-01-01T00:00:00.000000+00:00"}
TFLITE, METADATA = "TFLiteModel", "LlmMetadataProto"


@dataclass(frozen=True)
class Section:
    """A section of a bundle.

    Attributes:
      type: type, such as `TFLiteModel`.
      model: the runtime's name of a `.tflite` section in lower case; `""` for other sections.
      start: offset of its first byte in the file.
      size: number of bytes.
    """

    type: str
    model: str
    start: int
    size: int


def read_sections(path: str | Path) -> list[Section]:
    """Read the offsets of a bundle's sections, and check its metadata.

    Args:
      path: path of the file.

    Returns:
      The sections, in the file's order.

    Raises:
      ExportError: the file is missing, not a regular file, not a bundle, or damaged.
      MissingExtraError: LiteRT-LM's builder is not installed.
    """
    library = require("litert_lm_builder.litertlm_header_schema_py_generated", extra=EXTRA)
    protocol = require("litert_lm_builder.runtime.proto.llm_metadata_pb2", extra=EXTRA)
    message = require("google.protobuf.message", extra=EXTRA)
    with files.opened(path, ExportError) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            header = library.LiteRTLMMetaData.GetRootAs(_header(file, size), 0)
            sections = _sections(library, header.SectionMetadata(), size)
            for section in sections:
                if section.type == METADATA:
                    if section.size > MAX_METADATA:
                        raise ValueError(f"metadata of {section.size} bytes exceeds the limit")
                    file.seek(section.start)
                    protocol.LlmMetadata().ParseFromString(file.read(section.size))
        except (message.DecodeError, *PARSE_ERRORS) as error:
            raise ExportError(f"{path}: damaged LiteRT-LM bundle: {error}") from error
    return sections


def _header(file: BinaryIO, size: int) -> bytes:
    core = require("litert_lm_builder.litertlm_core", extra=EXTRA)
    begin, mark = core.HEADER_BEGIN_BYTE_OFFSET, core.HEADER_MAGIC_BYTES
    head = file.read(begin)
    if len(head) < begin or not head.startswith(mark):
        raise ValueError(f"it lacks the magic bytes {mark.decode()}")
    (end,) = struct.unpack_from("<Q", head, core.HEADER_END_LOCATION_BYTE_OFFSET)
    if not begin < end <= min(size, begin + MAX_HEADER):
        raise ValueError(f"the header ends at byte {end} of {size}")
    return file.read(end - begin)


def _sections(library: Any, metadata: Any, size: int) -> list[Section]:
    kinds = {number: name for name, number in vars(library.AnySectionDataType).items()}
    entries, sections = EntryCounter(), []
    for index in entries(metadata.ObjectsLength()):
        part = metadata.Objects(index)
        start, end = part.BeginOffset(), part.EndOffset()
        if not 0 < start <= end <= size:
            raise ValueError(
                f"section {index} spans bytes {start} to {end}, but the file has {size}"
            )
        model = ""
        for item in map(part.Items, entries(part.ItemsLength())):
            if item.Key() == b"model_type" and item.ValueType() == library.VData.StringValue:
                value = library.StringValue()
                value.Init(item.Value().Bytes, item.Value().Pos)
                model = (value.Value() or b"").decode().removeprefix("tf_lite_")
        sections.append(Section(kinds[part.DataType()], model, start, end - start))
    return sections


def make_repeatable(file: BinaryIO) -> None:
    """Write a content identifier and a fixed time into the header of a new bundle.

    Args:
      file: complete bundle from the builder, open for reading and writing.
    """
    library = require("litert_lm_builder.litertlm_header_schema_py_generated", extra=EXTRA)
    core = require("litert_lm_builder.litertlm_core", extra=EXTRA)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    packed = bytearray(_header(file, size))
    header = library.LiteRTLMMetaData.GetRootAs(packed, 0)
    first = min(section.start for section in _sections(library, header.SectionMetadata(), size))
    digest = hashlib.sha256()
    file.seek(first)
    while block := file.read(1 << 20):
        digest.update(block)
    values = {b"uuid": str(uuid.UUID(bytes=digest.digest()[:16], version=5)), **NO_TIME}
    entries = header.SystemMetadata()
    for entry in map(entries.Entries, range(entries.EntriesLength())):
        if entry.Key() in values:
            value = library.StringValue()
            value.Init(entry.Value().Bytes, entry.Value().Pos)
            text = value.Value()
            # Same length as before, so that no offset in the header changes.
            fixed = values[entry.Key()][: len(text)].ljust(len(text)).encode()
            at = packed.index(text)
            packed[at : at + len(text)] = fixed
    file.seek(core.HEADER_BEGIN_BYTE_OFFSET)
    file.write(packed)
