"""Hours, storage and network of labelling large data sets, from measured rates: the table of docs/labelling.md.

    python benchmarks/label_estimate.py --pairs-per-second 6675 --bytes-per-pair 20000 --readers 16

`--pairs-per-second` is that of one GPU alone (benchmarks/encoder_rate.py), `--bytes-per-pair` the size of a labelled step in
Parquet (benchmarks/label_rate.py), `--readers` the processes that decode for each GPU; what one of them prepares
(benchmarks/label_reader.py) and everything else is what the data sets are, below; say otherwise by options.
"""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class DataSet:
    """
    Size of a data set.

    Args:
        name: For the table.
        episodes: Clips or episodes.
        seconds: Mean length of one.
        rate: Frames per second.
        gap_seconds: Between the frames of a pair.
        gigabytes: As it is distributed, which labelling reads once.
        reader_rate: Pairs per second that one reader process prepares.
    """

    name: str
    episodes: int
    seconds: float
    rate: float
    gap_seconds: float
    gigabytes: float
    reader_rate: float

    @property
    def pairs(self) -> float:
        """Every frame that has another one a gap later begins a pair."""
        return self.episodes * max(self.seconds - self.gap_seconds, 0) * self.rate


# Something-Something v2: 220,847 clips of 4.03 s on average at 12 frames per second, 19.4 GB (its web page). Open X-Embodiment:
# the 970,000 episodes that OpenVLA trains on; means over its mixture are rough: about 9 s at 7 control steps per second, and
# about 4.5 TB for all of the collection's images at the cameras that are read. Rates of readers: one core of a 2-core server.
SSV2 = DataSet("Something-Something v2", 220_847, 4.03, 12, 2.4, 19.4, 368)
OPEN_X = DataSet("Open X-Embodiment", 970_000, 9.0, 7, 0.6, 4500, 2313)


def row(data: DataSet, gpus: int, readers: int, pairs_per_second: float, bytes_per_pair: float) -> list[str]:
    """One line of the table."""
    fed = readers * data.reader_rate
    seconds = data.pairs / (gpus * min(pairs_per_second, fed))
    read = data.gigabytes * 8 / seconds
    written = data.pairs * bytes_per_pair / 1e9
    return [
        data.name,
        str(gpus),
        f"{data.pairs / 1e6:.1f} M",
        f"{seconds / 3600:.3f}",
        "GPU" if pairs_per_second <= fed else "readers",
        f"{written:,.0f} GB",
        f"{read:.2f} Gbit/s",
        f"{written * 8 / seconds:.2f} Gbit/s",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs-per-second", type=float, required=True, help="of one GPU")
    parser.add_argument("--bytes-per-pair", type=float, required=True, help="of Parquet")
    parser.add_argument("--readers", type=int, default=16, help="reader processes for each GPU")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    for name, data in (("ssv2", SSV2), ("open-x", OPEN_X)):
        parser.add_argument(f"--{name}-seconds", type=float, default=data.seconds, help="mean length of a clip")
        parser.add_argument(f"--{name}-rate", type=float, default=data.rate, help="frames per second")
        parser.add_argument(f"--{name}-gap-seconds", type=float, default=data.gap_seconds)
        parser.add_argument(f"--{name}-gigabytes", type=float, default=data.gigabytes)
        parser.add_argument(f"--{name}-reader-rate", type=float, default=data.reader_rate, help="pairs/s of a reader")
    args = vars(parser.parse_args())
    print(
        "| data | GPUs | pairs | hours | bound by | Parquet | reading | writing |\n|---|---|---|---|---|---|---|---|"
    )
    for name, data in (("ssv2", SSV2), ("open_x", OPEN_X)):
        values = {key: args[f"{name}_{key}"] for key in ("seconds", "rate", "gap_seconds", "gigabytes", "reader_rate")}
        for gpus in args["gpus"]:
            sized = DataSet(data.name, data.episodes, **values)
            cells = row(sized, gpus, args["readers"], args["pairs_per_second"], args["bytes_per_pair"])
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
