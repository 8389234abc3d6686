"""Compiles the .proto files into the descriptor set that the package carries.

    python tools/protos.py          writes src/esker/esker_v1.binpb
    python tools/protos.py --check  fails if that file says anything that the .proto files do not

Needs grpcio-tools. The package itself needs no compiler and no generated code: see src/esker/wire.py.
"""

import pathlib
import sys
import tempfile

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

HERE = pathlib.Path(__file__).resolve().parent
PROTOS = HERE.parent.parent.parent / "proto" / "proto"
OUT = HERE.parent / "src" / "esker" / "esker_v1.binpb"


def compiled() -> bytes:
    files = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.glob("esker/v1/*.proto"))
    with tempfile.NamedTemporaryFile(suffix=".binpb") as out:
        failed = protoc.main(["protoc", f"-I{PROTOS}", f"--descriptor_set_out={out.name}", *files])
        if failed:
            raise SystemExit(failed)
        files_set = descriptor_pb2.FileDescriptorSet.FromString(pathlib.Path(out.name).read_bytes())
    return files_set.SerializeToString(deterministic=True)


def unlike(carried: bytes, now: bytes) -> list[str]:
    """What the package carries and the .proto files say otherwise, or not at all. What they say beyond it does no harm."""

    def facts(text: bytes) -> dict[str, str]:
        known: dict[str, str] = {}
        for file in descriptor_pb2.FileDescriptorSet.FromString(text).file:
            for message in file.message_type:
                known.update(
                    (f"{message.name}.{field.name}", f"{field.number} {field.type} {field.label} {field.type_name}")
                    for field in message.field
                )
            for enum in file.enum_type:
                known.update((f"{enum.name}.{value.name}", str(value.number)) for value in enum.value)
            for service in file.service:
                known.update(
                    (f"{service.name}.{method.name}", f"{method.input_type} {method.output_type}")
                    for method in service.method
                )
        return known

    mine, theirs = facts(carried), facts(now)
    known = {name.split(".")[0] for name in theirs}
    # A message that the .proto files do not have at all belongs to a call that such a node does not offer, and says so.
    return sorted(name for name, fact in mine.items() if name.split(".")[0] in known and theirs.get(name) != fact)


if __name__ == "__main__":
    if "--check" in sys.argv:
        if wrong := unlike(OUT.read_bytes(), compiled()):
            raise SystemExit(f"{OUT} is not what {PROTOS} says of {wrong}: run tools/protos.py and commit the result")
    else:
        OUT.write_bytes(compiled())
