"""Compiles the .proto files into the descriptor set that the package carries.

    python tools/protos.py          writes src/esker/esker_v1.binpb
    python tools/protos.py --check  fails if that file is not what the .proto files say

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


if __name__ == "__main__":
    if "--check" in sys.argv:
        if OUT.read_bytes() != compiled():
            raise SystemExit(f"{OUT} is not what {PROTOS} says: run tools/protos.py and commit the result")
    else:
        OUT.write_bytes(compiled())
