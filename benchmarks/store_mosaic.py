"""The part of store.py that runs where MosaicML Streaming is installed: the same rows as MDS shards."""

import json
import shutil
import statistics
import sys
import time

import numpy as np
from streaming import MDSWriter, StreamingDataset


def main() -> None:
    raw, mds, units, width, repeats = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
    shutil.rmtree(mds, ignore_errors=True)
    n_bytes = 0
    wall, cpu = time.perf_counter(), time.process_time()
    with MDSWriter(out=mds, columns={"act": f"ndarray:uint16:{width}"}, hashes=["xxh3_64"], size_limit=1 << 27) as out:
        for unit in range(units):
            rows = np.fromfile(f"{raw}/{unit}", np.uint16).reshape(-1, width)
            n_bytes += rows.nbytes
            for row in rows:
                out.write({"act": row})
    result = {"write": figures(wall, cpu, n_bytes)}
    for name, settings in (("in order", {"shuffle": False}), ("shuffled", {"shuffle": True, "shuffle_algo": "py1e"})):
        runs = []
        for _ in range(repeats):
            dataset = StreamingDataset(local=mds, batch_size=4096, **settings)
            target = np.empty((4096, width), np.uint16)
            wall, cpu = time.perf_counter(), time.process_time()
            for index, sample in enumerate(dataset):
                target[index % 4096] = sample["act"]
            runs.append(figures(wall, cpu, n_bytes))
        result[f"read, {name}, unverified"] = {
            key: round(statistics.median(run[key] for run in runs), 3) for key in ("gb_per_s", "cpu_s_per_gb")
        }
    print(json.dumps(result))


def figures(wall: float, cpu: float, n_bytes: int) -> dict[str, float]:
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"gb_per_s": round(n_bytes / 1e9 / wall, 3), "cpu_s_per_gb": round(cpu / (n_bytes / 1e9), 3)}


if __name__ == "__main__":
    main()
