"""Speed and memory of reading demonstrations: several shuffled passes, frames decoded, peak memory after each.

    python benchmarks/read_data.py PATH [--split train] [--passes 3] [--buffer 1000] [--decode 1] [--copies 1]

Prints one line per pass. Memory is the resident set of this process, at the end of the pass and at its largest so
far: a reader that keeps what it has read shows in both growing. `--copies N` reads the data N times a pass.
"""

import argparse
import gc
import json
import resource
import sys
import time
from pathlib import Path

from openvla.data import EpisodeStream, frames, open_dataset


def peak_mib() -> float:
    # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def resident_mib() -> float:
    """Now, as far as the system tells without help (Linux); elsewhere the peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_mib()
    return int(status.read_text().split("VmRSS:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="demonstrations: a folder or file (RLDS, LeRobot, HDF5)")
    parser.add_argument("--split", default="train", help="split to read; default: %(default)s")
    parser.add_argument("--passes", type=int, default=3, help="passes over the data; default: %(default)s")
    parser.add_argument("--copies", type=int, default=1, help="how often a pass reads the data; default: %(default)s")
    parser.add_argument("--buffer", type=int, default=1000, help="frames in the shuffle buffer; default: %(default)s")
    parser.add_argument(
        "--decode",
        type=int,
        default=1,
        help="1: decode the image of every camera; 0: leave it encoded; default: %(default)s",
    )
    parser.add_argument("--output", help="a JSON file for the figures")
    arguments = parser.parse_args()

    dataset = open_dataset(arguments.path, split=arguments.split)
    stream = EpisodeStream(dataset, shuffle=True, expand=frames, buffer_size=arguments.buffer)
    print(f"{dataset.name}: {len(dataset)} episodes; before reading {resident_mib():.0f} MiB")
    rows = []
    for number in range(1, arguments.passes + 1):
        started, count, images = time.perf_counter(), 0, 0
        for _ in range(arguments.copies):
            for frame in stream:
                count += 1
                if arguments.decode:
                    images += sum(1 for camera in frame.images.values() if camera[0].size)
        seconds = time.perf_counter() - started
        gc.collect()
        row = {"frames": count, "images": images, "seconds": seconds, "peak_mib": peak_mib(), "end_mib": resident_mib()}
        rows.append(row)
        print(
            f"pass {number}: {count} frames, {images} images, {seconds:.2f} s, {count / seconds:.0f} frames/s, "
            f"memory {row['end_mib']:.0f} MiB, peak {row['peak_mib']:.0f} MiB"
        )
    if arguments.output:
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.output).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
