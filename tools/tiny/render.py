"""Pictures of the tiny world with captions, as a folder or as tar shards: something to try `imagerl sft` on."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from imagerl.rl.data.seeding import derive_seed
from imagerl.rl.data.tiny.world import FONTS, HEIGHT, WIDTH, Scene, random_scene, render, texts
from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.writing import atomic_folder


def rendered(
    count: int, split: str, seed: int, fonts: Sequence[str] = FONTS
) -> Iterator[tuple[str, bytes, str]]:
    """Draw (key, PNG, caption) of `count` scenes of a split, texts in its fixed order and repeated when they run
    out."""
    pool = texts(split)
    rngs = (random.Random(derive_seed("rendered folder", split, seed, number)) for number in range(count))
    return written(random_scene(rng, pool[number % len(pool)], fonts) for number, rng in enumerate(rngs))


def written(
    batch: Iterable[Scene], size: tuple[int, int] = (WIDTH, HEIGHT)
) -> Iterator[tuple[str, bytes, str]]:
    """Yield (key, PNG, caption) of scenes, drawn at a width and height."""
    for number, scene in enumerate(batch):
        buffer = io.BytesIO()
        render(scene, size).save(buffer, format="PNG")
        yield f"{number:06d}", buffer.getvalue(), scene.caption


def write_folder(target: Path, samples: Iterator[tuple[str, bytes, str]]) -> None:
    """Write `key.png` and `key.txt` of each sample. `target` must be new."""
    with atomic_folder(target) as folder:
        for key, png, caption in samples:
            (folder / f"{key}.png").write_bytes(png)
            (folder / f"{key}.txt").write_text(caption + "\n", encoding="utf-8")


def write_shards(target: Path, samples: Iterator[tuple[str, bytes, str]], size: int) -> None:
    """Write tar files `000000.tar`, ... of `size` samples each. `target` must be new."""
    with atomic_folder(target) as folder:
        archive: tarfile.TarFile | None = None
        for number, (key, png, caption) in enumerate(samples):
            if number % size == 0:
                if archive is not None:
                    archive.close()
                archive = tarfile.open(folder / f"{number // size:06d}.tar", "w")  # noqa: SIM115
            assert archive is not None
            for name, data in ((f"{key}.png", png), (f"{key}.txt", caption.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        if archive is not None:
            archive.close()


def write(out: Path, count: int, split: str, seed: int, fonts: Sequence[str] | None, shard: int) -> None:
    """Write `count` pictures into a new folder, as shards of `shard` samples, or as loose files for 0.

    Raises ImageRLError when that cannot be done."""
    samples = rendered(count, split, seed, fonts or FONTS)
    try:
        if shard:
            write_shards(out, samples, shard)
        else:
            write_folder(out, samples)
    except OSError as error:  # no such font
        raise ImageRLError(f"cannot render {out}: {error}") from None
