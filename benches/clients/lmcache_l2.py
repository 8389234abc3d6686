"""`lmcache bench l2`, LMCache's own benchmark, over Esker and over LMCache's own fs and raw_block adapters, in one run on one disk.

    .ci/bench-clients [--mib 512] [--batch 32] [--folder DIR]

It compares every byte that it loads with what it stored. Its loads follow its stores at once and it drops no page cache: fs without
O_DIRECT would be memory, so it reads and writes directly, as raw_block does. A store of Esker's is on the drive when it is done; the
others' are where the device put them. Its keys are the same in every run: each adapter begins with nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "client" / "python" / "tests"))
from support import Node, offers  # noqa: E402

MIB = 1 << 20


def bench(spec: dict[str, Any], batch: int, rounds: int) -> dict[str, Any]:
    """GB/s of stores and loads of 1 MiB, or why it did not run."""
    command = [str(pathlib.Path(sys.executable).with_name("lmcache")), "bench", "l2", "--l2-adapter", json.dumps(spec)]
    command += ["--data-size-kb", "1024", "--num-keys", str(batch), "--rounds", str(rounds), "--l1-align-bytes", "4096"]
    command += ["--no-skip-verify", "--format", "json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    start = run.stdout.find("\n{")
    if run.returncode != 0 or start < 0:
        return {"not_run": (run.stderr or run.stdout).strip().splitlines()[-1:]}
    report = json.JSONDecoder().raw_decode(run.stdout[start + 1 :])[0]
    operations = {one["operation"]: one for one in report["metrics"].values() if isinstance(one, dict) and "operation" in one}
    for one in (operations["Store"], operations["Load"]):
        if one["total_success"] != one["total_keys"] or one["rounds_timed_out"]:
            return {"not_run": f"{one['operation']}: {one['total_success']} of {one['total_keys']} came to an end"}
    # Its megabytes are of 2^20 bytes.
    gb = {name: round(one["throughput_avg_mbps"] * MIB / 1e9, 3) for name, one in operations.items()}
    return {"store_gb_per_s": gb["Store"], "load_gb_per_s": gb["Load"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    arguments, _ = parser.parse_known_args()
    rounds = max(1, arguments.mib // arguments.batch)
    folder = arguments.folder / f"esker-l2-{os.getpid()}"
    folder.mkdir(parents=True)
    socket = str(folder / "s")
    memory = ["--local", socket] if offers("--local") else []
    node = Node(folder / "data", "--codec", "raw", "--scrub-mb-per-s", "0", *memory)

    def esker(endpoint: str) -> dict[str, Any]:
        params = {"endpoint": endpoint, "weights_revision": endpoint}
        classes = {"module_path": "esker.connectors.lmcache", "class_name": "EskerL2Adapter"}
        return {"type": "plugin", **classes, "adapter_params": params}

    def raw_block(engine: str) -> dict[str, Any]:
        image = folder / f"raw-{engine}.img"
        with image.open("wb") as file:
            # A warm-up round, and what the adapter keeps for itself.
            os.posix_fallocate(file.fileno(), 0, (rounds + 2) * arguments.batch * 2 * MIB + (300 << 20))
        return {"type": "raw_block", "device_path": str(image), "slot_bytes": MIB + 4096, "io_engine": engine}

    try:
        suites = {
            "lmcache fs (O_DIRECT)": lambda: {"type": "fs", "base_path": str(folder / "fs"), "use_odirect": True},
            "lmcache raw_block (io_uring)": lambda: raw_block("io_uring"),
            "lmcache raw_block (posix)": lambda: raw_block("posix"),
            "esker under lmcache, by gRPC": lambda: esker(node.address),
            **({"esker under lmcache, by shared memory": lambda: esker(f"unix:{socket}")} if memory else {}),
        }
        for name, spec in suites.items():
            result = {"name": f"lmcache bench l2: {name}", **bench(spec(), arguments.batch, rounds)}
            print(json.dumps({**result, "values": rounds * arguments.batch, "mib": 1, "batch": arguments.batch}), flush=True)
            for left in [*folder.glob("raw-*.img")]:
                left.unlink()
            shutil.rmtree(folder / "fs", ignore_errors=True)
    finally:
        node.kill()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
