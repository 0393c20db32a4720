"""The same images in every container, for tests of sources."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def make_images(count: int = 9, seed: int = 0) -> dict[str, bytes]:
    """Encoded images by name, sorted: PNG and JPEG, grey and colour, one of some 200 kB."""
    generator = np.random.default_rng(seed)
    images = {}
    for i in range(count):
        side = 256 if i == 4 else int(generator.integers(2, 30))
        pixels = generator.integers(0, 256, (side, side + 1, 3)[: 2 + (i % 3 != 0)], np.uint8)
        kind, suffix = (("PNG", "png"), ("JPEG", "jpg"))[i % 2]
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind)
        images[f"{i:04d}.{suffix}"] = buffer.getvalue()
    return images


def write_folder(folder: Path, images: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in images.items():
        (folder / name).write_bytes(data)
    return folder


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def split_up(images: dict[str, bytes], parts: int) -> list[dict[str, bytes]]:
    """In `parts` pieces, in order, of different sizes."""
    names = list(images)
    cuts = [round(len(names) * (i / parts) ** 1.5) for i in range(parts + 1)]
    return [{n: images[n] for n in names[a:b]} for a, b in zip(cuts, cuts[1:], strict=False)]


def write_tars(folder: Path, images: dict[str, bytes], parts: int = 3) -> Path:
    for i, part in enumerate(split_up(images, parts)):
        members = {}
        for name, data in part.items():
            members |= {f"{name.split('.')[0]}.cls": b"3", name: data, f"{name.split('.')[0]}.json": b"{}"}
        write_tar(folder / f"train-{i:06d}.tar", members)
    return folder


def write_array_records(
    folder: Path, records: list[bytes], parts: int = 3, name: str = "train", options: str = "group_size:1,uncompressed"
) -> Path:
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(split_up({str(i): r for i, r in enumerate(records)}, parts)):
        writer = ArrayRecordWriter(str(folder / f"{name}-{i:05d}-of-{parts:05d}.array_record"), options)
        for record in part.values():
            writer.write(record)
        writer.close()
    return folder


def write_parquet(folder: Path, images: dict[str, bytes], parts: int = 2, binary: bool = False, **options) -> Path:
    import pyarrow as pa
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(split_up(images, parts)):
        if binary:
            column = pa.array(list(part.values()), pa.binary())
        else:
            struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            column = pa.array([{"bytes": b, "path": n} for n, b in part.items()], struct)
        table = pa.table({"image": column, "label": pa.array(range(len(part)), pa.int64())})
        path = folder / f"train-{i:05d}-of-{parts:05d}.parquet"
        pyarrow.parquet.write_table(table, path, **{"row_group_size": 2, **options})
    return folder


def write_saved(folder: Path, images: dict[str, bytes], parts: int = 2) -> Path:
    """As `save_to_disk` of Hugging Face's datasets lays a split out."""
    import json

    import pyarrow as pa

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for i, part in enumerate(split_up(images, parts)):
        struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({"image": pa.array([{"bytes": b, "path": n} for n, b in part.items()], struct)})
        files.append({"filename": f"data-{i:05d}-of-{parts:05d}.arrow"})
        with pa.OSFile(str(folder / files[-1]["filename"]), "wb") as file:
            with pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))
    return folder


def prepare_tfds(folder, name, version, features, examples, file_format="array_record"):
    """A data set as tfds itself lays it out, under any name, public ones included."""
    import tensorflow_datasets as tfds

    def info(self):
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    body = {
        "name": name,
        "VERSION": tfds.core.Version(version),
        "pkg_dir_path": folder,  # where it looks for its metadata; this builder lives in no package
        "_info": info,
        "_split_generators": lambda self, manager: {s: self._generate_examples(s) for s in examples},
        "_generate_examples": lambda self, split: ((str(i), e) for i, e in enumerate(examples[split])),
    }
    builder = type("Builder", (tfds.core.GeneratorBasedBuilder,), body, skip_registration=True)
    builder(data_dir=folder, file_format=file_format).download_and_prepare()
