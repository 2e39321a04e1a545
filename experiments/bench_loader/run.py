"""Images per second of the loader beside `torch.utils.data` with Pillow, on the same JPEG files, each at its best setting.

    python -m experiments.bench_loader.run                     the figures of the README, a few minutes
    python -m experiments.bench_loader.run --small --output /tmp/bench

Both read the files in random order, decode them, resize them to 224 x 224 (bilinear, antialiased), scale to [-1, 1] and give float32 batches.
"""
import argparse
from collections.abc import Callable
from pathlib import Path
import statistics
import tempfile
import time

import numpy as np
from PIL import Image

from experiments.results import write_results

SIZE = 224


def write_photographs(folder: Path, count: int, size: int, seed: int = 0) -> list[str]:
    """Writes `count` JPEG files of about a photograph's statistics (a 1/f spectrum, correlated colours) and returns their names."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    frequency[0, 0] = 1 / size
    names = []
    for i in range(count):
        shared, own = rng.normal(size=(size, size, 1)), rng.normal(size=(size, size, 3))
        spectrum = np.fft.fft2(shared + 0.4 * own, axes=(0, 1)) / frequency[:, :, None]
        pixels = np.fft.ifft2(spectrum, axes=(0, 1)).real
        pixels = 128 + 48 * (pixels - pixels.mean()) / pixels.std()
        name = f"{i:05d}.jpg"
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / name, quality=90)
        names.append(name)
    return names


def ours(folder: Path, names: list[str], batch_size: int, workers: int, threads: int) -> Callable[[], int]:
    """Returns a function that reads every file once and returns how many it read."""
    from vlm_jax.data.loader import Loader
    from vlm_jax.data.processor import Processor
    from vlm_jax.data.tables import TableSource
    table = folder / "table.jsonl"
    table.write_text("".join(f'{{"image": "{name}", "caption": "a photograph"}}\n' for name in names))
    source = TableSource(table)
    processor = Processor(image=[["resize", {"size": SIZE, "method": "bilinear"}], ["value_range", {"low": -1, "high": 1}]])

    def read() -> int:
        loader = Loader(source, processor, batch_size, workers=workers, threads=threads, prefetch=2, repeat=False, augment=False, on_bad="raise")
        return sum(int(batch["mask"].sum()) for batch in loader.batches())
    return read


class TorchFiles:
    """The peer's data set: Pillow and torch, as torchvision does it."""

    def __init__(self, folder: Path, names: list[str]):
        self.folder, self.names = folder, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int):
        import torch
        with Image.open(self.folder / self.names[index]) as file:
            image = file.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float().div_(127.5).sub_(1)


def torchs(folder: Path, names: list[str], batch_size: int, workers: int) -> Callable[[], int]:
    """Returns a function that reads every file once with torch.utils.data and returns how many it read."""
    import torch
    data = TorchFiles(folder, names)
    torch.set_num_threads(1)

    def read() -> int:
        loader = torch.utils.data.DataLoader(data, batch_size, shuffle=True, num_workers=workers, drop_last=True,
                                             prefetch_factor=2 if workers else None)
        return sum(len(batch) for batch in loader)
    return read


def measure(readers: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Returns images per second of every reader in every round; the readers take turns, so that the machine's moods meet all of them."""
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(rounds + 1):
        for name, read in readers.items():
            start = time.perf_counter()
            count = read()
            seconds = time.perf_counter() - start
            if number:                                              # round 0 fills the page cache and loads the libraries
                rates[name].append(count / seconds)
                print(f"round {number}: {name:32s} {count / seconds:8.1f} images/s", flush=True)
    return rates


def main(arguments: list[str] | None = None) -> None:
    """Measures and writes results.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a few files and one round: shows that it runs, not how fast")
    parser.add_argument("--output", default=str(Path(__file__).parent), help="folder of results.json; by default that of the study")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="worker processes to try, for both")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 3, 4], help="threads to try, for ours without workers")
    options = parser.parse_args(arguments)
    count, size, batch_size, rounds = (48, 96, 8, 1) if options.small else (2000, 256, 50, 5)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        print(f"writing {count} JPEG files of {size} x {size}", flush=True)
        names = write_photographs(folder, count, size)
        readers = {f"ours threads={n}": ours(folder, names, batch_size, 0, n) for n in options.threads}
        readers |= {f"ours workers={n} threads=1": ours(folder, names, batch_size, n, 1) for n in options.workers if n}
        readers |= {f"torch workers={n}": torchs(folder, names, batch_size, n) for n in options.workers}
        rates = measure(readers, rounds)
        bytes_per_file = sum((folder / name).stat().st_size for name in names) / count
    medians = {name: statistics.median(rate) for name, rate in rates.items()}
    best = {who: max((name for name in medians if name.startswith(who)), key=medians.get) for who in ("ours", "torch")}
    ratio = statistics.median(a / b for a, b in zip(rates[best["ours"]], rates[best["torch"]]))
    path = write_results(
        options.output, {"images_per_second_over_torch": ratio, "images_per_second": medians[best["ours"]],
                         "images_per_second_torch": medians[best["torch"]]},
        name="bench_loader", best=best, medians=medians, rounds=rounds, files=count, file_size=[size, size], bytes_per_file=bytes_per_file,
        batch_size=batch_size, small=options.small)
    print(f"{best['ours']}: {medians[best['ours']]:.1f}, {best['torch']}: {medians[best['torch']]:.1f} images/s, ratio {ratio:.3f}; {path}")


if __name__ == "__main__":
    main()
